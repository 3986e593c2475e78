"""Goal images from an InstructPix2Pix pipeline: the picture now, edited into the picture a few steps later.

As GR-MG (https://github.com/bytedance/GR-MG) draws them: the prompt holds the instruction and the progress in
tens of percent, pictures have 256 px, 50 denoising steps, guidance 7.5 by the text and 2.5 by the picture.
"""

import contextlib
import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from datasets_scripts.command_line import pick_device
from datasets_scripts.extras import install_advice
from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.file_hash import hash_file
from datasets_scripts.storage.hub.download import is_hub_id
from goal_images.source import GoalRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline

__all__ = [
    "SAMPLING_FILE",
    "GoalGenerator",
    "Sampling",
    "load_pipeline",
    "pipeline_digest",
    "read_sampling",
    "write_prompt",
]

SAMPLING_FILE = "goal_images.json"  # of a pipeline's folder: its `Sampling`
PIPELINE = "StableDiffusionInstructPix2PixPipeline"
PIPELINE_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
HOW_TO_LOAD = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}


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
            kind = int if name in ("image_size", "steps") else int | float
            if not isinstance(value, kind) or isinstance(value, bool) or not value >= 1:
                what = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} of the goal generator is {value!r}; it must be {what}, at least 1")


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
        device = pick_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
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
    kind, folder = import_pipeline(), find_pipeline(source)
    with explain_failure(source):
        pipeline = kind.from_pretrained(folder, torch_dtype=dtype, **HOW_TO_LOAD)
    channels, needed = pipeline.unet.config.in_channels, 2 * pipeline.vae.config.latent_channels
    if channels != needed:
        raise ValueError(
            f"the U-Net of goal generator {source} takes {channels} channels; an InstructPix2Pix takes "
            f"{needed}, noise and picture"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_digest(source: str | Path) -> str:
    """SHA-256 of the files that a pipeline is loaded from: weights, configurations and tokenizer.

    All copies of a pipeline have the same. Its [`Sampling`] is not part of it. Raises as `GoalGenerator`.
    """
    folder, lines = find_pipeline(source), []
    for path in sorted(path for part in PIPELINE_PARTS for path in (folder / part).glob("*")):
        # Names with two dots are variants that are not loaded (model.fp16.safetensors), and lists of shards.
        if path.suffix in (".safetensors", ".json", ".txt", ".model") and path.name.count(".") == 1:
            lines.append(f"{path.parent.name}/{path.name} {hash_file(path)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_pipeline(source: str | Path) -> Path:
    """Folder of an InstructPix2Pix pipeline, downloaded if it is on the Hub; raises as `GoalGenerator`."""
    folder = Path(source)
    if not folder.is_dir():
        if not is_hub_id(source):
            raise ValueError(f"goal generator {source} is neither a folder nor a Hub id (owner/name)")
        kind = import_pipeline()
        with explain_failure(source):
            folder = Path(kind.download(str(source), **HOW_TO_LOAD))
    index = folder / "model_index.json"
    found = read_json(index).get("_class_name") if index.is_file() else None
    if found != PIPELINE:
        found = f"holds a {found}" if found else "has no model_index.json"
        raise ValueError(f"goal generator {source} {found}; give a {PIPELINE}")
    return folder


def import_pipeline() -> type["StableDiffusionInstructPix2PixPipeline"]:
    """The pipeline's class; raises a `RuntimeError` with what installs diffusers."""
    try:
        from diffusers import StableDiffusionInstructPix2PixPipeline
    except ImportError as error:
        raise RuntimeError(f"goal images need diffusers ({error}); run `{install_advice('goal')}`") from None
    return StableDiffusionInstructPix2PixPipeline


@contextlib.contextmanager
def explain_failure(source: str | Path) -> Iterator[None]:
    """Makes one kind of error of those that diffusers, transformers and the Hub raise."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"goal generator {source} cannot be loaded: {reason}") from error
