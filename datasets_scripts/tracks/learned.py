"""What learned trackers share: loading weights, resizing images, and clips longer than memory.

A long clip is cut into overlapping chunks. A track continues in the next chunk from the last frame of the
overlap in which it is visible, and in the previous chunk from the first one; a track that is hidden in the
whole overlap ends there.
"""

import importlib.util
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from datasets_scripts.command_line import pick_device
from datasets_scripts.storage.file_hash import hash_file

CHUNK_FRAMES, OVERLAP_FRAMES = 128, 16
MAX_QUERIES = 1024  # followed together; GPU memory grows with them
RESIZED_AT_ONCE = 16  # frames

# From images and maybe depth of a chunk, each `(k, ...)`, and queries `(m, 3)` (frame, x, y) to places
# `(k, m, d)`, visibility `(k, m)` and confidence `(k, m)`, before and after the query's frame.
Predict = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


def track_in_chunks(
    predict: Predict,
    clip: Sequence[Sequence[np.ndarray]],
    queries: np.ndarray,
    size: int,
    chunk: int = CHUNK_FRAMES,
    overlap: int = OVERLAP_FRAMES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow pixels forwards and backwards through a clip of any length.

    Args:
        predict (`Callable`): Follows at most 1024 pixels both ways through a chunk.
        clip (`Sequence`): F images, and F depth maps if `predict` takes them.
        queries (`np.ndarray`): `(n, 3)` float: frame, x, y in pixels counted from the image's outer edge.
        size (`int`): Coordinates of a place: 2, or 3 with the depth.
        chunk (`int`): Most frames at once.
        overlap (`int`): Frames that successive chunks share, at most half of `chunk`.

    Returns:
        `tuple`: Places `(F, n, size)` float32, visibility `(F, n)` bool, confidence `(F, n)` float32. A track
        that ends keeps its last place.
    """
    n_frames, step = len(clip[0]), chunk - overlap
    firsts = range(0, max(n_frames - overlap, 1), step)
    spans = [range(first, min(first + chunk, n_frames)) for first in firsts]
    home = np.minimum(queries[:, 0].astype(np.int64) // step, len(spans) - 1)
    tracks = _Tracks(predict, clip, n_frames, len(queries), size)
    for number, span in enumerate(spans):
        own = np.flatnonzero(home == number)
        arrived, entries = tracks.enter_chunk(np.flatnonzero(home < number), spans[max(number - 1, 0)], span)
        tracks.follow(span, np.r_[arrived, own], np.r_[entries, queries[own]], len(arrived), forwards=True)
    for number in reversed(range(len(spans) - 1)):
        arrived, entries = tracks.enter_chunk(np.flatnonzero(home > number), spans[number + 1], spans[number])
        tracks.follow(spans[number], arrived, entries, len(arrived), forwards=False)
    return tracks.places, tracks.visible, tracks.confidence


class _Tracks:
    """Tracks of a whole clip, chunk by chunk."""

    def __init__(
        self, predict: Predict, clip: Sequence[Sequence[np.ndarray]], n_frames: int, n: int, size: int
    ):
        self.predict, self.clip = predict, clip
        self.places = np.zeros((n_frames, n, size), np.float32)
        self.visible = np.zeros((n_frames, n), bool)
        self.confidence = np.zeros((n_frames, n), np.float32)

    def enter_chunk(self, index: np.ndarray, before: range, span: range) -> tuple[np.ndarray, np.ndarray]:
        """Tracks of `index` that continue from the chunk `before` into `span`, and their queries `(m, 3)`.

        The others keep their last place.
        """
        shared = range(max(before.start, span.start), min(before.stop, span.stop))
        seen = self.visible[shared.start : shared.stop, index]
        if forwards := before.start < span.start:
            entry = shared.stop - 1 - seen[::-1].argmax(axis=0)
        else:
            entry = shared.start + seen.argmax(axis=0)
        ended = index[~seen.any(axis=0)]
        if forwards:
            self.places[before.stop : span.stop, ended] = self.places[before.stop - 1, ended]
        else:
            self.places[span.start : before.start, ended] = self.places[before.start, ended]
        arrived, entry = index[seen.any(axis=0)], entry[seen.any(axis=0)]
        return arrived, np.c_[entry, self.places[entry, arrived, :2]]

    def follow(
        self, span: range, index: np.ndarray, queries: np.ndarray, n_arrived: int, forwards: bool
    ) -> None:
        """Follow tracks through a chunk; the first `n_arrived` only beyond their queries' frames."""
        if not len(index):
            return
        parts = [np.stack([part[frame] for frame in span]) for part in self.clip]
        n_groups = math.ceil(len(index) / MAX_QUERIES)
        rows, frames = slice(span.start, span.stop), np.array(span)[:, None]
        for group in range(n_groups):
            # Every n-th one, so that each group covers the image: trackers relate points to each other.
            of_group = slice(group, None, n_groups)
            columns, entries = index[of_group], queries[of_group]
            found = self.predict(*parts, entries - [span.start, 0, 0])
            beyond = frames > entries[:, 0] if forwards else frames < entries[:, 0]
            new = beyond | (np.arange(len(index))[of_group] >= n_arrived)
            for known, value in zip((self.places, self.visible, self.confidence), found, strict=True):
                mask = new[..., None] if known.ndim == 3 else new
                known[rows, columns] = np.where(mask, value, known[rows, columns])


class LearnedTracker:
    """Base of the trackers that come from the user's copy of their project and a `checkpoint` of it."""

    name: str  # of the project
    model_name: str
    license: str
    package: str  # imported name
    remedy: str  # how to get the project

    def __init__(self, checkpoint: str, device: str = "auto"):
        self.check(checkpoint)
        self.checkpoint, self.device = checkpoint, pick_device(device)

    @classmethod
    def check(cls, checkpoint: str | None) -> None:
        """Raise a `ValueError` with the remedy if package or file is missing; the weights are not read."""
        if importlib.util.find_spec(cls.package) is None:
            raise ValueError(f"{cls.name} is not installed: {cls.remedy}")
        if not checkpoint:
            raise ValueError(f"{cls.name} needs its weights: --track-model FILE.pth, see its README")
        if not Path(checkpoint).is_file():
            raise ValueError(f"there is no checkpoint {checkpoint}; the README of {cls.name} links to it")

    def describe(self) -> dict[str, Any]:
        """Checkpoint, its hash, license, package."""
        return {
            "model": f"{self.model_name}: {Path(self.checkpoint).name}",
            "revision": f"sha256:{hash_file(self.checkpoint)[:32]}",
            "license": self.license,
            "package": f"{self.package}, torch {torch.__version__}",
        }


def load_weights(model: torch.nn.Module, checkpoint: str, unused: str = "") -> None:
    """Fill a network from a file with tensors, at the top or under `model`; nothing else is unpickled.

    Parameters with the prefix `unused` may be missing. A file that is damaged or of another network raises a
    `ValueError`.
    """
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        missing = model.load_state_dict(weights.get("model", weights), strict=False).missing_keys
        needed = {name for name, _ in model.named_parameters() if not (unused and name.startswith(unused))}
        if lacks := sorted(needed & set(missing)):
            raise ValueError(f"it lacks {lacks[0]}")
    except (pickle.UnpicklingError, EOFError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} holds no weights of {type(model).__name__}, or is damaged: {str(error)[:300]}"
        ) from error


def resize(maps: np.ndarray, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Images `(k, H, W, 3)` uint8, or depth `(k, H, W)` in meters, at a network's size, as in the projects.

    Returns:
        `torch.Tensor`: `(1, k, 3 or 1, height, width)` float32, corners aligned; images in [0, 255].
    """
    is_depth, done = maps.ndim == 3, []
    options = {"mode": "nearest"} if is_depth else {"mode": "bilinear", "align_corners": True}
    for piece in np.array_split(maps, math.ceil(len(maps) / RESIZED_AT_ONCE)):
        piece = torch.from_numpy(np.ascontiguousarray(piece)).to(device)
        piece = piece[:, None] if is_depth else piece.permute(0, 3, 1, 2).float()
        done.append(F.interpolate(piece, (height, width), **options))
    return torch.cat(done)[None]


class PixelScale:
    """Pixels of an image counted from its outer edge <-> those of a network, counted from pixel centers.

    `size` and `resolution` are rows and columns of the image and of the network's input.
    """

    def __init__(self, size: tuple[int, int], resolution: tuple[int, int]):
        (height, width), (rows, columns) = size, resolution
        self.factor = np.array([(columns - 1) / max(width - 1, 1), (rows - 1) / max(height - 1, 1)])

    def to_network(self, queries: np.ndarray, device: torch.device) -> torch.Tensor:
        """Queries `(m, 3)` of frame, x, y -> `(1, m, 3)` float32."""
        place = (queries[:, 1:] - 0.5) * self.factor
        return torch.from_numpy(np.c_[queries[:, 0], place]).float().to(device)[None]

    def to_image(self, places: torch.Tensor) -> np.ndarray:
        """Places `(..., 2)` of the network -> places of the image, float32."""
        return (places.float().cpu().numpy() / self.factor + 0.5).astype(np.float32)
