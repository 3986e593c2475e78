"""Make the labels of one episode of an existing dataset."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import (
    POINT_LIMITS,
    clean_depth,
    depth_key,
    find_depth_key,
    find_image_key,
    picture_size,
)
from datasets_scripts.depth import open_depth
from datasets_scripts.depth.range_check import DepthRange
from datasets_scripts.inspection.quality import DepthMeter, TrackMeter
from datasets_scripts.storage.atomic import write_whole_folder
from datasets_scripts.storage.dataset_rows import RESTORE, BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.shards import ARRAYS_FILE, read_shard_summary, write_shard_summary
from datasets_scripts.storage.videos.depth_reading import DepthVideos
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder, depth_code_table
from datasets_scripts.storage.videos.writing import DepthVideo, lerobot_depth_encoder, video_stats
from datasets_scripts.tracks import open_tracker
from datasets_scripts.tracks.track_columns import pad_tracks
from datasets_scripts.tracks.track_selection import sample_tracks

__all__ = ["LabelMaker", "annotate_shard", "check_readable", "read_current_facts"]

DECODED_FRAMES, DECODED_BYTES = 64, 64e6  # most frames and bytes that are decoded together
HELD_BYTES = 256e6  # decoded frames of one column that are kept; short episodes are decoded once
TIME_TOLERANCE = 0.1  # of the time between two frames
STATS_PIXELS = 1e7  # most depth pixels of an episode that enter its statistics


class EpisodeFrames(Sequence):
    """Frames of an episode by number, decoded by `read` in runs; only the last used runs are held."""

    def __init__(self, n_frames: int, read: Callable[[range], np.ndarray]):
        frame_bytes = read(range(1)).nbytes
        self._n_frames = n_frames
        self._run_frames = run_frames = int(np.clip(DECODED_BYTES // frame_bytes, 1, DECODED_FRAMES))

        # Without `self`: a reference cycle would keep the frames until the garbage collector runs.
        @functools.lru_cache(max(1, int(HELD_BYTES // (frame_bytes * run_frames))))
        def read_run(number: int) -> np.ndarray:
            start = number * run_frames
            return read(range(start, min(start + run_frames, n_frames)))

        self._read_run = read_run

    def __len__(self) -> int:
        return self._n_frames

    def __getitem__(self, frame: int) -> np.ndarray:
        """RGB `(H, W, 3)` uint8, or depth `(H, W)` float32 meters with 0 where invalid."""
        if not 0 <= frame < self._n_frames:
            raise IndexError(f"frame {frame} of {self._n_frames}")
        number, offset = divmod(frame, self._run_frames)
        return self._read_run(number)[offset]

    def runs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first frame, frames)` of successive runs."""
        for number, start in enumerate(range(0, self._n_frames, self._run_frames)):
            yield start, self._read_run(number)


class LabelMaker:
    """Depth source and tracker for an opened dataset, loaded once per process."""

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
        self.decoders = {key: FrameDecoder(rows, key, picture_size(rows.features[key])) for key in keys}
        table_m = depth_code_table(lerobot_depth_encoder(annotation.depth_max_m))
        self.depth_table_m = clean_depth(table_m, annotation.depth_max_m)

    def label(self, span: range, episode: int, folder: Path) -> dict[str, Any]:
        """Make the labels of some frames.

        Args:
            span (`range`): Rows of one episode.
            episode (`int`): Number of the episode; seeds the choice of points.
            folder (`Path`): Gets a video per estimated depth, and the tracks.

        Returns:
            `dict`: `n_frames`; figures by camera under `cameras`; statistics of the new videos under `stats`;
            the models under `sources`.

        Raises:
            BrokenEpisodeError: If a video file is missing or damaged, or the depth model finds no depth in
                the whole episode; names it.
            ValueError: If the depth model does not give meters.
        """
        facts: dict[str, Any] = {"n_frames": len(span), "cameras": {}, "stats": {}}
        for camera in self.annotation.cameras:
            video = self._read_video(camera, span)
            if self.depth is None:
                depth, known = self._read_sensor_depth(camera, span), {}
            else:
                path = folder / f"{depth_key(camera)}.mp4"
                clip = f"camera '{camera}' in episode {episode}"
                known, facts["stats"][depth_key(camera)] = self._estimate_depth(video, path, clip)
                depth = self._read_estimated_depth(path, len(span))
            measured: dict[str, Any] = {}
            tracks = None
            if camera == self.annotation.cameras[0]:
                tracks, measured = self._track(video, depth, episode, folder / ARRAYS_FILE)
            measured |= _measure(video, depth, tracks)
            measured["depth"] |= known
            facts["cameras"][camera] = measured
        models = {} if self.depth is None else self.depth.describe()
        facts["sources"] = {"depth": models, "tracks": self.tracker.describe()}
        return facts

    def _read_video(self, camera: str, span: range) -> EpisodeFrames:
        decoder = self.decoders[find_image_key(self.rows.features, camera)]
        return EpisodeFrames(
            len(span), lambda frames: decoder.decode(span[frames.start : frames.stop]).transpose(0, 2, 3, 1)
        )

    def _read_sensor_depth(self, camera: str, span: range) -> EpisodeFrames:
        decoder = self.decoders[find_depth_key(self.rows.features, camera)]
        return EpisodeFrames(
            len(span), lambda frames: decoder.meters(decoder.decode(span[frames.start : frames.stop]))
        )

    def _read_estimated_depth(self, path: Path, n_frames: int) -> EpisodeFrames:
        """Estimated depth as users will read it: from its video."""
        fps, videos = self.rows.fps, DepthVideos(1)

        def read(frames: range) -> np.ndarray:
            codes = videos.read(path, [frame / fps for frame in frames], 0.1 / fps)
            return np.take(self.depth_table_m, codes, mode="clip")

        return EpisodeFrames(n_frames, read)

    def _estimate_depth(self, video: EpisodeFrames, path: Path, name: str) -> tuple[dict, dict]:
        """Write the estimated depth of a clip; returns its facts and its statistics."""
        clip = self.depth.estimate(video, self.rows.fps)
        depth_max_m = self.annotation.depth_max_m
        found, sample = DepthRange(depth_max_m), []
        start = 0
        with path.open("w+b") as file, DepthVideo(file, self.rows.fps, depth_max_m) as out:
            for depth_m, valid in clip.runs:
                found.add(depth_m, valid)
                # Clipped as in the video, so that the statistics are those of its content.
                depth_m = np.where(valid, np.minimum(depth_m, np.float32(depth_max_m)), np.float32(0))
                out.add(depth_m)
                step = max(1, min(depth_m.shape[1:]) // 150)  # LeRobot thins out large pictures too
                every = max(1, round(len(video) * depth_m[0, ::step, ::step].size / STATS_PIXELS))
                sample += [m[::step, ::step] for t, m in enumerate(depth_m, start) if t % every == 0]
                start += len(depth_m)
        if start != len(video):
            raise RuntimeError(
                f"--depth {self.annotation.depth} gave {start} depth maps for {len(video)} frames; "
                "update its package"
            )
        # By name: what is said of episodes that are left out is published.
        found.check(f"--depth {Path(self.annotation.depth).name}", name)
        return clip.facts, video_stats(np.stack(sample))

    def _track(
        self, video: EpisodeFrames, depth: EpisodeFrames, episode: int, path: Path
    ) -> tuple[TrackMeter, dict[str, Any]]:
        """Write the tracks of a clip; returns their meter, and facts of the choice of points."""
        height, width = video[0].shape[:2]

        def follow(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            points, visible, confidence = self.tracker.track(
                video, depth, seeds[:, [0, 2, 1]] + [0, 0.5, 0.5]
            )
            points /= np.array([width, height, 1], np.float32)
            points[..., :2] = points[..., :2].clip(*POINT_LIMITS)
            return points, visible, confidence

        n_points = self.annotation.n_points
        generator = np.random.default_rng([self.annotation.seed, episode])
        points, visible, choice = sample_tracks(follow, (len(video), height, width), generator, n_points)
        np.savez(path, **pad_tracks(points, visible, choice.moving, n_points))
        facts = {"has_motion": choice.has_motion, "moving_camera": choice.moving_camera}
        return TrackMeter(points, visible, choice.moving), facts


def _measure(video: EpisodeFrames, depth: EpisodeFrames, tracks: TrackMeter | None) -> dict[str, Any]:
    """Quality figures of one camera."""
    meter = DepthMeter()
    for start, run in depth.runs():
        meter.add(run, np.stack([video[frame] for frame in range(start, start + len(run))]))
        if tracks is not None:
            tracks.add(start, run)
    return ({} if tracks is None else tracks.figures()) | {"depth": meter.figures()}


def annotate_shard(maker: LabelMaker, episode: int, folder: Path, skip_broken: bool = False) -> dict:
    """Make the labels of one episode.

    Args:
        maker (`LabelMaker`): The sources, on the dataset.
        episode (`int`): Number of the episode.
        folder (`Path`): Output folder; if another process makes it first, that one stays.
        skip_broken (`bool`): Whether to record an episode that cannot be read instead of raising.

    Returns:
        `dict`: As [`LabelMaker.label`], and the sizes of the video files that were read under `videos`. An
        episode that cannot be read has `n_frames`, `videos`, and `file` and `reason` under `broken`.

    Raises:
        BrokenEpisodeError, ValueError: As [`LabelMaker.label`].
        OSError: If the disk is full; nothing is left under the folder's name.
    """
    rows = maker.rows
    span = rows.rows_of(episode)
    read = [decoder.file_of(episode) for decoder in maker.decoders.values() if decoder.is_video]
    with write_whole_folder(folder, shared=True) as scratch:
        try:
            check_readable(rows, episode, maker.annotation.estimates_depth)
            facts = maker.label(span, episode, scratch)
        except BrokenEpisodeError as error:
            if not skip_broken:
                raise
            for unfinished in scratch.iterdir():
                unfinished.unlink()
            place = None if error.path is None else error.path.relative_to(rows.root).as_posix()
            facts = {"n_frames": len(span), "broken": {"file": place, "reason": rows.strip_folder(error)}}
            read += [error.path] if error.path else []
        facts["videos"] = {path.relative_to(rows.root).as_posix(): _read_size(path) for path in read}
        return write_shard_summary(scratch, facts)


def read_current_facts(rows: DatasetRows, folder: Path, skip_broken: bool = False) -> dict | None:
    """Facts of a finished episode; `None` if it has to be made.

    That is if it is missing or damaged, its video files have changed since, or it could not be read and
    should not be skipped.
    """
    facts = read_shard_summary(folder)
    if facts is None or ("broken" in facts and not skip_broken):
        return None
    for name, size in facts["videos"].items():
        now = _read_size(rows.root / name)
        if now != size and not (now is None and rows.hub is not None):  # not downloaded to this machine
            return None
    return facts


def check_readable(rows: DatasetRows, episode: int, adds_depth: bool) -> None:
    """Quick check of one episode: it has frames, and its downloaded videos can be opened.

    Args:
        rows (`DatasetRows`): The dataset.
        episode (`int`): Its number.
        adds_depth (`bool`): Whether a depth video is made, whose frames follow each other at the dataset's
            rate: then the rows must do so too, or their depth would be that of other rows.

    Raises:
        BrokenEpisodeError: Names the file, or the times of the rows.
    """
    span = rows.rows_of(episode)
    if not len(span):
        raise BrokenEpisodeError(f"episode {episode} of dataset {rows.name} has no frames")
    if adds_depth and "timestamp" in rows.features:
        times_s = rows.column("timestamp").read(span).reshape(-1)
        apart = np.abs(times_s - np.arange(len(span)) / rows.fps)
        if not (apart < TIME_TOLERANCE / rows.fps).all():  # false for NaN
            row = int(np.argmax(~(apart < TIME_TOLERANCE / rows.fps)))
            raise BrokenEpisodeError(
                f"row {row} of episode {episode} of dataset {rows.name} has the timestamp "
                f"{times_s[row]:.6g} s and not frame_index / fps = {row / rows.fps:.6g} s (rows were left "
                "out, or the times do not begin at 0): estimated depth would be shifted against the images. "
                "Write the dataset again, its videos too, for example with lerobot-edit-dataset"
            )
    for path in sorted(rows.video_files([episode])):
        if rows.hub is None or path.exists():
            _check_opens(rows.local(path))


@functools.lru_cache(4096)
def _check_opens(path: Path) -> None:
    try:
        with av.open(str(path)) as container:
            container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:
        raise BrokenEpisodeError(
            f"video file {path} cannot be opened ({error}); it is damaged or truncated: {RESTORE}", path
        ) from error


def _read_size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
