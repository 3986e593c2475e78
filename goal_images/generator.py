"""Goal images from an InstructPix2Pix pipeline: the picture now, edited into the picture a few steps later.

As GR-MG (https://github.com/bytedance/GR-MG) draws them: the prompt holds the instruction and the progress in
tens of percent, pictures have 256 px, 50 denoising steps, guidance 7.5 by the text and 2.5 by the picture.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from datasets_scripts.extras import install_advice
from datasets_scripts.storage.atomic import read_json
from goal_images.source import GoalRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline

__all__ = ["SAMPLING_FILE", "GoalGenerator", "Sampling", "load_pipeline", "write_prompt"]

SAMPLING_FILE = "goal_images.json"  # of a pipeline's folder: its `Sampling`
PIPELINE = "StableDiffusionInstructPix2PixPipeline"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; the defaults are GR-MG's.

    Attributes:
        image_size (`int`): Pixels per side of the pictures that the U-Net edits.
        steps (`int`): Denoising steps.
        guidance (`float`): Classifier-free guidance by the text.
        image_guidance (`float`): The same by the picture.
    """

    image_size: int = 256
    steps: int = 50
    guidance: float = 7.5
    image_guidance: float = 2.5

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} of the goal generator is {value!r}; it must be at least 1")


def write_prompt(instruction: str, progress: float) -> str:
    """GR-MG's prompt; `progress` in [0, 1] is cut to 0, 10, ..., 90 percent, which its training has."""
    percent = 10 * min(max(int(10 * progress), 0), 9)
    return f"{instruction}.And {percent}% of the instruction has been finished."


class GoalGenerator:
    """Draws goals with an InstructPix2Pix pipeline.

    Args:
        source (`str` or `Path`): Folder or Hub id of the pipeline, safetensors only.
        device (`str`, *optional*): Default: cuda if there is one, otherwise cpu.
        dtype (`torch.dtype`, *optional*): Default: bfloat16 on a GPU, as GR-MG, float32 elsewhere.
        seed (`int`): Noise is a function of the seed, the picture and the prompt.
        sampling (`Sampling`, *optional*): Default: `goal_images.json` of the folder, otherwise GR-MG's.

    Raises:
        ValueError: If there is no such pipeline, or it is another one; names it.
        RuntimeError: If diffusers is not installed.
    """

    needs_progress = True

    def __init__(
        self,
        source: str | Path,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        self.sampling, self.seed = sampling or read_sampling(source), seed
        self.pipeline = load_pipeline(source, dtype).to(device)

    def draw(self, requests: Sequence[GoalRequest]) -> np.ndarray:
        """Goals `(robots, image_size, image_size, 3)` uint8 RGB, see `GoalSource`.

        Raises:
            RuntimeError: If a picture is not finite.
        """
        sampling, side = self.sampling, self.sampling.image_size
        prompts = [write_prompt(request.instruction, request.progress) for request in requests]
        pictures = [Image.fromarray(request.picture) for request in requests]
        noise = [
            # On the CPU, so that a GPU draws the same.
            torch.Generator().manual_seed(zlib.crc32(request.picture.tobytes() + prompt.encode(), self.seed))
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        made = self.pipeline(
            prompts,
            image=[picture.resize((side, side), Image.Resampling.BILINEAR) for picture in pictures],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            image_guidance_scale=sampling.image_guidance,
            generator=noise,
            output_type="np",
        ).images  # (B, side, side, 3) in [0, 1]
        if not np.isfinite(made).all():
            raise RuntimeError("the goal generator drew NaN: its weights are damaged, or need another dtype")
        return (255 * made).round().astype(np.uint8)


def read_sampling(source: str | Path) -> Sampling:
    """`goal_images.json` of a pipeline's folder; GR-MG's values where there is none, as on the Hub."""
    path = Path(source) / SAMPLING_FILE
    if not path.is_file():
        return Sampling()
    try:
        return Sampling(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} has a field that is none of a sampling's: {error}") from None


def load_pipeline(
    source: str | Path, dtype: torch.dtype = torch.float32
) -> "StableDiffusionInstructPix2PixPipeline":
    """An InstructPix2Pix pipeline without safety checker, on the CPU; raises as `GoalGenerator`."""
    try:
        from diffusers import StableDiffusionInstructPix2PixPipeline
    except ImportError as error:
        raise RuntimeError(f"goal images need diffusers ({error}); run `{install_advice('goal')}`") from None
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        kind = read_json(index).get("_class_name") if index.is_file() else None
        if kind != PIPELINE:
            found = f"of a {kind}" if kind else "without model_index.json"
            raise ValueError(f"goal generator {source} is a folder {found}; give one of a {PIPELINE}")
    elif folder.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise ValueError(f"goal generator {source} is neither a folder nor a Hub id (owner/name)")
    try:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            source,
            torch_dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # diffusers, transformers and the Hub raise their own types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"goal generator {source} cannot be loaded: {reason}") from error
    channels, needed = pipeline.unet.config.in_channels, 2 * pipeline.vae.config.latent_channels
    if channels != needed:
        raise ValueError(
            f"the U-Net of goal generator {source} takes {channels} channels; an InstructPix2Pix takes "
            f"{needed}, noise and picture"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
