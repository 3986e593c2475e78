"""Errors of depth and track sources against exact labels.

The dataset has exact depth and exact tracks, as `simulate.py` makes them. Depth is estimated from its images
and compared pixel by pixel. Visible points of the dataset are then followed through the next steps on the
estimated depth, and their positions are compared.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.columns import picture_size
from datasets_scripts.inspection.label_errors import DepthErrors, TrackErrors
from datasets_scripts.inspection.labeled_episode import Camera, LabeledDataset, LabeledEpisode
from datasets_scripts.inspection.template_rendering import render_template
from datasets_scripts.storage.provenance import find_intrinsics

__all__ = ["ExactEpisodes", "format_report", "measure_sources", "split_windows"]

ERRORS_TEMPLATE = Path(__file__).with_name("source_errors_template.md")


class ExactEpisodes:
    """The dataset that is taken for the truth, one camera of it.

    Args:
        dataset (`str`): Folder or Hub id.
        camera (`str`, *optional*): Which one; the first with tracks by default.

    Raises:
        ValueError: If depth or tracks are missing, or the tracks are estimates; names them.
    """

    def __init__(self, dataset: str, camera: str | None = None):
        self._dataset = LabeledDataset(dataset)
        self.rows, labels = self._dataset.rows, self._dataset.labels
        with_tracks = [name for name, kinds in labels.items() if "tracks" in kinds]
        self.camera = camera or next(iter(with_tracks), None)
        if self.camera not in with_tracks:
            raise ValueError(
                f"dataset {self.rows.name} has tracks of {', '.join(with_tracks) or 'no camera'}"
                + (f", not of '{camera}'" if camera else "")
                + ": exact ones come from simulate.py"
            )
        if "depth" not in labels[self.camera]:
            raise ValueError(f"dataset {self.rows.name} has no depth of camera '{self.camera}'")
        provenance = self._dataset.provenance
        facts = provenance.get("cameras", {}).get(self.camera, {})
        self.intrinsics = find_intrinsics(provenance, self.rows.features, self.camera)
        self.made_by = {name: facts.get(name, {}).get("source") for name in ("depth", "tracks")}
        for name, source in self.made_by.items():
            if "exact" not in str(source):
                raise ValueError(
                    f"{name} of dataset {self.rows.name} {'is' if name == 'depth' else 'are'} of "
                    f"{source or 'an unknown source'}, which nothing can be measured against: exact labels "
                    "come from simulate.py"
                )
        features, (_, known) = self.rows.features, self._read_camera(0)
        self.size = picture_size(features[known.image_key])
        if picture_size(features[known.depth_key]) != self.size:
            raise ValueError(f"depth of {known.depth_key} and its camera's images differ in size")

    def _read_camera(self, number: int) -> tuple[LabeledEpisode, Camera]:
        episode = LabeledEpisode(self._dataset, number)
        return episode, next(camera for camera in episode.cameras if camera.name == self.camera)

    def read(self, number: int) -> tuple[np.ndarray, ...]:
        """Images `(F, H, W, 3)`, depth `(F, H, W)` m, points `(F, n, 3)`, visible `(F, n)`, moving `(n,)`."""
        episode, camera = self._read_camera(number)
        images = episode.read(camera.image_key, 0, episode.length)
        depth_m = episode.read(camera.depth_key, 0, episode.length)
        moving = np.zeros(camera.points.shape[1], bool) if camera.moving is None else camera.moving
        return images, depth_m, camera.points, camera.visible, moving


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
            for meters, valid in clip.runs:
                run = slice(start, start + len(meters))
                depth_m[run] = np.where(valid, meters, 0)
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
    return render_template(ERRORS_TEMPLATE, **report)
