"""What the labels of one episode are, as text, and what is wrong with them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datasets_scripts.columns import picture_size
from datasets_scripts.inspection.labeled_episode import Camera, LabeledEpisode, Measures, measure_episode
from datasets_scripts.inspection.quality import FAR_FROM_DEPTH, MAX_OFF_DEPTH_SHARE
from datasets_scripts.inspection.template_rendering import render_template

__all__ = ["describe_episode"]

EPISODE_TEMPLATE = Path(__file__).with_name("episode_template.txt")


def describe_episode(episode: LabeledEpisode) -> tuple[str, list[str]]:
    """A report on an episode, and what is wrong with it.

    Returns:
        `tuple[str, list[str]]`: The report; problems, none for a good dataset.
    """
    cameras, problems = [], []
    for camera, measures in zip(episode.cameras, measure_episode(episode).values(), strict=True):
        height, width = picture_size(episode.rows.features[camera.image_key])
        depth = measures.depth and measures.problem is None and measures.depth.figures()
        tracks = measures.tracks and measures.tracks.figures()
        hidden = tracks and int(np.count_nonzero(~measures.tracks.real))
        fields = {"name": camera.name, "depth_key": camera.depth_key, "intrinsics": camera.intrinsics}
        fields |= {"width": width, "height": height, "hidden": hidden}
        cameras.append({**fields, "figures": {"depth": depth, "tracks": tracks}})
        problems += _find_problems(camera, measures, depth, tracks)
    name = Path(episode.rows.name).name
    report = {"name": name, "episode": episode, "cameras": cameras, "tolerance": FAR_FROM_DEPTH}
    return render_template(EPISODE_TEMPLATE, **report).rstrip(), problems


def _find_problems(camera: Camera, measures: Measures, depth: dict, tracks: dict) -> Iterator[str]:
    if measures.problem is not None:
        yield measures.problem
    if depth and depth["median_m"] is None:
        yield f"depth column '{camera.depth_key}' has no valid value in this episode"
    if tracks and not tracks["n_points"]:
        yield f"camera {camera.name}: no point is visible in this episode"
    if tracks and (missed := tracks["off_depth_share"] or 0) > MAX_OFF_DEPTH_SHARE:
        yield (
            f"camera {camera.name}: {missed:.1%} of the visible points miss the depth map by more than "
            f"{FAR_FROM_DEPTH:.0%} of their distance; depth and tracks do not belong together"
        )
