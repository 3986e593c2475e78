"""Errors of metric depth maps where the truth is known, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Errors of metric depth over the pixels where the true depth is known."
_KWARGS_DESCRIPTION = """
With prediction d and truth t over all N pixels, of all maps together, where both are finite and positive:

- `abs_rel`: 1/N sum |d - t| / t
- `rmse_m`: sqrt(1/N sum (d - t)^2), meters
- `delta_1`, `delta_2`, `delta_3`: share of pixels with max(d / t, t / d) < 1.25, 1.25^2, 1.25^3
- `covered`: N divided by the number of pixels with truth; below 1 if predictions are missing
- `pixels`: N

Args:
    predictions: depth maps `(H, W)`, float, meters along the optical axis; 0 or NaN where there is none.
    references: true depth of the same shapes and unit; 0 or NaN where it is unknown.

Raises:
    ValueError: If a map and its truth differ in shape, or no pixel can be compared.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("training/evaluation/hub_metrics/masked_depth")
    >>> figures = metric.compute(predictions=[[[1.5, 2.0], [3.0, 0.0]]],
    ...                          references=[[[1.0, 2.0], [4.0, 5.0]]])
    >>> figures["abs_rel"], figures["delta_1"] == 1 / 3, figures["covered"]  # errors of 1/2, 0 and 1/4
    (0.25, True, 0.75)
"""
_CITATION = (
    "Eigen, Puhrsch, Fergus: Depth Map Prediction from a Single Image using a Multi-Scale Deep Network, 2014"
)


def depth_errors(predictions, references) -> dict:
    """The figures from plain arrays; see `inputs_description`."""
    n = n_true = 0
    relative = squared = 0.0
    close = np.zeros(3)
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        d, t = _to_array(prediction), _to_array(reference)
        if d.shape != t.shape:
            raise ValueError(f"map {i}: the prediction has shape {d.shape}, its truth {t.shape}")
        known = np.isfinite(t) & (t > 0)
        both = known & np.isfinite(d) & (d > 0)
        d, t = d[both], t[both]
        ratio = np.maximum(d / t, t / d)
        n, n_true = n + d.size, n_true + int(known.sum())
        relative += float((np.abs(d - t) / t).sum())
        squared += float(((d - t) ** 2).sum())
        close += [(ratio < 1.25**k).sum() for k in (1, 2, 3)]
    if not n:
        raise ValueError(
            "no pixel has both a predicted and a true depth: nothing to compare (meters, 0 or NaN where "
            "unknown)"
        )
    return {
        "abs_rel": relative / n,
        "rmse_m": (squared / n) ** 0.5,
        **{f"delta_{k}": float(close[k - 1] / n) for k in (1, 2, 3)},
        "covered": n / n_true,
        "pixels": n,
    }


class MaskedDepth(evaluate.Metric):
    """See `inputs_description`."""

    def _info(self):
        prefix = "" if self.config_name == "default" else f"{self.config_name}_"
        image = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({f"{prefix}predictions": image, f"{prefix}references": image}),
        )

    def _compute(self, **given):
        inputs = [given.pop(name) for name in self.features]
        return depth_errors(*inputs, **given)


def _to_array(depth) -> np.ndarray:
    try:
        return np.asarray(depth, dtype=np.float64)
    except ValueError:
        raise ValueError("rows of one map differ in length") from None
