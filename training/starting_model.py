"""The model and processor that a run starts from: a trained one, or a fresh one for the data."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.utils import find_adapter_config_file

from modeling_foresight import (
    ForesightConfig,
    ForesightForActionPrediction,
    ForesightProcessor,
    build_small_tokenizer,
)
from modeling_foresight.processing_foresight import STILL
from training.config import RunConfig
from training.data import RunData

__all__ = ["build_model", "starting_config"]


def starting_config(config: RunConfig) -> ForesightConfig:
    """The model's config as far as the data need it: that of `init_from`, or the one of the run.

    Raises:
        ValueError: If `init_from` is an adapter.
    """
    if config.init_from:
        if find_adapter_config_file(config.init_from, revision=config.init_revision):
            raise ValueError(
                f"init_from={config.init_from} is an adapter, not a model: continue its run with --resume, "
                "or start from the merged model that --lora.merge true exports"
            )
        return AutoConfig.from_pretrained(config.init_from, revision=config.init_revision, **config.model)
    return ForesightConfig(**config.model)


def build_model(config: RunConfig, data: RunData) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """The policy and its processor: from `init_from`, or fresh on the towers that the config names."""
    if config.init_from:
        return load_base(config, data)
    fields = dict(config.model)
    if fields.pop("fps", None) not in (None, data.fps):
        raise ValueError(
            f"model.fps is {config.model['fps']}, but the dataset gives {data.fps:g} steps per second: leave "
            "it out, or choose a frame_stride"
        )
    if config.towers.tokenizer == "small":
        length = fields.get("text_config", {}).get("max_position_embeddings", 77)
        tokenizer = build_small_tokenizer(data.instructions, max_length=length)
        special = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
        }
        fields["text_config"] = {**fields.get("text_config", {}), "vocab_size": len(tokenizer), **special}
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.towers.tokenizer)
    # Sizes of a robot that the config leaves open are the dataset's.
    if data.train.action_dim:
        fields.setdefault("action_dim", data.train.action_dim)
        if fields.get("action_codec") != "local_delta":  # whose entries are fixed
            fields.setdefault("binary_action_indices", [])
    fields.setdefault("state_dim", data.train.state_dim)
    if fields.get("action_codec") != "local_delta":
        fields.setdefault("binary_state_indices", [])
    attention = config.train.attn_implementation
    model_config = ForesightConfig(**fields, fps=data.fps, attn_implementation=attention)
    if config.towers.text or config.towers.vision:
        model = ForesightForActionPrediction.from_encoder_checkpoints(
            model_config, text=config.towers.text, vision=config.towers.vision
        )
    else:
        model = ForesightForActionPrediction(model_config)
    return model, ForesightProcessor.from_config(model.config, tokenizer, **dataset_statistics(data))


def load_base(config: RunConfig, data: RunData) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """The trained model of `init_from` and a processor for this run's data.

    Raises:
        ValueError: If the model was made for another size of action or state than the data have, or its
            statistics are asked for and do not fit.
    """
    source = {"pretrained_model_name_or_path": config.init_from, "revision": config.init_revision}
    model = AutoModel.from_pretrained(
        **source,
        dtype=torch.float32,
        attn_implementation=config.train.attn_implementation,
        **config.model,
    )
    for name in ("action", "state"):
        here, there = getattr(data.train, f"{name}_dim"), getattr(model.config, f"{name}_dim")
        if here and there and here != there:
            raise ValueError(
                f"{config.init_from} was trained for {name}s of {there} entries, the dataset's have {here}: "
                f"choose a base that fits, or data.{name}_key={'null' if name == 'state' else '...'}"
            )
    model.config.fps = data.fps
    processor = AutoProcessor.from_pretrained(**source)
    if config.data.statistics == "dataset":
        own = {"action_stats": processor.action_stats, "state_stats": processor.state_stats}
        stats = {**own, **dataset_statistics(data)}
        processor = ForesightProcessor.from_config(model.config, processor.tokenizer, **stats)
    else:
        _check_motion(config, data, processor)
    return model, processor


def _check_motion(config: RunConfig, data: RunData, processor: ForesightProcessor) -> None:
    """Refuses statistics of the base by which the policy could not do what the data show.

    Raises:
        ValueError: If entries of the action move in the data that never did in the base's.
    """
    there, here = processor.action_stats, data.statistics("action") if data.train.action_dim else None
    if there is None or here is None:
        return
    binary = np.isin(np.arange(len(here["std"])), processor.binary_action_indices)
    was_still, is_still = (
        np.where(binary, np.equal(stats["min"], stats["max"]), np.less_equal(stats["std"], STILL))
        for stats in (there, here)
    )
    if entries := np.flatnonzero(was_still & ~is_still).tolist():
        raise ValueError(
            f"data.statistics=model: entries {entries} of the action move in the dataset, but never did in "
            f"what {config.init_from} was trained on, so they would be kept still: use "
            "data.statistics=dataset"
        )


def dataset_statistics(data: RunData) -> dict[str, dict]:
    """`action_stats` and `state_stats` of what the data have of them."""
    return {
        f"{name}_stats": data.statistics(name)
        for name in ("action", "state")
        if getattr(data.train, f"{name}_dim")
    }
