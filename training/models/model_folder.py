"""The folder (or Hub repo) of a trained model: write it, load it, and find the run that made it."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from datasets_scripts.storage.atomic import read_json, write_whole_folder
from datasets_scripts.storage.file_hash import hash_file
from datasets_scripts.storage.hub.download import is_hub_id
from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.exported_policy import POLICY_FILE, ExportedPolicy
from training.config import RunConfig
from training.config_reading import load_config
from training.engines.wrapping import plain_model, whole_state
from training.models.own_exports import note_export

__all__ = [
    "DATASETS",
    "check_checkpoint",
    "export_model",
    "export_places",
    "find_commit",
    "is_exported",
    "load_checkpoint",
    "load_exported",
    "read_run_config",
    "read_summary",
    "run_folder",
    "settings_digest",
    "summary_of",
    "summary_places",
    "weights_digest",
]

ADAPTER_CONFIG = "adapter_config.json"  # peft's name
DATASETS = "datasets.json"  # in the run folder: what it was trained on
SUMMARY = "summary.json"  # in the run folder: what was trained on what, and how good it is


def export_places(config: RunConfig) -> list[Path]:
    """Folders that a run exports."""
    export, merges = Path(config.export), config.lora.r and config.lora.merge
    return [export, *([_merged_folder(export)] if merges else [])]


def export_model(
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: ForesightProcessor,
    config: RunConfig,
    image_keys: dict[str, str | None],
    base: dict | None,
) -> None:
    """Writes the trained model, or the adapter and, if asked for, the merged model; all processes call it.

    `model` is as Accelerate prepared it; `image_keys` are the image columns of the views, for LeRobot; `base`
    is the description of an adapter's base.
    """
    target, output = Path(config.export), Path(config.output)
    state = whole_state(accelerator, model)
    if accelerator.is_main_process:
        plain = plain_model(accelerator, model)
        if base is None:
            save = functools.partial(plain.save_pretrained, state_dict=state)
            write_export(target, processor, save, image_keys, output)
        else:
            from training.models.adapters import merge_adapter, write_adapter  # peft is slow to import

            write_export(
                target, processor, lambda folder: write_adapter(plain, folder, base, state), None, output
            )
            if config.lora.merge:
                merged = merge_adapter(plain, state)
                write_export(_merged_folder(target), processor, merged.save_pretrained, image_keys, output)
            else:
                print(f"{target} is not a policy for LeRobot's commands; --lora.merge true makes one")
            if Path(config.init_from).exists():
                print(
                    f"{target} names its base as {config.init_from!r}, a folder that other machines do not "
                    "have: before publishing, push the base to the Hub and put its id into "
                    "adapter_config.json (docs/lora.md)"
                )
    accelerator.wait_for_everyone()


def _merged_folder(export: Path) -> Path:
    """Where the merged model goes, beside its adapter."""
    return export.with_name(f"{export.name}-merged")


def write_export(
    target: Path,
    processor: ForesightProcessor,
    write: Callable[[Path], None],
    image_keys: dict[str, str | None] | None = None,
    output: Path | None = None,
) -> None:
    """Writes model and processor for `from_pretrained`; `target` appears only when it is whole.

    `write` writes the model into the folder it is given. With `image_keys` it becomes a LeRobot policy too.
    The run in `output` may replace it later.

    Raises:
        OSError: If a file cannot be written.
    """
    try:
        with write_whole_folder(target, replace=True) as folder:
            write(folder)
            processor.save_pretrained(folder)
            if image_keys is not None:
                add_lerobot_files(folder, target, image_keys)
            if output is not None:
                note_export(output, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer reports a full disk differently
        raise OSError(
            f"the model could not be written to {target}: {error}. Free space and repeat with --resume"
        ) from error


def add_lerobot_files(folder: Path, target: Path, image_keys: dict[str, str | None]) -> None:
    """Makes a model that will lie in `target` a LeRobot policy too, or prints why LeRobot cannot use it."""
    # No other part of training needs the policy.
    from lerobot_policy_foresight.lerobot_files import write_lerobot_files

    try:
        write_lerobot_files(folder, image_keys)
    except (ValueError, ImportError, StrictDataclassError) as error:
        message = str(error).replace(str(folder), str(target))
        print(f"{target} is not a policy for LeRobot's commands: {message}")


def load_checkpoint(
    source: str | Path, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """Model in evaluation mode and processor; an adapter is merged into the base that it names.

    Args:
        source (`str` or `Path`): Folder or Hub id of a model, or of an adapter that `train.py` trained.
        device (`str` or `torch.device`): Where the model goes.
        revision (`str`, *optional*): Commit, branch or tag of a Hub repo.

    Raises:
        ValueError: If there is no such folder or repo, or a part of it is missing or damaged; names it.
    """
    check_checkpoint(source, "checkpoint")
    try:
        if find_adapter_config_file(str(source), revision=revision):
            from training.models.adapters import load_adapter

            model = load_adapter(str(source), revision)
        else:
            model = ForesightForActionPrediction.from_pretrained(
                source, revision=revision, dtype=torch.float32
            )
        processor = ForesightProcessor.from_pretrained(source, revision=revision)
    except Exception as error:  # safetensors, hub and tokenizer libraries raise their own types
        raise ValueError(f"checkpoint {source} cannot be loaded: {error}") from error
    return model.to(device).eval(), processor


def check_checkpoint(source: str | Path, setting: str) -> None:
    """Refuses what is neither a folder with a model or an adapter nor a Hub id; `setting` gave it.

    Raises:
        ValueError: Names the setting, the folder and the part that it lacks.
    """
    if Path(source).is_dir():
        _check_folder(Path(source), f"{setting} {source}")
    elif not is_hub_id(source):
        raise ValueError(
            f"{setting} {source} is not a folder; train one first, or give a Hub id (owner/name)"
        )


def find_commit(source: str | Path, revision: str | None = None) -> str | None:
    """Commit of the files of a Hub repo that this machine has loaded; `None` for a folder.

    Of an adapter it is the adapter's, not that of its base.
    """
    if Path(source).is_dir():
        return None
    known = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    for name in (ADAPTER_CONFIG, "config.json"):
        if file := cached_file(str(source), name, **known):
            return extract_commit_hash(file, None)
    return None


def is_exported(source: str | Path) -> bool:
    """Whether this is a folder that `python -m modeling_foresight.export` wrote."""
    return (Path(source) / POLICY_FILE).is_file()


def load_exported(folder: str | Path) -> tuple[ExportedPolicy, ForesightProcessor]:
    """An exported policy, which acts but predicts nothing else, and its processor.

    Raises:
        ValueError: If a part is missing or damaged, or ONNX Runtime is not installed; says which.
    """
    try:
        return ExportedPolicy(folder), ForesightProcessor.from_pretrained(folder)
    except Exception as error:  # the libraries raise their own types
        raise ValueError(f"checkpoint {folder} cannot be loaded: {error}") from error


def _check_folder(folder: Path, told: str) -> None:
    """Refuses a folder that lacks a part of a model or adapter of this project; names the part."""
    if is_exported(folder):
        raise ValueError(f"{told} is an exported policy, which only acts: give the model it came from")
    adapter = (folder / ADAPTER_CONFIG).is_file()
    needed = {} if adapter else {"config.json": "a model's configuration"}
    for name, what in {**needed, "processor_config.json": "its processor"}.items():
        if not (folder / name).is_file():
            raise ValueError(
                f"{told} has no {name} ({what}): give the folder that train.py exports, for example "
                "outputs/quickstart/model"
            )
    weights = "adapter_model.safetensors" if adapter else "model*.safetensors"  # LeRobot has others
    if not any(folder.glob(weights)):
        raise ValueError(f"{told} has no weights ({weights}): export the model again")
    config = {"model_type": "foresight"} if adapter else read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "foresight":
        raise ValueError(f"{told} is a model of type {kind!r}, not 'foresight'")


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of a folder's weights by name, dtype, shape and content, however they are split into files.

    Raises:
        ValueError: If a file is damaged; names it.
    """
    exported = sorted(path for path in Path(folder).iterdir() if path.suffix in (".onnx", ".data", ".pt2"))
    lines = [f"{path.name} {hash_file(path)}" for path in exported]
    for path in [*Path(folder).glob("model*.safetensors"), *Path(folder).glob("adapter_model.safetensors")]:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    value = file.get_tensor(name)
                    digest = hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy())
                    lines.append(f"{name} {value.dtype} {tuple(value.shape)} {digest.hexdigest()}")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; copy it again, or export the model") from None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def settings_digest(folder: str | Path) -> str:
    """SHA-256 of what beside the weights decides a folder's actions: the model's settings, the processor."""
    folder = Path(folder)
    content = {}
    for name in ("config.json", ADAPTER_CONFIG, "processor_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            content[name] = read_json(folder / name)
    if known := content.get("config.json"):  # LeRobot's commands and the library add fields of their own
        content["config.json"] = {name: known.get(name) for name in ForesightConfig.__annotations__}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_folder(checkpoint: str | Path) -> Path | None:
    """The run that made a local checkpoint: around it, or in `training/` beside it (`make quickstart`)."""
    parent = Path(checkpoint).resolve().parent
    for folder in (parent, parent / "training"):
        if Path(checkpoint).is_dir() and (folder / "config.yaml").is_file():
            return folder
    return None


def summary_of(export: Path, output: Path) -> Path:
    """Where the figures of an export of the run in `output` are.

    Those of the export that the run was begun with are the run's. Other weights of the same run, exported
    later to another folder, have theirs beside them.
    """
    begun = load_config(output / "config.yaml", []) if (output / "config.yaml").is_file() else None
    if begun is None or export.absolute() == Path(begun.export).absolute():
        return output / SUMMARY
    # The whole run may have moved.
    is_own = os.path.relpath(export, output) == os.path.relpath(begun.export, begun.output)
    return output / SUMMARY if is_own else _summary_beside(export)


def summary_places(config: RunConfig) -> list[Path]:
    """Where a run writes the figures of what it has just exported; its folder has always some."""
    output = Path(config.output)
    if summary_of(Path(config.export), output) == output / SUMMARY:
        return [output / SUMMARY]
    beside = [_summary_beside(place) for place in export_places(config)]
    return beside if (output / SUMMARY).exists() else [output / SUMMARY, *beside]


def _summary_beside(export: Path) -> Path:
    return export.with_name(f"{export.name}-{SUMMARY}")


def read_summary(checkpoint: str | Path) -> dict:
    """Figures of the training of a local checkpoint; empty if they are not where [`summary_of`] has them."""
    places = [_summary_beside(Path(checkpoint).resolve())]
    if folder := run_folder(checkpoint):
        places.append(folder / SUMMARY)
    return next((read_json(place) for place in places if place.is_file()), {})


def read_run_config(checkpoint: str | Path) -> RunConfig:
    """Settings of the run that made a local checkpoint; defaults if they are not beside it.

    The split into training and validation episodes follows from them.
    """
    folder = run_folder(checkpoint)
    return load_config(folder / "config.yaml", []) if folder else RunConfig()
