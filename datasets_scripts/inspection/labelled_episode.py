"""The episodes of a dataset with their labels: cameras, depth, tracks, and how good they are.

Whatever a dataset lacks is left out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from datasets_scripts.columns import (
    IMAGE_PREFIX,
    check_depth_range,
    clean_depth,
    find_depth_key,
    is_depth_feature,
    points_key,
    points_visible_key,
    unpack_points,
)
from datasets_scripts.inspection.quality import DepthMeter, TrackMeter
from datasets_scripts.storage.frame_cache import OnDemandFrames
from datasets_scripts.storage.provenance import moving_flags, read_provenance
from datasets_scripts.storage.rows import DatasetRows

__all__ = ["Camera", "LabelledEpisode", "LabelledDataset", "Measures", "measure"]

CHUNK = 32  # frames decoded at a time


@dataclasses.dataclass
class Camera:
    """One camera of an episode and its labels.

    Attributes:
        name (`str`): Camera.
        image_key (`str`): Its RGB column.
        depth_key (`str`, *optional*): Its depth column.
        intrinsics (`dict`, *optional*): fx, fy, cx, cy in pixels from the image's outer edge, height, width.
        points (`np.ndarray`, *optional*): `(F, n, 3)` x, y as image fractions, z in metres.
        visible (`np.ndarray`, *optional*): Boolean `(F, n)`.
        moving (`np.ndarray`, *optional*): Boolean `(n,)`; `None` where it is not recorded which points move,
            as after LeRobot's own tools, which leave `meta/foresight.json` behind.
    """

    name: str
    image_key: str
    depth_key: str | None = None
    intrinsics: dict | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None
    moving: np.ndarray | None = None


class LabelledDataset:
    """A dataset whose episodes are looked at; files are opened once.

    Args:
        name (`str`): Folder, or Hub id.

    Attributes:
        rows (`DatasetRows`): What is underneath.
        provenance (`dict`): Contents of `meta/foresight.json`; empty if there is none.
        image_keys (`list[str]`): RGB columns.

    Raises:
        ValueError: If the dataset cannot be read.
    """

    def __init__(self, name: str):
        self.rows = rows = DatasetRows(name, stream=True)
        self.provenance = read_provenance(rows.root)
        self.image_keys = [
            key
            for key, feature in rows.features.items()
            if feature["dtype"] in ("image", "video") and not is_depth_feature(feature)
        ]
        depth_keys = [find_depth_key(rows.features, self.camera_name(key)) for key in self.image_keys]
        self.frames = OnDemandFrames(rows, [*self.image_keys, *filter(None, depth_keys)])

    def labels(self) -> dict[str, list[str]]:
        """Which labels every camera has: `depth`, `tracks`, both or none."""
        found = {}
        for camera in map(self.camera_name, self.image_keys):
            has_tracks = {points_key(camera), points_visible_key(camera)} <= set(self.rows.features)
            kinds = {"depth": find_depth_key(self.rows.features, camera), "tracks": has_tracks}
            found[camera] = [kind for kind, there in kinds.items() if there]
        return found

    @staticmethod
    def camera_name(key: str) -> str:
        """Camera of an RGB column."""
        return key.removeprefix(IMAGE_PREFIX)


class LabelledEpisode:
    """An episode's cameras, labels and series; frames are decoded when they are asked for.

    Args:
        dataset (`LabelledDataset`): Its dataset.
        number (`int`): Which one.

    Attributes:
        series (`dict[str, np.ndarray]`): Key -> `(F, size)`: state and action, where there are.

    Raises:
        ValueError: If the dataset has no such episode.
    """

    def __init__(self, dataset: LabelledDataset, number: int):
        self.rows, self.number = dataset.rows, number
        rows = self.rows
        if not 0 <= number < rows.n_episodes:
            raise ValueError(f"dataset {rows.name} has the episodes 0 to {rows.n_episodes - 1}, not {number}")
        self.fps, self._frames = rows.fps, dataset.frames
        self.start, stop = int(rows.episode_starts[number]), int(rows.episode_stops[number])
        self.length, whole = stop - self.start, range(self.start, stop)
        self.task = rows.tasks[int(rows.column("task_index").read(whole)[0])]
        self.cameras = [self._camera(dataset, key, whole) for key in dataset.image_keys]
        self.series = {
            key: rows.column(key).read(whole).astype(np.float32).reshape(self.length, -1)
            for key, feature in rows.features.items()
            if key.rsplit(".", 1)[-1] in ("state", "action", "actions") and "float" in feature["dtype"]
        }

    def _camera(self, dataset: LabelledDataset, key: str, whole: range) -> Camera:
        rows, name = self.rows, dataset.camera_name(key)
        facts = dataset.provenance.get("cameras", {}).get(name, {})
        camera = Camera(name, key, find_depth_key(rows.features, name), facts.get("intrinsics"))
        if {points_key(name), points_visible_key(name)} <= set(rows.features):
            camera.points = unpack_points(rows.column(points_key(name)).read(whole))
            camera.visible = rows.column(points_visible_key(name)).read(whole)
            known = dataset.provenance.get("episodes", {}).get(str(self.number), {}).get(name, {})
            if "moving" in known:
                camera.moving = moving_flags(dataset.provenance, self.number, name, camera.visible.shape[1])
        return camera

    def read(self, key: str, first: int, count: int = 1) -> np.ndarray:
        """Frames `first` and on: RGB `(count, H, W, 3)` uint8, or depth `(count, H, W)` m, 0 = invalid."""
        frames = self._frames.read(key, range(self.start + first, self.start + first + count))
        return frames if frames.ndim == 3 else frames.transpose(0, 2, 3, 1)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First frame and number of frames of parts that fit into memory."""
        for first in range(0, self.length, CHUNK):
            yield first, min(CHUNK, self.length - first)

    def depth_as_stored(self, key: str, first: int, count: int) -> tuple[np.ndarray, float]:
        """Depth `(count, H, W)` in metres, nothing marked invalid, and the far limit of its storage."""
        decoder = self._frames.decoders[key]
        rows = range(self.start + first, self.start + first + count)
        return decoder.metres(decoder.decode(rows), clean=False), decoder.limit_m


@dataclasses.dataclass
class Measures:
    """How good the labels of one camera are in one episode.

    Attributes:
        depth (`DepthMeter`, *optional*): Of its depth.
        tracks (`TrackMeter`, *optional*): Of its tracks.
        problem (`str`, *optional*): Why the depth cannot be used: a damaged file, or not in metres.
    """

    depth: DepthMeter | None = None
    tracks: TrackMeter | None = None
    problem: str | None = None

    def figures(self) -> dict[str, Any]:
        """For `meta/foresight.json`; see `quality.py`."""
        facts: dict[str, Any] = {}
        if self.tracks is not None:
            facts |= self.tracks.figures()
        if self.depth is not None and self.problem is None:
            facts["depth"] = self.depth.figures()
        if self.problem is not None:
            facts["problem"] = self.problem
        return facts


def measure(episode: LabelledEpisode, most_chunks: int | None = None) -> dict[str, Measures]:
    """Reads an episode and measures its labels.

    Args:
        episode (`LabelledEpisode`): Which one.
        most_chunks (`int`, *optional*): Look at so many evenly spread runs of 32 frames; at all if omitted.

    Returns:
        `dict[str, Measures]`: By camera.
    """
    found = {}
    for camera in episode.cameras:
        own = found[camera.name] = Measures()
        if camera.points is not None:
            own.tracks = TrackMeter(camera.points, camera.visible, camera.moving)
        try:
            if camera.depth_key is not None:
                own.depth = DepthMeter()
                _measure_depth(episode, camera, own, most_chunks)
            else:
                episode.read(camera.image_key, episode.length - 1)  # tells whether the file is whole
        except ValueError as error:
            own.problem = episode.rows.remove_folder(error)
    return found


def _measure_depth(episode: LabelledEpisode, camera: Camera, own: Measures, most_chunks: int | None) -> None:
    chunks = list(episode.chunks())
    if most_chunks is not None and len(chunks) > most_chunks:
        chunks = [chunks[i] for i in np.linspace(0, len(chunks) - 1, most_chunks).round().astype(int)]
    expected = 0
    for first, count in chunks:
        if first != expected:
            own.depth.cut()
        expected = first + count
        stored, limit_m = episode.depth_as_stored(camera.depth_key, first, count)
        check_depth_range(stored, camera.depth_key, limit_m)
        depth = clean_depth(stored, limit_m)
        own.depth.add(depth, episode.read(camera.image_key, first, count))
        if own.tracks is not None:
            own.tracks.add(first, depth)
