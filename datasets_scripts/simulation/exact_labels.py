"""Labels from a simulator, frame by frame: depth of every view and tracks of the first one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.columns import DEPTH_LIMIT_MARGIN_M, depth_key
from datasets_scripts.simulation.exact_tracks import RigidClip, make_tracks
from datasets_scripts.simulation.rendering import RenderedScene
from datasets_scripts.storage.provenance import encode_flags
from datasets_scripts.storage.shards import read_array
from datasets_scripts.tracks.track_columns import pad_tracks
from datasets_scripts.tracks.track_selection import MOVING_FRACTION

__all__ = ["ExactLabels", "describe_cameras", "describe_tracks"]

TRACK_FACTS = ("n_points", "n_moving")


class ExactLabels:
    """Labels of one episode, collected while it is shown.

    Args:
        scene (`RenderedScene`): What is looked at.
        views (`Sequence[str]`): Views with depth; tracks are made for the first.
        depth_max_m (`float`): Farthest depth kept.
    """

    def __init__(self, scene: RenderedScene, views: Sequence[str], depth_max_m: float):
        self.scene, self.views, self.depth_max_m = scene, views, depth_max_m
        self._depth: dict[str, list[np.ndarray]] = {view: [] for view in views}
        self._geometry: list[tuple] = []

    def add_frame(self) -> None:
        """Add the scene as it is now, as the next frame of the episode."""
        scene, first = self.scene, self.views[0]
        for view in self.views:
            depth_m, bodies = scene.render_geometry(view)
            self._depth[view].append(np.minimum(depth_m, np.float32(self.depth_max_m)))
            if view == first:
                self._geometry.append((bodies, *scene.body_poses(), *scene.camera_pose(view)))

    def depth_videos(self) -> dict[str, np.ndarray]:
        """Depth by column: `(F, H, W)` float32 meters."""
        return {depth_key(view): np.stack(frames) for view, frames in self._depth.items()}

    def make_tracks(
        self, n_points: int, generator: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], dict]:
        """Tracks through all frames; `generator` chooses points.

        Returns:
            `tuple`: Arrays (`points`, `visible`, and which points are `moving`) and facts (counts,
            intrinsics).
        """
        first = self.views[0]
        depth = np.stack(self._depth[first])
        valid = depth < self.depth_max_m - DEPTH_LIMIT_MARGIN_M
        clip = RigidClip(
            np.where(valid, depth, np.float32(0)),
            *(np.stack(values) for values in zip(*self._geometry, strict=True)),
            intrinsics=self.scene.intrinsics(first),
        )
        points, visible, choice = make_tracks(clip, generator, n_points)
        facts = {
            "n_points": points.shape[1],
            "n_moving": int(choice.moving.sum()),
            "has_motion": choice.has_motion,
            "intrinsics": {view: self.scene.intrinsics(view) for view in self.views},
        }
        return pad_tracks(points, visible, choice.moving, n_points), facts


def describe_cameras(
    intrinsics: Mapping[str, Mapping], depth_max_m: float, n_points: int, seed: int
) -> dict[str, dict]:
    """`cameras` of `meta/foresight.json`; `intrinsics` by view, the one with tracks first."""
    depth = {"source": "mujoco depth buffer, exact", "depth_max_m": depth_max_m}
    cameras = {view: {"depth": dict(depth), "intrinsics": dict(lens)} for view, lens in intrinsics.items()}
    cameras[next(iter(cameras))]["tracks"] = {
        "source": "mujoco rigid bodies, exact",
        "n_points": n_points,
        "moving_fraction": MOVING_FRACTION,
        "seed": seed,
    }
    return cameras


def describe_tracks(facts: Mapping, shard: Path) -> dict:
    """An episode's tracks in the dataset's provenance, from the facts of [`ExactLabels.make_tracks`]."""
    return {name: facts[name] for name in TRACK_FACTS} | {"moving": encode_flags(read_array(shard, "moving"))}
