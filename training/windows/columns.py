"""Which columns of a dataset a window reads, and whether their values can be trained on."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from lerobot.utils.constants import OBS_STATE

from datasets_scripts.columns import (
    find_depth_key,
    find_image_key,
    is_label_key,
    points_key,
    points_visible_key,
    validate_columns,
)
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.streaming.streamed_rows import StreamedRows
from modeling_foresight.action_codec import ACTION_SIZE, GRIPPER
from training.windows.settings import WindowConfig
from training.windows.slicing import combine_commands

__all__ = [
    "WindowColumns",
    "require_targets",
    "column_statistics",
    "column_width",
    "idle_objectives",
    "read_numbers",
    "require_columns",
    "two_dimensional",
]

STATISTICS_ROWS = 2**16  # read at a time


@dataclasses.dataclass(frozen=True)
class WindowColumns:
    """Columns of one dataset that a window reads; `None` or absent where the dataset has none.

    Attributes:
        cameras (`dict[str, str]`): View -> camera.
        images, depth (`dict[str, str]`): View -> column.
        points (`tuple[str, str]`, *optional*): Tracks of the first view, and whether each point is visible.
        state, actions (`str`, *optional*): Columns of numbers.
    """

    cameras: dict[str, str]
    images: dict[str, str]
    depth: dict[str, str]
    points: tuple[str, str] | None
    state: str | None
    actions: str | None

    @classmethod
    def find(cls, features: Mapping[str, dict], config: WindowConfig) -> "WindowColumns":
        """Columns among a dataset's `features` for the views and objectives of a configuration."""
        cameras = {view: config.cameras.get(view, view) for view in config.views}
        cameras = {view: camera for view, camera in cameras.items() if camera is not None}
        images = {view: find_image_key(features, camera) for view, camera in cameras.items()}
        depth = {view: find_depth_key(features, camera) for view, camera in cameras.items()}
        tracked = cameras.get(config.views[0]) if config.wants_flow else None
        points = None if tracked is None else (points_key(tracked), points_visible_key(tracked))
        actions = config.action_source
        return cls(
            cameras=cameras,
            images={view: key for view, key in images.items() if key},
            depth={view: key for view, key in depth.items() if key and config.wants_depth},
            points=points if points and set(points) <= set(features) else None,
            state=config.state_key if config.state_key in features else None,
            actions=actions if "action" in config.objectives and actions in features else None,
        )

    def sizes(self, features: Mapping[str, dict], config: WindowConfig) -> dict[str, int]:
        """Entries of `action` and `state`; 0 for what is not delivered."""
        local = config.action_codec == "local_delta" and self.actions
        action = ACTION_SIZE if local else column_width(features, self.actions)
        return {"action": action, "state": column_width(features, self.state)}

    @property
    def frame_keys(self) -> list[str]:
        """All columns of frames: images, then depth."""
        return [*self.images.values(), *self.depth.values()]


def idle_objectives(columns: WindowColumns, config: WindowConfig) -> dict[str, str]:
    """Objectives that have no target in a dataset -> the columns that they lack.

    `future`, `future_rgb` and `progress` always have one: pictures and frame numbers.
    """
    first = columns.cameras.get(config.views[0])
    flow = "the first view has no camera"
    if first is not None:
        flow = f"no {points_key(first)} and {points_visible_key(first)}"
    found = {"action": columns.actions, "depth": columns.depth}
    lacking = {"action": f"no {config.action_source}", "depth": "no camera in use has a depth column"}
    found |= dict.fromkeys(("flow", "flow_2d"), columns.points)
    lacking |= dict.fromkeys(("flow", "flow_2d"), flow)
    return {name: lacking[name] for name in config.objectives if name in lacking and not found[name]}


def require_targets(datasets: Sequence[tuple[str, WindowColumns, WindowConfig]]) -> None:
    """Refuses datasets (name, columns, configuration) of which none has a target of any objective.

    Raises:
        ValueError: Names what each dataset lacks.
    """
    idle = {name: idle_objectives(columns, config) for name, columns, config in datasets}
    if all(len(idle[name]) == len(config.objectives) for name, _, config in datasets):
        lacking = "; ".join(
            f"{name}: " + ", ".join(f"{objective} ({why})" for objective, why in reasons.items())
            for name, reasons in idle.items()
        )
        raise ValueError(
            f"there is nothing to train, because no objective has a target in the data: {lacking}. Add the "
            "columns (`python datasets_scripts/annotate.py` adds depth and points) or choose other objectives"
        )


def require_columns(rows: DatasetRows, columns: WindowColumns, config: WindowConfig) -> None:
    """Refuses a dataset that lacks a column, unless `missing_targets` allows it.

    Raises:
        ValueError: Names the column and the remedy.
    """
    name, strict, first = rows.name, not config.missing_targets, config.views[0]
    if not columns.cameras:
        raise ValueError(f"dataset {name}: every view is mapped to no camera; name at least one")
    validate_columns(
        rows.features,
        list(columns.cameras.values()),
        need_depth=config.wants_depth and strict,
        need_tracks=config.wants_flow and strict and first in columns.cameras,
        name=name,
    )
    if config.wants_flow and strict and first not in columns.cameras:
        raise ValueError(
            f"dataset {name}: the flow objective needs the view '{first}', which is mapped to no camera; "
            "name one, or set missing_targets for a mixture"
        )
    local = config.action_codec == "local_delta"
    if columns.actions is None and "action" in config.objectives and strict:
        raise ValueError(
            f"dataset {name} has no column '{config.state_key}', from whose poses local_delta actions are "
            "made; set state_key to it, or action_codec to 'recorded'"
            if local
            else f"dataset {name} has no column '{config.action_key}'; set action_key to its action column, "
            "or leave 'action' out of the objectives"
        )
    if columns.state is None and strict and config.state_key not in (None, OBS_STATE):
        # A state is optional under its usual name; another name was meant to be there.
        raise ValueError(
            f"dataset {name} has no column '{config.state_key}'; set state_key to its state column, or to "
            "null to train without a state"
        )
    for option, key in (("state_key", columns.state), ("action_key", columns.actions)):
        _check_numbers(rows, option, key)
    width = column_width(rows.features, columns.state)
    if columns.actions and local and width < ACTION_SIZE:
        raise ValueError(
            f"dataset {name}: '{columns.actions}' has {width} entries; local_delta actions need x, y, z, "
            "roll, pitch, yaw and the gripper in the first 7: set action_codec to 'recorded'"
        )
    if columns.actions and not local and config.frame_stride > 1 and config.strided_commands == "refuse":
        raise ValueError(
            f"dataset {name}: with frame_stride={config.frame_stride} a step of the window spans "
            f"{config.frame_stride} recorded commands. Set strided_commands to 'sum' if '{columns.actions}' "
            "holds motions per frame, or to 'last' if it holds targets"
        )


def column_statistics(
    rows: DatasetRows, columns: WindowColumns, config: WindowConfig, episodes: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """`mean`, `std`, `min` and `max` `(size,)` of state and actions over some episodes, by column.

    Actions are those of a step of the window, which may combine several recorded commands. Those of a
    `StreamedRows` come from its metadata.

    Raises:
        ValueError: If a value is NaN or infinite, or no pose where `local_delta` needs one; names the place.
    """
    statistics = {}
    for key in dict.fromkeys(filter(None, (columns.actions, columns.state))):
        if isinstance(rows, StreamedRows):
            statistics[key] = _known_statistics(rows, key, key == columns.actions, config, episodes)
            continue
        local = key == columns.actions and config.action_codec == "local_delta"
        combined = key == columns.actions and not local and config.frame_stride > 1
        moments, grippers = _Moments(), np.zeros(0)
        for span in _find_spans(rows, episodes, joined=not combined):
            part = read_numbers(rows, key, span).astype(np.float64)
            if local:
                grippers = np.unique(np.append(grippers, part[:, GRIPPER]))
                _check_poses(f"dataset {rows.name}: '{key}'", part, grippers)
            elif combined:
                part = combine_commands(
                    part,
                    config.frame_stride,
                    how=config.strided_commands,
                    binary=config.binary_action_indices,
                    every=1,
                )
            moments.add(part)
        statistics[key] = moments.summary()
    return statistics


def _known_statistics(
    rows: StreamedRows, key: str, is_action: bool, config: WindowConfig, episodes: np.ndarray
) -> dict[str, np.ndarray]:
    """Statistics of a column from the metadata; refuses actions that these do not describe."""
    found = rows.read_statistics(key, episodes)
    if is_action and config.action_codec == "local_delta":
        bounds = np.stack([found["min"], found["max"]])
        _check_poses(f"dataset {rows.name}: '{key}'", bounds, np.unique(bounds[:, GRIPPER]))
    elif is_action and config.frame_stride > 1 and config.strided_commands == "sum":
        raise ValueError(
            f"dataset {rows.name}: statistics of actions that are sums of {config.frame_stride} commands are "
            "not in its metadata, and streaming does not read all rows before: train without data.streaming"
        )
    return found


def _find_spans(rows: DatasetRows, episodes: np.ndarray, joined: bool) -> Iterator[range]:
    """Rows of ascending episodes, one range each; or `joined` with their neighbors and cut into blocks."""
    starts, stops = rows.episode_starts[episodes], rows.episode_stops[episodes]
    if joined:
        gap = starts[1:] != stops[:-1]
        starts, stops = starts[np.append(True, gap)], stops[np.append(gap, True)]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        size = STATISTICS_ROWS if joined else stop - start
        yield from (range(first, min(first + size, stop)) for first in range(start, stop, size))


class _Moments:
    """Mean, deviation and range of rows `(n, size)` that come in parts (Chan et al. 1979)."""

    def __init__(self):
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, part: np.ndarray) -> None:
        if not len(part):
            return
        before, self._count = self._count, self._count + len(part)
        away = part.mean(0) - self._mean
        self._squares += part.var(0) * len(part) + away**2 * (before * len(part) / self._count)
        self._mean += away * (len(part) / self._count)
        self._low, self._high = np.minimum(self._low, part.min(0)), np.maximum(self._high, part.max(0))

    def summary(self) -> dict[str, np.ndarray]:
        std = np.sqrt(self._squares / self._count)
        return {"mean": self._mean, "std": std, "min": self._low, "max": self._high}


def read_numbers(rows: DatasetRows, key: str, chosen: range) -> np.ndarray:
    """`(rows, size)` of some rows of a column of states or actions.

    Raises:
        ValueError: If a value is NaN or infinite; names the place and the remedy.
    """
    values = two_dimensional(rows.column(key).read(chosen))
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32)).all(1)  # as the model takes them
    if not finite.all():
        bad = np.array(chosen)[~finite]
        episode = rows.episode_of(bad[0])
        more = int((bad < rows.episode_stops[episode]).sum()) - 1
        raise ValueError(
            f"dataset {rows.name}: '{key}' is not finite in episode {episode}, frame "
            f"{bad[0] - int(rows.episode_starts[episode])} (and in {more} more frames of it): "
            "repair it, or leave the episode out (lerobot-edit-dataset deletes episodes, lerobot-train takes "
            "--dataset.episodes)"
        )
    return values


def _check_poses(place: str, states: np.ndarray, gripper: np.ndarray) -> None:
    """Refuses states `(rows, >= 7)` whose angles are degrees, and more than two values `gripper` so far."""
    if (largest := np.abs(states[:, 3:GRIPPER]).max()) > 2 * np.pi:
        raise ValueError(
            f"{place} has an angle of {largest:.4g} in entries 3 to 5, which must be roll, pitch, yaw in "
            "radians: convert them, or set action_codec to 'recorded'"
        )
    if not any(np.isin(gripper, pair).all() for pair in ((-1, 1), (0, 1))):
        raise ValueError(
            f"{place} has values from {gripper[0]:.4g} to {gripper[-1]:.4g} in entry 6, which must be "
            "the gripper, -1 or 0 closed and 1 open: convert it, or set action_codec to 'recorded'"
        )


def two_dimensional(values: np.ndarray) -> np.ndarray:
    """`(rows, size)` of a column; LeRobot stores features of one element as scalars `(rows,)`."""
    return values[:, None] if values.ndim == 1 else values


def _check_numbers(rows: DatasetRows, option: str, key: str | None) -> None:
    """Refuses a state or an action that is not one row of numbers per frame."""
    feature = rows.features.get(key) or {"dtype": "float32", "shape": []}
    is_number = feature["dtype"] == "bool" or feature["dtype"].startswith(("float", "int", "uint"))
    if not is_number or len(feature["shape"]) > 1 or is_label_key(key or "", feature):
        raise ValueError(
            f"dataset {rows.name}: {option} is '{key}', a column of {feature['dtype']} of the shape "
            f"{tuple(feature['shape'])}; a state or an action is one row of numbers: name another column"
        )


def column_width(features: Mapping[str, dict], key: str | None) -> int:
    """Entries of a column per frame; 0 for no column."""
    return 0 if key is None else int(np.prod(features[key]["shape"]))
