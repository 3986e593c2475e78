"""Depth models of transformers: Depth-Anything-V2 (metric or relative), ZoeDepth, DepthPro, GLPN, DPT."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

from datasets_scripts.command_line import pick_device
from datasets_scripts.depth.gpu import compute_ahead
from datasets_scripts.licenses import read_card_license
from datasets_scripts.storage.file_hash import hash_file

# What the numbers are, by the type in a model's config. DPT covers MiDaS, whose depth is inverse.
METRIC_TYPES, RELATIVE_TYPES = ("zoedepth", "depth_pro", "glpn"), ("dpt",)
# What the library calls depth estimation too, and why it is none here.
OTHER_TYPES = {
    "chmv2": "it measures the height of trees in pictures from above, not the distance from a camera",
    "prompt_depth_anything": "it refines the depth of a sensor, and gives no meters without; for a dataset "
    "that has such depth use --depth sensor",
}
MOST_MISSING = 0.1  # of the tensors of a model


class TransformersDepth:
    """A depth model of transformers.

    Args:
        name (`str`): Hub id or folder; weights in safetensors.
        device (`str`): `"auto"`: a GPU if there is one.
        batch_size (`int`, *optional*): Frames at once; 16 on a GPU, 2 on a CPU.

    Raises:
        ValueError: If it cannot be loaded; says why.
    """

    def __init__(self, name: str, device: str = "auto", batch_size: int | None = None):
        self.name, self.device = name, pick_device(device)
        self.is_metric = self.check(name)
        self.batch_size = batch_size or (16 if self.device.type == "cuda" else 2)
        try:
            self.processor = AutoImageProcessor.from_pretrained(name)
            model, loading = AutoModelForDepthEstimation.from_pretrained(
                name,
                use_safetensors=True,  # nothing pickled is opened
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"depth model {name} cannot be loaded: {error}") from error
        # The library fills in what a file lacks at random. A few layers that no result needs are often left
        # out; more means that the file belongs to another model.
        missing, total = len(loading["missing_keys"]), len(model.state_dict())
        if missing > MOST_MISSING * total:
            raise ValueError(
                f"the weights in {name} belong to another model: {missing} of {total} are missing"
            )
        self.model = model.to(self.device).eval()
        # bf16 keeps 8 bits, too few for meters: Depth-Anything's last layers stay in float32, and so do all
        # layers of the other models, which were not tested in bf16.
        self.in_bfloat16 = self.device.type == "cuda" and model.config.model_type == "depth_anything"
        if self.in_bfloat16:
            self.model.head = _InFloat32(self.model.head, self.device.type)

    @staticmethod
    def check(name: str) -> bool:
        """Whether a model gives meters, from its config alone.

        Raises:
            ValueError: If there is no such model, or it is not a depth model that works here.
        """
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"depth model {name} cannot be read: neither a folder with a config.json nor on the Hub "
                f"or in its cache ({str(error).splitlines()[0]})"
            ) from error
        if config.model_type == "depth_anything":
            return config.depth_estimation_type == "metric"
        if config.model_type in METRIC_TYPES + RELATIVE_TYPES:
            return config.model_type in METRIC_TYPES
        if config.model_type in OTHER_TYPES:
            raise ValueError(f"{name} is of type '{config.model_type}': {OTHER_TYPES[config.model_type]}")
        raise ValueError(
            f"{name} is a model of type '{config.model_type}'; depth comes from depth_anything, "
            f"{', '.join(METRIC_TYPES + RELATIVE_TYPES)}"
        )

    def describe(self) -> dict[str, Any]:
        """Model, revision (of the Hub, or a hash of the weights in a folder), license, package, precision."""
        revision = self.model.config._commit_hash
        if revision is None:
            files = sorted(Path(self.name).glob("*.safetensors"))
            revision = "sha256:" + " ".join(hash_file(file)[:32] for file in files)
        return {
            "model": Path(self.name).name if Path(self.name).is_dir() else self.name,
            "revision": revision,
            "license": _read_license(self.name),
            "is_metric": self.is_metric,
            "package": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "precision": "bfloat16" if self.in_bfloat16 else "float32",
        }

    def predict(self, frames: Sequence[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        """Depth of successive frames, `(k, H, W)` float32 at the frames' resolution."""
        numbers = range(len(frames))
        starts = range(0, len(frames), self.batch_size)
        batches = ([frames[i] for i in numbers[start : start + self.batch_size]] for start in starts)
        return compute_ahead(batches, partial(map, self._estimate), self.device)

    @torch.inference_mode()
    def _estimate(self, batch: torch.Tensor) -> torch.Tensor:
        """Depth `(k, H, W)` float32 of images `(k, H, W, 3)` uint8."""
        images = batch.permute(0, 3, 1, 2)  # (k, 3, H, W)
        inputs = self.processor(
            images=images, input_data_format="channels_first", return_tensors="pt", device=self.device
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            outputs = self.model(**inputs)
        for name in ("predicted_depth", "field_of_view"):
            if outputs.get(name) is not None:
                outputs[name] = outputs[name].float()
        sizes = [tuple(images.shape[-2:])] * len(images)
        padded = {"source_sizes": sizes} if self.model.config.model_type == "zoedepth" else {}
        found = self.processor.post_process_depth_estimation(outputs, target_sizes=sizes, **padded)
        return torch.stack([item["predicted_depth"] for item in found])


class _InFloat32(torch.nn.Module):
    """A head that computes in float32 inside autocast."""

    def __init__(self, head: torch.nn.Module, device_type: str):
        super().__init__()
        self.head, self.device_type = head, device_type

    def forward(self, features: list[torch.Tensor], *sizes: int) -> torch.Tensor:
        with torch.autocast(self.device_type, enabled=False):
            return self.head([feature.float() for feature in features], *sizes)


def _read_license(name: str) -> str:
    """License on a model's card."""
    card = Path(name) / "README.md" if Path(name).is_dir() else name
    with contextlib.suppress(Exception):  # no card, no network, or a card that cannot be parsed
        if license := read_card_license(ModelCard.load(card).data):
            return license
    return "unknown: see the page of the model"
