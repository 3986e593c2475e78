"""The card of a model or adapter, from the files in its folder: every figure is read from one of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from datasets_scripts.simulation.metaworld import task_descriptions
from hub_cards.cards.eval_results import model_index
from hub_cards.cards.licences import derive_licence
from hub_cards.cards.measurements import read_measurements
from hub_cards.cards.tables import (
    closed_loop_rows,
    describe_conditions,
    foresight_rows,
    format_number,
    join_words,
    latency_rows,
    training_rows,
)
from training.run_facts import portable_path

__all__ = ["build_card"]

TEMPLATES = Path(__file__).parents[1] / "templates"
OBJECTIVE_TEXTS = {
    "depth": "the depth of what it sees",
    "future": "what it will see (RGB and depth)",
    "future_rgb": "what it will see (RGB)",
    "flow": "where points in the scene will move in 3D",
    "flow_2d": "where points in the scene will move in the image",
    "progress": "how much of the task is done",
}
UNKNOWN_PARTS = [{"what": "what the weights were made of", "name": "unknown", "licence": None}]


def build_card(folder: str | Path, source: str | None = None, licence: str | None = None) -> ModelCard:
    """The card of a folder.

    Args:
        folder (`str` or `Path`): Model or adapter with `evaluation/training.json`, and `evaluation/eval.json`
            and `evaluation/latency.json` if they were measured.
        source (`str`, *optional*): What the card's examples load from: a folder, or a Hub id. By default the
            folder itself.
        licence (`str`, *optional*): The Hub's name of a licence, if it does not follow from the parts.

    Raises:
        ValueError: If a figure or a licence is missing; names it and the remedy.
    """
    folder = Path(folder)
    measured = read_measurements(folder)
    try:
        parts = measured["summary"].get("licences", UNKNOWN_PARTS)
        terms = derive_licence(parts, licence)
        fields = _fields(folder, measured) | {"parts": parts, "terms": terms}
        metadata = _metadata(measured, fields)
        # Strict: a figure that a template needs and the measurements lack is an error, never an empty place.
        environment = Environment(
            undefined=StrictUndefined, keep_trailing_newline=True, loader=FileSystemLoader(TEMPLATES)
        )
        text = environment.get_template(f"{measured['kind']}.md").render(
            card_data=metadata.to_yaml(), source=source or portable_path(folder), **fields
        )
    except (KeyError, UndefinedError) as error:
        raise ValueError(
            f"a figure is missing from {folder}/evaluation: {error}; it was written by another version: "
            "run training and evaluation again"
        ) from error
    return ModelCard(text)


def _fields(folder: Path, measured: Mapping) -> dict:
    """What the templates print."""
    config, summary, evaluation = (measured[name] for name in ("config", "summary", "evaluation"))
    validation, episodes = _held_out(folder, summary, evaluation)
    local = config.get("action_codec") == "local_delta"
    foresight = foresight_rows(validation, "2 cm or 0.05 rad" if local else "data units")
    tasks = list(evaluation["tasks"]) if evaluation else []
    descriptions = task_descriptions() if tasks else {}
    instructions = {task: descriptions.get(task, task) for task in tasks}
    recorded = [text for dataset in summary["datasets"] for text in dataset.get("tasks", [])]
    objectives = [text for name, text in OBJECTIVE_TEXTS.items() if name in config["objectives"]]
    demonstrations = [f"{d['train_episodes']} episodes of `{d['name']}`" for d in summary["datasets"]]
    return {
        **{name: measured[name] for name in ("kind", "config", "summary", "evaluation", "seeds")},
        "title": _title(measured, list(instructions.values())),
        "latency": latency_rows(measured["latency"]) if measured["latency"] is not None else [],
        "base": measured["base"] or {},
        "acts": "action" in config["objectives"],
        "validation": validation,
        "views": join_words([f"`{view}`" for view in config["views"]], "camera"),
        "objectives": join_words(objectives) or "nothing else",
        "closed_loop": closed_loop_rows(evaluation, instructions, measured["seeds"]) if evaluation else [],
        "foresight": foresight,
        "not_better": "; ".join(row["what"] for row in foresight if not row["best"]),
        "held_out": f"{episodes} held-out episode{'s' if episodes != 1 else ''}",
        "demonstrations": join_words(demonstrations),
        "training": training_rows(summary),
        "predicts_depth": bool({"depth", "future"} & set(config["objectives"])),
        "learned_depth_from": _depth_sources(summary),
        "has_film": (folder / "rollout.mp4").is_file(),
        "is_lerobot_policy": (folder / "policy_preprocessor.json").is_file(),
        "instruction": next(iter([*instructions.values(), *recorded]), ""),
        "number": format_number,
        "conditions": describe_conditions,
    }


def _metadata(measured: Mapping, fields: Mapping) -> ModelCardData:
    adapter, base = measured["kind"] == "adapter", fields["base"]
    datasets = [dataset["name"] for dataset in measured["summary"]["datasets"]]
    return ModelCardData(
        **fields["terms"],
        library_name="peft" if adapter else "transformers",
        pipeline_tag="robotics",
        base_model=None if base.get("is_folder", True) else base["name"],
        tags=["robotics", "foresight", "lerobot", *(["lora"] if adapter else [])],
        datasets=[name for name in datasets if name.count("/") == 1] or None,
        model_name=_name(measured),
        eval_results=model_index(measured["evaluation"], fields["foresight"], join_words(datasets)),
    )


def _held_out(folder: Path, summary: Mapping, evaluation: Mapping | None) -> tuple[Mapping, int]:
    """Errors on held-out episodes and their number, from the training or from a later evaluation."""
    if summary.get("validation"):
        return summary["validation"], sum(len(data["validation_episodes"]) for data in summary["datasets"])
    if not (evaluation or {}).get("open_loop"):
        raise ValueError(
            f"nothing in {folder}/evaluation has figures of held-out episodes: run hub_cards/build.py on the "
            "run's folder, which says how to measure them"
        )
    return evaluation["open_loop"]["metrics"], len(evaluation["open_loop"]["episodes"])


def _name(measured: Mapping) -> str:
    what = {"pretrained": "pretrained", "adapter": "lora"}.get(measured["kind"])
    if what is None:
        evaluation = measured["evaluation"] or {"tasks": (), "benchmark": "policy"}
        tasks = list(evaluation["tasks"])
        what = tasks[0] if len(tasks) == 1 else evaluation["benchmark"].lower()
    return f"3d-foresight-{what}"


def _title(measured: Mapping, instructions: Sequence[str]) -> str:
    if len(instructions) == 1:
        what = instructions[0]
    elif instructions:
        what = f"{len(instructions)} {measured['evaluation']['benchmark']} tasks"
    else:
        what = join_words([dataset["name"] for dataset in measured["summary"]["datasets"]])
    word = {"pretrained": ", pretrained", "adapter": ", LoRA adapter"}.get(measured["kind"], "")
    return f"3D Foresight{word}: {what}"


def _depth_sources(summary: Mapping) -> str:
    found = {
        labels["depth"]["source"]
        for dataset in summary["datasets"]
        for labels in dataset.get("labels", {}).values()
        if "depth" in labels
    }
    return join_words(sorted(found))
