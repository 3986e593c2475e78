"""The card of a model or adapter, from what lies in its folder; every figure is read from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from hub_cards.cards.evidence import is_folder, read_json
from hub_cards.cards.licences import derive_licence
from hub_cards.cards.results import model_index
from hub_cards.cards.rows import (
    closed_loop_rows,
    conditions,
    foresight_rows,
    join,
    latency_rows,
    number,
    training_rows,
)
from training.run_facts import portable_path

__all__ = ["build_card", "read_evidence"]

TEMPLATES = Path(__file__).parents[1] / "templates"
OBJECTIVES = {
    "depth": "the depth of what it sees",
    "future": "what it will see (RGB and depth)",
    "future_rgb": "what it will see (RGB)",
    "flow": "where points in the scene will move in 3D",
    "flow_2d": "where points in the scene will move in the image",
    "progress": "how much of the task is done",
}


def build_card(folder: str | Path, source: str | None = None, licence: str | None = None) -> ModelCard:
    """The card of a folder.

    Args:
        folder (`str` or `Path`): Model or adapter with `evaluation/training.json`, and `evaluation/eval.json`
            and `evaluation/latency.json` if they were measured.
        source (`str`, *optional*): What the card's examples load from: a folder, or a Hub id. By default the
            folder itself.
        licence (`str`, *optional*): The Hub's name of a licence, where it does not follow from the parts.

    Raises:
        ValueError: If a figure or a licence is missing; names it and the remedy.
    """
    folder = Path(folder)
    evidence = read_evidence(folder)
    try:
        return _fill(folder, evidence, source or portable_path(folder), licence)
    except (KeyError, UndefinedError) as error:
        raise ValueError(
            f"a figure is missing from {folder}/evaluation: {error}; it was written by another version: "
            "run training and evaluation again"
        ) from error


def read_evidence(folder: Path) -> dict:
    """What the folder says of itself: `kind`, `config`, `summary`, `evaluation`, `seeds`, `latency`, `base`.

    Raises:
        ValueError: If the configuration or the training's figures are missing or damaged.
    """
    evaluation = folder / "evaluation"
    adapter = (folder / "adapter_config.json").is_file()
    own = folder / ("adapter_config.json" if adapter else "config.json")
    for path, remedy in {
        own: "give the folder that train.py exports",
        evaluation / "training.json": "run hub_cards/build.py on the run's folder, which holds model/",
    }.items():
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
    summary, config = read_json(evaluation / "training.json"), read_json(own)
    base = summary.get("base")
    if adapter:
        # Here, because whoever publishes the base afterwards corrects it here.
        name, revision = config["base_model_name_or_path"], config.get("revision")
        base = {"name": name, "revision": revision, "is_folder": is_folder(name)}
        config = summary.get("config", {})

    def optional(name: str) -> dict | None:
        return read_json(evaluation / name) if (evaluation / name).is_file() else None

    acts = "action" in config.get("objectives", ())
    return {
        "kind": "adapter" if adapter else "finetuned" if acts else "pretrained",
        "config": config,
        "summary": summary,
        "evaluation": optional("eval.json"),
        "seeds": [read_json(path) for path in sorted(evaluation.glob("eval-seed*.json"))],
        "latency": optional("latency.json"),
        "base": base,
    }


def _fill(folder: Path, evidence: Mapping, source: str, licence: str | None) -> ModelCard:
    config, summary, evaluation = (evidence[name] for name in ("config", "summary", "evaluation"))
    validation, episodes = _held_out(folder, summary, evaluation)
    local = config.get("action_codec") == "local_delta"
    foresight = foresight_rows(validation, "2 cm or 0.05 rad" if local else "data units")
    tasks = list(evaluation["tasks"]) if evaluation else []
    instructions = _instructions(tasks)
    name = _name(evidence, tasks)
    parts = summary.get(
        "licences", [{"what": "what the weights were made of", "name": "unknown", "licence": None}]
    )
    terms = derive_licence(parts, licence)
    base = evidence["base"] or {}
    data = ModelCardData(
        **terms,
        library_name="peft" if evidence["kind"] == "adapter" else "transformers",
        pipeline_tag="robotics",
        base_model=None if base.get("is_folder", True) else base["name"],
        tags=["robotics", "foresight", "lerobot", *(["lora"] if evidence["kind"] == "adapter" else [])],
        datasets=[d["name"] for d in summary["datasets"] if d["name"].count("/") == 1] or None,
        model_name=name,
        eval_results=model_index(evaluation, foresight, join([d["name"] for d in summary["datasets"]])),
    )
    # Strict: what a template asks for and the measurements lack is an error, never an empty place.
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, loader=FileSystemLoader(TEMPLATES)
    )
    content = environment.get_template(f"{evidence['kind']}.md").render(
        card_data=data.to_yaml(),
        title=_title(evidence, [instructions.get(task, task) for task in tasks]),
        kind=evidence["kind"],
        config=config,
        summary=summary,
        evaluation=evaluation,
        seeds=evidence["seeds"],
        latency=latency_rows(evidence["latency"]) if evidence["latency"] is not None else [],
        base=base,
        acts="action" in config["objectives"],
        validation=validation,
        views=join([f"`{view}`" for view in config["views"]], "camera"),
        objectives=join([text for name, text in OBJECTIVES.items() if name in config["objectives"]])
        or "nothing else",
        closed_loop=closed_loop_rows(evaluation, instructions, evidence["seeds"]) if evaluation else [],
        foresight=foresight,
        not_better="; ".join(row["what"] for row in foresight if not row["best"]),
        held_out=f"{episodes} held-out episode{'s' if episodes != 1 else ''}",
        demonstrations=join(
            [f"{d['train_episodes']} episodes of `{d['name']}`" for d in summary["datasets"]]
        ),
        training=training_rows(summary),
        predicts_depth=bool({"depth", "future"} & set(config["objectives"])),
        learned_depth_from=_depth_sources(summary),
        source=source,
        has_film=(folder / "rollout.mp4").is_file(),
        is_lerobot_policy=(folder / "policy_preprocessor.json").is_file(),
        instruction=_first_instruction(summary, instructions, tasks),
        parts=parts,
        terms=terms,
        number=number,
        conditions=conditions,
    )
    return ModelCard(content)


def _held_out(folder: Path, summary: Mapping, evaluation: Mapping | None) -> tuple[Mapping, int]:
    """Errors on held-out episodes, and how many of them: of the training, or of an evaluation after it."""
    if summary.get("validation"):
        return summary["validation"], sum(len(data["validation_episodes"]) for data in summary["datasets"])
    if not (evaluation or {}).get("open_loop"):
        raise ValueError(
            f"nothing in {folder}/evaluation has figures of held-out episodes: run hub_cards/build.py on the "
            "run's folder, which says how to measure them"
        )
    return evaluation["open_loop"]["metrics"], len(evaluation["open_loop"]["episodes"])


def _name(evidence: Mapping, tasks: Sequence[str]) -> str:
    what = {"pretrained": "pretrained", "adapter": "lora"}.get(evidence["kind"])
    if what is None:
        benchmark = (evidence["evaluation"] or {}).get("benchmark", "policy").lower()
        what = tasks[0] if len(tasks) == 1 else benchmark
    return f"3d-foresight-{what}"


def _title(evidence: Mapping, wordings: Sequence[str]) -> str:
    if len(wordings) == 1:
        what = wordings[0]
    elif wordings:
        what = f"{len(wordings)} {evidence['evaluation']['benchmark']} tasks"
    else:
        what = join([dataset["name"] for dataset in evidence["summary"]["datasets"]])
    word = {"pretrained": ", pretrained", "adapter": ", LoRA adapter"}.get(evidence["kind"], "")
    return f"3D Foresight{word}: {what}"


def _instructions(tasks: Sequence[str]) -> dict[str, str]:
    from datasets_scripts.simulation.metaworld import task_descriptions

    known = task_descriptions() if tasks else {}
    return {task: known.get(task, task) for task in tasks}


def _first_instruction(summary: Mapping, instructions: Mapping[str, str], tasks: Sequence[str]) -> str:
    if tasks:
        return instructions[tasks[0]]
    return next((text for dataset in summary["datasets"] for text in dataset.get("tasks", [])), "")


def _depth_sources(summary: Mapping) -> str:
    found = {
        labels["depth"]["source"]
        for dataset in summary["datasets"]
        for labels in dataset.get("labels", {}).values()
        if "depth" in labels
    }
    return join(sorted(found))
