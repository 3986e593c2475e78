"""The episodes of a dataset with their labels: cameras, depth, tracks, and their quality.

Whatever a dataset lacks is left out.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from datasets_scripts.columns import (
    check_depth_range,
    clean_depth,
    find_depth_key,
    find_image_key,
    list_cameras,
    points_key,
    points_visible_key,
    unpack_points,
)
from datasets_scripts.inspection.quality import DepthMeter, TrackMeter
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.even_spread import spread_evenly
from datasets_scripts.storage.frame_cache import OnDemandFrames
from datasets_scripts.storage.provenance import (
    find_intrinsics,
    is_made_depth,
    moving_flags,
    read_provenance,
)

CHUNK = 32  # frames decoded at a time


@dataclasses.dataclass
class Camera:
    """One camera of an episode and its labels.

    Attributes:
        name (`str`): Camera.
        image_key (`str`): RGB column.
        depth_key (`str`, *optional*): Depth column.
        intrinsics (`dict`, *optional*): fx, fy, cx, cy in pixels from the image's outer edge, height, width.
        points (`np.ndarray`, *optional*): `(F, n, 3)` x, y as image fractions, z in meters.
        visible (`np.ndarray`, *optional*): Boolean `(F, n)`.
        moving (`np.ndarray`, *optional*): Boolean `(n,)`; `None` where it is not recorded which points move,
            as after LeRobot's own tools, which leave `meta/foresight.json` behind.
        is_made_depth (`bool`): Whether our scripts made the depth, which may be at its far limit anywhere.
    """

    name: str
    image_key: str
    depth_key: str | None = None
    intrinsics: dict | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None
    moving: np.ndarray | None = None
    is_made_depth: bool = False


class LabeledDataset:
    """A dataset whose episodes are read one by one; files are opened once.

    Args:
        name (`str`): Folder, or Hub id.

    Attributes:
        rows (`DatasetRows`): What is underneath.
        provenance (`dict`): What `read_provenance` gives; empty if there is none.
        labels (`dict[str, list[str]]`): Which labels every camera has: `depth`, `tracks`, both or none.

    Raises:
        ValueError: If the dataset cannot be read.
    """

    def __init__(self, name: str):
        self.rows = DatasetRows(name, stream=True)
        self.provenance = read_provenance(self.rows.root)
        features, self.labels, keys = self.rows.features, {}, []
        for camera in list_cameras(features):
            depth, tracks = find_depth_key(features, camera), {points_key(camera), points_visible_key(camera)}
            kinds = {"depth": depth is not None, "tracks": tracks <= features.keys()}
            self.labels[camera] = [kind for kind, exists in kinds.items() if exists]
            keys += [find_image_key(features, camera), *([depth] if depth else [])]
        self.frames = OnDemandFrames(self.rows, keys)


class LabeledEpisode:
    """An episode's cameras, labels and series; frames are decoded when they are asked for.

    Args:
        dataset (`LabeledDataset`): Dataset of the episode.
        number (`int`): Number of the episode.

    Attributes:
        series (`dict[str, np.ndarray]`): Key -> `(F, size)`: state and action, as far as they exist.

    Raises:
        ValueError: If the dataset has no such episode.
    """

    def __init__(self, dataset: LabeledDataset, number: int):
        self.rows, self.number = dataset.rows, number
        rows = self.rows
        if not 0 <= number < rows.n_episodes:
            raise ValueError(f"dataset {rows.name} has the episodes 0 to {rows.n_episodes - 1}, not {number}")
        self.fps, self._frames = rows.fps, dataset.frames
        whole = rows.rows_of(number)
        self.start, self.length = whole.start, len(whole)
        self.task = read_task(rows, number)
        self.cameras = [self._read_camera(dataset, camera, whole) for camera in dataset.labels]
        self.series = {
            key: rows.column(key).read(whole).astype(np.float32).reshape(self.length, -1)
            for key, feature in rows.features.items()
            if key.rsplit(".", 1)[-1] in ("state", "action", "actions") and "float" in feature["dtype"]
        }

    def _read_camera(self, dataset: LabeledDataset, name: str, whole: range) -> Camera:
        rows, provenance = self.rows, dataset.provenance
        keys = find_image_key(rows.features, name), find_depth_key(rows.features, name)
        camera = Camera(name, *keys, find_intrinsics(provenance, rows.features, name))
        camera.is_made_depth = is_made_depth(provenance, name)
        if "tracks" in dataset.labels[name]:
            camera.points = unpack_points(rows.column(points_key(name)).read(whole))
            camera.visible = rows.column(points_visible_key(name)).read(whole)
            if "moving" in provenance.get("episodes", {}).get(str(self.number), {}).get(name, {}):
                camera.moving = moving_flags(provenance, self.number, name, camera.visible.shape[1])
        return camera

    def read(self, key: str, first: int, count: int = 1) -> np.ndarray:
        """Frames `first` and on: RGB `(count, H, W, 3)` uint8, or depth `(count, H, W)` m, 0 = invalid."""
        frames = self._frames.read(key, range(self.start + first, self.start + first + count))
        return frames if frames.ndim == 3 else frames.transpose(0, 2, 3, 1)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First frame and number of frames of parts that fit into memory."""
        for first in range(0, self.length, CHUNK):
            yield first, min(CHUNK, self.length - first)

    def read_stored_depth(self, key: str, first: int, count: int) -> tuple[np.ndarray, float]:
        """Depth `(count, H, W)` in meters, nothing marked invalid, and the far limit of its storage."""
        decoder = self._frames.decoders[key]
        rows = range(self.start + first, self.start + first + count)
        return decoder.meters(decoder.decode(rows), clean=False), decoder.limit_m


def read_task(rows: DatasetRows, episode: int) -> str:
    """Instruction of an episode."""
    return rows.instruction_of(rows.rows_of(episode).start)


@dataclasses.dataclass
class Measures:
    """Quality of one camera's labels in one episode.

    Attributes:
        depth (`DepthMeter`, *optional*): Figures of the depth.
        tracks (`TrackMeter`, *optional*): Figures of the tracks.
        problem (`str`, *optional*): Why the depth cannot be used: a damaged file, or not in meters.
    """

    depth: DepthMeter | None = None
    tracks: TrackMeter | None = None
    problem: str | None = None

    def figures(self) -> dict[str, Any]:
        """For `meta/foresight_episodes.jsonl`; see `quality.py`."""
        facts = {} if self.tracks is None else self.tracks.figures()
        if self.problem is not None:
            return {**facts, "problem": self.problem}
        return facts if self.depth is None else {**facts, "depth": self.depth.figures()}


def measure_episode(episode: LabeledEpisode, most_chunks: int | None = None) -> dict[str, Measures]:
    """Reads an episode and measures its labels.

    Args:
        episode (`LabeledEpisode`): The episode.
        most_chunks (`int`, *optional*): Read at most so many evenly spread runs of 32 frames; all if omitted.

    Returns:
        `dict[str, Measures]`: By camera.
    """
    found = {}
    for camera in episode.cameras:
        measures = found[camera.name] = Measures()
        if camera.points is not None:
            measures.tracks = TrackMeter(camera.points, camera.visible, camera.moving)
        try:
            if camera.depth_key is not None:
                measures.depth = DepthMeter()
                _measure_depth(episode, camera, measures, most_chunks)
            else:
                episode.read(camera.image_key, episode.length - 1)  # tells whether the file is whole
        except ValueError as error:
            measures.problem = episode.rows.strip_folder(error)
    return found


def _measure_depth(episode: LabeledEpisode, camera: Camera, measures: Measures, most: int | None) -> None:
    chunks, expected = list(episode.chunks()), 0
    for first, count in (chunks[i] for i in spread_evenly(len(chunks), most or len(chunks))):
        if first != expected:
            measures.depth.start_clip()
        expected = first + count
        stored, limit_m = episode.read_stored_depth(camera.depth_key, first, count)
        check_depth_range(stored, camera.depth_key, math.inf if camera.is_made_depth else limit_m)
        depth = clean_depth(stored, limit_m)
        measures.depth.add(depth, episode.read(camera.image_key, first, count))
        if measures.tracks is not None:
            measures.tracks.add(first, depth)
