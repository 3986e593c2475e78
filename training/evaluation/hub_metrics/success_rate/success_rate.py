"""Success rate of episodes with Wilson's interval, as an `evaluate` metric."""

import inspect
import math
from statistics import NormalDist

import datasets
import evaluate

_DESCRIPTION = "Share of episodes that succeeded, with Wilson's score interval."
_KWARGS_DESCRIPTION = """
With s successes in n episodes, p = s / n and z the normal quantile of the confidence (1.96 for 95 %):

- `success_rate`: p
- `interval`: [c - h, c + h] with c = (p + z^2 / 2n) / (1 + z^2 / n) and
  h = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2); it stays sensible at 0 and at 1
- `successes`: s, `episodes`: n

Args:
    predictions: outcomes, one per episode: True, 1 or more (tasks solved in a row) if it succeeded, else 0.
    confidence (`float`): 0.95 by default.

Raises:
    ValueError: If there is no episode, an outcome is not a whole number from 0, or the confidence is not
        between 0 and 1.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("training/evaluation/hub_metrics/success_rate")
    >>> figures = metric.compute(predictions=[1] * 19 + [0])
    >>> figures["success_rate"], [round(bound, 4) for bound in figures["interval"]]
    (0.95, [0.7639, 0.9911])
"""
_CITATION = (
    "Wilson: Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (158), 1927"
)
_OPTIONS = ("confidence",)


def success_rate(predictions, confidence=0.95) -> dict:
    """The figures from plain numbers; see `inputs_description`."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95")
    n = len(predictions)
    if not n:
        raise ValueError("no episode: a success rate needs at least one")
    if wrong := [outcome for outcome in predictions if not (outcome >= 0 and outcome % 1 == 0)]:
        raise ValueError(f"outcomes are whole numbers, 0 for a failure, not {wrong[:3]}")
    successes = sum(outcome > 0 for outcome in predictions)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, spread = successes / n, z * z / n
    center = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return {
        "success_rate": rate,
        "interval": [max(0.0, center - half), min(1.0, center + half)],
        "successes": successes,
        "episodes": n,
    }


class SuccessRate(evaluate.Metric):
    """See `inputs_description`."""

    def __init__(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        if unknown := kwargs.keys() - inspect.signature(evaluate.Metric).parameters.keys():
            # The base class would ignore it, and the figures would be of the default.
            raise TypeError(f"success_rate has no option {', '.join(sorted(unknown))}: {', '.join(_OPTIONS)}")
        super().__init__(*args, **kwargs)

    def _info(self):
        prefix = "" if self.config_name == "default" else f"{self.config_name}_"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # As integers, a rate of 0.9 would be stored as a failure.
            features=datasets.Features({f"{prefix}predictions": datasets.Value("float32")}),
        )

    def _compute(self, **given):
        inputs = [given.pop(name) for name in self.features]
        return success_rate(*inputs, **(self.options | given))
