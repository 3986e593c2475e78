"""Errors of predicted future frames, RGB or RGB-D, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Errors of predicted future frames: RGB in [0, 1], and metric depth where it is known."
_KWARGS_DESCRIPTION = """
An example is one frame. Over all known values of all frames together:

- `rgb_mae`: mean |p - t| of the three channels, range [0, 1]
- `rgb_mse`: mean (p - t)^2
- `psnr_db`: -10 log10(`rgb_mse`); absent for equal pictures, where it is infinite
- `depth_abs_rel`: mean |p - t| / t, and `depth_rmse_m`: sqrt(mean (p - t)^2), meters; with depth only, over
  pixels where both are finite and positive
- `depth_covered`: their share of the pixels with true depth; below 1 if predictions are missing
- `frames`

Args:
    predictions: frames `(H, W, 3)`: red, green, blue in [0, 1], or `(H, W, 4)` with depth in meters; float.
    references: true frames of the same shapes. A pixel with a NaN in its colors is not compared; 0 or NaN is
        an unknown depth.

Raises:
    ValueError: If shapes differ, colors of the truth leave [0, 1] (bytes need a division by 255),
        predicted ones are not finite, or nothing can be compared.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("training/evaluation/hub_metrics/future_rgbd")
    >>> figures = metric.compute(predictions=[[[[0.5, 0.5, 0.5, 1.0]]]],
    ...                          references=[[[[0.5, 0.5, 0.2, 2.0]]]])
    >>> round(figures["rgb_mae"], 4), round(figures["psnr_db"], 2), figures["depth_abs_rel"]
    (0.1, 15.23, 0.5)
"""


def frame_errors(predictions, references) -> dict:
    """The figures from plain arrays; see `inputs_description`."""
    n = n_depth = n_true = frames = 0
    absolute = squared = relative = squared_m = 0.0
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        p, t = _to_array(prediction), _to_array(reference)
        if p.shape != t.shape or p.shape[-1] not in (3, 4):
            raise ValueError(
                f"frame {i}: the prediction has shape {p.shape}, its truth {t.shape}; both must be "
                "(H, W, 3) or (H, W, 4)"
            )
        known = np.isfinite(t[..., :3]).all(-1)
        colors, truth = p[known][:, :3], t[known][:, :3]
        if truth.size and (truth.min() < -1e-3 or truth.max() > 1.001):
            raise ValueError(f"frame {i}: colors of the truth leave [0, 1]; divide bytes by 255")
        if not np.isfinite(colors).all():
            raise ValueError(f"frame {i}: predicted colors are not finite where the truth is known")
        frames, n = frames + 1, n + truth.size
        absolute += float(np.abs(colors - truth).sum())
        squared += float(((colors - truth) ** 2).sum())
        if p.shape[-1] == 4:
            d, m = p[..., 3], t[..., 3]
            measured = np.isfinite(m) & (m > 0)
            both = measured & np.isfinite(d) & (d > 0)
            d, m = d[both], m[both]
            n_depth, n_true = n_depth + d.size, n_true + int(measured.sum())
            relative += float((np.abs(d - m) / m).sum())
            squared_m += float(((d - m) ** 2).sum())
    if not n:
        raise ValueError("no pixel has a known color: nothing to compare")
    mse = squared / n
    result = {"rgb_mae": absolute / n, "rgb_mse": mse, "frames": frames}
    if mse:
        result["psnr_db"] = float(-10 * np.log10(mse))
    if n_true:
        result["depth_covered"] = n_depth / n_true
    if n_depth:
        result |= {"depth_abs_rel": relative / n_depth, "depth_rmse_m": (squared_m / n_depth) ** 0.5}
    return result


class FutureRGBD(evaluate.Metric):
    """See `inputs_description`."""

    def _info(self):
        prefix = "" if self.config_name == "default" else f"{self.config_name}_"
        frame = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({f"{prefix}predictions": frame, f"{prefix}references": frame}),
        )

    def _compute(self, **given):
        inputs = [given.pop(name) for name in self.features]
        return frame_errors(*inputs, **given)


def _to_array(frame) -> np.ndarray:
    try:
        return np.asarray(frame, dtype=np.float64)
    except ValueError:
        raise ValueError("rows or pixels of one frame differ in length") from None
