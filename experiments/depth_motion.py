"""How much of a task's motion is motion in depth, from the tracks of its demonstrations."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from datasets_scripts.columns import points_key, points_visible_key, unpack_points
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import moving_flags, read_provenance

__all__ = ["depth_shares"]


def depth_shares(root: Path, camera: str, flow_length: int) -> dict[str, float]:
    """Share of motion along the optical axis, by task: 0 (parallel to the image) to 1.

    For points labeled as moving, between frames a flow apart (`flow_length - 1` steps), where both are
    visible: the sum of `|dz|` over the sum of the lengths of the displacement in space. Image fractions
    become meters by the camera's focal length.

    Args:
        root (`Path`): A simulated dataset with one or more tasks.
        camera (`str`): The camera with tracks.
        flow_length (`int`): L of the policies.
    """
    rows, provenance = DatasetRows(root), read_provenance(root)
    camera_matrix = provenance["cameras"][camera]["intrinsics"]
    along, total = defaultdict(float), defaultdict(float)
    for episode, facts in provenance["episodes"].items():
        frames = rows.rows_of(int(episode))
        points = unpack_points(rows.column(points_key(camera)).read(frames))  # (F, n, 3)
        visible = rows.column(points_visible_key(camera)).read(frames)
        moving = moving_flags(provenance, int(episode), camera, points.shape[1])
        points, visible = points[:, moving].astype(np.float64), visible[:, moving]
        side_px = np.array([camera_matrix["width"], camera_matrix["height"]])
        center_px = np.array([camera_matrix["cx"], camera_matrix["cy"]])
        focal_px = np.array([camera_matrix["fx"], camera_matrix["fy"]])
        depth_m = points[..., 2:]
        across_m = (points[..., :2] * side_px - center_px) / focal_px * depth_m
        position_m = np.concatenate([across_m, depth_m], -1)  # (F, n, 3)
        later = flow_length - 1
        seen = visible[later:] & visible[:-later]
        shift_m = (position_m[later:] - position_m[:-later])[seen]  # (pairs, 3)
        along[facts["task"]] += np.abs(shift_m[:, 2]).sum()
        total[facts["task"]] += np.linalg.norm(shift_m, axis=1).sum()
    return {task: round(float(along[task] / total[task]), 4) if total[task] else 0.0 for task in total}
