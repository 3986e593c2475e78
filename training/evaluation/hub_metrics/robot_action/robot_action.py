"""Errors of predicted robot actions, as an `evaluate` metric."""

import inspect

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "Mean absolute error of robot actions per dimension, and accuracy of binary ones such as a gripper."
)
_KWARGS_DESCRIPTION = """
Over all M actions whose truth is known:

- `l1`: mean |p - t| of each regressed dimension, in the actions' own units, a list in the dimensions' order
- `l1_mean`: the mean of `l1`
- `binary_accuracy`, with `binary_indices`: share of actions whose sides of `threshold` agree, a list, one
  entry per binary dimension; `binary_accuracy_mean` their mean
- `actions`: M

Args:
    predictions: actions `(A,)`, float; each step of a chunk counts as one action.
    references: true actions `(A,)`. An action with a NaN in it is padding and not compared.
    binary_indices (`list[int]`): Dimensions that are one of two values; none by default.
    threshold (`float` or `list[float]`): Between those two values, of all or of each; 0.5 by default (0 for a
        gripper of -1 and 1).

Raises:
    ValueError: If shapes differ, an index does not exist, no action is known, or a prediction
        for a known one is not finite.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("training/evaluation/hub_metrics/robot_action")
    >>> metric.compute(predictions=[[0.0, 1.0], [0.5, 0.2]], references=[[0.25, 1.0], [0.0, 1.0]],
    ...                binary_indices=[1])
    {'actions': 2, 'l1': [0.375], 'l1_mean': 0.375, 'binary_accuracy': [0.5], 'binary_accuracy_mean': 0.5}
"""
_OPTIONS = ("binary_indices", "threshold")


def action_errors(predictions, references, binary_indices=(), threshold=0.5) -> dict:
    """The figures from plain arrays; see `inputs_description`."""
    if not len(references):
        raise ValueError("no action was given: nothing to compare")
    p, t = (np.asarray(actions, dtype=np.float64) for actions in (predictions, references))  # (M, A)
    if p.shape != t.shape or p.ndim != 2 or not p.size:
        raise ValueError(
            f"predictions have shape {p.shape} and references {t.shape}; both must be (actions, dimensions)"
        )
    size = p.shape[1]
    binary = [int(i) for i in binary_indices]
    if wrong := [i for i in binary if not 0 <= i < size]:
        raise ValueError(f"binary_indices has {wrong}, but actions have {size} dimensions")
    if np.size(threshold) not in (1, len(binary)):
        raise ValueError(
            f"threshold has {np.size(threshold)} values for {len(binary)} binary_indices: give one for all, "
            "or one for each"
        )
    known = np.isfinite(t).all(1)
    if not known.any():
        raise ValueError("no action is known: nothing to compare")
    p, t = p[known], t[known]
    if not np.isfinite(p).all():
        raise ValueError("predictions are not finite where the truth is known")
    result = {"actions": len(p)}
    regressed = [i for i in range(size) if i not in binary]
    if regressed:
        l1 = np.abs(p - t)[:, regressed].mean(0)
        result |= {"l1": l1.tolist(), "l1_mean": float(l1.mean())}
    if binary:
        agree = ((p[:, binary] > threshold) == (t[:, binary] > threshold)).mean(0)
        result |= {"binary_accuracy": agree.tolist(), "binary_accuracy_mean": float(agree.mean())}
    return result


class RobotAction(evaluate.Metric):
    """See `inputs_description`."""

    def __init__(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        if unknown := kwargs.keys() - inspect.signature(evaluate.Metric).parameters.keys():
            # The base class would ignore it, and the figures would be of the default.
            raise TypeError(f"robot_action has no option {', '.join(sorted(unknown))}: {', '.join(_OPTIONS)}")
        super().__init__(*args, **kwargs)

    def _info(self):
        prefix = "" if self.config_name == "default" else f"{self.config_name}_"
        action = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({f"{prefix}predictions": action, f"{prefix}references": action}),
        )

    def _compute(self, **given):
        inputs = [given.pop(name) for name in self.features]
        return action_errors(*inputs, **(self.options | given))
