"""What a trained model's folder (or Hub repo) and the run beside it hold."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import find_adapter_config_file

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from training.config import RunConfig, load_config

__all__ = ["load_checkpoint", "read_run_config", "read_summary", "run_folder", "weights_digest"]

ADAPTER_CONFIG = "adapter_config.json"  # peft's name


def load_checkpoint(
    source: str | Path, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """Model in evaluation mode and processor.

    An adapter is merged into the base that it names.

    Args:
        source (`str` or `Path`): Folder or Hub id of a model, or of an adapter that `train.py` trained.
        device (`str` or `torch.device`): Where the model goes.
        revision (`str`, *optional*): Commit, branch or tag of a Hub repo.

    Raises:
        ValueError: If there is no such folder or repo, or a part of it is missing or damaged; names it.
    """
    folder = Path(source)
    if folder.is_dir():
        adapter = (folder / ADAPTER_CONFIG).is_file()
        needed = {"processor_config.json": "its processor"}
        if not adapter:
            needed = {"config.json": "a model's configuration", **needed}
        for name, what in needed.items():
            if not (folder / name).is_file():
                raise ValueError(
                    f"checkpoint {source} has no {name} ({what}): give the folder that train.py exports, for "
                    "example outputs/quickstart/model"
                )
        weights = "adapter_model.safetensors" if adapter else "model*.safetensors"  # LeRobot has others
        if not any(folder.glob(weights)):
            raise ValueError(f"checkpoint {source} has no weights ({weights}): export the model again")
        kind = "foresight" if adapter else _read_json(folder / "config.json").get("model_type")
        if kind != "foresight":
            raise ValueError(f"checkpoint {source} is a model of type {kind!r}, not 'foresight'")
    elif folder.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise ValueError(f"checkpoint {source} is no folder; train one first, or give a Hub id (owner/name)")
    try:
        if find_adapter_config_file(str(source), revision=revision):
            from training.adapters import load_adapter

            model = load_adapter(str(source), revision)
        else:
            model = ForesightForActionPrediction.from_pretrained(
                source, revision=revision, dtype=torch.float32
            )
        processor = ForesightProcessor.from_pretrained(source, revision=revision)
    except Exception as error:  # safetensors, hub and tokenizer libraries raise types of their own
        raise ValueError(f"checkpoint {source} cannot be loaded: {error}") from error
    return model.to(device).eval(), processor


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of the weights by name, dtype, shape and content, however many files they are split into.

    Args:
        folder (`str` or `Path`): Folder with `model*.safetensors` or `adapter_model.safetensors`.

    Raises:
        ValueError: If a file is damaged; names it.
    """
    lines = []
    for pattern in ("model*.safetensors", "adapter_model.safetensors"):
        for path in Path(folder).glob(pattern):
            try:
                lines += _tensor_digests(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}; copy it again, or export the model") from None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _tensor_digests(path: Path) -> list[str]:
    lines = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  no dict
            value = file.get_tensor(name)
            digest = hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
            lines.append(f"{name} {value.dtype} {tuple(value.shape)} {digest}")
    return lines


def run_folder(checkpoint: str | Path) -> Path | None:
    """The run that made a local checkpoint: around it, or in `training/` beside it (`make quickstart`)."""
    parent = Path(checkpoint).resolve().parent
    for folder in (parent, parent / "training"):
        if Path(checkpoint).is_dir() and (folder / "config.yaml").is_file():
            return folder
    return None


def read_summary(checkpoint: str | Path) -> dict:
    """`summary.json` of the run that made a local checkpoint; empty if it is not beside it."""
    folder = run_folder(checkpoint)
    return _read_json(folder / "summary.json") if folder and (folder / "summary.json").is_file() else {}


def read_run_config(checkpoint: str | Path) -> RunConfig:
    """Settings of the run that made a local checkpoint; defaults if they are not beside it.

    The split into training and validation episodes follows from them.
    """
    folder = run_folder(checkpoint)
    return load_config(folder / "config.yaml", []) if folder else RunConfig()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
