"""Gathers what a run measured into the folder that will be published: `evaluation/*.json` and pictures.

From then on the folder speaks for itself: `card.py` writes the card from it, `check.py` compares the two.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets_scripts.storage.atomic import write_json, write_whole_file
from hub_cards.cards.licences import parts_of_run, stage_before
from training.checkpoint_folder import read_run_config, read_summary, run_folder, weights_digest
from training.config import RunConfig, load_config
from training.run_facts import portable_path

__all__ = ["collect", "is_folder", "read_json", "same_weights"]

# What makes what a card needs; in braces the run, the folder of its training and its (first) dataset.
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
# What of a base's configuration the card of an adapter speaks of; a model has its own config.json.
OF_BASE = (
    "views",
    "objectives",
    "history_length",
    "chunk_size",
    "action_dim",
    "state_dim",
    "action_codec",
    "image_size",
)


def collect(run: Path, seed_evaluations: Sequence[Path] = (), open_loop: bool = False) -> None:
    """Copies figures and pictures of a run into its `model/`.

    Args:
        run (`Path`): Folder with `model/`, `eval.json`, `foresight.png` and, if there is one, `rollout.mp4`.
            `summary.json` and `config.yaml` of the training are in it, or in its `training/`.
        seed_evaluations (`Sequence[Path]`): What `training/evaluate.py` wrote for the same training with
            other seeds; `eval-*.json` of the run are added to them.
        open_loop (`bool`): Whether a policy may go without `eval.json`.

    Raises:
        ValueError: If a figure is missing or does not belong to the model; names the file and the command
            that makes it.
    """
    model = run / "model"
    adapter = (model / "adapter_config.json").is_file()
    trained, places = _training(run)
    make = RESUME if (trained / "config.yaml").is_file() else TRAIN
    needed = {
        model / ("adapter_config.json" if adapter else "config.json"): make,
        trained / "summary.json": make,
        run / "eval.json": EVALUATE,
        run / "foresight.png": VISUALIZE,
    }
    tried = run / "eval.json"
    if open_loop and not tried.is_file():
        del needed[tried]
    missing = [path for path in needed if not path.is_file()]
    if missing == [tried]:  # a model that only foresees cannot be tried
        acts = "action" in read_json(trained / "summary.json").get("objectives", ["action"])
        missing = [tried] if acts else []
    if missing:
        raise ValueError(
            "\n".join(
                f"{path} is missing; make it with:\n  {needed[path].format(**places)}" for path in missing
            )
            + (
                "\n(a policy that cannot be tried in MetaWorld gets a card that says so with --open-loop)"
                if tried in missing
                else ""
            )
        )
    summary = read_json(trained / "summary.json")
    evaluation = read_json(tried) if tried.is_file() else None
    _check_figures(places, summary, evaluation)
    seeds = {}
    for path in sorted({*run.glob("eval-*.json"), *seed_evaluations}):
        other = _of_other_seed(path, evaluation, summary)
        seeds[f"eval-seed{other['training']['seed']}.json"] = other

    folder = model / "evaluation"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("eval*.json"):
        old.unlink()
    write_json(folder / "training.json", _with_facts(summary, _settings(model), adapter))
    for name, content in {**({"eval.json": evaluation} if evaluation else {}), **seeds}.items():
        write_json(folder / name, content)
    for name in PICTURES:
        if (run / name).is_file():
            with write_whole_file(model / name) as temporary:
                shutil.copyfile(run / name, temporary)


def _training(run: Path) -> tuple[Path, dict[str, str | Path]]:
    """Folder of the run's training, and the places that the commands name."""
    trained = run if (run / "config.yaml").is_file() else run / "training"
    settings = trained / "config.yaml"
    datasets = load_config(settings, []).data.datasets if settings.is_file() else []
    data = datasets[0].path if datasets else run / "dataset"
    return trained, {"run": run, "trained": trained, "data": data}


def _check_figures(places: Mapping[str, str | Path], summary: Mapping, evaluation: Mapping | None) -> None:
    run = Path(places["run"])
    again = EVALUATE.format(**places)
    if not (summary.get("validation") or (evaluation or {}).get("open_loop")):
        raise ValueError(
            f"{places['trained']}/summary.json has no figures of held-out episodes (data.val_fraction 0?): "
            f"train with some, or measure them with:\n  {again} --dataset {places['data']}"
        )
    if evaluation is not None:
        measured = (run / evaluation["checkpoint"]["path"]).resolve()
        if measured != (run / "model").resolve():
            raise ValueError(
                f"{run}/eval.json measures {evaluation['checkpoint']['path']}, not {run}/model; "
                f"measure again with:\n  {again}"
            )
        if not same_weights(evaluation, run / "model"):
            raise ValueError(
                f"{run}/eval.json measured weights that {run}/model had before it was exported again; "
                f"measure again with:\n  {again}"
            )


def same_weights(evaluation: Mapping, model: Path) -> bool:
    """Whether a folder still has the weights that were evaluated; true where one of the two is unknown."""
    measured = evaluation["checkpoint"].get("weights_sha256")
    known = measured is not None and any(model.glob("*model*.safetensors"))
    return not known or measured == weights_digest(model)


def _of_other_seed(path: Path, evaluation: Mapping | None, summary: Mapping) -> dict:
    """An evaluation with what its training was; refused if the two cannot stand beside each other."""
    other = read_json(path)
    trained = read_summary((path.parent / other["checkpoint"]["path"]).resolve())
    if not trained:
        raise ValueError(
            f"{path} measures {other['checkpoint']['path']}, but the summary.json of its training is not "
            "beside that: keep the file where evaluate.py wrote it, with the run"
        )
    if evaluation is None:
        raise ValueError(f"{path} has nothing to stand beside: evaluate this run too (eval.json)")
    for what, here, there in (
        ("tasks", sorted(evaluation["tasks"]), sorted(other["tasks"])),
        ("starts", evaluation["seeds"]["first"], other["seeds"]["first"]),
        ("episodes", evaluation["mean"]["episodes"], other["mean"]["episodes"]),
        ("settings", evaluation["settings"], other["settings"]),
        ("steps of training", summary["steps"], trained["steps"]),
    ):
        if here != there:
            raise ValueError(f"{path} has other {what} ({there}) than eval.json ({here}): evaluate alike")
    if trained["seed"] == summary["seed"]:
        raise ValueError(f"{path} is of a training with the same seed, {summary['seed']}: train with another")
    base = _base(_settings((path.parent / other["checkpoint"]["path"]).resolve()), trained)
    return {**other, "training": _made(trained) | base}


def _made(summary: Mapping) -> dict:
    """How weights were made, as far as a card tells it of trainings other than its own."""
    return {name: summary[name] for name in ("seed", "steps", "train_seconds", "command", "date", "commit")}


def _base(run: RunConfig | None, summary: Mapping) -> dict:
    """`base`: what a run started from, and how that was made if its run lies beside it; empty without one."""
    if run is None or not run.init_from:
        return {}
    facts = {"name": portable_path(run.init_from), "is_folder": is_folder(run.init_from)}
    facts["revision"] = summary.get("init_revision")
    if stage := stage_before(run):
        facts["training"] = _made(stage[1])
    return {"base": facts}


def _settings(model: Path) -> RunConfig | None:
    return read_run_config(model) if run_folder(model) else None


def _with_facts(summary: Mapping, run: RunConfig | None, adapter: bool) -> dict:
    """The summary with what the card says of licences, and of the base, which another machine may lack."""
    facts = {**summary, "licences": parts_of_run(run, summary), **_base(run, summary)}
    if adapter:
        if run is None:
            raise ValueError("the run's config.yaml is missing; it says which base the adapter has")
        from training.starting_model import starting_config

        base = starting_config(run).to_dict()
        facts["config"] = {name: base[name] for name in OF_BASE}
    return facts


def is_folder(name: str) -> bool:
    """Whether a base's name is a place of some machine rather than a Hub id."""
    return Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~"))


def read_json(path: Path) -> dict:
    """Raises `ValueError` that names a damaged file."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and make it again") from None
    return content
