"""The card of a model or adapter, from the files in its folder: every figure is read from one of them."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError
from markupsafe import Markup

from datasets_scripts.inspection.dataset_card import list_label_licenses
from datasets_scripts.inspection.template_rendering import as_code, render_template
from datasets_scripts.simulation.libero_files import libero_instruction
from datasets_scripts.simulation.metaworld import task_descriptions
from datasets_scripts.storage.atomic import read_json
from hub_cards.cards.diagnostic_tables import build_condition_rows, build_demonstration_rows, describe_limit
from hub_cards.cards.error_tables import build_error_rows, format_number, join_words
from hub_cards.cards.eval_results import build_model_index, success_by_task
from hub_cards.cards.licenses import derive_license
from hub_cards.cards.measurements import read_measurements
from training.run_record import portable_path

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
UNKNOWN_PARTS = [{"what": "what the weights were made of", "name": "unknown", "license": None}]


def build_card(folder: str | Path, source: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a folder.

    Args:
        folder (`str` or `Path`): Model or adapter with `evaluation/training.json`, and `eval.json`,
            `diagnostics.json` and `latency.json` beside it if they were measured.
        source (`str`, *optional*): What the card's examples load from: a folder, or a Hub id. By default the
            folder itself.
        license (`str`, *optional*): The Hub's name of a license, if it does not follow from the parts.

    Raises:
        ValueError: If a figure or a license is missing; names it and the remedy.
    """
    folder = Path(folder)
    measured = read_measurements(folder)
    try:
        parts = _read_parts(measured["summary"])
        terms = derive_license(parts, license)
        fields = _build_fields(folder, measured) | {"parts": parts, "terms": terms}
        text = render_template(
            TEMPLATES / f"{measured['kind']}.md",
            card_data=_build_metadata(fields).to_yaml(),
            source=source or portable_path(folder),
            **fields,
        )
    except (KeyError, UndefinedError) as error:
        raise ValueError(
            f"a figure is missing from {folder}/evaluation: {error}; it was written by another version: "
            "run training and evaluation again"
        ) from error
    return ModelCard(text)


def _read_parts(summary: Mapping) -> list[dict]:
    """What the weights were made of; figures of before the first release spell it `licences`, `licence`."""
    parts = summary.get("licenses", summary.get("licences", UNKNOWN_PARTS))
    return [{"license": part.get("licence"), **part} for part in parts]


def _build_fields(folder: Path, measured: Mapping) -> dict:
    """What the templates print."""
    config, summary, evaluation = (measured[name] for name in ("config", "summary", "evaluation"))
    validation, episodes = _read_held_out(folder, summary, evaluation)
    local = config.get("action_codec") == "local_delta"
    robots = _read_robots(folder)
    robot = min(robots, default=None)  # the one of the examples
    sizes = {k: len(robots[robot][k]) if robot else config[f"{k}_dim"] for k in ("action", "state")}
    unit = "2 cm or 0.05 rad" if local else "data units"
    foresight = build_error_rows(validation, unit)
    diagnostics = measured["diagnostics"]
    instructions = _find_instructions(evaluation) if evaluation else {}
    tasks = list(evaluation["tasks"]) if evaluation else []
    recorded = [text for dataset in summary["datasets"] for text in dataset.get("tasks", [])]
    trained_on = [dataset for dataset in summary["datasets"] if dataset["train_episodes"]]
    subject = join_words([dataset["name"] for dataset in trained_on])
    if tasks:
        many = f"{len(tasks)} {evaluation['benchmark']} tasks"
        subject = many if len(tasks) > 1 else instructions.get(tasks[0], tasks[0])
    texts = dict(OBJECTIVE_TEXTS)
    if config.get("depth_form") == "metric":
        texts["depth"] += " in meters"
    learned = [text for name, text in texts.items() if name in config["objectives"]]
    demonstrations = [_describe_demonstrations(dataset) for dataset in trained_on]
    labels = [each for dataset in summary["datasets"] for each in dataset.get("labels", {}).values()]
    return {
        **measured,
        "robots": sorted(robots),
        "sizes": sizes,
        "subject": subject,
        "latency": (measured["latency"] or {}).get("measurements", []),
        "base": measured["base"] or {},
        "validation": validation,
        "views": Markup(join_words([as_code(view) for view in config["views"]])),
        "objectives": join_words(learned),
        "results": [success_by_task(run) for run in (evaluation, *measured["seeds"]) if run],
        "instructions": instructions,
        "foresight": foresight,
        "conditions": build_condition_rows(diagnostics) if diagnostics else [],
        "diagnostics_limit": describe_limit(diagnostics) if diagnostics else "",
        "on_demonstrations": build_demonstration_rows(diagnostics, unit) if diagnostics else [],
        "held_out": f"{episodes} held-out episode{'s' if episodes != 1 else ''}",
        "demonstrations": Markup(join_words(demonstrations)),
        "depth_sources": join_words(sorted({x["depth"]["source"] for x in labels if "depth" in x})),
        "has_film": (folder / "rollout.mp4").is_file(),
        "is_lerobot_policy": (folder / "policy_preprocessor.json").is_file(),
        "instruction": next(iter([*instructions.values(), *recorded]), ""),
        "number": format_number,
        "list_label_licenses": list_label_licenses,
    }


def _read_robots(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Robots of a policy for several; an adapter's base need not know them all, its processor does."""
    path = folder / "processor_config.json"
    return (read_json(path).get("embodiments") or {}) if path.is_file() else {}


def _describe_demonstrations(dataset: Mapping) -> str:
    simulator = dataset.get("scripted_in")
    origin = f" (scripted experts in {simulator})" if simulator else ""
    robot = f" of the robot {as_code(dataset['embodiment'])}" if "embodiment" in dataset else ""
    return f"{dataset['train_episodes']:d} episodes of {as_code(dataset['name'])}{robot}{origin}"


def _find_instructions(evaluation: Mapping) -> dict[str, str]:
    """Task -> instruction; CALVIN's wording is in the user's installation alone."""
    tasks = evaluation["tasks"]
    if evaluation["benchmark"] == "LIBERO":
        return {task: libero_instruction(task) for task in tasks}
    known = task_descriptions() if evaluation["benchmark"] == "MetaWorld" else {}
    return {task: known[task] for task in tasks if task in known}


def _build_metadata(fields: Mapping) -> ModelCardData:
    adapter, base, evaluation = fields["kind"] == "adapter", fields["base"], fields["evaluation"]
    datasets = [dataset["name"] for dataset in fields["summary"]["datasets"]]
    name = {"pretrained": "pretrained", "adapter": "lora"}.get(fields["kind"], "policy")
    if name == "policy" and evaluation:
        tasks = list(evaluation["tasks"])
        name = tasks[0].rpartition("/")[2] if len(tasks) == 1 else evaluation["benchmark"].lower()
    return ModelCardData(
        **fields["terms"],
        library_name="peft" if adapter else "transformers",
        pipeline_tag="robotics",
        base_model=None if base.get("is_folder", True) else base["name"],
        tags=["robotics", "foresight", "lerobot", *(["lora"] if adapter else [])],
        datasets=[name for name in datasets if name.count("/") == 1] or None,
        model_name=f"3d-foresight-{name}",
        eval_results=build_model_index(evaluation, fields["foresight"], join_words(datasets)),
    )


def _read_held_out(folder: Path, summary: Mapping, evaluation: Mapping | None) -> tuple[Mapping, int]:
    """Errors on held-out episodes and their number, from the training or from a later evaluation."""
    if summary.get("validation"):
        return summary["validation"], sum(len(data["validation_episodes"]) for data in summary["datasets"])
    if not (evaluation or {}).get("open_loop"):
        raise ValueError(
            f"nothing in {folder}/evaluation has figures of held-out episodes: run hub_cards/build.py on the "
            "run's folder, which says how to measure them"
        )
    return evaluation["open_loop"]["metrics"], len(evaluation["open_loop"]["episodes"])
