"""Errors of depth and tracks against the truth, gathered clip by clip.

| figure | is |
|---|---|
| `abs_rel` | mean of abs(d - t) / t over pixels that have both |
| `rmse_m` | root of the mean of (d - t)^2, meters |
| `delta_125` | share of those pixels with max(d / t, t / d) < 1.25 |
| `covered` | share of the pixels with truth that have depth |
| `flicker` | mean change of d / t from frame to frame at a pixel; 0 for any steady error |
| `epe_px` | distance in the image at 224 px of points that are visible and seen as visible; all frames |
| `epe_px_last` | the same in the last frame, which is the hardest |
| `epe_cm` | distance in space of the same points as `epe_px` |
| `visibility_accuracy` | share of points whose visibility is right |
| `found` | share of the visible points that are seen as visible |
"""

from typing import Any

import numpy as np

from datasets_scripts.columns import REFERENCE_PX
from datasets_scripts.inspection.drawing import locate_points

__all__ = ["DepthErrors", "TrackErrors"]

DELTA = 1.25


class DepthErrors:
    """Errors of depth against exact depth, over any number of clips."""

    def __init__(self):
        self._n = self._n_true = self._n_close = self._n_steps = 0
        self._relative = self._squared = self._change = 0.0
        self._ratio: np.ndarray | None = None  # of the clip's last frame, nan where unknown

    def start_clip(self) -> None:
        """Starts a new clip: its first frame is not compared with the one before."""
        self._ratio = None

    def add(self, depth_m: np.ndarray, true_m: np.ndarray) -> None:
        """Add successive frames of a clip.

        Args:
            depth_m (`np.ndarray`): `(k, H, W)` meters, 0 where invalid.
            true_m (`np.ndarray`): `(k, H, W)` exact meters, 0 where unknown.
        """
        for depth, true in zip(depth_m.astype(np.float64), true_m.astype(np.float64), strict=True):
            both = (depth > 0) & (true > 0)
            d, t = depth[both], true[both]
            ratio = np.full(true.shape, np.nan)
            ratio[both] = d / t
            self._n += d.size
            self._n_true += int(np.count_nonzero(true > 0))
            self._relative += float((np.abs(d - t) / t).sum())
            self._squared += float(((d - t) ** 2).sum())
            self._n_close += int(np.count_nonzero(np.maximum(d / t, t / d) < DELTA))
            if self._ratio is not None:
                change = np.abs(ratio - self._ratio)
                self._change += float(np.nansum(change))
                self._n_steps += int(np.count_nonzero(~np.isnan(change)))
            self._ratio = ratio

    def report(self) -> dict[str, float | None]:
        """The figures of depth that the top of this file lists; `None` without any pixel to compare."""
        n = self._n
        return {
            "abs_rel": _round_ratio(self._relative, n),
            "rmse_m": _round_ratio((self._squared * n) ** 0.5, n),  # sqrt(squared / n)
            "delta_125": _round_ratio(self._n_close, n),
            "covered": _round_ratio(n, self._n_true),
            "flicker": _round_ratio(self._change, self._n_steps),
        }


class TrackErrors:
    """Errors of tracks against exact tracks, moving and still points apart, over any number of clips.

    Args:
        height (`int`): Rows of the image.
        width (`int`): Columns of the image.
        intrinsics (`dict`, *optional*): fx, fy, cx, cy in pixels counted from the image's outer edge; without
            them there is no distance in space.
    """

    def __init__(self, height: int, width: int, intrinsics: dict[str, float] | None = None):
        self._size_px = REFERENCE_PX / min(height, width) * np.array([width, height])
        self._intrinsics = intrinsics and {**intrinsics, "width": width, "height": height}
        # Rows: distance in px and cm, seen as visible, truly visible, of a last frame; (5, positions).
        self._parts = {"moving": [np.zeros((5, 0))], "still": [np.zeros((5, 0))]}

    def add(
        self,
        points: np.ndarray,
        visible: np.ndarray,
        true_points: np.ndarray,
        true_visible: np.ndarray,
        moving: np.ndarray,
    ) -> None:
        """Add successive frames of some tracks, without those in which the truth was given.

        Args:
            points (`np.ndarray`): `(F, n, 3)` x, y as image fractions, z in meters.
            visible (`np.ndarray`): `(F, n)` bool.
            true_points (`np.ndarray`): `(F, n, 3)`, exact.
            true_visible (`np.ndarray`): `(F, n)` bool, exact.
            moving (`np.ndarray`): `(n,)` bool, which points move.
        """
        epe_px = np.linalg.norm((points - true_points)[..., :2] * self._size_px, axis=-1)
        epe_cm, last = np.full(visible.shape, np.nan), np.zeros(visible.shape)
        if self._intrinsics is not None:
            found, true = (locate_points(each, self._intrinsics) for each in (points, true_points))
            epe_cm = 100 * np.linalg.norm(found - true, axis=-1)
        last[-1] = 1
        part = np.stack([epe_px, epe_cm, visible, true_visible, last]).astype(np.float32)  # (5, F, n)
        for name, columns in (("moving", moving), ("still", ~moving)):
            self._parts[name].append(part[..., columns].reshape(5, -1))

    def report(self) -> dict[str, dict[str, Any]]:
        """The figures of tracks that the top of this file lists, for moving and still points.

        Distances have `median`, `mean` and `p90`; a figure is `None` without any point to compare.
        """
        result = {}
        for name, parts in self._parts.items():
            px, cm, seen, true, last = np.concatenate(parts, axis=1)
            both = (seen > 0) & (true > 0)
            result[name] = {
                "positions": int(true.sum()),
                "epe_px": _summarize_errors(px[both]),
                "epe_px_last": _summarize_errors(px[both & (last > 0)]),
                "epe_cm": _summarize_errors(cm[both]) if self._intrinsics is not None else None,
                "visibility_accuracy": _round_ratio((seen == true).sum(), len(seen)),
                "found": _round_ratio(both.sum(), true.sum()),
            }
        return result


def _summarize_errors(errors: np.ndarray) -> dict[str, float] | None:
    if not len(errors):
        return None
    numbers = {"median": np.median(errors), "mean": errors.mean(), "p90": np.percentile(errors, 90)}
    return {name: _round_ratio(value, 1) for name, value in numbers.items()}


def _round_ratio(value: float, n: float) -> float | None:
    """`value / n` with four significant digits; `None` for nothing."""
    return float(f"{value / n:.4g}") if n else None
