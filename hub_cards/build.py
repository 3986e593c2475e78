"""Writes the model card of a finished run from its measurements, or says which measurement is missing.

Every figure of the card is read from a file that the script which measured it has written; none is typed.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError

from datasets_scripts.columns import replacing

__all__ = ["build_card", "main"]

TEMPLATE = Path(__file__).with_name("model_card_template.md")
EXAMPLE = "example: python hub_cards/build.py outputs/quickstart"
# What a card needs, and how to get it; {0} is the folder.
TRAIN = (
    "accelerate launch training/train.py --config training/configs/quickstart.yaml --dataset {0}/dataset "
    "--output {0}/training --export {0}/model"
)
EVALUATE = (
    "python training/evaluate.py --checkpoint {0}/model --tasks drawer-open-v3 --output {0}/eval.json "
    "--video {0}/rollout.mp4"
)
VISUALIZE = (
    "python training/visualize.py --checkpoint {0}/model --dataset {0}/dataset --output {0}/foresight.png"
)
NEEDED = {
    "model/config.json": TRAIN,
    "training/summary.json": TRAIN,
    "eval.json": EVALUATE,
    "rollout.mp4": EVALUATE,
    "foresight.png": VISUALIZE,
}
OBJECTIVES = {
    "depth": "the depth of what it sees",
    "future": "what it will see (RGB and depth)",
    "future_rgb": "what it will see (RGB)",
    "flow": "where points in the scene will move in 3D",
    "flow_2d": "where points in the scene will move in the image",
    "progress": "how much of the task is done",
}


def build_card(folder: str | Path, source: str = "model") -> ModelCard:
    """The card of a run.

    Args:
        folder (`str` or `Path`): Folder with `model/`, `training/summary.json`, `eval.json`, `foresight.png`
            and `rollout.mp4`.
        source (`str`): What the card's example loads the model from: a folder, or a Hub id.

    Raises:
        ValueError: If a figure is missing or does not belong to the model; names the file and the command
            that makes it.
    """
    folder = Path(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            "\n".join(
                f"{folder / name} is missing; make it with:\n  {NEEDED[name].format(folder)}"
                for name in missing
            )
        )
    config, summary, evaluation = (
        _read(folder / name) for name in ("model/config.json", "training/summary.json", "eval.json")
    )
    validation = summary.get("validation") or evaluation.get("open_loop", {}).get("metrics")
    if not validation:
        raise ValueError(
            f"{folder}/training/summary.json has no figures of held-out episodes (data.val_fraction 0?): "
            f"train with some, or measure them with:\n  {EVALUATE.format(folder)} --dataset {folder}/dataset"
        )
    measured = (folder / evaluation["checkpoint"]["path"]).resolve()
    if measured != (folder / "model").resolve():
        raise ValueError(
            f"{folder}/eval.json measures {evaluation['checkpoint']['path']}, not {folder}/model; "
            f"measure again with:\n  {EVALUATE.format(folder)}"
        )
    try:
        return _fill(config, summary, evaluation, validation, source)
    except (KeyError, UndefinedError) as error:
        raise ValueError(
            f"a figure is missing from {folder}/training/summary.json or {folder}/eval.json: {error}; "
            "they were written by another version: run training and evaluation again"
        ) from error


def _fill(
    config: Mapping, summary: Mapping, evaluation: Mapping, validation: Mapping, source: str
) -> ModelCard:
    tasks = list(evaluation["tasks"])
    instructions = _instructions(tasks)
    local = config.get("action_codec") == "local_delta"
    foresight = _foresight_rows(validation, "2 cm or 0.05 rad" if local else "data units")
    several = f"{len(tasks)} MetaWorld tasks"
    episodes = [len(dataset["validation_episodes"]) for dataset in summary["datasets"]]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="robotics",
        tags=["robotics", "foresight", "lerobot"],
        datasets=[d["name"] for d in summary["datasets"] if d["name"].count("/") == 1] or None,
        model_name=f"3d-foresight-{tasks[0] if len(tasks) == 1 else 'metaworld'}",
        eval_results=_eval_results(evaluation),
    )
    # Strict: what the template asks for and the measurements lack is an error, never an empty place.
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text()
    )
    content = template.render(
        card_data=data.to_yaml(),
        title=f"3D Foresight: {instructions[tasks[0]] if len(tasks) == 1 else several}",
        config=config,
        summary=summary,
        evaluation=evaluation,
        validation=validation,
        views=_join([f"`{view}`" for view in config["views"]], "camera"),
        objectives=_join([text for name, text in OBJECTIVES.items() if name in config["objectives"]])
        or "nothing else",
        closed_loop=_closed_loop_rows(evaluation, instructions),
        foresight=foresight,
        not_better="; ".join(row["what"] for row in foresight if not row["best"]),
        held_out=f"{sum(episodes)} held-out episode{'s' if sum(episodes) != 1 else ''}",
        demonstrations=_join(
            [f"{d['train_episodes']} episodes of `{d['name']}`" for d in summary["datasets"]]
        ),
        training=_training_rows(summary),
        predicts_depth=bool({"depth", "future"} & set(config["objectives"])),
        source=source,
        instruction=instructions[tasks[0]],
        number=_number,
        conditions=_conditions,
    )
    return ModelCard(content)


def _instructions(tasks: Sequence[str]) -> dict[str, str]:
    from datasets_scripts.metaworld_env import task_descriptions

    known = task_descriptions()
    return {task: known.get(task, task) for task in tasks}


def _eval_results(evaluation: Mapping) -> list[EvalResult]:
    """One `model-index` entry per task, and one for all if there are several."""
    tasks = evaluation["tasks"]
    rows = {**tasks, **({"all": evaluation["mean"]} if len(tasks) > 1 else {})}
    return [
        EvalResult(
            task_type="robotics",
            task_name="robot manipulation",
            dataset_type=evaluation["benchmark"].lower(),
            dataset_config=task,  # what tells entries of one benchmark apart
            dataset_name=f"{evaluation['benchmark']} {task}",
            metric_type="success_rate",
            metric_name=f"success rate, {figures['episodes']} unseen starts",
            metric_value=round(figures["success_rate"], 4),
        )
        for task, figures in rows.items()
    ]


def _closed_loop_rows(evaluation: Mapping, instructions: Mapping[str, str]) -> list[dict]:
    rows = dict(evaluation["tasks"])
    if len(rows) > 1:
        rows["all"] = evaluation["mean"]
    return [
        {
            "task": task,
            "instruction": instructions.get(task, ""),
            "rate": f"{100 * figures['success_rate']:.4g} %",
            "episodes": f"{figures['successes']} of {figures['episodes']}",
            "interval": "{:.1f} to {:.1f} %".format(*(100 * bound for bound in figures["ci95"])),
        }
        for task, figures in rows.items()
    ]


def _foresight_rows(validation: Mapping, action_unit: str) -> list[dict]:
    """Errors of the model and of the trivial predictors, one row per prediction."""
    rows = []

    def add(what: str, unit: str, group: Mapping, metric: str, copy: str, factor: float = 1.0) -> None:
        values = {
            who: group[who][metric] * factor
            for who in ("model", "mean", copy)
            if metric in group.get(who, {})
        }
        if "model" not in values:
            return
        others = [value for who, value in values.items() if who != "model"]
        mean, copied = (_number(values[who]) if who in values else "" for who in ("mean", copy))
        best = not others or values["model"] < min(others)
        row = {"what": what, "unit": unit, "mean": mean, "still": copied, "best": best}
        rows.append({**row, "model": f"**{_number(values['model'])}**" if best else _number(values["model"])})

    patch = "squared, per-patch normalised"
    for section, name in {
        "depth": "depth",
        "future_rgb": "future image",
        "future_depth": "future depth",
    }.items():
        for view, group in validation.get(section, {}).items():
            add(f"{name}, {view}", patch, group, "mse", "current")
    for name, group in validation.get("flow", {}).items():
        what = "flow, all points" if name == "all" else "flow, moving points"
        add(f"{what}: x", "pixels", group, "x_px", "stay_put")
        add(f"{what}: y", "pixels", group, "y_px", "stay_put")
        add(f"{what}: x and y", "pixels, distance", group, "xy_px", "stay_put")
        add(f"{what}: z", "mm", group, "z_m", "stay_put", 1000)
    for name, what in {"first": "next action", "chunk": "all actions of a chunk"}.items():
        if name in validation.get("actions", {}):
            add(what, f"absolute, {action_unit}, mean", validation["actions"][name], "l1_mean", "")
    if "progress" in validation:
        add("progress", "absolute, 0 to 1", validation["progress"]["all"], "mae", "")
    return rows


def _training_rows(summary: Mapping) -> list[tuple[str, str]]:
    rows = []
    for dataset in summary["datasets"]:
        held_out = len(dataset["validation_episodes"])
        rows.append(
            (
                f"data: `{dataset['name']}`",
                f"{dataset['train_episodes']} episodes ({dataset['train_windows']:,} windows) for training, "
                f"{held_out} held out; {_number(dataset['fps'])} frames a second",
            )
        )
        for camera, labels in dataset.get("labels", {}).items():
            sources = [f"{kind}: {labels[kind]['source']}" for kind in ("depth", "tracks") if kind in labels]
            if sources:
                rows.append((f"labels: {camera} camera", "; ".join(sources)))
    rows += [
        ("objectives", ", ".join(summary["objectives"])),
        ("parameters", f"{summary['parameters']:,}, of which {summary['trained_parameters']:,} trained"),
        ("steps", f"{summary['steps']:,}"),
        ("time", f"{summary['train_seconds'] / 60:.1f} minutes"),
        (
            "precision",
            "float32" if summary["mixed_precision"] == "no" else f"{summary['mixed_precision']} autocast",
        ),
        ("processes", f"{summary['processes']} x {summary['device']}"),
        ("seed", str(summary["seed"])),
    ]
    return rows


def _conditions(run: Mapping) -> str:
    """Hardware, versions, commit and date of a measurement in one sentence."""
    hardware, versions = run["hardware"], dict(run["versions"])
    machine = [hardware["gpu"]] if "gpu" in hardware else []
    machine.append(
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['torch_threads']} used by PyTorch"
    )
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f", commit `{run['commit']}`" if run.get("commit") else ""
    return f"On {'; '.join(machine)}; {libraries}{commit}; {run['date']}."


def _number(value: float) -> str:
    """Three significant digits without an exponent for everyday sizes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if float(value).is_integer() and "." in text else text


def _join(parts: Sequence[str], noun: str = "") -> str:
    """`a, b and c`, with a noun in the right number behind."""
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + "".join(parts[-1:])
    return f"{text} {noun}{'s' if len(parts) > 1 else ''}" if noun else text


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and make it again") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run with model/, training/, eval.json and pictures")
    parser.add_argument(
        "--repo-id", help="Hub id the card's example loads from (default: the folder model/ beside the card)"
    )
    args = parser.parse_args(arguments)
    try:
        text = str(build_card(args.folder, args.repo_id or "model"))
        for place in (args.folder, args.folder / "model"):
            with replacing(place / "README.md") as temporary:
                temporary.write_text(text)
        # The card in model/ is what a Hub repo shows; its pictures belong beside it.
        for name in ("foresight.png", "rollout.mp4"):
            with replacing(args.folder / "model" / name) as temporary:
                shutil.copyfile(args.folder / name, temporary)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.folder / 'README.md'} and {args.folder / 'model' / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
