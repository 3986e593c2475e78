"""One episode of an existing dataset -> its labels, in a folder that appears only when it is whole."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from datasets_scripts.columns import (
    IMAGE_PREFIX,
    check_depth_range,
    find_depth_key,
    image_key,
    is_label_key,
    pack_points,
    points_key,
    write_json_atomic,
)
from datasets_scripts.dataset_rows import DatasetRows
from datasets_scripts.frame_cache import FrameDecoder
from datasets_scripts.sampling import sample_tracks
from datasets_scripts.tracks import open_tracker

TRACKS = ("lucas-kanade",)
DEPTHS = ("sensor",)
ARRAYS, FACTS = "arrays.npz", "facts.json"
DECODED_AT_ONCE = 64
LIMITS = (-2.0, 3.0)  # image fractions beyond which a position is cut, as for exact tracks


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What is added to a dataset; two runs with equal fields add the same.

    Args:
        cameras (`tuple[str, ...]`): Cameras that need depth; the first one gets the tracks.
        depth (`str`): Where depth comes from: `"sensor"`, a depth column that the dataset has.
        tracks (`str`): Where tracks come from: `"lucas-kanade"`.
        n_points (`int`): Most tracks per episode, a quarter of them moving.
        seed (`int`): Of the choice of points.

    Raises:
        ValueError: If a source is unknown or a number out of range; names it.
    """

    cameras: tuple[str, ...]
    depth: str = "sensor"
    tracks: str = "lucas-kanade"
    n_points: int = 1250
    seed: int = 0

    def __post_init__(self):
        for name, known in (("depth", DEPTHS), ("tracks", TRACKS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} source '{getattr(self, name)}'; there is {', '.join(known)}"
                )
        if self.n_points < 2:
            raise ValueError(f"--n-points is {self.n_points}; a track column needs at least 2")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        if len(set(self.cameras)) != len(self.cameras) or not self.cameras:
            raise ValueError(f"cameras are {','.join(self.cameras) or 'none'}; name each of them once")

    def to_dict(self) -> dict:
        """JSON form."""
        return {**dataclasses.asdict(self), "cameras": list(self.cameras)}

    def check(self, rows: DatasetRows) -> None:
        """Whether a dataset can be annotated so.

        Raises:
            ValueError: If a camera or its depth is missing, the depth cannot be in metres or is of another
                size than the images, or the dataset has tracks; names it.
        """
        cameras = dataset_cameras(rows.features)
        for camera in self.cameras:
            if camera not in cameras:
                raise ValueError(
                    f"dataset {rows.name} has no camera '{camera}'; it has {', '.join(cameras) or 'none'}"
                )
            key = find_depth_key(rows.features, camera)
            if key is None:
                raise ValueError(
                    f"camera '{camera}' of dataset {rows.name} has no depth column, which --depth sensor "
                    f"needs (a feature with is_depth_map, such as 'observation.depth.{camera}'): record it "
                    "with a depth camera, or leave the camera out with --cameras"
                )
            decoder, pictures = FrameDecoder(rows, key), FrameDecoder(rows, image_key(camera))
            for episode in {0, rows.n_episodes // 2, rows.n_episodes - 1}:
                first = int(rows.episode_starts[episode])
                stored = decoder.decode(range(first, first + 1))
                check_depth_range(decoder.metres(stored, clean=False), key, decoder.limit_m)
                height, width = pictures.decode(range(first, first + 1)).shape[-2:]
                if camera == self.cameras[0] and stored.shape[1:] != (height, width):
                    raise ValueError(
                        f"depth of {key} is {stored.shape[2]}x{stored.shape[1]} px and its camera's images "
                        f"are {width}x{height}: record them aligned and of one size"
                    )
        if points_key(self.cameras[0]) in rows.features:
            raise ValueError(
                f"dataset {rows.name} has tracks of camera '{self.cameras[0]}' already: choose "
                "another camera as the first one, or remove the columns with lerobot-edit-dataset"
            )


def dataset_cameras(features: dict) -> list[str]:
    """RGB cameras of a dataset by name, in its order."""
    return [
        key.removeprefix(IMAGE_PREFIX)
        for key, feature in features.items()
        if key.startswith(IMAGE_PREFIX) and not is_label_key(key, feature)
    ]


class EpisodeFrames:
    """Frames of an episode by number, decoded in runs; at most two runs are held, however long it is.

    Args:
        decoder (`FrameDecoder`): Of an RGB or depth column.
        rows (`range`): The episode's.
    """

    def __init__(self, decoder: FrameDecoder, rows: range):
        self.decoder, self.rows = decoder, rows
        self._held: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, frame: int) -> np.ndarray:
        """RGB `(H, W, 3)` uint8, or depth `(H, W)` float32 metres with 0 where invalid."""
        run = frame // DECODED_AT_ONCE
        if run not in self._held:
            while len(self._held) > 1:
                self._held.pop(next(iter(self._held)))
            stored = self.decoder.decode(self.rows[run * DECODED_AT_ONCE : (run + 1) * DECODED_AT_ONCE])
            is_depth = self.decoder.is_depth
            self._held[run] = self.decoder.metres(stored) if is_depth else stored.transpose(0, 2, 3, 1)
        return self._held[run][frame % DECODED_AT_ONCE]


def annotate_shard(rows: DatasetRows, annotation: Annotation, episode: int, folder: Path) -> dict:
    """Makes the labels of one episode.

    Args:
        rows (`DatasetRows`): The dataset.
        annotation (`Annotation`): What to add.
        episode (`int`): Which episode.
        folder (`Path`): Where to; its parent exists.

    Returns:
        `dict`: Facts of the episode: frames, points, moving ones.

    Raises:
        ValueError: If a file is damaged; names it.
    """
    camera = annotation.cameras[0]
    span = range(int(rows.episode_starts[episode]), int(rows.episode_stops[episode]))
    video = EpisodeFrames(FrameDecoder(rows, image_key(camera)), span)
    depth = EpisodeFrames(FrameDecoder(rows, find_depth_key(rows.features, camera)), span)
    points, visible, choice = make_tracks(video, depth, annotation, episode)
    padding = annotation.n_points - points.shape[1]
    facts = {
        "n_frames": len(span),
        "n_points": points.shape[1],
        "n_moving": int(choice.moving.sum()),
        "has_motion": choice.has_motion,
        "visible_share": round(float(visible.mean()), 4) if visible.size else 0.0,
    }
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="tmp-"))
    try:
        np.savez(
            scratch / ARRAYS,
            points=pack_points(np.pad(points, ((0, 0), (0, padding), (0, 0)))),
            visible=np.pad(visible, ((0, 0), (0, padding))),
            moving=np.pad(choice.moving, (0, padding)),
        )
        digest = hashlib.sha256((scratch / ARRAYS).read_bytes()).hexdigest()
        write_json_atomic(scratch / FACTS, facts | {"sha256": digest})
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return facts


def make_tracks(video: EpisodeFrames, depth: EpisodeFrames, annotation: Annotation, episode: int):
    """Tracks of one episode: as [`sampling.sample_tracks`] gives them."""
    tracker = open_tracker(annotation.tracks)
    height, width = video[0].shape[:2]

    def follow(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points, visible, confidence = tracker.track(video, depth, seeds[:, [0, 2, 1]] + [0, 0.5, 0.5])
        points /= np.array([width, height, 1], np.float32)
        points[..., :2] = points[..., :2].clip(*LIMITS)
        return points, visible, confidence

    generator = np.random.default_rng([annotation.seed, episode])
    return sample_tracks(follow, (len(video), height, width), generator, annotation.n_points)


def read_facts(folder: Path) -> dict | None:
    """Facts of a finished episode; `None` if it is missing or damaged."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        whole = hashlib.sha256((folder / ARRAYS).read_bytes()).hexdigest() == facts["sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None
