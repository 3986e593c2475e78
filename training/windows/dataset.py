"""LeRobot datasets -> training windows: T frames of every view with all targets, masks and augmentation.

A window is T frames of one episode; the model predicts from each of them. It never crosses an episode, and
the episode's last frame is never one of them, so that every frame has a next one (GR-MG; `slicing.py` has the
arithmetic). Short histories, as at the start of control, need no extra windows: the model is causal,
so prefixes train them.

One sample, before `ForesightProcessor.prepare_batch` resizes and normalizes (T history frames, F lookahead
frames, V views, K action chunk, L flow length, P grid nodes, A action size; torch tensors):

| key | dtype, shape | meaning |
| --- | --- | --- |
| `images` | {view: uint8 `(T+F, 3, h, w)`} | camera resolution, oldest first, then lookahead frames |
| `depth` | {view: float32 `(T+F, h, w)`} | meters, 0 = invalid |
| `view_mask` | bool `(V,)` | false where the dataset has no such view (zeros then) |
| `frame_mask` | bool `(T+F,)` | false for lookahead frames past the episode's end (zeros then) |
| `state`, `state_mask` | float32 `(T, state_dim)`, bool `()` | dataset units; absent if there is none |
| `actions`, `action_mask` | float32 `(T, K, A)`, bool `(T, K)` | s..s+K-1; zeros past the end; see below |
| `track_start`, `track`, ... | see `flow_targets.build_flow_targets` | first view only |
| `progress` | float32 `(T,)` | (s - first) / (last - first) of the episode |
| `goal_image`, `goal_mask` | uint8 `(3, h, w)`, bool `()` | a frame after the window; first view |
| `task` | str | instruction |
| `embodiment` | str | name of the robot, if it has one |
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

from datasets_scripts.columns import check_depth_range
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.even_spread import spread_evenly
from datasets_scripts.storage.frame_cache import open_frames
from datasets_scripts.storage.provenance import is_made_depth, moving_flags, read_provenance
from datasets_scripts.storage.streaming.streamed_rows import StreamedFrames, StreamedRows
from modeling_foresight.action_codec import encode_local_delta
from training.windows.augmentation import draw_shift, shift_fraction, shift_frames, shift_px
from training.windows.columns import (
    WindowColumns,
    column_statistics,
    read_numbers,
    require_columns,
)
from training.windows.episode_windows import EpisodeWindows
from training.windows.flow_targets import FlowSampling, blank_flow_targets, build_flow_targets
from training.windows.settings import WindowConfig
from training.windows.slicing import action_chunks, combine_commands, goal_rows, progress

__all__ = ["ForesightWindows"]

DEPTH_CHECK_FRAMES = 4  # frames per depth column looked at when a dataset is opened


class ForesightWindows(Dataset):
    """All windows of one LeRobot dataset.

    `windows[i]` and `windows[i, draw]` are pure functions of the dataset, the configuration and `(seed, i,
    draw)`, in whatever process they run.

    Args:
        dataset (`str`, `Path` or `DatasetRows`): Dataset folder or Hub id; or the dataset, opened. With
            `stream`, only videos of the chosen episodes are read, and there is no frame cache. Of
            `StreamedRows`, files of the first episode alone are read here.
        config (`WindowConfig`): What a window holds.
        with_statistics (`bool`): Whether to read states and actions of all chosen episodes at once. Values
            that are not finite are refused then; otherwise by the window that holds them.

    Attributes:
        rows (`DatasetRows`): The dataset underneath.
        columns (`WindowColumns`): The columns that are read.
        view_sizes (`dict[str, tuple[int, int]]`): Height and width of every view's pictures.
        depth_sizes (`dict[str, tuple[int, int]]`): The same for the views that have depth.
        action_dim, state_dim (`int`): Sizes; 0 if not delivered.
        statistics (`dict[str, dict[str, numpy.ndarray]]`): See `column_statistics`.
        episodes (`numpy.ndarray`): Episodes that give windows.
        window_stops (`numpy.ndarray`): Number of windows up to and with each of these episodes.
        flagged (`list[int]`): Episodes left out for their flags.

    Raises:
        ValueError: If the dataset cannot serve the configuration; names the thing and the remedy.
    """

    def __init__(self, dataset: str | Path | DatasetRows, config: WindowConfig, with_statistics: bool = True):
        self.config = config
        self.rows = dataset if isinstance(dataset, DatasetRows) else DatasetRows(dataset)
        rows, features = self.rows, self.rows.features
        self.columns = columns = WindowColumns.find(features, config)
        require_columns(rows, columns, config)
        sizes = columns.sizes(features, config)
        self.action_dim, self.state_dim = sizes["action"], sizes["state"]
        self._provenance = read_provenance(rows.root) if columns.points or columns.depth else {}
        if columns.points and config.p_moving > 0 and not self._provenance.get("episodes"):
            warnings.warn(
                f"dataset {rows.name} has tracks but no moving flags (meta/foresight.json); flow points are "
                "drawn without preference for moving ones. Annotate it again to restore them.",
                stacklevel=2,
            )
        self._index = EpisodeWindows(rows, columns, config)
        self.episodes, self.flagged = self._index.episodes, self._index.flagged
        self.window_stops = self._index.stops
        self.statistics = column_statistics(rows, columns, config, self.episodes) if with_statistics else {}
        self.frames = (
            StreamedFrames(rows, columns.frame_keys)
            if isinstance(rows, StreamedRows)
            else open_frames(rows, columns.frame_keys, config.frame_cache, self.episodes)
        )
        self._check_depth()
        self.view_sizes = self._measure(columns.images)
        self.depth_sizes = self._measure(columns.depth)
        first = next(iter(self.view_sizes.values()))
        blank = first if config.image_size is None else (config.image_size, config.image_size)
        for view in config.views:
            self.view_sizes.setdefault(view, blank)

    @property
    def cameras(self) -> dict[str, str]:
        """Camera of every view that the dataset has."""
        return self.columns.cameras

    def _check_depth(self) -> None:
        """Refuses depth columns whose values cannot be meters, judged by a few frames of each."""
        count = 1 if isinstance(self.rows, StreamedRows) else DEPTH_CHECK_FRAMES
        picks = spread_evenly(len(self.episodes), count)
        for view, key in self.columns.depth.items():
            decoder = self.frames.decoders[key]
            seen = np.concatenate([self._some_frames(key, episode) for episode in self.episodes[picks]])
            limit_m = np.inf if is_made_depth(self._provenance, self.cameras[view]) else decoder.limit_m
            check_depth_range(decoder.meters(seen, clean=False), key, limit_m)

    def _measure(self, keys: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Height and width of every view's pictures in a column."""
        first = self.episodes[0]
        return {view: tuple(self._first_frame(key, first).shape[-2:]) for view, key in keys.items()}

    def _some_frames(self, key: str, episode: int) -> np.ndarray:
        """The first frame and that in the middle: a camera may warm up."""
        span = self.rows.rows_of(episode)
        middle = span[len(span) // 2 :][:1]
        return np.concatenate([self._first_frame(key, episode), self.frames.read_stored(key, middle)])

    def _first_frame(self, key: str, episode: int) -> np.ndarray:
        return self.frames.read_stored(key, self.rows.rows_of(episode)[:1])

    def __len__(self) -> int:
        return len(self._index)

    def locate(self, i: int) -> tuple[int, int]:
        """Episode and first row (global frame number) of window `i`."""
        return self._index.locate(i)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        i, draw = item if isinstance(item, tuple) else (item, 0)
        return self.read(*self.locate(int(i)), np.random.default_rng((self.config.seed, int(i), draw)))

    def read(self, episode: int, start: int, rng: np.random.Generator) -> dict:
        """The window of an episode whose oldest frame has the global number `start`.

        An episode that is shorter than the window is masked at its end. `rng` decides augmentation and the
        choice of points.
        """
        config, rows, columns = self.config, self.rows, self.columns
        whole = rows.rows_of(episode)
        first, stop = whole.start, whole.stop
        frames, stride = config.history_length, config.frame_stride

        def rows_ahead(steps: int) -> range:
            """Rows of the window and `steps` more, as far as the episode goes."""
            return range(start, min(stop, start + (frames + steps - 1) * stride + 1), stride)

        newest = rows_ahead(0)[-1]
        padding = {view: shift_px(config.random_shift, *self.view_sizes[view]) for view in config.views}
        shifts = {view: draw_shift(rng, padding_px) for view, padding_px in padding.items()}
        sample = self._read_frames(rows_ahead(config.lookahead_frames), shifts)
        if config.goal_image:
            goals = goal_rows(newest, stop - 1, stride)
            sample |= self._read_goal(int(goals[rng.integers(len(goals))]), shifts)
        if columns.actions:
            sample |= self._read_actions(start, stop)
        if columns.state:
            state = read_numbers(rows, columns.state, rows_ahead(0)).astype(np.float32)
            sample["state"] = torch.from_numpy(_pad_rows(state, frames))
            sample["state_mask"] = torch.tensor(True)
        if config.wants_flow:
            sample |= self._read_flow(episode, rows_ahead(config.flow_length - 1), shifts, rng)
        if config.embodiment is not None:
            sample["embodiment"] = config.embodiment
        share = progress(np.arange(start, start + frames * stride, stride), first, stop - 1)
        return sample | {
            "progress": torch.from_numpy(share.clip(max=1)),
            "task": rows.instruction_of(newest),
            "index": torch.tensor(newest),
            "episode_index": torch.tensor(episode),
        }

    def _read_frames(self, frame_rows: range, shifts: Mapping[str, tuple[int, int]]) -> dict:
        """`images`, `depth`, `view_mask` and `frame_mask` of a window."""
        config = self.config
        n_frames = config.history_length + config.lookahead_frames
        read = self.frames.read_many_stored(dict.fromkeys(self.columns.frame_keys, frame_rows))
        images, depth = {}, {}
        for view in config.views:
            size = self.view_sizes[view]
            if view in self.columns.images:
                frames = read[self.columns.images[view]]
                images[view] = _shift_into(n_frames, frames, *shifts[view])
            else:
                images[view] = torch.zeros(n_frames, 3, *size, dtype=torch.uint8)
            if view in self.columns.depth:
                # A depth camera of another resolution moves by the same fraction of its picture.
                d_x, d_y = shifts[view]
                height, width = self.depth_sizes[view]
                d_x, d_y = round(d_x * width / size[1]), round(d_y * height / size[0])
                key = self.columns.depth[view]
                # Moved as stored, in half the bytes. Frames past the end are 0, an invalid code too.
                moved = _shift_into(n_frames, read[key], d_x, d_y)
                depth[view] = torch.from_numpy(self.frames.decoders[key].meters(moved.numpy()))
        return {
            "images": images,
            "depth": depth,
            "view_mask": torch.tensor([view in self.cameras for view in config.views]),
            "frame_mask": torch.arange(n_frames) < len(frame_rows),
        }

    def _read_goal(self, row: int, shifts: Mapping[str, tuple[int, int]]) -> dict:
        """The goal image, shifted as the flow view's frames are."""
        view = self.config.views[0]
        if view not in self.columns.images:
            goal = torch.zeros(3, *self.view_sizes[view], dtype=torch.uint8)
            return {"goal_image": goal, "goal_mask": torch.tensor(False)}
        frames = self.frames.read(self.columns.images[view], range(row, row + 1))
        return {"goal_image": _shift_into(1, frames, *shifts[view])[0], "goal_mask": torch.tensor(True)}

    def _read_actions(self, start: int, stop: int) -> dict:
        """Chunks of actions at every frame of the window from `start`; masked zeros past row `stop`."""
        config, rows, key = self.config, self.rows, self.columns.actions
        steps, stride = config.history_length + config.chunk_size - 1, config.frame_stride
        if config.action_codec == "local_delta":
            poses = read_numbers(rows, key, range(start, min(stop, start + steps * stride + 1), stride))
            # In float64: what is left of a difference of poses is small.
            actions = encode_local_delta(torch.from_numpy(poses.astype(np.float64))).numpy()
        else:
            commands = read_numbers(rows, key, range(start, min(stop, start + steps * stride)))
            actions = combine_commands(
                commands, stride, config.strided_commands, config.binary_action_indices
            )
        chunks, mask = action_chunks(actions, config.history_length, config.chunk_size)
        return {"actions": torch.from_numpy(chunks), "action_mask": torch.from_numpy(mask)}

    def _read_flow(
        self, episode: int, track_rows: range, shifts: Mapping[str, tuple[int, int]], rng: np.random.Generator
    ) -> dict:
        """Flow targets of the first view, or zeros of weight 0 where the dataset has no tracks."""
        config, view = self.config, self.config.views[0]
        sampling = FlowSampling(
            frames=config.history_length,
            length=config.flow_length,
            grid=config.flow_grid,
            p_moving=config.p_moving,
            occluded_weight=config.occluded_weight,
        )
        if self.columns.points is None:
            targets = blank_flow_targets(sampling)
        else:
            tracks = (self.rows.column(key).read(track_rows) for key in self.columns.points)
            packed, visible = (_pad_rows(values, config.history_length) for values in tracks)
            points = packed.reshape(*visible.shape, 3)
            moving = moving_flags(self._provenance, episode, self.cameras[view], points.shape[1])
            shift = shift_fraction(*shifts[view], *self.view_sizes[view])
            targets = build_flow_targets(points, visible, moving, sampling, rng, shift)
        return {key: torch.from_numpy(value) for key, value in targets.items()}


def _shift_into(n_frames: int, frames: np.ndarray, d_x: int, d_y: int) -> Tensor:
    """Copies moved frames into a tensor of `n_frames`; those past the episode's end stay zero."""
    out = torch.from_numpy(np.empty((n_frames, *frames.shape[1:]), frames.dtype))
    shift_frames(frames, d_x, d_y, out=out.numpy()[: len(frames)])
    out[len(frames) :] = 0
    return out


def _pad_rows(values: np.ndarray, rows: int) -> np.ndarray:
    """Zeros, or false, behind the `(R, ...)` values of an episode that ends within the window."""
    if len(values) >= rows:
        return values
    return np.concatenate([values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)])
