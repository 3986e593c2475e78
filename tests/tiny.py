"""The smallest model that has every part, with a batch for it; sizes differ so that a transposition fails."""

from functools import cache

import torch
from transformers import CLIPTextConfig, ViTConfig

from modeling_foresight import ForesightConfig, ForesightProcessor, build_small_tokenizer

BATCH = 3
TASKS = ("open the drawer", "push the red cube to the left", "close it")


@cache
def tiny_tokenizer():
    """A tokenizer for `TASKS`: start 0, end 1, padding 2."""
    return build_small_tokenizer(list(TASKS), vocab_size=300, max_length=16)


BATCH_NORM_TOWER = {
    "model_type": "timm_wrapper",
    "do_pooling": False,
    "architecture": "test_resnet",
    "model_args": {"features_only": True, "out_indices": [2]},
}


def tiny_config(**overrides) -> ForesightConfig:
    """T=5 frames of 2 views at 40 px, d=48, 2 layers, every objective on. `overrides` are config fields."""
    fields = {
        "text_config": CLIPTextConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=22,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        "vision_config": ViTConfig(
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=40,
            patch_size=10,
            layer_norm_eps=1e-6,
        ),
        "image_size": 40,
        "patch_size": 8,  # 25 patches of 64 pixels; the vision tower has 16
        "history_length": 5,
        "future_shift": 3,
        "chunk_size": 4,
        "flow_length": 6,
        "flow_grid": (2, 8),
        "num_flow_queries": 3,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "resampler_depth": 2,
        "resampler_heads": 3,
        "resampler_head_dim": 12,
        "action_dim": 7,
        "binary_action_indices": (2,),  # not the last one, so that the order of entries matters
        "state_dim": 11,
        "binary_state_indices": (4, 9),
        "action_hidden_size": 24,
        "action_encoder_depth": 2,
        "action_decoder_depth": 2,
        "action_num_heads": 8,
        "latent_dim": 6,
    }
    return ForesightConfig(**(fields | overrides))


def tiny_processor(config: ForesightConfig, **stats) -> ForesightProcessor:
    """The processor of `config`; `stats` are `action_stats` and `state_stats`."""
    return ForesightProcessor.from_config(config, tiny_tokenizer(), **stats)


def tiny_inputs(
    config: ForesightConfig, batch: int = BATCH, frames: int | None = None, seed: int = 0
) -> dict:
    """What a robot knows: images, instruction, state, masks, and a goal if the config has one."""
    draw = torch.Generator().manual_seed(seed)
    frames = frames or config.history_length
    side, views = config.image_size, len(config.views)
    text = tiny_tokenizer()([TASKS[i % len(TASKS)] for i in range(batch)], padding=True, return_tensors="pt")
    inputs = {
        "pixel_values": torch.randn(batch, frames, views, 3, side, side, generator=draw),
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "frame_mask": torch.ones(batch, frames, dtype=torch.bool),
        "view_mask": torch.ones(batch, views, dtype=torch.bool),
    }
    if config.state_dim:
        inputs["state"] = torch.randn(batch, frames, config.state_dim, generator=draw)
        binary = list(config.binary_state_indices)
        inputs["state"][..., binary] = (inputs["state"][..., binary] > 0).float()
    if config.goal_image:
        inputs["goal_pixel_values"] = torch.randn(batch, 3, side, side, generator=draw)
        inputs["goal_mask"] = torch.ones(batch, dtype=torch.bool)
    return inputs


def tiny_targets(
    config: ForesightConfig, batch: int = BATCH, frames: int | None = None, seed: int = 1
) -> dict:
    """Random targets of every objective of the config, in the right units and ranges."""
    draw = torch.Generator().manual_seed(seed)
    frames = frames or config.history_length
    side, views, points = config.image_size, len(config.views), config.num_flow_points
    targets = {}
    if config.has("action"):
        shape = (batch, frames, config.chunk_size)
        targets["actions"] = torch.randn(*shape, config.action_dim, generator=draw)
        binary = list(config.binary_action_indices)
        targets["actions"][..., binary] = (targets["actions"][..., binary] > 0).float()
        targets["action_mask"] = torch.ones(shape, dtype=torch.bool)
    if config.has("depth") or config.has("future"):
        targets["depth"] = 0.5 + torch.rand(batch, frames, views, side, side, generator=draw)
    if config.has("future") and config.future_targets == "lookahead":
        later = config.future_shift
        targets["lookahead_pixel_values"] = torch.randn(batch, later, views, 3, side, side, generator=draw)
        targets["lookahead_depth"] = 0.5 + torch.rand(batch, later, views, side, side, generator=draw)
        targets["lookahead_mask"] = torch.ones(batch, later, dtype=torch.bool)
    if config.has("flow"):
        targets["track_start"] = torch.rand(batch, frames, points, 2, generator=draw)
        targets["track"] = torch.rand(batch, frames, config.flow_length, points, 3, generator=draw)
        targets["track_weight"] = torch.ones(batch, frames, config.flow_length, points)
    if config.has("progress"):
        targets["progress"] = torch.rand(batch, frames, generator=draw)
    return targets


def tiny_batch(config: ForesightConfig, batch: int = BATCH, frames: int | None = None, seed: int = 0) -> dict:
    """A model batch with all inputs and targets of the config."""
    return tiny_inputs(config, batch, frames, seed) | tiny_targets(config, batch, frames, seed + 1)
