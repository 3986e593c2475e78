"""Video-Depth-Anything, from the user's copy of that project: depth that is consistent in time.

The network sees windows of 32 frames. A window repeats ten frames of the previous one: the clip's first
frame and one from the middle, which anchor scale and shift, and the last eight, over which the two are
blended. The result is that of the project's `infer_video_depth`, but memory does not grow with the clip, and
images are resized on the GPU.

Source: Chen et al. 2025, Video Depth Anything: Consistent Depth Estimation for Super-Long Videos.
"""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from datasets_scripts.command_line import pick_device
from datasets_scripts.depth.gpu import compute_ahead
from datasets_scripts.storage.file_hash import hash_file

SIDE = 518  # shorter side of the network's input
PATCH = 14
WIDEST = 1.78  # ratio of sides above which the project reduces the input
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Sizes of the published networks, by the width of the tower.
ENCODERS = {
    384: {"encoder": "vits", "features": 64, "out_channels": [48, 96, 192, 384]},
    768: {"encoder": "vitb", "features": 128, "out_channels": [96, 192, 384, 768]},
    1024: {"encoder": "vitl", "features": 256, "out_channels": [256, 512, 1024, 1024]},
}
LICENSES = {"vits": "apache-2.0", "vitb": "cc-by-nc-4.0", "vitl": "cc-by-nc-4.0"}


class VideoDepth:
    """A network of Video-Depth-Anything.

    Args:
        checkpoint (`str`): Weights; files of metric networks are named `metric_...`, as in the project.
        device (`str`): `"auto"`: a GPU if there is one.
        batch_size (`int`, *optional*): Ignored: the network takes 32 frames at once.
        side (`int`): Shorter side of the network's input, a multiple of 14.

    Raises:
        ValueError: If package or file is missing or damaged; says what to do.
    """

    def __init__(
        self, checkpoint: str, device: str = "auto", batch_size: int | None = None, side: int = SIDE
    ):
        self.is_metric = self.check(checkpoint)
        self.checkpoint, self.device, self.side = Path(checkpoint), pick_device(device), side
        project = _import_project()
        self.window, self.overlap = project.INFER_LEN, project.OVERLAP
        self.repeated, self.blended = list(project.KEYFRAMES), project.INTERP_LEN
        try:
            weights = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            sizes = ENCODERS[weights["pretrained.cls_token"].shape[-1]]
            self.model = project.VideoDepthAnything(**sizes, metric=self.is_metric)
            self.model.load_state_dict(weights)
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{checkpoint} is not a checkpoint of Video-Depth-Anything, or damaged: {str(error)[:200]}"
            ) from error
        self.encoder = sizes["encoder"]
        self.model.to(self.device).eval()

    @staticmethod
    def check(checkpoint: str) -> bool:
        """Whether a checkpoint gives meters; the weights are not read.

        Raises:
            ValueError: If the project or the file is missing.
        """
        _import_project()
        if not Path(checkpoint).is_file():
            raise ValueError(f"there is no checkpoint {checkpoint}; the project's README links to it")
        return Path(checkpoint).name.startswith("metric_")

    def describe(self) -> dict[str, Any]:
        """Checkpoint, its hash, license, package, precision."""
        return {
            "model": f"Video-Depth-Anything {self.encoder}: {self.checkpoint.name}",
            "revision": f"sha256:{hash_file(self.checkpoint)[:32]}",
            "license": LICENSES[self.encoder],
            "is_metric": self.is_metric,
            "package": f"video_depth_anything, torch {torch.__version__}",
            "precision": "float16" if self.device.type == "cuda" else "float32",
        }

    def predict(self, frames: Sequence[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        """Depth of successive frames, `(k, H, W)` float32 at the frames' resolution."""
        return compute_ahead(
            self._new_frames(frames), lambda batches: self._depths(batches, len(frames)), self.device
        )

    def _new_frames(self, frames: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """What each window adds; the last frame is repeated where the clip ends."""
        step, last = self.window - self.overlap, len(frames) - 1
        for start in range(0, len(frames), step):
            first = start + self.overlap if start else 0
            yield [frames[min(i, last)] for i in range(first, start + self.window)]

    def _depths(self, batches: Iterator[torch.Tensor], n_frames: int) -> Iterator[torch.Tensor]:
        """Windows joined and cut to the clip, which ends before the last window does."""
        for depth in self._joined(batches):
            if n_frames > 0:
                yield depth[:n_frames]
            n_frames -= len(depth)

    def _joined(self, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Depth of the windows at the scale and shift of the first; a tail waits for the next window."""
        anchors = self.repeated[: self.overlap - self.blended]
        weight = torch.linspace(0, 1, self.blended, device=self.device)[:, None, None]
        images = reference = tail = None
        for batch in batches:
            images, depth = self._window(batch, images)
            if tail is None:
                reference = depth[anchors]
                ready = depth[: -self.blended]
            else:
                repeats, shared = depth[: len(anchors)], slice(len(anchors), self.overlap)
                if not self.is_metric:
                    scale, shift = _fit_line(repeats, reference)
                    depth = (depth * scale + shift).clamp(min=0)
                blend = tail * (1 - weight) + depth[shared] * weight
                ready = torch.cat([blend, depth[self.overlap : -self.blended]])
                reference = torch.cat([reference[:1], depth[anchors[1:]]])
            tail = depth[-self.blended :]
            yield ready
        yield tail

    @torch.inference_mode()
    def _window(self, batch: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Network input of a window, `(32, 3, h, w)`, and its depth, `(32, H, W)` float32."""
        height, width = batch.shape[1:3]
        images = self._prepare(batch)
        if before is not None:
            images = torch.cat([before[self.repeated], images])
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.float16, enabled=on_gpu):  # as in the project
            depth = self.model(images[None])[0]
        depth = F.interpolate(depth[:, None].float(), (height, width), mode="bilinear", align_corners=True)
        return images, depth[:, 0]

    def _prepare(self, batch: torch.Tensor) -> torch.Tensor:
        """Resized and normalized images: `(k, H, W, 3)` uint8 -> `(k, 3, h, w)` float32."""
        height, width = batch.shape[1:3]
        side, ratio = self.side, max(height, width) / min(height, width)
        if ratio > WIDEST:
            side = round(int(side * 1.777 / ratio) / PATCH) * PATCH
        scale = side / min(height, width)
        size = [max(side, round(length * scale / PATCH) * PATCH) for length in (height, width)]
        images = batch.permute(0, 3, 1, 2).float() / 255
        images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, STD))
        return (images - mean) / std


def _import_project() -> ModuleType:
    try:
        from video_depth_anything import video_depth
    except ImportError as error:
        raise ValueError(
            f"Video-Depth-Anything cannot be imported ({error}): clone "
            "github.com/DepthAnything/Video-Depth-Anything, install easydict, and add the clone to PYTHONPATH"
        ) from error
    return video_depth


def _fit_line(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of `y = a x + b`; a = 1, b = 0 where x does not vary."""
    x, y = x.double(), y.double()
    spread = ((x - x.mean()) ** 2).sum()
    scale = torch.where(spread > 0, ((x - x.mean()) * (y - y.mean())).sum() / spread, 1.0)
    shift = torch.where(spread > 0, y.mean() - scale * x.mean(), 0.0)
    return scale.float(), shift.float()
