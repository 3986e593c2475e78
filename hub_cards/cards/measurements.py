"""Copy what a run measured into the folder that will be published: `evaluation/*.json` and pictures.

`model_card.py` writes the card from this folder alone, and `check.py` compares the two.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets_scripts.storage.atomic import read_json, write_json, write_whole_file
from datasets_scripts.storage.dataset_folder import check_inside
from datasets_scripts.storage.hub.download import is_hub_id
from hub_cards.cards.licenses import find_previous_stage, list_parts
from training.config import RunConfig
from training.models.model_folder import read_run_config, read_summary, run_folder, weights_digest
from training.run_record import portable_path

__all__ = ["collect_measurements", "has_measured_weights", "is_folder", "read_measurements"]

# Commands that make what a card needs; in braces the run, the folder of its training and its (first) dataset.
TRAIN = (
    "accelerate launch training/train.py --config training/configs/quickstart.yaml --dataset {data} "
    "--output {trained} --export {run}/model"
)
RESUME = "accelerate launch training/train.py --config {trained}/config.yaml --resume"
EVALUATE = (
    "python training/evaluate.py --checkpoint {run}/model --tasks drawer-open-v3 --output {run}/eval.json "
    "--video {run}/rollout.mp4"
)
VISUALIZE = (
    "python training/visualize.py --checkpoint {run}/model --dataset {data} --output {run}/foresight.png"
)
PICTURES = ("foresight.png", "rollout.mp4")
DIAGNOSTICS = "diagnostics.json"  # what training/diagnose.py writes; a card may lack it
# Fields of a base's configuration that the card of an adapter needs; a model has its own config.json.
BASE_FIELDS = ("views", "objectives", "history_length", "chunk_size", "image_size")
BASE_FIELDS += ("action_dim", "action_codec", "state_dim")
STAGE_FIELDS = ("seed", "steps", "train_seconds", "command", "date", "commit")  # of trainings before this one


def collect_measurements(
    run: Path,
    seed_evaluations: Sequence[Path] = (),
    open_loop: bool = False,
    base: Path | None = None,
) -> None:
    """Copy figures and pictures of a run into its `model/`.

    Args:
        run (`Path`): Folder with `model/`, `eval.json`, `foresight.png` and, optionally, `rollout.mp4`.
            `summary.json` and `config.yaml` of the training are in it, or in its `training/`.
        seed_evaluations (`Sequence[Path]`): Evaluations of the same training with other seeds, besides
            `eval-*.json` of the run.
        open_loop (`bool`): Whether a policy needs no `eval.json`.
        base (`Path`, *optional*): Folder with a card of its own that holds the model the run started from.

    Raises:
        ValueError: If a figure is missing or does not belong to the model; names the file and the command
            that makes it.
    """
    model = run / "model"
    adapter = (model / "adapter_config.json").is_file()
    trained = run if (run / "config.yaml").is_file() else run / "training"
    settings = _read_settings(model)
    datasets = settings.data.datasets if settings else []
    places = {"run": run, "trained": trained, "data": datasets[0].path if datasets else run / "dataset"}
    _refuse_missing_files(places, adapter, open_loop)
    summary = read_json(trained / "summary.json")
    evaluation = read_json(run / "eval.json") if (run / "eval.json").is_file() else None
    _check_figures(places, summary, evaluation)
    evaluations = {"eval.json": evaluation} if evaluation else {}
    for path in sorted({*run.glob("eval-*.json"), *seed_evaluations}):
        other = _read_other_seed(path, evaluation, summary)
        evaluations[f"eval-seed{other['training']['seed']}.json"] = other

    folder = model / "evaluation"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("eval*.json"):
        old.unlink()
    described = _describe_training(summary, _start_from(settings, base, model), adapter)
    if base:
        described["base"] |= {"training": _read_stage(base), "has_card": True}
    write_json(folder / "training.json", described)
    if (run / DIAGNOSTICS).is_file():
        write_json(folder / DIAGNOSTICS, _read_diagnostics(run / DIAGNOSTICS, model))
    for name, content in evaluations.items():
        write_json(folder / name, content)
    for name in PICTURES:
        if (run / name).is_file():
            check_inside(run, run / name)
            with write_whole_file(model / name) as temporary:
                shutil.copyfile(run / name, temporary)


def read_measurements(folder: Path) -> dict:
    """What the folder says of itself.

    Returns:
        `dict`: `kind`, `config`, `summary`, `evaluation`, `diagnostics`, `seeds`, `latency`, `base`.

    Raises:
        ValueError: If the configuration or the training's figures are missing or damaged.
    """
    evaluation = folder / "evaluation"
    adapter = (folder / "adapter_config.json").is_file()
    settings = folder / ("adapter_config.json" if adapter else "config.json")
    for path, remedy in {
        settings: "give the folder that train.py exports",
        evaluation / "training.json": "run hub_cards/build.py on the run's folder, which holds model/",
    }.items():
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
    summary, config = read_json(evaluation / "training.json"), read_json(settings)
    base = summary.get("base")
    if adapter:
        # From the adapter's own file, which is corrected when the base is published later.
        name, revision = config["base_model_name_or_path"], config.get("revision")
        base = {"name": name, "revision": revision, "is_folder": is_folder(name)}
        config = summary.get("config", {})
    acts = "action" in config.get("objectives", ())
    measured, diagnostics, latency = (
        read_json(path) if (path := evaluation / f"{name}.json").is_file() else None
        for name in ("eval", "diagnostics", "latency")
    )
    return {
        "kind": "adapter" if adapter else "finetuned" if acts else "pretrained",
        "config": config,
        "summary": summary,
        "evaluation": measured,
        "diagnostics": diagnostics,
        "seeds": [read_json(path) for path in sorted(evaluation.glob("eval-seed*.json"))],
        "latency": latency,
        "base": base,
    }


def _refuse_missing_files(places: Mapping[str, str | Path], adapter: bool, open_loop: bool) -> None:
    run, trained = Path(places["run"]), Path(places["trained"])
    train = RESUME if (trained / "config.yaml").is_file() else TRAIN
    tried, summary = run / "eval.json", trained / "summary.json"
    needed = {
        run / "model" / ("adapter_config.json" if adapter else "config.json"): train,
        summary: train,
        run / "foresight.png": VISUALIZE,
    }
    acts = not summary.is_file() or "action" in read_json(summary).get("objectives", ["action"])
    if acts and not open_loop:
        needed[tried] = EVALUATE
    missing = [path for path in needed if not path.is_file()]
    lines = [f"{path} is missing; make it with:\n  {needed[path].format(**places)}" for path in missing]
    if tried in missing:
        lines.append(
            "(or with --benchmark libero or calvin; for a policy that none of them can try, --open-loop "
            "writes a card that says so)"
        )
    if lines:
        raise ValueError("\n".join(lines))


def _check_figures(places: Mapping[str, str | Path], summary: Mapping, evaluation: Mapping | None) -> None:
    """Refuse a run without held-out errors, and an evaluation of another model or of other weights."""
    run, again = Path(places["run"]), (evaluation or {}).get("command") or EVALUATE.format(**places)
    if not (summary.get("validation") or (evaluation or {}).get("open_loop")):
        raise ValueError(
            f"{places['trained']}/summary.json has no figures of held-out episodes (data.val_fraction 0?): "
            f"train with some, or measure them with:\n  {again} --dataset {places['data']}"
        )
    if evaluation is None:
        return
    measured = None
    if (run / evaluation["checkpoint"]["path"]).resolve() != (run / "model").resolve():
        measured = f"{evaluation['checkpoint']['path']}, not {run}/model"
    elif not has_measured_weights(evaluation, run / "model"):
        measured = f"weights that {run}/model had before it was exported again"
    elif changes := evaluation["settings"].get("perturbation"):
        measured = f"changed scenes ({', '.join(changes)})"
    elif change := evaluation["settings"].get("change"):
        measured = f"changed inputs ({change})"
    if measured:
        raise ValueError(f"{run}/eval.json measured {measured}; measure again with:\n  {again}")


def _read_diagnostics(path: Path, model: Path) -> dict:
    """Diagnostics of a run's model; refused if they are those of other weights."""
    diagnostics = read_json(path)
    if not has_measured_weights(diagnostics, model):
        raise ValueError(
            f"{path} measured other weights than {model} has; measure again:\n  {diagnostics['command']}"
        )
    return diagnostics


def has_measured_weights(evaluation: Mapping, model: Path) -> bool:
    """Whether a folder still has the weights that were evaluated; true where one of the two is unknown."""
    measured = evaluation["checkpoint"].get("weights_sha256")
    known = measured is not None and any(model.glob("*model*.safetensors"))
    return not known or measured == weights_digest(model)


def _read_other_seed(path: Path, evaluation: Mapping | None, summary: Mapping) -> dict:
    """An evaluation and how its training was done; refused if it cannot be compared with ours."""
    other = read_json(path)
    checkpoint = (path.parent / other["checkpoint"]["path"]).resolve()
    trained = read_summary(checkpoint)
    if not trained:
        raise ValueError(
            f"{path} measures {other['checkpoint']['path']}, but the summary.json of its training is not "
            "beside that: keep the file where evaluate.py wrote it, with the run"
        )
    if evaluation is None:
        raise ValueError(f"{path} cannot be compared with anything: evaluate this run too (eval.json)")
    for what, here, there in (
        ("benchmark", evaluation["benchmark"], other["benchmark"]),
        ("starts", _list_starts(evaluation), _list_starts(other)),
        ("settings", evaluation["settings"], other["settings"]),
        ("steps of training", summary["steps"], trained["steps"]),
    ):
        if here != there:
            raise ValueError(
                f"{path} has other {what} ({there}) than eval.json ({here}): evaluate both in the same way"
            )
    if trained["seed"] == summary["seed"]:
        raise ValueError(f"{path} is of a training with the same seed, {summary['seed']}: train with another")
    stage = {name: trained[name] for name in STAGE_FIELDS}
    return {**other, "training": stage | _describe_base(_read_settings(checkpoint), trained)}


def _list_starts(evaluation: Mapping) -> dict:
    """Tasks and starts that were tried, or the number of chains."""
    if "chains" in evaluation:  # which tasks are reached depends on the policy
        return {"chains": evaluation["chains"]["chains"]}
    return {"tasks": sorted(evaluation["tasks"])} | {n: evaluation["seeds"][n] for n in ("first", "last")}


def _describe_base(run: RunConfig | None, summary: Mapping) -> dict:
    """`base`: what a run started from, and how it was made if its run is beside it; empty without one."""
    if run is None or not run.init_from:
        return {}
    base = {"name": portable_path(run.init_from), "is_folder": is_folder(run.init_from)}
    base["revision"] = summary.get("init_revision")
    if stage := find_previous_stage(run):
        base["training"] = {name: stage[1][name] for name in STAGE_FIELDS}
    return {"base": base}


def _start_from(run: RunConfig | None, base: Path | None, model: Path) -> RunConfig | None:
    """The settings with `init_from` in the folder `base`; refused if that holds another model."""
    if base is None:
        return run
    if run is None or not run.init_from or not Path(run.init_from).is_dir():
        raise ValueError(f"--base {base}: the run of {model} did not start from a folder that is still there")
    if not (base / "evaluation" / "training.json").is_file():
        raise ValueError(f"--base {base} has no evaluation/training.json: run hub_cards/build.py on it first")
    if weights_digest(base) != weights_digest(run.init_from):
        raise ValueError(
            f"--base {base} has other weights than {portable_path(run.init_from)}, from which {model} started"
        )
    return dataclasses.replace(run, init_from=str(base))


def _read_stage(base: Path) -> dict:
    """How a model with a card was trained."""
    stage = read_json(base / "evaluation" / "training.json")
    return {name: stage[name] for name in STAGE_FIELDS}


def _read_settings(model: Path) -> RunConfig | None:
    return read_run_config(model) if run_folder(model) else None


def _describe_training(summary: Mapping, run: RunConfig | None, adapter: bool) -> dict:
    """The summary, licenses, and what the card says of the base, which another machine may lack."""
    described = {**summary, "licenses": list_parts(run, summary), **_describe_base(run, summary)}
    if adapter:
        if run is None:
            raise ValueError("the run's config.yaml is missing; it says which base the adapter has")
        from training.models.starting_model import starting_config

        base = starting_config(run).to_dict()
        described["config"] = {name: base[name] for name in BASE_FIELDS}
    return described


def is_folder(name: str) -> bool:
    """Whether a base's name is a place on some machine rather than a Hub id."""
    return Path(name).exists() or not is_hub_id(name)
