"""How many instructions of a chain succeed in a row, as an `evaluate` metric (CALVIN's protocol)."""

import inspect

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "Success of 1, 2, ... instructions in a row, and the average length of a chain (CALVIN's Avg. Len.)."
)
_KWARGS_DESCRIPTION = """
A chain of instructions ends at its first failure. Over all n chains:

- `1_in_a_row` ... `5_in_a_row`: share of chains with at least so many successes from the beginning
- `avg_len`: mean number of successes from the beginning, the sum of those shares
- `1_in_a_row_se` ..., `avg_len_se`: their standard errors, sample deviation / sqrt(n); absent for one chain
- `chains`: n

Args:
    predictions: number of successes from the beginning of each chain, 0 to `chain_length`.
    chain_length (`int`): 5 by default, as in CALVIN.

Raises:
    ValueError: If there is no chain, or a number lies outside of 0 to `chain_length`.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("training/evaluation/hub_metrics/task_chain")
    >>> figures = metric.compute(predictions=[5, 2, 0, 1])
    >>> figures["1_in_a_row"], figures["2_in_a_row"], figures["avg_len"]
    (0.75, 0.5, 2.0)
"""
_CITATION = (
    "Mees, Hermann, Rosete-Beas, Burgard: CALVIN: A Benchmark for Language-Conditioned Policy Learning for "
    "Long-Horizon Robot Manipulation Tasks, RA-L 2022"
)
_OPTIONS = ("chain_length",)


def chain_lengths(predictions, chain_length=5) -> dict:
    """The figures from plain numbers; see `inputs_description`."""
    lengths = np.asarray(predictions, dtype=np.float64)
    if not lengths.size:
        raise ValueError("no chain: give the number of successes of at least one")
    if len(wrong := np.unique(lengths[~np.isin(lengths, range(chain_length + 1))])):
        raise ValueError(
            f"chains of {wrong[:3].tolist()} successes, but a chain has {chain_length} instructions, so "
            f"0 to {chain_length} successes"
        )
    result = {f"{k}_in_a_row": float((lengths >= k).mean()) for k in range(1, chain_length + 1)}
    result |= {"avg_len": float(lengths.mean()), "chains": int(lengths.size)}
    if lengths.size > 1:
        measured = {f"{k}_in_a_row": lengths >= k for k in range(1, chain_length + 1)} | {"avg_len": lengths}
        result |= {f"{name}_se": float(x.std(ddof=1) / lengths.size**0.5) for name, x in measured.items()}
    return result


class TaskChain(evaluate.Metric):
    """See `inputs_description`."""

    def __init__(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        if unknown := kwargs.keys() - inspect.signature(evaluate.Metric).parameters.keys():
            # The base class would ignore it, and the figures would be of the default.
            raise TypeError(f"task_chain has no option {', '.join(sorted(unknown))}: {', '.join(_OPTIONS)}")
        super().__init__(*args, **kwargs)

    def _info(self):
        prefix = "" if self.config_name == "default" else f"{self.config_name}_"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # As integers, 2.7 would be stored as 2.
            features=datasets.Features({f"{prefix}predictions": datasets.Value("float32")}),
        )

    def _compute(self, **given):
        inputs = [given.pop(name) for name in self.features]
        return chain_lengths(*inputs, **(self.options | given))
