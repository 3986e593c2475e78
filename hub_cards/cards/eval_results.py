"""Results that machines read: `model-index` of the card, and the Hub's newer `.eval_results/*.yaml`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from datasets_scripts.storage.atomic import write_whole_file

__all__ = [
    "build_result_files",
    "build_model_index",
    "read_result_files",
    "success_by_task",
    "write_result_files",
]

FOLDER = ".eval_results"
# The dataset of the Hub under which the results of a benchmark are collected, and the number of its tasks;
# CALVIN's is not on the Hub.
BENCHMARKS = {"MetaWorld": ("lerobot/metaworld_mt50", 50), "LIBERO": ("lerobot/libero", 40), "CALVIN": None}


def build_model_index(
    evaluation: Mapping | None, errors: Sequence[Mapping], dataset: str
) -> list[EvalResult]:
    """Success rates, one per task and one for all tasks; without an evaluation, errors on held-out episodes.

    Args:
        evaluation (`Mapping`, *optional*): What `training/evaluate.py` wrote.
        errors (`Sequence[Mapping]`): Rows of `build_error_rows`.
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
            for row in errors
        ]
    measured = [
        ("success_rate", name, f"success rate, {figures['episodes']} unseen starts", figures["success_rate"])
        for name, figures in _published_success(evaluation).items()
    ]
    if chains := evaluation.get("chains"):
        measured.append(("avg_len", "chains", f"Avg. Len., {chains['chains']} chains", chains["avg_len"]))
    return [
        EvalResult(
            **task,
            dataset_type=evaluation["benchmark"].lower(),
            dataset_config=name,  # distinguishes entries of one benchmark
            dataset_name=f"{evaluation['benchmark']} {name}",
            metric_type=kind,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for kind, name, metric, value in measured
    ]


def success_by_task(evaluation: Mapping) -> dict[str, Mapping]:
    """Figures of every task, then of several suites, then of all tasks under `all` if there are several.

    The tasks of CALVIN's chains have no mean: how often each is tried depends on the policy.
    """
    tasks, suites = evaluation["tasks"], evaluation.get("suites", {})
    several = suites if len(suites) > 1 else {}
    return {
        **tasks,
        **several,
        **({"all": evaluation["mean"]} if len(tasks) > 1 and "mean" in evaluation else {}),
    }


def _published_success(evaluation: Mapping) -> dict[str, Mapping]:
    """[`success_by_task`] as strangers read it: the mean of chosen tasks is not one of `all` tasks."""
    found, whole = success_by_task(evaluation), BENCHMARKS[evaluation["benchmark"]]
    if "all" in found and whole and len(evaluation["tasks"]) < whole[1]:
        found[f"mean of {len(evaluation['tasks'])} tasks"] = found.pop("all")
    return found


def build_result_files(evaluation: Mapping | None) -> dict[str, str]:
    """Name and content of the files that `.eval_results/` should hold, with success in percent."""
    if evaluation is None or BENCHMARKS[evaluation["benchmark"]] is None:
        return {}
    dataset = BENCHMARKS[evaluation["benchmark"]][0]
    commit = f"commit {evaluation['commit']}; " if evaluation["commit"] else ""  # none outside a checkout
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=name,
            value=round(100 * figures["success_rate"], 2),
            date=evaluation["date"],
            notes=f"success in percent of {figures['episodes']} unseen starts, 95 % Wilson interval "
            f"{100 * figures['ci95'][0]:.1f} to {100 * figures['ci95'][1]:.1f}; "
            f"{commit}{evaluation['command']}",
        )
        for name, figures in _published_success(evaluation).items()
        if not name.startswith("mean of")  # leaderboards compare the benchmark's own tasks
    ]
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {f"{evaluation['benchmark'].lower()}.yaml": content}


def read_result_files(folder: Path) -> dict[str, str]:
    """Name and content of all files in `.eval_results/`."""
    return {path.name: path.read_text(errors="replace") for path in (folder / FOLDER).glob("*.yaml")}


def write_result_files(folder: Path, evaluation: Mapping | None) -> None:
    """Write `.eval_results/`, and remove earlier files."""
    files = build_result_files(evaluation)
    for name in read_result_files(folder).keys() - files.keys():
        (folder / FOLDER / name).unlink()
    for name, content in files.items():
        with write_whole_file(folder / FOLDER / name) as temporary:
            temporary.write_text(content)
