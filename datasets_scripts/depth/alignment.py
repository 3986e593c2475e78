"""Temporally consistent relative depth + metric depth of a few frames -> metric depth of a whole clip.

A video model (Video-Depth-Anything) gives inverse depth q that is consistent in time and known up to one
scale and one shift; an image model (Depth-Anything-V2 metric) gives meters m that flicker. One pair (a, b)
aligns them over the whole clip: a pair per frame would bring the flicker back. The fit is in inverse depth,
where the video model is ambiguous and the near field, where manipulation happens, has most weight
(3D Foresight uses both models; the alignment is ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from datasets_scripts.storage.even_spread import spread_evenly

MIN_DEPTH_M, MAX_DEPTH_M = 0.05, 100.0  # the farthest that `--depth-max` may keep; by default it is 10
FIT_RANGE_M = (0.1, 10.0)  # metric values beyond it are not trusted
FIT_SAMPLES = 200_000
FIT_ROUNDS = 5
KEPT_FRACTION = 0.9
MAX_ERROR = 0.25  # median relative error above which a clip's alignment has failed
MAX_KEY_FRAMES = 32
SMOOTHING_FRAMES = 15  # over which the medians of a clip without alignment are smoothed


@dataclass(frozen=True)
class Alignment:
    """What relates the two depths of a clip: `1 / depth = scale * q + shift`.

    Attributes:
        scale (`float`): a, 1/m per unit of q; positive, or the fit failed.
        shift (`float`): b, 1/m.
        error (`float`): Median of |D - m| / m over the valid pixels of the key frames; `inf` without any.
    """

    scale: float
    shift: float
    error: float

    @property
    def is_good(self) -> bool:
        """Whether the clip may use it."""
        return self.scale > 0 and self.error <= MAX_ERROR


def choose_key_frames(n_frames: int) -> np.ndarray:
    """At most 32 evenly spaced frames for metric depth, including the first and the last: `(k,)` int64."""
    return np.array(spread_evenly(n_frames, MAX_KEY_FRAMES), np.int64)


def fit_alignment(relative: np.ndarray, metric_m: np.ndarray, generator: np.random.Generator) -> Alignment:
    """Fit scale and shift robustly: least squares, then rounds that keep the 90 % smallest residuals.

    Args:
        relative (`np.ndarray`): `(k, H, W)` inverse depth q of the key frames, any unit; valid above 0.
        metric_m (`np.ndarray`): `(k, H, W)` meters of the same pixels, 0 where invalid.
        generator (`np.random.Generator`): Draws the pixels of the fit.

    Raises:
        ValueError: If the shapes differ.
    """
    if relative.shape != metric_m.shape:
        raise ValueError(f"relative depth has shape {relative.shape}, metric depth {metric_m.shape}")
    low, high = FIT_RANGE_M
    valid = np.flatnonzero((relative > 0) & (metric_m > low) & (metric_m < high))
    if len(valid) < 2:
        return Alignment(0.0, 0.0, np.inf)
    drawn = valid
    if len(valid) > FIT_SAMPLES:
        drawn = generator.choice(valid, FIT_SAMPLES, replace=False)
    q = relative.reshape(-1)[drawn].astype(np.float64)
    y = 1 / metric_m.reshape(-1)[drawn].astype(np.float64)
    scale, shift = _fit_line(q, y)
    for _ in range(FIT_ROUNDS):
        residual = np.abs(scale * q + shift - y)
        kept = residual <= np.quantile(residual, KEPT_FRACTION)
        scale, shift = _fit_line(q[kept], y[kept])
    m = metric_m.reshape(-1)[valid]
    depth_m = invert_depth(relative.reshape(-1)[valid], scale, shift)
    return Alignment(scale, shift, float(np.median(np.abs(depth_m - m) / m)))


def invert_depth(relative: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """Meters from inverse depth: `1 / clip(scale q + shift)` in [0.05, 100] m, float32, same shape."""
    inverse = np.clip(scale * relative + shift, 1 / MAX_DEPTH_M, 1 / MIN_DEPTH_M)
    return (1 / inverse).astype(np.float32)


def steady_ratio(metric_m: Iterable[np.ndarray]) -> np.ndarray:
    """Factor per frame that brings its median depth to the median of the frames around it.

    Args:
        metric_m (`Iterable[np.ndarray]`): F frames `(H, W)` of meters, 0 where invalid; read one by one.

    Returns:
        `np.ndarray`: `(F,)` float64; 1 for frames without valid depth.
    """
    medians = np.array([np.median(frame[frame > 0]) if (frame > 0).any() else np.nan for frame in metric_m])
    half = SMOOTHING_FRAMES // 2
    padded = np.pad(medians, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    known = ~np.isnan(medians)
    ratio = np.ones(len(medians))
    ratio[known] = np.nanmedian(windows[known], axis=1) / medians[known]
    return ratio


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares of `y = a x + b`; `a` is 0 where x does not vary."""
    x_mean, y_mean = x.mean(), y.mean()
    spread = ((x - x_mean) ** 2).sum()
    a = float(((x - x_mean) * (y - y_mean)).sum() / spread) if spread > 0 else 0.0
    return a, float(y_mean - a * x_mean)
