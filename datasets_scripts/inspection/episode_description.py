"""What the labels of one episode are, in lines of text, and what is wrong with them."""

from pathlib import Path

import numpy as np

from datasets_scripts.columns import picture_size
from datasets_scripts.inspection.labeled_episode import Camera, LabeledEpisode, Measures, measure_episode
from datasets_scripts.inspection.quality import FAR_FROM_DEPTH, MAX_OFF_DEPTH_SHARE

__all__ = ["describe_episode"]


def describe_episode(episode: LabeledEpisode) -> tuple[list[str], list[str]]:
    """Report on an episode, and what is wrong with it.

    Returns:
        `tuple[list[str], list[str]]`: Lines of the report; problems, none for a good dataset.
    """
    sizes = [f"{key} ({values.shape[1]})" for key, values in episode.series.items()]
    name = Path(episode.rows.name).name
    lines = [
        f"{name}, episode {episode.number} of {episode.rows.n_episodes}: “{episode.task}”",
        f"  {episode.length} frames at {episode.fps} fps; {', '.join(sizes) or 'no state and no action'}",
    ]
    problems: list[str] = []
    measured = measure_episode(episode)
    for camera in episode.cameras:
        height, width = picture_size(episode.rows.features[camera.image_key])
        known = "known" if camera.intrinsics else "unknown"
        lines.append(f"camera {camera.name}: {width} x {height}, intrinsics {known}")
        own = measured[camera.name]
        if own.problem is not None:
            problems.append(own.problem)
        lines.append(_describe_depth(camera, own, problems))
        lines.append(_describe_points(camera, own, problems))
    return lines, problems


def _describe_depth(camera: Camera, own: Measures, problems: list[str]) -> str:
    if own.depth is None:
        return "  depth   none"
    if own.problem is not None:
        return "  depth   cannot be used"
    known = own.depth.figures()
    if known["median_m"] is None:
        problems.append(f"depth column '{camera.depth_key}' has no valid value in this episode")
        return f"  depth   {camera.depth_key}: nothing valid"
    flicker = "" if known["flicker"] is None else f", flicker {known['flicker']:.2%}"
    return (
        f"  depth   {camera.depth_key}: {known['valid_share']:.1%} valid, {known['near_m']:.2f} to "
        f"{known['far_m']:.2f} m (1 % to 99 %), median {known['median_m']:.2f} m{flicker}"
    )


def _describe_points(camera: Camera, own: Measures, problems: list[str]) -> str:
    if own.tracks is None:
        return "  tracks  none"
    known, hidden = own.tracks.figures(), int(np.count_nonzero(~own.tracks.real))
    moving = "unknown how many" if known["n_moving"] is None else known["n_moving"]
    line = (
        f"  tracks  {known['n_points']} points ({hidden} never visible), {moving} moving, "
        f"visible in {known['visible_share']:.1%} of the frames"
    )
    if not known["n_points"]:
        problems.append(f"camera {camera.name}: no point is visible in this episode")
    if (missed := known["off_depth_share"]) is not None:
        line += f"; {1 - missed:.1%} lie on the depth map within {FAR_FROM_DEPTH:.0%}"
        if missed > MAX_OFF_DEPTH_SHARE:
            problems.append(
                f"camera {camera.name}: {missed:.1%} of the visible points miss the depth map by more than "
                f"{FAR_FROM_DEPTH:.0%} of their distance; depth and tracks do not belong together"
            )
    return line
