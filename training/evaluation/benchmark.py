"""What the benchmarks of `evaluate.py` share: options, the policy, figures, resumed results."""

# No import of PyTorch at the top: every simulator process imports its command, which may import this file.
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import read_json
from training.run_facts import portable_path

__all__ = [
    "describe_checkpoint",
    "open_policy",
    "option",
    "percentiles_ms",
    "read_earlier",
    "success_figures",
]

SMALL_MODEL = 20_000_000  # parameters


def option(help: str, default=dataclasses.MISSING, **more):
    """A field with its help text; `default` may be a function that gives the value."""
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"help": help, **more})


@contextlib.contextmanager
def open_policy(options, check: Callable) -> Iterator[tuple]:
    """Yields model and processor of `options.checkpoint`, with `options.threads` threads of PyTorch.

    `check` is called with the model's config; `options` also has `device` and `revision`.
    """
    import torch

    from training.model_folder import load_checkpoint

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_checkpoint(options.checkpoint, device, options.revision)
    check(model.config)
    threads = torch.get_num_threads()
    # Threads of a small model mostly wait for each other, and for long where other processes want the cores.
    torch.set_num_threads(options.threads or (1 if model.num_parameters() < SMALL_MODEL else threads))
    try:
        yield model, processor
    finally:
        torch.set_num_threads(threads)


def describe_checkpoint(options, config) -> dict:
    """Path, as it may be published beside `options.output`, revision, and digest of a folder's weights."""
    from training.model_folder import weights_digest

    source, digest = options.checkpoint, None
    if Path(source).is_dir():
        source, digest = portable_path(source, options.output.parent), weights_digest(source)
    revision = options.revision or getattr(config, "_commit_hash", None)
    return {"path": source, "revision": revision, "weights_sha256": digest}


def success_figures(metric, outcomes: Sequence[bool]) -> dict:
    """Figures of the metric `success_rate`, with its interval as `ci95`."""
    figures = metric.compute(predictions=[int(outcome) for outcome in outcomes])
    interval = figures.pop("interval")
    return {**figures, "ci95": [round(bound, 4) for bound in interval]}


def percentiles_ms(durations_s: Sequence[float]) -> dict:
    """Median and 90th percentile of durations, in milliseconds."""
    median, p90 = np.percentile(np.asarray(durations_s) * 1000, [50, 90])
    return {"median": round(float(median), 3), "p90": round(float(p90), 3), "count": len(durations_s)}


def read_earlier(output: Path, benchmark: str, checkpoint: Mapping, settings: Mapping) -> dict:
    """The results that an interrupted evaluation left in `output`; empty if there are none.

    Raises:
        ValueError: If they are damaged, or of another benchmark, policy or setting; names the difference.
    """
    if not output.is_file():
        return {}
    remedy = "give another --output, or delete the file"
    found = read_json(output, remedy)
    if not {"benchmark", "checkpoint", "settings", "episodes"} <= found.keys():
        raise ValueError(f"{output} holds no results of evaluate.py: {remedy}")
    # The same weights are the same policy, wherever they lie; a Hub id has no digest.
    names = ("weights_sha256",) if checkpoint["weights_sha256"] else ("path", "revision")
    pairs = [("benchmark", found["benchmark"], benchmark)]
    pairs += [(f"checkpoint.{name}", found["checkpoint"].get(name), checkpoint[name]) for name in names]
    both = found["settings"] | settings
    pairs += [(name, found["settings"].get(name), settings.get(name)) for name in both]
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(f"{output} has results with {name} {theirs!r}, this run has {ours!r}: {remedy}")
    return found
