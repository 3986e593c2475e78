"""Results that machines read: `model-index` of the card, and the Hub's newer `.eval_results/*.yaml`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from datasets_scripts.storage.atomic import write_whole_file

__all__ = ["eval_results", "model_index", "read_eval_results", "write_eval_results"]

FOLDER = ".eval_results"
# The dataset of the Hub under which the results of a benchmark are collected.
BENCHMARKS = {"MetaWorld": "lerobot/metaworld_mt50"}


def model_index(evaluation: Mapping | None, foresight: Sequence[Mapping], dataset: str) -> list[EvalResult]:
    """Success rates, one per task and one for all tasks; without an evaluation, errors on held-out episodes.

    Args:
        evaluation (`Mapping`, *optional*): What `training/evaluate.py` wrote.
        foresight (`Sequence[Mapping]`): Rows of `foresight_rows`.
        dataset (`str`): Name of the data with the held-out episodes.
    """
    task = {"task_type": "robotics", "task_name": "robot manipulation"}
    if evaluation is None:
        return [
            EvalResult(
                **task,
                dataset_type=re.sub(r"[^\w.-]+", "-", dataset),
                dataset_name=f"held-out episodes of {dataset}",
                metric_type="error",
                metric_name=f"{row['what']} ({row['unit']})",
                metric_value=float(f"{row['value']:.4g}"),
            )
            for row in foresight
        ]
    return [
        EvalResult(
            **task,
            dataset_type=evaluation["benchmark"].lower(),
            dataset_config=name,  # distinguishes entries of one benchmark
            dataset_name=f"{evaluation['benchmark']} {name}",
            metric_type="success_rate",
            metric_name=f"success rate, {figures['episodes']} unseen starts",
            metric_value=round(figures["success_rate"], 4),
        )
        for name, figures in _figures_by_task(evaluation).items()
    ]


def _figures_by_task(evaluation: Mapping) -> dict[str, Mapping]:
    tasks = evaluation["tasks"]
    return {**tasks, **({"all": evaluation["mean"]} if len(tasks) > 1 else {})}


def eval_results(evaluation: Mapping) -> list[dict]:
    """Entries of `.eval_results/<benchmark>.yaml`, with success in percent."""
    commit = f"commit {evaluation['commit']}; " if evaluation["commit"] else ""  # none outside a checkout
    notes = (
        "success in percent of {episodes} unseen starts, 95 % Wilson interval {low:.1f} to {high:.1f}; "
        f"{commit}{evaluation['command']}"
    )
    return eval_result_entries_to_yaml(
        [
            EvalResultEntry(
                dataset_id=BENCHMARKS[evaluation["benchmark"]],
                task_id=name,
                value=round(100 * figures["success_rate"], 2),
                date=evaluation["date"],
                notes=notes.format(
                    episodes=figures["episodes"], low=100 * figures["ci95"][0], high=100 * figures["ci95"][1]
                ),
            )
            for name, figures in _figures_by_task(evaluation).items()
        ]
    )


def write_eval_results(folder: Path, evaluation: Mapping | None) -> None:
    """Write `.eval_results/`, or remove the earlier ones if nothing was evaluated."""
    for old in (folder / FOLDER).glob("*.yaml"):
        old.unlink()
    if evaluation is None:
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    with write_whole_file(folder / FOLDER / f"{evaluation['benchmark'].lower()}.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(eval_results(evaluation), sort_keys=False))


def read_eval_results(folder: Path) -> list[dict]:
    """The entries of all files in `.eval_results/`.

    Raises:
        ValueError: If a file holds something else; names it.
    """
    entries = []
    for path in sorted((folder / FOLDER).glob("*.yaml")):
        try:
            found = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        entries += found if isinstance(found, list) else [found]
    return entries
