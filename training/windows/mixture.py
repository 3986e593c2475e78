"""Several datasets as one, and samples as batches: what differs between datasets becomes masked zeros."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from modeling_foresight.embodiments import find_still_entries, place_entries
from modeling_foresight.processing_foresight import resize_depth
from training.windows.columns import require_targets
from training.windows.dataset import ForesightWindows

__all__ = [
    "ConcatWindows",
    "collate_windows",
    "control_rate",
    "find_embodiments",
    "warn_of_differences",
    "warn_of_no_future",
]

# Between datasets, what this many times exceeds the deviation of an entry is a difference of units.
UNIT_RATIO = 20


class ConcatWindows(Dataset):
    """Several datasets as one, every sample in the same layout.

    Window `i` counts through the datasets in order. Pictures are resized to the largest size of their view
    among the datasets; what a dataset lacks (a view, depth, state, actions) becomes masked zeros. With named
    robots, the entries of states and actions are at the places of `embodiments`. Samples gain `dataset`,
    int64 `()`: the place of their dataset.

    Args:
        datasets (`Sequence[ForesightWindows]`): At least one; the same lengths, views and objectives.
        embodiments (`dict`, *optional*): Robots and places that are known (`ForesightConfig.embodiments`).

    Attributes:
        embodiments (`dict`, *optional*): Those, and the robots of the datasets (see `find_embodiments`);
            `None` if the robot has no name.
        action_dim, state_dim (`int`): Sizes that hold the entries of all of them; 0 if there are none.
        near (`numpy.ndarray`, *optional*): Of streams, ascending windows in few files, for measurements.

    Raises:
        ValueError: If the datasets do not fit together, or none has a target; says in what.
    """

    def __init__(self, datasets: Sequence[ForesightWindows], embodiments: dict | None = None):
        self.datasets = list(datasets)
        self.near: np.ndarray | None = None
        may_differ = {"cameras", "episodes", "frame_cache", "frame_stride", "strided_commands", "seed"}
        may_differ |= {"missing_targets", "state_key", "action_key", "random_shift", "p_moving", "image_size"}
        may_differ |= {"embodiment", "binary_action_indices"}
        first = dataclasses.asdict(self.datasets[0].config)
        for dataset in self.datasets:
            other = dataclasses.asdict(dataset.config)
            if unlike := [name for name in first.keys() - may_differ if other[name] != first[name]]:
                raise ValueError(
                    f"dataset {dataset.rows.name} differs from the first in {', '.join(sorted(unlike))}"
                )
        require_targets([(d.rows.name, d.columns, d.config) for d in self.datasets])
        self.sizes = [len(dataset) for dataset in self.datasets]
        self._offsets = np.cumsum([0, *self.sizes])
        self.config = self.datasets[0].config
        sources = [
            (d.rows.name, d.config.embodiment, {"action": d.action_dim, "state": d.state_dim})
            for d in self.datasets
        ]
        self.embodiments = find_embodiments(sources, embodiments)
        self.state_dim, self.action_dim = self._common("state"), self._common("action")
        self.view_sizes = _largest([dataset.view_sizes for dataset in self.datasets])
        self.depth_sizes = _largest([dataset.depth_sizes for dataset in self.datasets])

    def _common(self, kind: str) -> int:
        """The size of `state` or `action` that holds those of all datasets; 0 if none has any."""
        if self.embodiments:
            return 1 + max(place for robot in self.embodiments.values() for place in (-1, *robot[kind]))
        sizes = {dataset.rows.name: getattr(dataset, f"{kind}_dim") for dataset in self.datasets}
        found = {size for size in sizes.values() if size}
        if len(found) > 1:
            raise ValueError(
                f"datasets differ in {kind}_dim: {sizes}. If these are several robots, name the one of each "
                "dataset (embodiment in data.datasets); otherwise leave the action objective or the state "
                "(state_key null) out of the mixture"
            )
        return found.pop() if found else 0

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def locate(self, i: int) -> tuple[ForesightWindows, int]:
        """The dataset of window `i`, and the window's number in it."""
        which = self._find_dataset(i)
        return self.datasets[which], int(i - self._offsets[which])

    def _find_dataset(self, i: int) -> int:
        return int(np.searchsorted(self._offsets, i, side="right")) - 1

    def spread(self, count: int | None = None) -> list[int]:
        """All windows in order, or `count` evenly spread; of streams, fewer than all are from those near."""
        if count is None or count >= len(self):
            return list(range(len(self)))
        among = np.arange(len(self)) if self.near is None else self.near
        count = min(count, len(among))
        return [int(among[i * len(among) // count]) for i in range(count)]

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        i, draw = item if isinstance(item, tuple) else (item, 0)
        dataset, own = self.locate(i)
        return self._conform(dataset[own, draw]) | {"dataset": torch.tensor(self._find_dataset(i))}

    def _conform(self, sample: dict) -> dict:
        """The sample with the common sizes and keys."""
        config, n_frames = self.config, len(sample["frame_mask"])
        for view, size in self.view_sizes.items():
            sample["images"][view] = _resize_rgb(sample["images"][view], size)
        for view, size in self.depth_sizes.items():
            depth = sample["depth"].get(view)
            sample["depth"][view] = (
                torch.zeros(n_frames, *size) if depth is None else resize_depth(depth, size)
            )
        if "goal_image" in sample:
            goal = sample["goal_image"][None]
            sample["goal_image"] = _resize_rgb(goal, self.view_sizes[config.views[0]])[0]
        if self.embodiments:
            places = self.embodiments[sample["embodiment"]]
            for key, kind in (("state", "state"), ("actions", "action")):
                if key in sample:
                    sample[key] = place_entries(sample[key], places[kind], getattr(self, f"{kind}_dim"))
        if self.state_dim:
            sample.setdefault("state_mask", torch.tensor(False))
            sample.setdefault("state", torch.zeros(config.history_length, self.state_dim))
        if self.action_dim:
            shape = (config.history_length, config.chunk_size)
            sample.setdefault("actions", torch.zeros(*shape, self.action_dim))
            sample.setdefault("action_mask", torch.zeros(shape, dtype=torch.bool))
        return sample


def find_embodiments(
    sources: Sequence[tuple[str, str | None, dict[str, int]]], known: dict | None, fresh: bool = True
) -> dict | None:
    """Places of every robot's entries in the model's states and actions; `None` if the robot has no name.

    A robot that is not `known` gets places of its own, behind those of the others: so each robot has its own
    columns and rows in the layers that read and predict entries. In a trained model, whose layers have their
    sizes, it shares the first places.

    Args:
        sources (`Sequence[tuple]`): Of each dataset its name, its robot, and its sizes of `action` and
            `state`; 0 for what it lacks.
        known (`dict`, *optional*): Robots that have places.
        fresh (`bool`): Whether these layers of the model are made for these data.

    Raises:
        ValueError: If only some datasets name their robot, or the entries of one robot differ in number.
    """
    unnamed = [name for name, robot, _ in sources if robot is None]
    if len(unnamed) == len(sources) and not known:
        return None
    if unnamed:
        raise ValueError(
            f"dataset {unnamed[0]} does not say which robot it is of: add `embodiment: NAME` to it in "
            "data.datasets" + (f"; the model knows {', '.join(sorted(known))}" if known else "")
        )
    found = {name: dict(robot) for name, robot in (known or {}).items()}
    for robot in dict.fromkeys(robot for _, robot, _ in sources):
        for kind in ("action", "state"):
            sizes = {name: size[kind] for name, other, size in sources if other == robot}
            taken = [place for one in found.values() for place in one.get(kind, ())] if fresh else []
            first = 1 + max(taken, default=-1)
            places = found.get(robot, {}).get(kind) or list(range(first, first + max(sizes.values())))
            if wrong := {name: size for name, size in sizes.items() if size not in (0, len(places))}:
                raise ValueError(
                    f"{kind}s of the embodiment {robot} have {len(places)} entries, but {wrong}: give other "
                    "robots other names"
                )
            found.setdefault(robot, {})[kind] = places
    return found


def warn_of_differences(datasets: Sequence[ForesightWindows]) -> None:
    """Warns where datasets of one mixture differ in the units of an entry, or in their steps per second.

    A robot has one normalization and a model one rate. A robot in meters beside one in millimeters keeps a
    thousandth of its range.

    Raises:
        ValueError: If the rates of datasets with actions differ: an action would mean two motions.
    """
    _compare_rates(datasets)
    for first, second in itertools.combinations(datasets, 2):
        if first.config.embodiment != second.config.embodiment:
            continue
        for key in first.statistics.keys() & second.statistics.keys():
            a, b = first.statistics[key], second.statistics[key]
            apart = np.hypot(np.hypot(a["std"], b["std"]), a["mean"] - b["mean"])
            unlike = apart > UNIT_RATIO * np.minimum(a["std"], b["std"])
            unlike &= ~(np.array(find_still_entries(a)) | find_still_entries(b))
            if key == first.config.action_key:
                unlike &= ~np.isin(np.arange(len(unlike)), first.config.binary_action_indices)
            if not unlike.any():
                continue
            here, there = (lambda i, s=s: f"{s['mean'][i]:.3g} ± {s['std'][i]:.3g}" for s in (a, b))
            told = "; ".join(f"entry {i}: {here(i)} and {there(i)}" for i in np.flatnonzero(unlike))
            warnings.warn(
                f"datasets {first.rows.name} and {second.rows.name} seem to differ in the units or origin of "
                f"'{key}' ({told}). They are normalized together, so the smaller motion nearly vanishes: "
                "convert one dataset to the units and origin of the other, or train a model for each",
                stacklevel=3,
            )


def warn_of_no_future(datasets: Sequence[ForesightWindows]) -> None:
    """Warns if no episode is long enough for a future frame, so that the loss of the future is always 0."""
    config = datasets[0].config
    lengths = [d.rows.episode_stops[d.episodes] - d.rows.episode_starts[d.episodes] for d in datasets]
    steps = max(-(-int(one.max()) // d.config.frame_stride) for one, d in zip(lengths, datasets, strict=True))
    if {"future", "future_rgb"} & set(config.objectives) and steps <= config.future_shift:
        warnings.warn(
            f"the objective future has no target: model.future_shift={config.future_shift} looks further "
            f"ahead than the longest episode, of {steps} steps: choose a smaller one, or drop the objective",
            stacklevel=3,
        )


def control_rate(datasets: Sequence[ForesightWindows]) -> float:
    """Control steps per second of a policy trained on a mixture: those of its actions, if it has any."""
    first = next((dataset for dataset in datasets if dataset.action_dim), datasets[0])
    return first.rows.fps / first.config.frame_stride


def _compare_rates(datasets: Sequence[ForesightWindows]) -> None:
    """Refuses actions of several rates, and warns of pictures of several rates."""
    rates = [dataset.rows.fps / dataset.config.frame_stride for dataset in datasets]  # names may be equal
    if max(rates) <= 1.02 * min(rates):
        return
    told = "datasets of the mixture differ in steps per second: "
    told += ", ".join(f"{d.rows.name} {rate:g}" for d, rate in zip(datasets, rates, strict=True))
    if sum(dataset.action_dim > 0 for dataset in datasets) < 2:
        warnings.warn(
            f"{told}. One model has one rate, here {control_rate(datasets):g}: "
            "choose frame_stride of each dataset so that their rates agree",
            stacklevel=4,
        )
        return
    whole = math.gcd(*(round(dataset.rows.fps) for dataset in datasets))
    strides = ", ".join(f"{d.rows.name} {round(d.rows.fps) // whole}" for d in datasets)
    raise ValueError(
        f"{told}. One model has one rate: choose frame_stride of each dataset so that they agree (all have "
        f"{whole} with frame_stride {strides})"
    )


def collate_windows(samples: Sequence[dict]) -> dict:
    """A raw batch of samples: tensors (of every view) gain a leading batch axis, texts become a list."""
    batch = {}
    for key, value in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(value, dict):
            batch[key] = {view: torch.stack([v[view] for v in values]) for view in value}
        else:
            batch[key] = torch.stack(values) if isinstance(value, Tensor) else values
    return batch


def _largest(sizes: Sequence[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """The largest height and width of each view among those of several datasets."""
    views = dict.fromkeys(view for known in sizes for view in known)
    return {view: tuple(np.max([known[view] for known in sizes if view in known], axis=0)) for view in views}


def _resize_rgb(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges uint8 `(n, 3, h, w)` to a mixture's common size."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    resized = F.interpolate(frames.float(), size=size, mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)
