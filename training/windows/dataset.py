"""LeRobot datasets -> training windows: T frames of every view with all targets, masks and augmentation.

A window is T frames of one episode; the model predicts from each of them. It never crosses an episode, and
the episode's last frame is never one of them, so that every frame has a next one (GR-MG; `slicing.py` has the
arithmetic). Short histories, as at the start of control, need no windows of their own: the model is causal,
so prefixes train them.

One sample, before `ForesightProcessor.prepare_batch` resizes and normalises (T history frames, F lookahead
frames, V views, K action chunk, L flow length, P grid nodes, A action size; torch tensors):

| key | dtype, shape | meaning |
| --- | --- | --- |
| `images` | {view: uint8 `(T+F, 3, h, w)`} | camera resolution, oldest first, then lookahead frames |
| `depth` | {view: float32 `(T+F, h, w)`} | metres, 0 = invalid |
| `view_mask` | bool `(V,)` | false where the dataset has no such view (zeros then) |
| `frame_mask` | bool `(T+F,)` | false for lookahead frames past the episode's end (zeros then) |
| `state`, `state_mask` | float32 `(T, state_dim)`, bool `()` | dataset units; absent if there is none |
| `actions`, `action_mask` | float32 `(T, K, A)`, bool `(T, K)` | s..s+K-1; zeros past the end; see below |
| `track_start`, `track`, ... | see `targets.build_flow_targets` | first view only |
| `progress` | float32 `(T,)` | (s - first) / (last - first) of the episode |
| `goal_image`, `goal_mask` | uint8 `(3, h, w)`, bool `()` | a frame after the window; first view |
| `task` | str | instruction |
| `index`, `episode_index` | int64 `()` | global number of the newest history frame; its episode |

Depth comes with the objectives `depth` and `future`, tracks with `flow` and `flow_2d` (the same points count
for both, so that they compare), actions with `action`: as recorded, or `local_delta` made from the poses of
the state column (`WindowConfig.action_codec`).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets_scripts.columns import (
    check_depth_range,
    find_depth_key,
    find_image_key,
    flagged_episodes,
    moving_flags,
    points_key,
    points_visible_key,
    read_provenance,
    validate_columns,
)
from datasets_scripts.storage.frame_cache import open_frames
from datasets_scripts.storage.rows import DatasetRows
from modeling_foresight.action_codec import ACTION_SIZE, GRIPPER, encode_local_delta
from modeling_foresight.targets import blank_flow_targets, build_flow_targets
from training.windows.augmentation import draw_shift, shift_fraction, shift_frames, shift_px
from training.windows.mixture import ConcatWindows, collate_windows
from training.windows.sampler import WindowSampler
from training.windows.settings import WindowConfig, split_episodes
from training.windows.slicing import action_chunks, goal_rows, progress, window_starts

__all__ = [
    "ConcatWindows",
    "ForesightWindows",
    "WindowConfig",
    "WindowSampler",
    "collate_windows",
    "split_episodes",
]

DEPTH_CHECK_FRAMES = 4  # frames per depth column looked at when a dataset is opened


class ForesightWindows(Dataset):
    """All windows of one LeRobot dataset.

    `windows[i]` and `windows[i, draw]` are pure functions of the dataset, the configuration and `(seed, i,
    draw)`, in whatever process they run.

    Args:
        dataset (`str`, `Path` or `DatasetRows`): Dataset folder or Hub id; or the dataset, opened: one with
            `stream` has only the videos of the chosen episodes looked at, without a frame cache.
        config (`WindowConfig`): What a window holds.

    Attributes:
        rows (`DatasetRows`): The dataset underneath.
        cameras (`dict[str, str]`): Camera of every view that the dataset has.
        view_sizes (`dict[str, tuple[int, int]]`): Height and width of every view's pictures.
        depth_sizes (`dict[str, tuple[int, int]]`): The same for the views that have depth.
        action_dim, state_dim (`int`): Sizes; 0 if not delivered.
        episodes (`numpy.ndarray`): Episodes that give windows.
        flagged (`list[int]`): Episodes left out for their flags.

    Raises:
        ValueError: If the dataset cannot serve the configuration; names the thing and the remedy.
    """

    def __init__(self, dataset: str | Path | DatasetRows, config: WindowConfig):
        self.config = config
        self.rows = dataset if isinstance(dataset, DatasetRows) else DatasetRows(dataset)
        cameras = {view: config.cameras.get(view, view) for view in config.views}
        self.cameras = {view: camera for view, camera in cameras.items() if camera is not None}
        if not self.cameras:
            raise ValueError(
                f"dataset {self.rows.name}: every view is mapped to no camera; name at least one"
            )
        self._choose_columns()
        self._index_windows()
        self._check_finite()
        keys = [*self._image_keys.values(), *self._depth_keys.values()]
        self.frames = open_frames(self.rows, keys, config.frame_cache)
        self._check_depth()
        self.view_sizes = self._measure(self._image_keys)
        self.depth_sizes = self._measure(self._depth_keys)
        first = next(iter(self.view_sizes.values()))
        blank = first if config.image_size is None else (config.image_size, config.image_size)
        for view in config.views:
            self.view_sizes.setdefault(view, blank)

    # ---------------------------------------------------------------- opening

    def _choose_columns(self) -> None:
        """Decide which columns a window reads; refuse the dataset if one is missing."""
        config, features, name = self.config, self.rows.features, self.rows.name
        flow_view = config.views[0]
        want_depth = bool({"depth", "future"} & set(config.objectives))
        self._wants_tracks = want_tracks = bool({"flow", "flow_2d"} & set(config.objectives))
        strict = not config.missing_targets
        validate_columns(
            self.rows.root,
            list(self.cameras.values()),
            need_depth=want_depth and strict,
            need_tracks=want_tracks and strict and flow_view in self.cameras,
        )
        self._image_keys = {view: find_image_key(features, camera) for view, camera in self.cameras.items()}
        depth_keys = {view: find_depth_key(features, camera) for view, camera in self.cameras.items()}
        self._depth_keys = {view: key for view, key in depth_keys.items() if key and want_depth}
        self._points_keys = None
        if want_tracks and flow_view in self.cameras:
            camera = self.cameras[flow_view]
            if points_key(camera) in features and points_visible_key(camera) in features:
                self._points_keys = points_key(camera), points_visible_key(camera)
        elif want_tracks and strict:
            raise ValueError(
                f"dataset {name}: the flow objective needs the view '{flow_view}', which is mapped to no "
                "camera; name one, or set missing_targets for a mixture"
            )
        self._state_key = config.state_key if config.state_key in features else None
        self.state_dim = _width(features, self._state_key)
        self._choose_actions(strict)
        self._provenance = read_provenance(self.rows.root) if self._points_keys else {}
        if self._points_keys and config.p_moving > 0 and not self._provenance.get("episodes"):
            warnings.warn(
                f"dataset {name} has tracks but no moving flags (meta/foresight.json); flow points are drawn "
                "without preference for moving ones. Annotate it again to restore them.",
                stacklevel=3,
            )

    def _choose_actions(self, strict: bool) -> None:
        """Which column actions come from, if any: `_action_key`; and their size."""
        config, features, name = self.config, self.rows.features, self.rows.name
        local = config.action_codec == "local_delta"
        key = config.state_key if local else config.action_key
        self._action_key = key if "action" in config.objectives and key in features else None
        self.action_dim = ACTION_SIZE if local and self._action_key else _width(features, self._action_key)
        if self._action_key is None and "action" in config.objectives and strict:
            raise ValueError(
                f"dataset {name} has no column '{key}', from whose poses local_delta actions are made; set "
                "state_key to it, or action_codec to 'recorded'"
                if local
                else f"dataset {name} has no column '{key}'; set action_key to its action column, or leave "
                "'action' out of the objectives"
            )
        if self._action_key and local and self.state_dim < ACTION_SIZE:
            raise ValueError(
                f"dataset {name}: '{key}' has {self.state_dim} entries; local_delta actions need x, y, z, "
                "roll, pitch, yaw and the gripper in the first 7: set action_codec to 'recorded'"
            )

    def _index_windows(self) -> None:
        """Count windows per episode."""
        config, rows = self.config, self.rows
        chosen = range(rows.n_episodes) if config.episodes is None else config.episodes
        chosen = np.asarray(sorted(set(chosen)), dtype=np.int64)
        if len(chosen) == 0:
            raise ValueError(f"dataset {rows.name}: no episodes chosen")
        if chosen[0] < 0 or chosen[-1] >= rows.n_episodes:
            raise ValueError(
                f"dataset {rows.name} has episodes 0 to {rows.n_episodes - 1}, "
                f"but {chosen[0]} to {chosen[-1]} are asked for"
            )
        self.flagged = self._flagged(chosen) if config.skip_flagged else []
        if len(self.flagged) == len(chosen):
            raise ValueError(
                f"dataset {rows.name}: the {len(chosen)} episodes chosen all have a flag, such as "
                f"{self.flagged[0]}, so that skip_flagged leaves none; see why with "
                "`python datasets_scripts/inspect_dataset.py DIR --report FILE.html`, choose another seed of "
                "the split, or set skip_flagged to false"
            )
        chosen = np.setdiff1d(chosen, self.flagged).astype(np.int64)
        self._span = (config.history_length - 1) * config.frame_stride  # oldest to newest frame
        lengths = rows.episode_stops[chosen] - rows.episode_starts[chosen]
        lasts = rows.episode_stops[chosen] - 1
        counts = np.array(
            [
                len(window_starts(first, last, config.history_length, 1, config.frame_stride))
                for first, last in zip(rows.episode_starts[chosen], lasts, strict=True)
            ]
        )
        if counts.max() < 1:
            raise ValueError(
                f"dataset {rows.name}: no window of history_length={config.history_length} frames fits "
                f"(frame_stride {config.frame_stride}); the longest episode has {lengths.max()} frames and "
                f"{self._span + 2} are needed: choose a smaller history_length"
            )
        if short := int((counts < 1).sum()):
            warnings.warn(
                f"dataset {rows.name}: {short} of {len(chosen)} episodes are shorter than "
                f"{self._span + 2} frames and give no window",
                stacklevel=3,
            )
        self.episodes = chosen[counts >= 1]
        self._window_stops = np.cumsum(counts[counts >= 1])

    def _flagged(self, chosen: np.ndarray) -> list[int]:
        """Those of some episodes that have a flag of a camera in use."""
        provenance = read_provenance(self.rows.root)
        if not any("flags" in facts for facts in provenance.get("episodes", {}).values()):
            if self.config.missing_targets:  # a mixture may hold datasets without labels
                return []
            raise ValueError(
                f"dataset {self.rows.name} has no flags to skip episodes by; `python "
                "datasets_scripts/inspect_dataset.py DIR --write-flags` writes them, or set skip_flagged to "
                "false"
            )
        flagged = flagged_episodes(provenance, list(self.cameras.values()))
        return [int(episode) for episode in chosen if episode in flagged]

    def _check_finite(self) -> None:
        """Refuse NaN and infinity in actions and state before training starts; keep their statistics."""
        self.statistics: dict[str, dict[str, np.ndarray]] = {}
        rows = self.rows
        for key in dict.fromkeys(filter(None, (self._action_key, self._state_key))):
            values = _two_dimensional(rows.column(key).read(range(len(rows))))
            spans = [slice(rows.episode_starts[e], rows.episode_stops[e]) for e in self.episodes]
            used = np.concatenate([values[span] for span in spans]).astype(np.float64)
            if not np.isfinite(used).all():
                for episode, span in zip(self.episodes, spans, strict=True):
                    bad = np.flatnonzero(~np.isfinite(values[span]).all(1))
                    if len(bad):
                        raise ValueError(
                            f"dataset {rows.name}: '{key}' is not finite in episode {episode}, frame "
                            f"{bad[0]} (and in {len(bad) - 1} more frames of it); repair it, or leave "
                            "the episode out with `episodes`"
                        )
            self.statistics[key] = {
                "mean": used.mean(0),
                "std": used.std(0),
                "min": used.min(0),
                "max": used.max(0),
            }

        if self._action_key and self.config.action_codec == "local_delta":
            self._check_poses(used)

    def _check_poses(self, states: np.ndarray) -> None:
        """Refuse states `(rows, >= 7)` whose angles are degrees or whose gripper has more than two values."""
        place = f"dataset {self.rows.name}: '{self._action_key}'"
        if (largest := np.abs(states[:, 3:GRIPPER]).max()) > 2 * np.pi:
            raise ValueError(
                f"{place} has an angle of {largest:.4g} in entries 3 to 5, which must be roll, pitch, yaw in "
                "radians: convert them, or set action_codec to 'recorded'"
            )
        gripper = np.unique(states[:, GRIPPER])
        if not any(np.isin(gripper, pair).all() for pair in ((-1, 1), (0, 1))):
            raise ValueError(
                f"{place} has values from {gripper[0]:.4g} to {gripper[-1]:.4g} in entry 6, which must be "
                "the gripper, -1 or 0 closed and 1 open: convert it, or set action_codec to 'recorded'"
            )

    def _check_depth(self) -> None:
        """Look at a few frames of every depth column: metres, or something else?"""
        picks = np.linspace(0, len(self.episodes) - 1, min(DEPTH_CHECK_FRAMES, len(self.episodes))).astype(
            int
        )
        for key in self._depth_keys.values():
            decoder = self.frames.decoders[key]
            first = [int(self.rows.episode_starts[self.episodes[pick]]) for pick in picks]
            seen = [self.frames.read_stored(key, range(row, row + 1)) for row in first]
            check_depth_range(decoder.metres(np.concatenate(seen), clean=False), key, decoder.limit_m)

    def _measure(self, keys: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        row = int(self.rows.episode_starts[self.episodes[0]])
        return {
            view: tuple(self.frames.read_stored(key, range(row, row + 1)).shape[-2:])
            for view, key in keys.items()
        }

    # ---------------------------------------------------------------- reading

    def __len__(self) -> int:
        return int(self._window_stops[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """Episode and first row (global frame number) of window `i`.

        Raises:
            IndexError: If there is no such window.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        slot = int(np.searchsorted(self._window_stops, i, side="right"))
        before = int(self._window_stops[slot - 1]) if slot else 0
        episode = int(self.episodes[slot])
        return episode, int(self.rows.episode_starts[episode]) + i - before

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        i, draw = item if isinstance(item, tuple) else (item, 0)
        config, rows = self.config, self.rows
        episode, start = self.locate(int(i))
        rng = np.random.default_rng((config.seed, int(i), draw))
        stop, stride = int(rows.episode_stops[episode]), config.frame_stride
        newest = start + self._span

        def ahead(steps: int) -> range:
            """Rows of the window and `steps` more, as far as the episode goes."""
            return range(start, min(stop, newest + steps * stride + 1), stride)

        shifts = {
            view: draw_shift(rng, shift_px(config.random_shift, *self.view_sizes[view]))
            for view in config.views
        }
        sample = self._read_frames(ahead(config.lookahead_frames), shifts)
        if config.goal_image:
            goals = goal_rows(newest, stop - 1, stride)
            sample |= self._read_goal(int(goals[rng.integers(len(goals))]), shifts)
        if self._action_key:
            sample |= self._read_actions(ahead(config.chunk_size))
        if self._state_key:
            state = _two_dimensional(rows.column(self._state_key).read(ahead(0)))
            sample["state"] = torch.from_numpy(state.astype(np.float32))
            sample["state_mask"] = torch.tensor(True)
        if self._wants_tracks:
            sample |= self._read_flow(episode, ahead(config.flow_length - 1), shifts, rng)
        first = int(rows.episode_starts[episode])
        share = progress(np.arange(start, newest + 1, stride), first, stop - 1)
        sample["progress"] = torch.from_numpy(share)
        task_index = int(rows.column("task_index").read(range(newest, newest + 1))[0])
        sample["task"] = rows.tasks[task_index]
        sample["index"] = torch.tensor(newest)
        sample["episode_index"] = torch.tensor(episode)
        return sample

    def _read_frames(self, frame_rows: range, shifts: Mapping[str, tuple[int, int]]) -> dict:
        """`images`, `depth`, `view_mask` and `frame_mask` of a window."""
        config = self.config
        n_frames = config.history_length + config.lookahead_frames
        keys = [*self._image_keys.values(), *self._depth_keys.values()]
        read = self.frames.read_many_stored(dict.fromkeys(keys, frame_rows))
        images, depth = {}, {}
        for view in config.views:
            size = self.view_sizes[view]
            if view in self._image_keys:
                frames = read[self._image_keys[view]]
                images[view] = _shift_into(n_frames, frames, *shifts[view])
            else:
                images[view] = torch.zeros(n_frames, 3, *size, dtype=torch.uint8)
            if view in self._depth_keys:
                # A depth camera of another resolution moves by the same fraction of its picture.
                d_x, d_y = shifts[view]
                height, width = self.depth_sizes[view]
                d_x, d_y = round(d_x * width / size[1]), round(d_y * height / size[0])
                key = self._depth_keys[view]
                # Moved as stored, in half the bytes. Frames past the end are 0, an invalid code too.
                moved = _shift_into(n_frames, read[key], d_x, d_y)
                depth[view] = torch.from_numpy(self.frames.decoders[key].metres(moved.numpy()))
        return {
            "images": images,
            "depth": depth,
            "view_mask": torch.tensor([view in self.cameras for view in config.views]),
            "frame_mask": torch.arange(n_frames) < len(frame_rows),
        }

    def _read_goal(self, row: int, shifts: Mapping[str, tuple[int, int]]) -> dict:
        """The goal image, shifted as the flow view's frames are."""
        view = self.config.views[0]
        if view not in self._image_keys:
            goal = torch.zeros(3, *self.view_sizes[view], dtype=torch.uint8)
            return {"goal_image": goal, "goal_mask": torch.tensor(False)}
        frames = self.frames.read(self._image_keys[view], range(row, row + 1))
        return {"goal_image": _shift_into(1, frames, *shifts[view])[0], "goal_mask": torch.tensor(True)}

    def _read_actions(self, action_rows: range) -> dict:
        """Chunks of actions at every frame, from the window's rows and K more; masked zeros past the end."""
        config = self.config
        actions = _two_dimensional(self.rows.column(self._action_key).read(action_rows))
        if config.action_codec == "local_delta":
            # In float64: what is left of a difference of poses is small.
            actions = encode_local_delta(torch.from_numpy(actions.astype(np.float64))).numpy()
        chunks, mask = action_chunks(actions, config.history_length, config.chunk_size)
        return {"actions": torch.from_numpy(chunks), "action_mask": torch.from_numpy(mask)}

    def _read_flow(
        self,
        episode: int,
        track_rows: range,
        shifts: Mapping[str, tuple[int, int]],
        rng: np.random.Generator,
    ) -> dict:
        """Flow targets of the first view, or zeros of weight 0 where the dataset has no tracks."""
        config, view = self.config, self.config.views[0]
        if self._points_keys is None:
            targets = blank_flow_targets(config.history_length, config.flow_length, config.flow_grid)
            return {key: torch.from_numpy(value) for key, value in targets.items()}
        packed = self.rows.column(self._points_keys[0]).read(track_rows)
        visible = self.rows.column(self._points_keys[1]).read(track_rows)
        points = packed.reshape(*visible.shape, 3)
        targets = build_flow_targets(
            points,
            visible,
            moving_flags(self._provenance, episode, self.cameras[view], points.shape[1]),
            config.history_length,
            config.flow_length,
            config.flow_grid,
            rng,
            config.p_moving,
            config.occluded_weight,
            shift_fraction(*shifts[view], *self.view_sizes[view]),
        )
        return {key: torch.from_numpy(value) for key, value in targets.items()}


def _shift_into(n_frames: int, frames: np.ndarray, d_x: int, d_y: int) -> Tensor:
    """Copy moved frames into a tensor of `n_frames`; those past the episode's end stay zero."""
    out = torch.from_numpy(np.empty((n_frames, *frames.shape[1:]), frames.dtype))
    shift_frames(frames, d_x, d_y, out=out.numpy()[: len(frames)])
    out[len(frames) :] = 0
    return out


def _two_dimensional(values: np.ndarray) -> np.ndarray:
    """LeRobot stores features of one element as scalars."""
    return values[:, None] if values.ndim == 1 else values


def _width(features: Mapping[str, dict], key: str | None) -> int:
    return 0 if key is None else int(np.prod(features[key]["shape"]))
