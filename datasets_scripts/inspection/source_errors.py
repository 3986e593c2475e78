"""Errors of depth and track sources against exact labels.

The dataset has exact depth and exact tracks, as `simulate.py` makes them. Depth is estimated from its images
and compared pixel by pixel. Its own visible points are then followed from frame after frame through the next
steps, on the depth that was estimated, and compared where they come to lie.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from datasets_scripts.columns import (
    POINTS_PREFIX,
    find_depth_key,
    find_image_key,
    picture_size,
    points_key,
    points_visible_key,
    unpack_points,
)
from datasets_scripts.inspection.label_errors import DepthErrors, TrackErrors
from datasets_scripts.storage.frame_cache import FrameDecoder
from datasets_scripts.storage.provenance import moving_flags, read_provenance
from datasets_scripts.storage.rows import DatasetRows
from datasets_scripts.tracks import TRACK_SOURCES

__all__ = ["ExactEpisodes", "format_report", "measure_sources", "split_windows"]

ERRORS_TEMPLATE = Path(__file__).with_name("source_errors_template.md")


class ExactEpisodes:
    """The dataset that is taken for the truth, one camera of it.

    Args:
        dataset (`str`): Folder or Hub id.
        camera (`str`, *optional*): Which one; the first with tracks by default.

    Raises:
        ValueError: If depth or tracks are missing, or the tracks were estimated themselves; names them.
    """

    def __init__(self, dataset: str, camera: str | None = None):
        self.rows = DatasetRows(dataset)
        features = self.rows.features
        with_tracks = [key.removeprefix(POINTS_PREFIX) for key in features if key.startswith(POINTS_PREFIX)]
        self.camera = camera or next(iter(with_tracks), None)
        if self.camera not in with_tracks:
            raise ValueError(
                f"dataset {self.rows.name} has tracks of {', '.join(with_tracks) or 'no camera'}"
                + (f", not of '{camera}'" if camera else "")
                + ": exact ones come from simulate.py"
            )
        key = find_depth_key(features, self.camera)
        if key is None:
            raise ValueError(f"dataset {self.rows.name} has no depth of camera '{self.camera}'")
        pictures = find_image_key(features, self.camera)
        self.size = picture_size(features[pictures])
        if picture_size(features[key]) != self.size:
            raise ValueError(f"depth of {key} and its camera's images differ in size")
        self._pictures, self._depth = FrameDecoder(self.rows, pictures), FrameDecoder(self.rows, key)
        self._provenance = read_provenance(self.rows.root)
        facts = self._provenance.get("cameras", {}).get(self.camera, {})
        self.intrinsics = facts.get("intrinsics")
        self.made_by = {name: facts.get(name, {}).get("source") for name in ("depth", "tracks")}
        if self.made_by["tracks"] in TRACK_SOURCES:
            raise ValueError(
                f"tracks of dataset {self.rows.name} are estimates of {self.made_by['tracks']}, which "
                "nothing can be measured against: exact ones come from simulate.py"
            )

    def read(self, episode: int) -> tuple[np.ndarray, ...]:
        """Images `(F, H, W, 3)`, depth `(F, H, W)` m, points `(F, n, 3)`, visible `(F, n)`, moving `(n,)`."""
        rows = self.rows
        span = range(int(rows.episode_starts[episode]), int(rows.episode_stops[episode]))
        points = unpack_points(rows.column(points_key(self.camera)).read(span))
        visible = np.asarray(rows.column(points_visible_key(self.camera)).read(span))
        moving = moving_flags(self._provenance, episode, self.camera, points.shape[1])
        depth_m = self._depth.metres(self._depth.decode(span))
        return self._pictures.decode(span).transpose(0, 2, 3, 1), depth_m, points, visible, moving


def split_windows(n_frames: int, steps: int) -> Iterator[tuple[int, int]]:
    """First and last frame of windows that start every half of their length; one for a short clip."""
    if n_frames < 2:
        return
    steps = min(steps or n_frames - 1, n_frames - 1)
    for first in range(0, n_frames - steps, max(1, steps // 2)):
        yield first, first + steps


def measure_sources(
    exact: ExactEpisodes, episodes: Sequence[int], depth: Any, tracker: Any, steps: int = 6
) -> dict[str, Any]:
    """Errors over some episodes.

    Args:
        exact (`ExactEpisodes`): The truth.
        episodes (`Sequence[int]`): Which.
        depth (`DepthSource`, *optional*): Without one the exact depth is used, and not compared.
        tracker (`TrackSource`): Follows the exact tracks' own points.
        steps (`int`): Frames that they are followed through; 0: to the end of the episode.

    Returns:
        `dict`: `frames`; `depth` and `tracks`, reports of [`DepthErrors`] and [`TrackErrors`]; `clips`, what
        the source of depth says of each episode, such as the error of an alignment.
    """
    height, width = exact.size
    in_depth, in_tracks = DepthErrors(), TrackErrors(height, width, exact.intrinsics)
    n_frames, clips = 0, {}
    for episode in episodes:
        video, true_m, true, seen, moving = exact.read(episode)
        n_frames += len(video)
        depth_m = true_m
        if depth is not None:
            depth_m = np.empty_like(true_m)
            in_depth.start_clip()
            start, clip = 0, depth.estimate(video, exact.rows.fps)
            for metres, valid in clip.runs:
                run = slice(start, start + len(metres))
                depth_m[run] = np.where(valid, metres, 0)
                in_depth.add(depth_m[run], true_m[run])
                start = run.stop
            clips[str(episode)] = clip.facts
        for first, last in split_windows(len(video), steps):
            asked, span = np.flatnonzero(seen[first]), slice(first, last + 1)
            if not len(asked):
                continue
            queries = np.c_[np.zeros(len(asked)), true[first, asked, :2] * [width, height]]
            points, visible, _ = tracker.track(video[span], depth_m[span], queries)
            points = points / [width, height, 1]
            later = slice(first + 1, last + 1)
            in_tracks.add(points[1:], visible[1:], true[later, asked], seen[later, asked], moving[asked])
    return {
        "frames": n_frames,
        "depth": None if depth is None else in_depth.report(),
        "tracks": in_tracks.report(),
        "clips": clips,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as tables in Markdown."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(ERRORS_TEMPLATE.read_text()).render(report)
