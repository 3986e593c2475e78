"""Settings of an annotation, and the check that a dataset can be annotated with them."""

import dataclasses
import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.columns import (
    check_depth_range,
    check_n_points,
    depth_key,
    find_depth_key,
    find_image_key,
    list_cameras,
    picture_size,
    points_key,
)
from datasets_scripts.depth import DEPTH_SOURCES, choose_depth_models
from datasets_scripts.depth.alignment import MAX_DEPTH_M
from datasets_scripts.depth.worker import split_command
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.even_spread import spread_evenly
from datasets_scripts.storage.provenance import find_intrinsics, read_provenance
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from datasets_scripts.storage.videos.writing import MIN_DEPTH_SIDE_PX
from datasets_scripts.tracks import choose_tracker

__all__ = ["Annotation"]

CHECKED = 3  # episodes, and frames of each, whose depth is checked
HASHED_BYTES = 1 << 20  # of each end of a model's file


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What is added to a dataset; two runs with equal fields add the same.

    Args:
        cameras (`tuple[str, ...]`): Cameras that need depth; the first one gets the tracks.
        depth (`str`): `"sensor"` for the dataset's own depth column, or a model of [`depth.open_depth`].
        depth_model (`str`, *optional*): Weights of the depth model.
        align_with (`str`, *optional*): Metric model that gives a relative one its scale.
        depth_max_m (`float`): Farthest estimated depth kept, meters.
        tracks (`str`): A tracker of [`tracks.open_tracker`].
        track_model (`str`, *optional*): Weights of the tracker.
        n_points (`int`): Most tracks per episode, a quarter of them moving.
        seed (`int`): Seed of the choice of points.

    Raises:
        ValueError: If a number is out of range; names it.
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
        check_n_points(self.n_points, "--n-points")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        if not 0.1 <= self.depth_max_m <= MAX_DEPTH_M:
            raise ValueError(
                f"--depth-max is {self.depth_max_m:g} m; it must lie between 0.1 and {MAX_DEPTH_M:g}"
            )
        if len(set(self.cameras)) != len(self.cameras) or not self.cameras:
            raise ValueError(f"cameras are {','.join(self.cameras) or 'none'}; name each of them once")

    @property
    def estimates_depth(self) -> bool:
        """Whether depth columns are added."""
        return self.depth != "sensor"

    def to_dict(self) -> dict:
        """JSON form; local models are given by name and content, not by path."""
        values = {**dataclasses.asdict(self), "cameras": list(self.cameras)}
        if self.depth == "worker" and self.depth_model:
            return values | _describe_command(self.depth_model)
        for name in ("depth", "depth_model", "align_with", "track_model"):
            path = Path(values[name] or "")
            if values[name] and values[name] not in DEPTH_SOURCES and path.exists():
                values |= {name: path.absolute().name, f"{name}_sha256": _hash_model(path)}
        return values

    def check(self, rows: DatasetRows, episodes: Sequence[int], skip_broken: bool = False) -> None:
        """Check that a dataset can be annotated this way.

        The depth of three of the episodes is checked; with `skip_broken`, of those that can be read.

        Raises:
            ValueError: If a source is unknown or not installed, a camera or its depth is missing, the depth
                cannot be in meters or has another size than the images, the labels exist already, or the
                provenance is damaged; names it.
            BrokenEpisodeError: If an episode cannot be read.
        """
        choose_depth_models(self.depth, self.depth_model, self.align_with)
        choose_tracker(self.tracks, self.track_model)
        cameras, provenance = list_cameras(rows.features), read_provenance(rows.root)
        for camera in self.cameras:
            if camera not in cameras:
                raise ValueError(
                    f"dataset {rows.name} has no camera '{camera}'; it has {', '.join(cameras) or 'none'}"
                )
            if self.estimates_depth:
                _check_images(rows, camera)
            else:
                _check_sensor_depth(rows, camera, episodes, camera == self.cameras[0], skip_broken)
            find_intrinsics(provenance, rows.features, camera)  # warns of those that it cannot read
        if points_key(self.cameras[0]) in rows.features:
            raise ValueError(
                f"dataset {rows.name} has tracks of camera '{self.cameras[0]}' already: choose "
                "another camera as the first one, or remove the columns with lerobot-edit-dataset"
            )


def _check_images(rows: DatasetRows, camera: str) -> None:
    """Refuse a camera that has a depth column, or images too small for a depth video."""
    if depth_key(camera) in rows.features:
        raise ValueError(
            f"dataset {rows.name} has the column '{depth_key(camera)}' already: use it with --depth sensor, "
            "or remove it with lerobot-edit-dataset"
        )
    height, width = picture_size(rows.features[find_image_key(rows.features, camera)])
    if min(height, width) < MIN_DEPTH_SIDE_PX:
        raise ValueError(
            f"images of camera '{camera}' are {width}x{height} px, and depth videos need "
            f"{MIN_DEPTH_SIDE_PX} px at least: leave the camera out with --cameras"
        )


def _check_sensor_depth(
    rows: DatasetRows, camera: str, episodes: Sequence[int], has_tracks: bool, skip_broken: bool
) -> None:
    """Refuse missing or implausible depth, and for tracks another size than the images'.

    The first, middle and last frame of an episode are judged together: a camera may warm up.
    """
    key = find_depth_key(rows.features, camera)
    if key is None:
        raise ValueError(
            f"camera '{camera}' of dataset {rows.name} has no depth column, which --depth sensor needs (a "
            f"feature with is_depth_map, such as '{depth_key(camera)}'): record it with a depth camera, "
            "estimate it with another --depth, or leave it out with --cameras"
        )
    depth, images = FrameDecoder(rows, key), FrameDecoder(rows, find_image_key(rows.features, camera))
    for episode in (episodes[i] for i in spread_evenly(len(episodes), CHECKED)):
        span = rows.rows_of(episode)
        try:
            frames = [depth.decode(span[i : i + 1]) for i in spread_evenly(len(span), CHECKED)]
            height, width = images.decode(span[:1]).shape[-2:]
        except BrokenEpisodeError:
            if not skip_broken:
                raise
            continue
        stored = np.concatenate(frames)
        check_depth_range(depth.meters(stored, clean=False), key, depth.limit_m)
        if has_tracks and stored.shape[1:] != (height, width):
            raise ValueError(
                f"depth of {key} is {stored.shape[2]}x{stored.shape[1]} px and its camera's images are "
                f"{width}x{height}: record them aligned and of one size"
            )


def _describe_command(command: str) -> dict[str, str]:
    """A worker's command with names in place of paths, and the content of its Python file."""
    parts = [Path(part) if Path(part).exists() else part for part in split_command(command)]
    scripts = [_hash_model(part) for part in parts if isinstance(part, Path) and part.suffix == ".py"]
    named = shlex.join(part.name if isinstance(part, Path) else part for part in parts)
    return {"depth_model": named, "depth_model_sha256": " ".join(scripts)}


def _hash_model(model: Path) -> str:
    """Hash of the sizes, first and last bytes of a model's files, which differ between two trainings."""
    digest = hashlib.sha256()
    files = [model] if model.is_file() else sorted(model.rglob("[!.]*"))
    for path in filter(Path.is_file, files):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for place in (0, max(0, size - HASHED_BYTES)):
                file.seek(place)
                digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()[:16]
