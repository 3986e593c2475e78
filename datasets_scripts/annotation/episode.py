"""One episode of an existing dataset -> its labels, in a folder that appears only when it is whole."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from datasets_scripts.columns import (
    IMAGE_PREFIX,
    check_depth_range,
    clean_depth,
    depth_key,
    find_depth_key,
    find_image_key,
    is_label_key,
    pack_points,
    picture_size,
    points_key,
)
from datasets_scripts.depth import DEPTH_SOURCES, check_depth_source, open_depth
from datasets_scripts.inspection.quality import DepthMeter, TrackMeter
from datasets_scripts.storage.atomic import write_whole_folder
from datasets_scripts.storage.dataset_folder import dataset_files
from datasets_scripts.storage.depth_videos import DepthVideos
from datasets_scripts.storage.frame_cache import FrameDecoder, depth_code_table
from datasets_scripts.storage.rows import BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.shards import ARRAYS, read_facts, write_facts
from datasets_scripts.storage.video_writing import (
    MIN_DEPTH_SIDE_PX,
    DepthVideo,
    lerobot_depth_encoder,
    video_stats,
)
from datasets_scripts.tracks import check_track_source, open_tracker
from datasets_scripts.tracks.sampling import sample_tracks

__all__ = [
    "Annotation",
    "LabelMaker",
    "annotate_shard",
    "check_readable",
    "current_facts",
    "dataset_cameras",
]

LIMITS = (-2.0, 3.0)  # image fractions beyond which a position is cut, as for exact tracks
RUN_FRAMES, RUN_BYTES = 64, 64e6  # decoded at once: the fewer of the two
HELD_BYTES = 256e6  # decoded frames of one column that are kept; short episodes are decoded once
STATS_PIXELS = 1e7  # of an episode's depth that its statistics are made of
FINGERPRINT_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What is added to a dataset; two runs with equal fields add the same.

    Args:
        cameras (`tuple[str, ...]`): Cameras that need depth; the first one gets the tracks.
        depth (`str`): Where depth comes from: `"sensor"`, a depth column that the dataset has, or a model as
            [`depth.open_depth`] knows it.
        depth_model (`str`, *optional*): Its weights.
        align_with (`str`, *optional*): Metric model for a relative one.
        depth_max_m (`float`): Farthest depth kept of a model's, metres.
        tracks (`str`): Where tracks come from, as [`tracks.open_tracker`] knows it.
        track_model (`str`, *optional*): Its weights.
        n_points (`int`): Most tracks per episode, a quarter of them moving.
        seed (`int`): Of the choice of points.

    Raises:
        ValueError: If a source is unknown or not installed, or a number out of range; names it.
    """

    cameras: tuple[str, ...]
    depth: str = "sensor"
    depth_model: str | None = None
    align_with: str | None = None
    depth_max_m: float = 10.0
    tracks: str = "lucas-kanade"
    track_model: str | None = None
    n_points: int = 1250
    seed: int = 0

    def __post_init__(self):
        if self.n_points < 2:
            raise ValueError(f"--n-points is {self.n_points}; a track column needs at least 2")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        if not 0.1 <= self.depth_max_m <= 100:
            raise ValueError(f"--depth-max is {self.depth_max_m:g} m; it must lie between 0.1 and 100")
        if len(set(self.cameras)) != len(self.cameras) or not self.cameras:
            raise ValueError(f"cameras are {','.join(self.cameras) or 'none'}; name each of them once")

    @property
    def estimates_depth(self) -> bool:
        """Whether depth columns are added."""
        return self.depth != "sensor"

    def to_dict(self) -> dict:
        """JSON form; models in folders and files by name and content, wherever these lie."""
        values = {**dataclasses.asdict(self), "cameras": list(self.cameras)}
        for name in ("depth", "depth_model", "align_with", "track_model"):
            path = Path(values[name] or "")
            if values[name] and values[name] not in DEPTH_SOURCES and path.exists():
                values |= {name: path.absolute().name, f"{name}_sha256": _fingerprint(path)}
        return values

    def check(self, rows: DatasetRows, episodes: Sequence[int]) -> None:
        """Whether a dataset can be annotated so.

        Args:
            rows (`DatasetRows`): The dataset.
            episodes (`Sequence[int]`): Those that will be annotated; depth is looked at in three of them.

        Raises:
            ValueError: If a source cannot be had, a camera or its depth is missing, the depth cannot be in
                metres or is of another size than the images, or the dataset has these labels; names it.
        """
        check_depth_source(self.depth, self.depth_model, self.align_with)
        check_track_source(self.tracks, self.track_model)
        cameras = dataset_cameras(rows.features)
        for camera in self.cameras:
            if camera not in cameras:
                raise ValueError(
                    f"dataset {rows.name} has no camera '{camera}'; it has {', '.join(cameras) or 'none'}"
                )
            if self.estimates_depth:
                self._check_room_for_depth(rows, camera)
            else:
                self._check_sensor(rows, camera, episodes)
        if points_key(self.cameras[0]) in rows.features:
            raise ValueError(
                f"dataset {rows.name} has tracks of camera '{self.cameras[0]}' already: choose "
                "another camera as the first one, or remove the columns with lerobot-edit-dataset"
            )

    def _check_room_for_depth(self, rows: DatasetRows, camera: str) -> None:
        if depth_key(camera) in rows.features:
            raise ValueError(
                f"dataset {rows.name} has the column '{depth_key(camera)}' already: use it with --depth "
                "sensor, or remove it with lerobot-edit-dataset"
            )
        height, width = picture_size(rows.features[find_image_key(rows.features, camera)])
        if min(height, width) < MIN_DEPTH_SIDE_PX:
            raise ValueError(
                f"images of camera '{camera}' are {width}x{height} px, and depth videos need "
                f"{MIN_DEPTH_SIDE_PX} px at least: leave the camera out with --cameras"
            )

    def _check_sensor(self, rows: DatasetRows, camera: str, episodes: Sequence[int]) -> None:
        key = find_depth_key(rows.features, camera)
        if key is None:
            raise ValueError(
                f"camera '{camera}' of dataset {rows.name} has no depth column, which --depth sensor "
                f"needs (a feature with is_depth_map, such as 'observation.depth.{camera}'): record it "
                "with a depth camera, estimate it with another --depth, or leave it out with --cameras"
            )
        decoder, pictures = (
            FrameDecoder(rows, name) for name in (key, find_image_key(rows.features, camera))
        )
        for episode in {episodes[0], episodes[len(episodes) // 2], episodes[-1]}:
            first = int(rows.episode_starts[episode])
            stored = decoder.decode(range(first, first + 1))
            check_depth_range(decoder.metres(stored, clean=False), key, decoder.limit_m)
            height, width = pictures.decode(range(first, first + 1)).shape[-2:]
            if camera == self.cameras[0] and stored.shape[1:] != (height, width):
                raise ValueError(
                    f"depth of {key} is {stored.shape[2]}x{stored.shape[1]} px and its camera's images "
                    f"are {width}x{height}: record them aligned and of one size"
                )


def _fingerprint(model: Path) -> str:
    """Of a model's files: sizes, beginnings and ends, which differ between two trainings of a network."""
    digest = hashlib.sha256()
    for path in [model] if model.is_file() else [model / place for place in dataset_files(model)]:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for place in (0, max(0, size - FINGERPRINT_BYTES)):
                file.seek(place)
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def dataset_cameras(features: dict) -> list[str]:
    """RGB cameras of a dataset by name, in its order; columns without the prefix are cameras of that name."""
    names = (key.removeprefix(IMAGE_PREFIX) for key in features)
    return [n for n in dict.fromkeys(names) if find_image_key(features, n) and not is_label_key(n)]


class EpisodeFrames(Sequence):
    """Frames of an episode by number, decoded in runs; of a long one only the last used runs are held.

    Args:
        n_frames (`int`): Of the episode.
        read (`Callable`): Decodes a range of frames: `(k, H, W, 3)` uint8 RGB or `(k, H, W)` float32 metres.
    """

    def __init__(self, n_frames: int, read: Callable[[range], np.ndarray]):
        self._n_frames, self._read = n_frames, read
        self._held: dict[int, np.ndarray] = {}
        self._run_frames = 1

    def __len__(self) -> int:
        return self._n_frames

    def __getitem__(self, frame: int) -> np.ndarray:
        """RGB `(H, W, 3)` uint8, or depth `(H, W)` float32 metres with 0 where invalid."""
        if not 0 <= frame < self._n_frames:
            raise IndexError(f"frame {frame} of {self._n_frames}")
        if not self._held:
            first = self._read(range(1))
            self._run_frames = int(np.clip(RUN_BYTES // first.nbytes, 1, RUN_FRAMES))
        number, place = divmod(frame, self._run_frames)
        run = self._held.pop(number, None)
        if run is None:
            start = number * self._run_frames
            run = self._read(range(start, min(start + self._run_frames, self._n_frames)))
            while self._held and sum(held.nbytes for held in self._held.values()) + run.nbytes > HELD_BYTES:
                self._held.pop(next(iter(self._held)))
        self._held[number] = run  # last, so that the first one is the longest unused
        return run[place]

    def runs(self) -> Iterator[tuple[int, np.ndarray]]:
        """First frame and frames of successive runs."""
        start = 0
        while start < self._n_frames:
            self[start]
            run = self._held[start // self._run_frames]
            yield start, run
            start += len(run)


class LabelMaker:
    """The sources of labels on an opened dataset, loaded once per process.

    Args:
        rows (`DatasetRows`): The dataset.
        annotation (`Annotation`): What to add.
        device (`str`): Of learned sources.
        batch_size (`int`, *optional*): Frames at once, for sources that work frame by frame.

    Raises:
        ValueError: If a source cannot be loaded.
    """

    def __init__(
        self, rows: DatasetRows, annotation: Annotation, device: str = "auto", batch_size: int | None = None
    ):
        self.rows, self.annotation = rows, annotation
        self.depth = open_depth(
            annotation.depth, annotation.depth_model, annotation.align_with, device, batch_size
        )
        self.tracker = open_tracker(annotation.tracks, annotation.track_model, device)
        keys = [find_image_key(rows.features, camera) for camera in annotation.cameras]
        if self.depth is None:
            keys += [find_depth_key(rows.features, camera) for camera in annotation.cameras]
        self.decoders = {key: FrameDecoder(rows, key) for key in keys}
        self.depth_table_m = depth_code_table(lerobot_depth_encoder(annotation.depth_max_m), "m")

    def sources(self) -> dict[str, Any]:
        """What the labels are made with, for the provenance."""
        depth = {} if self.depth is None else self.depth.describe()
        return {"depth": depth, "tracks": self.tracker.describe()}

    def label(self, span: range, episode: int, folder: Path) -> dict[str, Any]:
        """Makes the labels of some frames.

        Args:
            span (`range`): Rows of the dataset, of one episode.
            episode (`int`): Which; seeds the choice of points.
            folder (`Path`): Gets a video per estimated depth, and the tracks.

        Returns:
            `dict`: `n_frames`; figures by camera under `cameras`; statistics of the new videos under `stats`;
            the `sources`.

        Raises:
            BrokenEpisodeError: If a video file is missing or damaged; names it.
        """
        facts: dict[str, Any] = {"n_frames": len(span), "cameras": {}, "stats": {}}
        for camera in self.annotation.cameras:
            video = self._video(camera, span)
            if self.depth is None:
                depth, known = self._sensor_depth(camera, span), {}
            else:
                path = folder / f"{depth_key(camera)}.mp4"
                known, facts["stats"][depth_key(camera)] = self._estimate(video, path)
                depth = self._stored_depth(path, len(span))
            measured: dict[str, Any] = {}
            tracks = None
            if camera == self.annotation.cameras[0]:
                tracks, measured = self._track(video, depth, episode, folder / ARRAYS)
            measured |= _measure(video, depth, tracks)
            measured["depth"] |= known
            facts["cameras"][camera] = measured
        facts["sources"] = self.sources()
        return facts

    def _video(self, camera: str, span: range) -> EpisodeFrames:
        decoder = self.decoders[find_image_key(self.rows.features, camera)]

        def read(frames: range) -> np.ndarray:
            return decoder.decode(span[frames.start : frames.stop]).transpose(0, 2, 3, 1)

        return EpisodeFrames(len(span), read)

    def _sensor_depth(self, camera: str, span: range) -> EpisodeFrames:
        decoder = self.decoders[find_depth_key(self.rows.features, camera)]

        def read(frames: range) -> np.ndarray:
            return decoder.metres(decoder.decode(span[frames.start : frames.stop]))

        return EpisodeFrames(len(span), read)

    def _stored_depth(self, path: Path, n_frames: int) -> EpisodeFrames:
        """Depth as everybody will read it: from its video."""
        table = clean_depth(self.depth_table_m, self.annotation.depth_max_m)
        fps = self.rows.fps

        videos = DepthVideos(1)

        def read(frames: range) -> np.ndarray:
            codes = videos.read(path, [frame / fps for frame in frames], 0.1 / fps)
            return np.take(table, codes, mode="clip")

        return EpisodeFrames(n_frames, read)

    def _estimate(self, video: EpisodeFrames, path: Path) -> tuple[dict, dict]:
        """Writes the estimated depth of a clip; its facts and its statistics."""
        clip = self.depth.estimate(video, self.rows.fps)
        sample: list[np.ndarray] = []
        start = 0
        with path.open("w+b") as file, DepthVideo(file, self.rows.fps, self.annotation.depth_max_m) as out:
            for metres, valid in clip.runs:
                farthest = np.float32(self.annotation.depth_max_m)  # as the video keeps it
                metres = np.where(valid, np.minimum(metres, farthest), np.float32(0))
                out.add(metres)
                step = max(1, min(metres.shape[1:]) // 150)  # LeRobot thins large pictures out likewise
                every = max(1, round(len(video) * metres[0, ::step, ::step].size / STATS_PIXELS))
                sample += [m[::step, ::step] for t, m in enumerate(metres, start) if t % every == 0]
                start += len(metres)
        if start != len(video):
            raise RuntimeError(
                f"--depth {self.annotation.depth} gave {start} depth maps for {len(video)} frames; "
                "update its package"
            )
        return clip.facts, video_stats(np.stack(sample))

    def _track(
        self, video: EpisodeFrames, depth: EpisodeFrames, episode: int, path: Path
    ) -> tuple[TrackMeter, dict[str, Any]]:
        """Writes the tracks of a clip; what measures them, and facts of their choice."""
        height, width = video[0].shape[:2]

        def follow(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            points, visible, confidence = self.tracker.track(
                video, depth, seeds[:, [0, 2, 1]] + [0, 0.5, 0.5]
            )
            points /= np.array([width, height, 1], np.float32)
            points[..., :2] = points[..., :2].clip(*LIMITS)
            return points, visible, confidence

        n_points = self.annotation.n_points
        generator = np.random.default_rng([self.annotation.seed, episode])
        points, visible, choice = sample_tracks(follow, (len(video), height, width), generator, n_points)
        padding = n_points - points.shape[1]
        np.savez(
            path,
            points=pack_points(np.pad(points, ((0, 0), (0, padding), (0, 0)))),
            visible=np.pad(visible, ((0, 0), (0, padding))),
            moving=np.pad(choice.moving, (0, padding)),
        )
        found = {"has_motion": choice.has_motion, "moving_camera": choice.moving_camera}
        return TrackMeter(points, visible, choice.moving), found


def _measure(video: EpisodeFrames, depth: EpisodeFrames, tracks: TrackMeter | None) -> dict[str, Any]:
    """Figures of one camera."""
    meter = DepthMeter()
    for start, run in depth.runs():
        meter.add(run, np.stack([video[frame] for frame in range(start, start + len(run))]))
        if tracks is not None:
            tracks.add(start, run)
    return ({} if tracks is None else tracks.figures()) | {"depth": meter.figures()}


def annotate_shard(maker: LabelMaker, episode: int, folder: Path, skip_broken: bool = False) -> dict:
    """Makes the labels of one episode.

    Args:
        maker (`LabelMaker`): The sources, on the dataset.
        episode (`int`): Which episode.
        folder (`Path`): Where to. If somebody else makes it meanwhile, theirs stays.
        skip_broken (`bool`): Record an episode that cannot be read, and go on.

    Returns:
        `dict`: As [`LabelMaker.label`], and the sizes of the video files that were read under `videos`; of an
        episode that cannot be read, `n_frames`, `videos` and the `file` and `reason` under `broken`.

    Raises:
        BrokenEpisodeError: If a video file is missing or damaged; names it.
        OSError: If the disk is full; nothing is left under the folder's name.
    """
    rows = maker.rows
    span = range(int(rows.episode_starts[episode]), int(rows.episode_stops[episode]))
    with write_whole_folder(folder, shared=True) as scratch:
        try:
            check_readable(rows, episode)
            facts = maker.label(span, episode, scratch)
        except BrokenEpisodeError as error:
            if not skip_broken:
                raise
            for unfinished in scratch.iterdir():
                unfinished.unlink()
            place = None if error.path is None else error.path.relative_to(rows.root).as_posix()
            broken = {"file": place, "reason": rows.without_folder(error)}
            facts = {"n_frames": len(span), "broken": broken}
        files = [d.file_of(episode) for d in maker.decoders.values() if d.is_video]
        files += [rows.root / facts["broken"]["file"]] if facts.get("broken", {}).get("file") else []
        facts["videos"] = {path.relative_to(rows.root).as_posix(): _read_size(path) for path in files}
        return write_facts(scratch, facts)


def current_facts(rows: DatasetRows, folder: Path, skip_broken: bool = False) -> dict | None:
    """Facts of a finished episode; `None` if it has to be made.

    That is if it is missing or damaged, was made of video files that have changed since, or could not be read
    and is not to be skipped.
    """
    facts = read_facts(folder)
    if facts is None or ("broken" in facts and not skip_broken):
        return None
    for name, size in facts["videos"].items():
        now = _read_size(rows.root / name)
        if now != size and not (now is None and rows.hub is not None):  # not downloaded here
            return None
    return facts


def check_readable(rows: DatasetRows, episode: int) -> None:
    """Quick check of one episode: it has frames, and those of its videos that are here can be opened.

    Raises:
        BrokenEpisodeError: Names the file.
    """
    if rows.episode_starts[episode] >= rows.episode_stops[episode]:
        raise BrokenEpisodeError(f"episode {episode} of dataset {rows.name} has no frames")
    for key in rows.meta.video_keys:
        segments = rows.video_segments(key)
        path = segments.paths[segments.file_of_episode[episode]]
        if rows.hub is None or path.exists():
            _check_opens(rows.local(path))


@functools.lru_cache(4096)
def _check_opens(path: Path) -> None:
    try:
        with av.open(str(path)) as container:
            container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:
        raise BrokenEpisodeError(
            f"video file {path} cannot be opened ({error}); it is damaged or truncated: download the dataset "
            "again, or make it again with the script that made it",
            path,
        ) from error


def _read_size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
