"""Small LeRobot datasets whose content is a formula, for tests of everything that reads datasets.

`make_dataset` writes with the stock `LeRobotDataset` writer and our column appender; `SyntheticDataset` knows
what every value must be. Depth and RGB stored as pictures are exact; videos are close (RGB through a lossy
codec, depth quantised to 12 bits).
"""

import dataclasses
from pathlib import Path

import numpy as np
from lerobot.configs import DepthEncoderConfig, RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.columns import (
    IMAGE_PREFIX,
    depth_key,
    pack_points,
    points_features,
    points_key,
    points_visible_key,
)
from datasets_scripts.storage.dataset_folder import append_columns
from datasets_scripts.storage.provenance import encode_flags, write_provenance


@dataclasses.dataclass(frozen=True)
class SyntheticDataset:
    """A dataset on disk and the formulas of its content; `e` is the episode, `t` the frame within it."""

    root: Path
    lengths: tuple[int, ...]
    sizes: dict[str, tuple[int, int]]  # camera -> (height, width)
    track_camera: str | None
    n_points: int
    n_padding: int
    action_dim: int
    state_dim: int
    tasks: tuple[str, ...]
    fps: int
    poses: bool = False
    limits: tuple[tuple[float, float], ...] | None = None

    @property
    def starts(self) -> np.ndarray:
        """Global row of each episode's first frame."""
        return np.cumsum([0, *self.lengths])[:-1]

    def dot_px(self, e: int, t: int, camera: str) -> tuple[int, int]:
        """Column and row of the upper left pixel of a bright 4 x 4 square; it moves with t."""
        height, width = self.sizes[camera]
        return (4 + 3 * e + 2 * t) % (width - 8), (6 + e + t) % (height - 8)

    def image(self, e: int, t: int, camera: str) -> np.ndarray:
        """`(H, W, 3)` uint8: a smooth gradient that changes with e and t, and the dot."""
        height, width = self.sizes[camera]
        y, x = np.mgrid[:height, :width]
        base = 10 * list(self.sizes).index(camera)
        planes = [
            40 + base + 60 * x / width,
            40 + 60 * y / height,
            np.full_like(x, 40 + 5 * e + 3 * (t % 20)),
        ]
        image = np.stack(planes, axis=-1).astype(np.uint8)
        x_px, y_px = self.dot_px(e, t, camera)
        image[y_px : y_px + 4, x_px : x_px + 4] = 250
        return image

    def depth(self, e: int, t: int, camera: str) -> np.ndarray:
        """`(H, W)` float32 meters: a slope; the dot is at 0.5 m; the lower right corner is invalid (0)."""
        height, width = self.sizes[camera]
        y, x = np.mgrid[:height, :width]
        depth = (0.8 + 0.5 * x / width + 0.3 * y / height + 0.01 * t + 0.02 * e).astype(np.float32)
        x_px, y_px = self.dot_px(e, t, camera)
        depth[y_px : y_px + 4, x_px : x_px + 4] = 0.5
        depth[-3:, -3:] = 0
        return depth

    def moving(self, e: int) -> np.ndarray:
        """`(n,)` bool: every fourth point moves, the dot (point 0) among them; padding never does."""
        moving = np.arange(self.n_points) % 4 == 0
        moving[self.n_points - self.n_padding :] = False
        return moving

    def points(self, e: int, t: int) -> np.ndarray:
        """`(n, 3)` float32: point 0 is the dot's centre, the others fill the picture, padding is 0."""
        height, width = self.sizes[self.track_camera]
        rng = np.random.default_rng((17, e))
        points = rng.uniform([0.02, 0.02, 0.6], [0.98, 0.98, 1.6], size=(self.n_points, 3))
        points[self.moving(e), :2] += 0.01 * t * np.array([1.0, -0.5])
        points[self.moving(e), 2] += 0.005 * t
        x_px, y_px = self.dot_px(e, t, self.track_camera)
        points[0] = ((x_px + 2) / width, (y_px + 2) / height, 0.5)
        points[self.n_points - self.n_padding :] = 0
        return points.astype(np.float32)

    def visible(self, e: int, t: int) -> np.ndarray:
        """`(n,)` bool: inside the picture, not hidden (one in seven in turn), not padding; the dot always."""
        xy = self.points(e, t)[:, :2]
        hidden = (np.arange(self.n_points) + t) % 7 == 3
        visible = ((xy >= 0) & (xy < 1)).all(1) & ~hidden
        visible[0] = True
        visible[self.n_points - self.n_padding :] = False
        return visible

    def state(self, e: int, t: int) -> np.ndarray:
        """`(state_dim,)` float32; with `poses`: a pose near roll = pi, a gripper at -1 or 1, other values."""
        if self.poses:
            rest = 0.2 * e + 0.03 * t + np.arange(self.state_dim - 7)
            roll = (np.pi + 0.2 * np.sin(t + e) + np.pi) % (2 * np.pi) - np.pi  # jumps from pi to -pi
            pose = [0.3 + 0.01 * t, 0.1 * e, 0.5 - 0.02 * t, roll, 0.1 * np.sin(t), 0.05 * t - e]
            return np.array([*pose, 1.0 if (t + e) % 3 else -1.0, *rest], dtype=np.float32)
        if self.limits:
            return self._joints(np.sin(e + 0.3 * (t - 1) + np.arange(self.state_dim)))
        return (e + 0.01 * t + 0.1 * np.arange(self.state_dim)).astype(np.float32)

    def action(self, e: int, t: int) -> np.ndarray:
        """`(action_dim,)` float32 in [-1, 1], or within the joints' limits."""
        motion = np.sin(e + 0.3 * t + np.arange(self.action_dim))
        return self._joints(motion) if self.limits else motion.astype(np.float32)

    def _joints(self, motion: np.ndarray) -> np.ndarray:
        """[-1, 1] -> the joints' limits."""
        low, high = np.array(self.limits).T
        return (low + (high - low) * (motion + 1) / 2).astype(np.float32)

    def task(self, e: int) -> str:
        """Instruction."""
        return self.tasks[e % len(self.tasks)]


def make_dataset(
    root: str | Path,
    episodes: int = 3,
    frames: int | list[int] = 12,
    cameras: tuple[str, ...] | dict[str, tuple[int, int]] = ("main", "wrist"),
    size: tuple[int, int] = (48, 64),
    depth: bool | tuple[str, ...] = True,
    tracks: bool = True,
    n_points: int = 60,
    n_padding: int = 4,
    action_dim: int = 4,
    state_dim: int = 3,
    tasks: tuple[str, ...] = ("open the drawer", "close the drawer"),
    fps: int = 20,
    use_videos: bool = True,
    depth_max_m: float = 4.0,
    depth_factor: float = 1.0,
    action_key: str = "action",
    state_key: str | None = "observation.state",
    poses: bool = False,
    limits: tuple[tuple[float, float], ...] | None = None,
    image_prefix: str = IMAGE_PREFIX,
    extra: tuple[str, ...] = (),
    file_per_episode: bool = False,
) -> SyntheticDataset:
    """Write a dataset and return what it holds.

    Args:
        root: Folder to make; must not exist.
        episodes: Number of episodes.
        frames: Frames per episode, one number or one per episode.
        cameras: Names, or names with `(height, width)` each; the first one carries the tracks.
        size: Height and width of cameras given by name only; at least 16 px.
        depth: Whether cameras have depth, or the names of those that do.
        tracks: Whether the first camera has points.
        n_points: Points per episode.
        n_padding: How many of them are padding.
        action_dim: Length of the action, at least 2.
        state_dim: Length of the state, at least 2.
        tasks: Instructions, dealt to the episodes in turn.
        fps: Frames per second.
        use_videos: Video files, or exact pictures inside the parquet files.
        depth_max_m: Far limit of the depth video.
        depth_factor: Multiplies stored depth; 1000 makes the mistake of storing millimeters as meters.
        action_key: Name of the action column.
        state_key: Name of the state column; `None` leaves it out.
        poses: Let the state begin with a pose and a gripper, as CALVIN's does; `state_dim` is 7 or more.
        limits: Lowest and highest value of every joint; states and actions are then joint positions.
        image_prefix: What image columns' names have before the camera's.
        extra: Names of more columns, of three random numbers each.
        file_per_episode: Give every episode files of its own.

    Returns:
        The formulas.
    """
    root = Path(root)
    sizes = dict(cameras) if isinstance(cameras, dict) else dict.fromkeys(cameras, size)
    lengths = tuple(frames) if isinstance(frames, list) else (frames,) * episodes
    depth_cameras = [camera for camera in sizes if depth is True or (depth and camera in depth)]
    track_camera = next(iter(sizes)) if tracks else None
    facts = SyntheticDataset(
        root,
        lengths,
        sizes,
        track_camera,
        n_points,
        n_padding,
        action_dim,
        state_dim,
        tasks,
        fps,
        poses,
        limits,
    )
    kind = "video" if use_videos else "image"
    axes = ["height", "width", "channels"]
    features: dict[str, dict] = {action_key: {"dtype": "float32", "shape": (action_dim,), "names": None}}
    if state_key:
        features[state_key] = {"dtype": "float32", "shape": (state_dim,), "names": None}
    for camera, (height, width) in sizes.items():
        features[image_prefix + camera] = {"dtype": kind, "shape": (height, width, 3), "names": axes}
    for camera in depth_cameras:
        shape = (*sizes[camera], 1)
        info = {"is_depth_map": True}
        features[depth_key(camera)] = {"dtype": kind, "shape": shape, "names": axes, "info": info}
    features |= {key: {"dtype": "float32", "shape": (3,), "names": None} for key in extra}
    dataset = LeRobotDataset.create(
        "local/synthetic",
        fps=fps,
        features=features,
        root=root,
        use_videos=use_videos,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv444p", crf=4, preset="ultrafast"),
        depth_encoder=DepthEncoderConfig(depth_max=depth_max_m),
        **(
            dict.fromkeys(("video_files_size_in_mb", "data_files_size_in_mb"), 1e-3)
            if file_per_episode
            else {}
        ),
    )
    for e, length in enumerate(lengths):
        for t in range(length):
            frame = {action_key: facts.action(e, t), "task": facts.task(e)}
            if state_key:
                frame[state_key] = facts.state(e, t)
            for camera in sizes:
                frame[image_prefix + camera] = facts.image(e, t, camera)
            for key in extra:
                frame[key] = np.random.default_rng((e, t)).normal(size=3).astype(np.float32)
            for camera in depth_cameras:
                frame[depth_key(camera)] = facts.depth(e, t, camera)[..., None] * np.float32(depth_factor)
            dataset.add_frame(frame)
        # Not in forks of this process: one made while a thread holds a lock waits for ever.
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    if tracks:
        add_tracks(facts)
    return facts


def add_tracks(facts: SyntheticDataset) -> None:
    """Append points, visibility and moving flags, as `simulate.py` and `annotate.py` do."""
    camera = facts.track_camera
    features = points_features(camera, facts.n_points, *facts.sizes[camera])
    times = [range(length) for length in facts.lengths]
    append_columns(
        facts.root,
        features,
        {
            points_key(camera): lambda e: pack_points(np.stack([facts.points(e, t) for t in times[e]])),
            points_visible_key(camera): lambda e: np.stack([facts.visible(e, t) for t in times[e]]),
        },
    )
    episodes = {
        str(e): {
            camera: {
                "n_points": facts.n_points,
                "n_moving": int(facts.moving(e).sum()),
                "moving": encode_flags(facts.moving(e)),
            }
        }
        for e in range(len(facts.lengths))
    }
    source = {"tracks": {"source": "synthetic", "n_points": facts.n_points}}
    write_provenance(facts.root, {"cameras": {camera: source}, "episodes": episodes})
