"""The datasets of a run as windows for training and validation, and their statistics and descriptions."""

import dataclasses
import functools
import hashlib
import itertools
import signal
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import distributed
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig

from datasets_scripts.columns import find_image_key, image_key
from datasets_scripts.storage.dataset_folder import STATS_PATH
from datasets_scripts.storage.dataset_rows import DatasetRows, dataset_name, pin_commit
from datasets_scripts.storage.provenance import (
    EPISODE_FACTS_PATH,
    PROVENANCE_PATH,
    find_unrecorded,
    read_provenance,
    scripted_in,
)
from datasets_scripts.storage.statistics import pool_statistics
from datasets_scripts.storage.streaming.streamed_rows import StreamedRows, open_store
from modeling_foresight import ForesightConfig
from training.config import DatasetSource, RunConfig
from training.windows import (
    ConcatWindows,
    ForesightWindows,
    WindowConfig,
    WindowSampler,
    collate_windows,
    control_rate,
    find_embodiments,
    split_episodes,
    warn_of_differences,
    warn_of_no_future,
)
from training.windows.block_shuffle import split_by_files
from training.windows.columns import WindowColumns
from training.windows.stream_plan import StreamedBatches, StreamedSampler, StreamPlan

__all__ = [
    "RunData",
    "dataset_identity",
    "describe_data",
    "evaluation_loader",
    "is_same_dataset",
    "learns_to_act",
    "open_dataset",
    "open_datasets",
    "read_base",
    "split_rows",
    "training_loader",
    "window_config",
]


def open_datasets(config: RunConfig, known: Sequence[Mapping] = ()) -> list[DatasetRows]:
    """The datasets of a run, in the config's order, then the one for validation alone.

    The only place where training opens them.

    Args:
        config (`RunConfig`): The run.
        known (`Sequence[Mapping]`): What [`describe_data`] said of them when the run began. Those of the Hub
            are opened at the commits of then: their branches may have moved.

    Raises:
        ValueError: If no dataset is named, or one is missing or damaged.
    """
    if not config.data.datasets:
        raise ValueError("no dataset: give --dataset DIR_OR_REPO, or data.datasets in the config")
    paths = [source.path for source in config.data.datasets]
    paths += [config.data.validation] if config.data.validation else []
    pairs = itertools.zip_longest(paths, known[: len(paths)], fillvalue={})
    return [open_dataset(path, config, one.get("commit")) for path, one in pairs]


def open_dataset(path: str, config: RunConfig, commit: str | None = None) -> DatasetRows:
    """One dataset of a run, streamed if the run is; a Hub id that names no commit is read at `commit`."""
    place = pin_commit(path, commit)
    if config.data.streaming:
        rows = StreamedRows(place, open_store(config.data.streaming_disk_gb))
    else:
        rows = DatasetRows(place)
    rows.name = path  # in all messages and summaries of the run
    return rows


def describe_data(config: RunConfig, datasets: Sequence[DatasetRows]) -> list[dict]:
    """What a run folder tells of [`open_datasets`]: identities, commits, and which is for validation."""
    count = len(config.data.datasets)
    roles = [{}] * count + [{"validation": True}] * (len(datasets) - count)
    return [
        dataset_identity(rows) | {"commit": rows.commit} | role
        for rows, role in zip(datasets, roles, strict=True)
    ]


def dataset_identity(rows: DatasetRows) -> dict:
    """Name, size, tasks, metadata and statistics of a dataset: the same for every copy of it but the name.

    Two recordings may have all but the statistics in common.
    """
    digest, statistics = hashlib.sha256(), rows.root / STATS_PATH
    for place in ("meta/info.json", PROVENANCE_PATH, EPISODE_FACTS_PATH):
        if (rows.root / place).exists():
            digest.update((rows.root / place).read_bytes())
    digest.update(rows.version.encode())
    content = statistics.read_bytes() if statistics.is_file() else b""
    return {
        "name": dataset_name(rows.name),
        "episodes": rows.n_episodes,
        "frames": len(rows),
        "tasks": rows.tasks,
        "digest": digest.hexdigest()[:16],
        "statistics_sha256": hashlib.sha256(content).hexdigest(),
    }


def is_same_dataset(known: Mapping, own: Mapping) -> bool:
    """Whether two [`dataset_identity`] are of copies; runs of older versions know less of their data.

    Two commits of the Hub may have the same data.
    """
    shared = known.keys() & own.keys() - {"name", "commit"}
    return "digest" in shared and all(known[fact] == own[fact] for fact in shared)


def window_config(model: ForesightConfig, config: RunConfig) -> WindowConfig:
    """Windows of a run: what the model takes and is supervised with, made as `config.data` says."""
    names = ("p_moving", "occluded_weight", "random_shift", "action_key")
    names += ("skip_flagged", "missing_targets", "frame_cache")
    return WindowConfig.for_model(
        model,
        views=list(model.views),
        goal_image=model.goal_image,
        state_key=config.data.state_key if model.state_dim else None,
        action_codec=model.action_codec,
        binary_action_indices=list(model.binary_action_indices),
        seed=config.seed,
        **{name: getattr(config.data, name) for name in names},
    )


def read_base(config: RunConfig) -> ForesightConfig:
    """The config of `init_from`.

    Raises:
        ValueError: If it cannot be loaded; says why.
    """
    try:
        return AutoConfig.from_pretrained(config.init_from, revision=config.init_revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={config.init_from} cannot be loaded: {error}") from error


def learns_to_act(base: ForesightConfig, fields: dict) -> bool:
    """Whether `fields` of the config add actions to a base that was trained without."""
    return "action" in fields.get("objectives", ()) and not base.has("action")


class RunData:
    """Windows of all datasets of a run, split by episode.

    Args:
        config (`RunConfig`): Datasets and how their windows are made.
        model (`ForesightConfig`): Lengths, views and objectives.
        datasets (`Sequence[DatasetRows]`, *optional*): As of [`open_datasets`], if they are already open.

    Attributes:
        train (`ConcatWindows`): Augmented windows of the training episodes.
        val (`ConcatWindows`, *optional*): Windows of the validation episodes, held out or those of
            `data.validation`; `None` if there are none.
        stream (`StreamPlan`, *optional*): Of a streamed run, the order of its windows.
        mixture (`str` or `list[float]`): As of `WindowSampler`.
        instructions (`list[str]`): All instructions.
        fps (`float`): Control steps per second.

    Raises:
        ValueError: If no dataset is named, one does not fit the model, or none has anything to train on.
    """

    def __init__(
        self, config: RunConfig, model: ForesightConfig, datasets: Sequence[DatasetRows] | None = None
    ):
        datasets = open_datasets(config) if datasets is None else datasets
        base = window_config(model, config)
        sources, train, val = [_apply_source(base, source) for source in config.data.datasets], [], []
        trained_on, apart = datasets[: len(sources)], datasets[len(sources) :]
        pairs = list(zip(trained_on, sources, strict=True))
        embodiments = _place_robots(pairs, model, config)
        for rows, own in pairs:
            own = _name_binary_entries(own, embodiments, model)
            chosen, held_out = split_rows(rows, own, config)
            train.append(ForesightWindows(rows, dataclasses.replace(own, episodes=chosen)))
            if held_out and _is_long_enough(rows, own, held_out):
                val.append(ForesightWindows(rows, own.for_evaluation(held_out)))
        self.train = ConcatWindows(train, embodiments)
        warn_of_differences(train)
        warn_of_no_future(train)
        for rows in apart:
            own = _name_binary_entries(sources[0], embodiments, model)
            val.append(_open_validation(rows, own.for_evaluation(), train))
        self.val = ConcatWindows(val, self.train.embodiments) if val else None
        self.mixture, self.stream = config.data.mixture, None
        if config.data.streaming:
            self.stream = StreamPlan(self.train, self.val, self.mixture, config.seed)
        self.instructions = sorted({task for windows in train for task in windows.rows.tasks})
        self.fps = control_rate(train)

    def sampler(self, batch_size: int, **options) -> WindowSampler:
        """[`WindowSampler`] of the training windows; of a streamed run, in the order of its files."""
        kind = functools.partial(StreamedSampler, self.stream.orders) if self.stream else WindowSampler
        return kind(self.train.sizes, batch_size, mixture=self.mixture, **options)

    def unaugmented_train(self) -> ConcatWindows:
        """The training windows without augmentation."""
        plain = (w.config.for_evaluation(w.config.episodes) for w in self.train.datasets)
        windows = ConcatWindows(
            [ForesightWindows(w.rows, own) for w, own in zip(self.train.datasets, plain, strict=True)],
            self.train.embodiments,
        )
        windows.near = self.train.near
        return windows

    def describe_window(self, index: int) -> str:
        """Dataset, episode and newest frame of a training window, for messages."""
        windows, index = self.train.locate(index)
        episode, first_row = windows.locate(index)
        newest = first_row + (windows.config.history_length - 1) * windows.config.frame_stride
        frame = newest - int(windows.rows.episode_starts[episode])
        return f"dataset {windows.rows.name}, episode {episode}, frame {frame}"

    @property
    def names(self) -> list[str]:
        """Names of the datasets that are trained on, each different from the others."""
        short = [dataset_name(windows.rows.name) for windows in self.train.datasets]
        names, taken = [], {name for name in short if short.count(name) == 1}
        for i, name in enumerate(short):
            while short.count(name) > 1 or name in taken - {short[i]}:
                name = f"{name}-{i}"
            names.append(name)
            taken.add(name)
        return names

    def statistics(self, key: str, embodiment: str | None = None) -> dict[str, np.ndarray] | None:
        """`mean`, `std`, `min` and `max` of `action` or `state` over the episodes trained on, of one robot.

        In a mixture every dataset of the robot counts by its number of windows. `None` for `local_delta`
        actions, which are never normalized, and where the robot has no such numbers.
        """
        if key == "action" and self.train.config.action_codec == "local_delta":
            return None
        column = getattr(self.train.config, f"{key}_key")
        robot = [windows for windows in self.train.datasets if windows.config.embodiment == embodiment]
        found = [windows for windows in robot if column in windows.statistics]
        if not found:
            return None
        each = {
            name: np.stack([windows.statistics[column][name] for windows in found])
            for name in ("mean", "std", "min", "max")
        }
        return pool_statistics(each, np.array([len(windows) for windows in found]))

    @property
    def image_keys(self) -> dict[str, str | None]:
        """Image column of every view in the first dataset that has the view; `None` if none has."""
        keys = dict.fromkeys(self.train.config.views)
        for windows in reversed(self.train.datasets):
            for view, camera in windows.cameras.items():
                key = find_image_key(windows.rows.features, camera)
                # LeRobot hands no other columns to a policy; robots name their cameras like this.
                keys[view] = key if key.startswith("observation.") else image_key(key)
        return keys

    def describe(self) -> list[dict]:
        """Name, episodes, windows and label sources of every dataset, for the card."""
        val = self.val.datasets if self.val else []
        apart = [windows for windows in val if windows.config.episodes is None]
        held_out = {id(windows.rows): windows for windows in val}  # not all datasets need have some
        pairs = [(windows, held_out.get(id(windows.rows))) for windows in self.train.datasets]
        return [_describe_dataset(*pair) for pair in (*pairs, *((None, windows) for windows in apart))]


def split_rows(rows: DatasetRows, own: WindowConfig, config: RunConfig) -> tuple[list[int], list[int]]:
    """Episodes of a dataset for training and for validation; `own` are its windows."""
    # Flagged episodes are not removed yet: a flag must not move other episodes across the split.
    split = {"val_fraction": config.data.val_fraction, "seed": config.seed}
    if config.data.streaming:
        return split_by_files(rows, WindowColumns.find(rows.features, own).frame_keys, **split)
    try:
        return split_episodes(rows.n_episodes, **split)
    except ValueError as error:
        raise ValueError(f"dataset {rows.name}: {error}") from None


def _is_long_enough(rows: DatasetRows, own: WindowConfig, held_out: Sequence[int]) -> bool:
    """Whether any of the episodes held out gives a window; warns if none does."""
    longest = int((rows.episode_stops - rows.episode_starts)[held_out].max())
    if longest < own.frames_needed:
        warnings.warn(
            f"dataset {rows.name} has no validation: the {len(held_out)} episodes held out have at most "
            f"{longest} frames, and a window needs {own.frames_needed}. Another seed or a larger "
            "data.val_fraction holds out others",
            stacklevel=3,
        )
    return longest >= own.frames_needed


def _apply_source(base: WindowConfig, source: DatasetSource) -> WindowConfig:
    """Windows of one dataset of the mixture."""
    return dataclasses.replace(base, **{name: x for name, x in vars(source).items() if name != "path"})


def _place_robots(
    pairs: Sequence[tuple[DatasetRows, WindowConfig]], model: ForesightConfig, config: RunConfig
) -> dict | None:
    """Places of the robots' entries, of those that the model knows and those of the data."""
    sources, known = [], model.embodiments or {}
    for rows, own in pairs:
        sizes = WindowColumns.find(rows.features, own).sizes(rows.features, own)
        sources.append((rows.name, own.embodiment, sizes))
    fresh = not config.init_from
    if not fresh and any(robot not in (None, *known) for _, robot, _ in sources):
        fresh = learns_to_act(read_base(config), config.model)
    # Poses have the same form, and the same places, for all robots.
    fresh &= (model.action_codec, model.state_representation) == ("recorded", "absolute")
    return find_embodiments(sources, known, fresh)


def _name_binary_entries(
    config: WindowConfig, embodiments: dict | None, model: ForesightConfig
) -> WindowConfig:
    """The windows of a robot, whose binary entries are those at the binary places of the model's action."""
    if not embodiments:
        return config
    places = embodiments[config.embodiment]["action"]
    binary = [entry for entry, place in enumerate(places) if place in model.binary_action_indices]
    return dataclasses.replace(config, binary_action_indices=binary)


def _open_validation(
    rows: DatasetRows, config: WindowConfig, train: Sequence[ForesightWindows]
) -> ForesightWindows:
    """Windows of a dataset for validation alone; it must be like the first one, and none trained on."""
    val, first = ForesightWindows(rows, config), train[0]
    own = dataset_identity(rows)  # a copy in another place counts too
    if any(is_same_dataset(dataset_identity(windows.rows), own) for windows in train):
        raise ValueError(f"data.validation is {rows.name}, which is trained on too; give another dataset")
    for what, read in {
        "state size": lambda windows: windows.state_dim,
        "action size": lambda windows: windows.action_dim,
        "pictures": lambda windows: windows.view_sizes,
        "depth": lambda windows: windows.depth_sizes,
        "views": lambda windows: sorted(windows.cameras),
        "tracks": lambda windows: windows.columns.points is not None,
        "frames a second": lambda windows: windows.rows.fps,
    }.items():
        if read(val) != read(first):
            raise ValueError(
                f"data.validation: {val.rows.name} and {first.rows.name} differ in {what}: {read(val)} and "
                f"{read(first)}; convert and annotate both in the same way"
            )
    return val


def _describe_dataset(train: ForesightWindows | None, val: ForesightWindows | None) -> dict:
    """One entry of `RunData.describe`, from the windows of the two parts of a dataset."""
    parts = [windows for windows in (train, val) if windows is not None]
    rows = parts[0].rows
    provenance = read_provenance(rows.root)
    simulator, identity = scripted_in(provenance), dataset_identity(rows)
    return {
        "name": Path(rows.name).name if Path(rows.name).exists() else rows.name.partition("@")[0],
        "commit": rows.commit,
        **{fact: identity[fact] for fact in ("digest", "statistics_sha256")},
        "train_episodes": len(train.episodes) if train else 0,
        "train_windows": len(train) if train else 0,
        "validation_episodes": val.episodes.tolist() if val else [],
        "flagged_episodes": sorted({episode for windows in parts for episode in windows.flagged}),
        "fps": rows.fps,
        **({"embodiment": robot} if (robot := parts[0].config.embodiment) else {}),
        "tasks": rows.tasks,
        "labels": provenance.get("cameras", {}),
        **({"unrecorded_labels": unknown} if (unknown := find_unrecorded(provenance, rows.features)) else {}),
        **({"scripted_in": simulator} if simulator else {}),
    }


def training_loader(
    config: RunConfig, data: RunData, sampler: WindowSampler, device: torch.device
) -> DataLoader:
    """Augmented training windows in the sampler's batches, read by `num_workers` processes."""
    workers, batches = config.data.num_workers, sampler
    if data.stream and PartialState().is_local_main_process:
        batches = StreamedBatches(data.stream, sampler, workers)
    return DataLoader(
        data.train,
        batch_sampler=batches,
        collate_fn=collate_windows,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        # Forking a process that decodes video and computes with threads is not safe.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=device.type == "cuda",
    )


def leave_signals_to_parent(worker: int) -> None:
    """Ignores what a terminal sends to all its processes: a run needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def evaluation_loader(windows: ConcatWindows, batch_size: int, count: int | None = None) -> DataLoader:
    """Windows in order, all or `count` of them; of several processes, each gets its share of them."""
    chosen = windows.spread(count or None)
    ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    share = chosen[ranks[0] :: ranks[1]]
    return DataLoader(Subset(windows, share), batch_size=batch_size, collate_fn=collate_windows)
