"""The smallest InstructPix2Pix pipeline that has every part, with random weights."""

from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_foresight import build_small_tokenizer
from tests.tiny import TASKS

SIDE, TOKENS = 32, 48  # pixels of its pictures, tokens of a prompt
WIDTH, LATENTS = 16, 4  # of its text features, channels of its latents


def tiny_pipeline(seed: int = 0, in_channels: int = 2 * LATENTS):
    """Weights of a seed; the autoencoder halves pictures."""
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )

    tokenizer = build_small_tokenizer([*TASKS, "And 90% of the instruction has been finished."], 300, TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIDE // 2,
            in_channels=in_channels,
            out_channels=LATENTS,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=LATENTS,
            norm_num_groups=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(**betas),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny_pipeline(folder: Path, **options) -> Path:
    """Writes [`tiny_pipeline`], with a sampling of two steps."""
    from datasets_scripts.storage.atomic import write_json

    tiny_pipeline(**options).save_pretrained(folder)
    write_json(folder / "goal_images.json", {"image_size": SIDE, "steps": 2})
    return folder
