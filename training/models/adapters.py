"""LoRA in a run: an adapter on a base, and checkpoints and folders that hold the adapter alone.

An adapter folder holds what `peft` writes, the processor of the data it was trained on, and
`foresight_adapter.json`, which identifies the weights of the base.
"""

import copy
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from datasets_scripts.storage.atomic import read_json, write_json
from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.base_model import refuse_broken_weights
from modeling_foresight.lora import lora_config
from training.config import LoraOptions
from training.engines.machines import is_writer

__all__ = [
    "add_lora",
    "describe_base",
    "load_adapter",
    "merge_adapter",
    "save_only_adapter",
    "write_adapter",
]

WEIGHTS = "adapter_model.safetensors"  # peft's name
BASE_FILE = "foresight_adapter.json"


def add_lora(model: ForesightForActionPrediction, options: LoraOptions) -> PeftModel:
    """Freezes a model and puts the adapter of `options` on it."""
    config = lora_config(
        model,
        r=options.r,
        lora_alpha=options.r if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        modules_to_save=options.modules_to_save,
    )
    return get_peft_model(model, config)


def describe_base(model: ForesightForActionPrediction) -> dict:
    """Name, revision and weights digest of an adapter's base, and the run's control rate and robots.

    Call it before [`add_lora`].

    The digest covers the values of all parameters and saved buffers (running statistics), not their names or
    files: it is the same for a folder, its copy on the Hub, and any sharding.
    """
    saved = model.state_dict().keys()
    tensors = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]
    raw = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in tensors)
    digests = sorted(hashlib.sha256(t.numpy()).digest() for t in raw)
    return {
        "base_model": model.name_or_path,
        "base_revision": getattr(model.config, "_commit_hash", None),
        "base_weights_sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        "fps": model.config.fps,
        "embodiments": model.config.embodiments,
    }


def write_adapter(model: PeftModel, folder: Path, base: dict, state: dict | None = None) -> None:
    """Writes the adapter of a model without its base, which [`describe_base`] described.

    `state` is the state of the whole model, if it was gathered from shards.
    """
    # Embeddings belong to the frozen text tower; by default peft asks the Hub about them.
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # a template; hub_cards writes cards
    write_json(folder / BASE_FILE, base)


def merge_adapter(model: PeftModel, state: Mapping[str, Tensor]) -> ForesightForActionPrediction:
    """A new model on the CPU with the adapter merged into its base; `model` does not change.

    `state` is the whole model's: the weights in `model` may be parts, and modules in shards cannot be copied.
    """
    base = ForesightForActionPrediction(copy.deepcopy(model.get_base_model().config))
    adapted = get_peft_model(base, copy.deepcopy(model.peft_config["default"]))
    adapted.load_state_dict(state)
    return adapted.merge_and_unload()


def save_only_adapter(accelerator: Accelerator, base: dict) -> None:
    """Makes Accelerate's checkpoints hold the adapter instead of the whole model; shards hold both."""

    def save(models, weights, folder):
        sharded = not weights  # FSDP has written them
        weights.clear()  # Accelerate writes what is left in this list
        if is_writer(accelerator) and sharded:
            write_json(Path(folder) / BASE_FILE, base)
        elif is_writer(accelerator):
            write_adapter(accelerator.unwrap_model(models[0]), Path(folder), base)

    def load(models, folder):
        folder = Path(folder)
        before = read_json(folder / BASE_FILE)
        if before["base_weights_sha256"] != base["base_weights_sha256"]:
            raise ValueError(
                f"{folder} was trained on other weights than {base['base_model']} has now: bring back the "
                "base it started from (revision "
                f"{before['base_revision'] or 'unknown'}), or choose another --output"
            )
        if not models:  # FSDP has loaded them
            return
        model = accelerator.unwrap_model(models.pop())  # Accelerate loads what is left in this list
        state = load_file(folder / WEIGHTS)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        if state.keys() != expected:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit this run: {sorted(state.keys() ^ expected)[:5]}"
            )
        set_peft_model_state_dict(model, state)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_adapter(source: str, revision: str | None = None) -> ForesightForActionPrediction:
    """An adapter merged into the base that it names: a plain model in float32.

    Args:
        source (`str`): Adapter folder or Hub id.
        revision (`str`, *optional*): Of the adapter's repo.

    Raises:
        ValueError: If the base is missing or is not the one that the adapter was trained on, or a part of the
            adapter is missing; names it and the remedy.
    """
    config = PeftConfig.from_pretrained(source, revision=revision)
    if getattr(config, "megatron_config", None) is not None:  # peft would import the module `megatron_core`
        raise ValueError(f"adapter_config.json of {source} names code in megatron_core: train it again")
    if not Path(source).is_dir() and Path(config.base_model_name_or_path or "").is_dir():
        raise ValueError(
            f"the adapter {source} of the Hub names a folder of this machine as its base, "
            f"{config.base_model_name_or_path}: download the adapter, and correct base_model_name_or_path in "
            "its adapter_config.json"
        )
    base = f"{config.base_model_name_or_path}" + (f" (revision {config.revision})" if config.revision else "")
    remedy = (
        f"bring it back, or correct base_model_name_or_path in the adapter_config.json of {source}. An "
        "adapter does not work without its base; --lora.merge true exports a model that stands alone"
    )
    try:
        model = ForesightForActionPrediction.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, dtype=torch.float32
        )
    except Exception as error:  # safetensors, hub and config classes raise their own types
        raise ValueError(f"its base {base} cannot be loaded ({error}): {remedy}") from error
    file = cached_file(source, BASE_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    trained_on = read_json(Path(file)) if file else {}  # peft alone does not write this file
    if trained_on and trained_on["base_weights_sha256"] != describe_base(model)["base_weights_sha256"]:
        raise ValueError(f"its base {base} has other weights than the adapter was trained on: {remedy}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # Without memory, until the sizes in its config have been compared with its weights.
        adapted = PeftModel.from_pretrained(model, source, revision=revision, low_cpu_mem_usage=True)
    merged = adapted.merge_and_unload()
    refuse_broken_weights(merged, source)
    for name in ("fps", "embodiments"):
        setattr(merged.config, name, trained_on.get(name, getattr(merged.config, name)))
    return merged
