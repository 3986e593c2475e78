"""Tracks of an episode as the values of its track columns, and these columns added to a dataset."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from datasets_scripts.columns import pack_points, points_features, points_key, points_visible_key
from datasets_scripts.storage.dataset_folder import append_columns
from datasets_scripts.storage.shards import read_array

__all__ = ["append_tracks", "pad_tracks"]


def pad_tracks(
    points: np.ndarray, visible: np.ndarray, moving: np.ndarray, n_points: int
) -> dict[str, np.ndarray]:
    """Arrays of a shard: the tracks that were chosen, and padding up to the columns' number of points.

    Args:
        points (`np.ndarray`): `(F, k, 3)` x, y as image fractions and z in meters, k <= n_points.
        visible (`np.ndarray`): `(F, k)` bool.
        moving (`np.ndarray`): `(k,)` bool.
        n_points (`int`): Points of the columns.

    Returns:
        `dict`: `points` `(F, 3 * n_points)` float16, `visible` `(F, n_points)` bool and `moving`
        `(n_points,)` bool.
    """
    padding = (0, n_points - points.shape[1])
    return {
        "points": pack_points(np.pad(points, ((0, 0), padding, (0, 0)))),
        "visible": np.pad(visible, ((0, 0), padding)),
        "moving": np.pad(moving, padding),
    }


def append_tracks(
    root: Path, camera: str, n_points: int, size: tuple[int, int], shard_of: Callable[[int], Path]
) -> None:
    """Add a dataset's columns of points from its shards, without statistics.

    Args:
        root (`Path`): The dataset.
        camera (`str`): Camera that sees the points.
        n_points (`int`): Points of the columns.
        size (`tuple[int, int]`): Height and width of its images in pixels.
        shard_of (`Callable`): From an episode's number to its shard, with the arrays of [`pad_tracks`].

    Raises:
        ValueError: As `append_columns`.
    """
    values = {
        points_key(camera): lambda episode: read_array(shard_of(episode), "points"),
        points_visible_key(camera): lambda episode: read_array(shard_of(episode), "visible"),
    }
    append_columns(root, points_features(camera, n_points, *size), values)
