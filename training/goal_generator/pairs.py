"""Pairs of a frame and a later one, with GR-MG's prompt: what a goal generator is trained on."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from datasets_scripts.columns import find_image_key, list_cameras
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.frame_cache import open_frames
from goal_images.generator import write_prompt

__all__ = ["GoalPairs"]

RESIZE = 288 / 256  # before the random crop (GR-MG)
JITTERED = 0.6  # share of pairs whose colors are changed (GR-MG)
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.04}


class GoalPairs(Dataset):
    """All frames of a LeRobot dataset but the last of each episode, each with a frame ahead of it.

    `pairs[i, draw]` is a pure function of the dataset, the arguments and `(seed, i, draw)`. It has `picture`
    and `goal`, float32 `(3, image_size, image_size)` in [-1, 1], and `prompt`.

    Args:
        dataset (`str` or `Path`): Folder or Hub id.
        camera (`str`): The camera.
        ahead (`Sequence[int]`): Least and largest number of frames between the two, drawn uniformly; at an
            episode's end, its last frame.
        image_size (`int`): Pixels per side; other shapes are stretched, as in GR-MG.
        augment (`bool`): A random crop, and in 6 of 10 pairs other colors, the same for both pictures.
        seed (`int`): Seed of all draws.
        frame_cache (`str`): As of training's datasets.

    Raises:
        ValueError: If the dataset or the camera does not exist, a frame has no instruction, or no
            episode two frames; names it.
    """

    def __init__(
        self,
        dataset: str | Path,
        camera: str = "main",
        ahead: Sequence[int] = (20, 22),
        image_size: int = 256,
        augment: bool = True,
        seed: int = 0,
        frame_cache: str = "auto",
    ):
        self.rows = rows = DatasetRows(dataset)
        self._key = find_image_key(rows.features, camera)
        if self._key is None:
            raise ValueError(
                f"dataset {rows.name} has no camera {camera!r}; choose --camera among "
                f"{list_cameras(rows.features)}"
            )
        empty = [number for number, text in rows.instructions.items() if not text.strip()]
        if count := int(np.isin(rows.column("task_index").read(range(len(rows))), empty).sum()):
            raise ValueError(
                f"dataset {rows.name} has no language: the instruction of {count} of its {len(rows)} frames "
                "is empty; write one with `lerobot-edit-dataset --operation.type modify_tasks`"
            )
        self._ahead, self._seed = tuple(ahead), seed
        ends = zip(rows.episode_starts, rows.episode_stops - 1, strict=True)
        self._firsts = np.concatenate([np.arange(start, last) for start, last in ends])
        if not len(self._firsts):
            raise ValueError(
                f"dataset {rows.name} has no episode of two frames: there is nothing to train on"
            )
        self._transform = make_transform(image_size, augment)
        self._frames = open_frames(rows, [self._key], frame_cache)

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        rng = np.random.default_rng((self._seed, *item))
        row = int(self._firsts[item[0]])
        goal, prompt = self.describe(row, int(rng.integers(self._ahead[0], self._ahead[1] + 1)))
        both = [self._frames.read(self._key, range(frame, frame + 1)) for frame in (row, goal)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            picture, goal_picture = self._transform(torch.from_numpy(np.concatenate(both)))
        return {"picture": picture, "goal": goal_picture, "prompt": prompt}

    def describe(self, row: int, ahead: int) -> tuple[int, str]:
        """Goal's frame number and prompt of a frame."""
        rows = self.rows
        span = rows.rows_of(rows.episode_of(row))
        prompt = write_prompt(rows.instruction_of(row), (row - span.start + 1) / len(span))
        return min(row + ahead, span[-1]), prompt


def make_transform(image_size: int, augment: bool) -> v2.Transform:
    """uint8 `(n, 3, H, W)` -> float32 `(n, 3, image_size, image_size)` in [-1, 1], one draw for all."""
    resize = functools.partial(v2.Resize, antialias=True)
    steps = [resize((image_size, image_size))]
    if augment:
        side = round(image_size * RESIZE)
        jitter = v2.RandomApply([v2.ColorJitter(**JITTER)], p=JITTERED)
        steps = [resize((side, side)), v2.RandomCrop(image_size), jitter]
    unit = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*steps, unit, v2.Normalize([0.5] * 3, [0.5] * 3)])


def collate_pairs(samples: Sequence[dict]) -> dict[str, Tensor | list[str]]:
    """A batch: pictures stacked, prompts as a list."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("picture", "goal")}
    return {**batch, "prompt": [sample["prompt"] for sample in samples]}
