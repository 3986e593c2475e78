"""Record one simulated demonstration as a shard: expert, cameras, exact depth and tracks."""

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from datasets_scripts.columns import check_n_points, depth_key, image_key, recorded_features
from datasets_scripts.simulation.exact_labels import ExactLabels
from datasets_scripts.simulation.rendering import check_cameras
from datasets_scripts.storage.shards import Layout, write_shard
from datasets_scripts.storage.videos.writing import MIN_DEPTH_SIDE_PX

# So that the last frames before success have a future to predict.
FRAMES_AFTER_SUCCESS = 3


class Simulator(Protocol):
    """A task with an expert; also a `rendering.RenderedScene`, with its cameras and exact geometry."""

    task: str
    task_description: str
    steps_left: int

    def reset(self, seed: int) -> None:
        """Start an episode; the same seed gives the same start, whatever happened before."""
        ...

    def expert_action(self) -> np.ndarray:
        """What the expert does now: float32 in [-1, 1], first the hand's motion in x, y, z."""
        ...

    def step(self, action: np.ndarray, repeat: int) -> bool:
        """Hold an action for `repeat` simulation steps; gives whether any was successful."""
        ...

    def state(self) -> np.ndarray:
        """State of the robot, float32."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True)
class Recording(ABC):
    """Everything that determines the contents of a simulated dataset.

    `simulators.py` has a subclass for each simulator.

    Attributes:
        tasks (`tuple[str, ...]`): Tasks of the simulator.
        episodes (`int`): Episodes per task.
        image_size (`int`): Side of the square images in pixels.
        stride (`int`): Simulation steps between stored frames; each action is held that long.
        seed (`int`): Seed of starts, action noise and choice of points.
        noise (`float`): Standard deviation of the noise on the expert's executed actions, which lie in [-1,
            1]; the stored action is the one without noise.
        detour (`int`): Most frames at the start in which one random motion of the hand is executed instead
            of the expert's; the stored action is the expert's. Without it the hand is soon on the way to the
            goal, and a policy learns to look at the hand instead of the goal.
        n_points (`int`): Tracked points per episode.
        cameras (`tuple[str, ...]`): Cameras; tracks are made for the first.
        depth_max (`float`): Farthest depth kept, in meters.
        max_steps (`int`): Most simulation steps of the expert.
        retries (`int`): New starts after a failure of the expert.
    """

    tasks: tuple[str, ...]
    episodes: int = 50
    image_size: int = 96
    stride: int = 4
    seed: int = 0
    noise: float = 0.1
    detour: int = 0
    n_points: int = 1250
    cameras: tuple[str, ...] = ("main", "wrist")
    depth_max: float = 4.0
    max_steps: int = 500
    retries: int = 50

    # Of the simulator.
    views: ClassVar[Collection[str]]
    hz: ClassVar[int]
    step_limit: ClassVar[int]
    robot_type: ClassVar[str]
    state_names: ClassVar[Sequence[str]]
    action_names: ClassVar[Sequence[str]]
    packages: ClassVar[Sequence[str]]

    def __post_init__(self):
        check_cameras(self.cameras, self.views)
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}; at least one episode per task is needed")
        if self.stride < 1 or self.hz % self.stride:
            divisors = [str(n) for n in range(1, self.hz + 1) if self.hz % n == 0]
            raise ValueError(
                f"--stride {self.stride} gives {self.hz}/{self.stride} frames per second, "
                f"which must be whole; choose a stride from {', '.join(divisors)}"
            )
        check_n_points(self.n_points, "--n-points")
        if self.image_size < MIN_DEPTH_SIDE_PX or self.image_size % 2:
            raise ValueError(f"--image-size is {self.image_size}; video needs an even size of at least 32 px")
        if not 0 <= self.noise <= 2:
            raise ValueError(f"--noise is {self.noise}; actions lie in [-1, 1], so use 0 to 2")
        if not 0 <= self.detour * self.stride < self.max_steps:
            raise ValueError(
                f"--detour is {self.detour} frames of {self.stride} simulation steps; the expert has "
                f"{self.max_steps} steps in all, so give 0 or a few"
            )
        if not 0.1 <= self.depth_max <= 50:
            raise ValueError(f"--depth-max is {self.depth_max}; give meters between 0.1 and 50")
        if not self.stride <= self.max_steps <= self.step_limit:
            raise ValueError(
                f"--max-steps is {self.max_steps}; give {self.stride} to {self.step_limit} simulation steps"
            )
        if self.retries < 0 or self.seed < 0:
            raise ValueError("--retries and --seed cannot be negative")

    @staticmethod
    @abstractmethod
    def resolve_tasks(names: str) -> list[str]:
        """Tasks of comma-separated names; raises a `ValueError` if one is unknown."""

    @abstractmethod
    def open_simulator(self, task: str) -> Simulator:
        """The simulator of a task."""

    @property
    def fps(self) -> int:
        """Stored frames per second."""
        return self.hz // self.stride

    @property
    def n_episodes(self) -> int:
        """Episodes of all tasks together."""
        return self.episodes * len(self.tasks)

    def task_of(self, episode: int) -> str:
        """Task of an episode: all episodes of the first task, then those of the second, and so on."""
        return self.tasks[episode // self.episodes]

    def layout(self) -> Layout:
        """Layout of the dataset before the points are appended (later, without statistics)."""
        sizes = dict.fromkeys(self.cameras, (self.image_size, self.image_size))
        features = recorded_features(sizes, True, self.state_names, self.action_names)
        depth_max_m = {depth_key(camera): self.depth_max for camera in self.cameras}
        point_bytes = 6.2 * self.n_points  # float16 x 3 and one bit
        return Layout(self.fps, self.robot_type, features, depth_max_m, point_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))


def record_shard(sim: Simulator, recording: Recording, episode: int, shard: Path) -> dict:
    """Record an episode (its index over all tasks), which it and the seed determine, as a folder `shard`.

    Returns:
        `dict`: The facts also written to `facts.json`: task, seed, attempts, frames, points.

    Raises:
        RuntimeError: If the expert failed in all tries.
        OSError: If the disk is full or not writable; nothing is left under the shard's name.
    """
    task_number = zlib.crc32(sim.task.encode())
    for attempt in range(recording.retries + 1):
        entropy = (recording.seed, task_number, episode % recording.episodes, attempt)
        start_seed, noise_seed, track_seed = map(int, np.random.SeedSequence(entropy).generate_state(3))
        plan = plan_episode(sim, recording, start_seed, np.random.default_rng(noise_seed))
        if plan is not None:
            break
    else:
        raise RuntimeError(
            f"the expert failed {recording.retries + 1} times in a row on {sim.task} (episode {episode}); "
            "lower --noise, raise --retries, or leave the task out"
        )
    labels, executed = plan
    generator = np.random.default_rng(track_seed)
    videos, arrays, facts = render_episode(sim, recording, start_seed, executed, generator)
    facts |= {"task": sim.task, "instruction": sim.task_description}
    facts |= {"seed": start_seed, "attempts": attempt + 1}
    layout = recording.layout()
    return write_shard(shard, videos, arrays | {"action": labels}, facts, layout.fps, layout.depth_max_m)


def plan_episode(
    sim: Simulator, recording: Recording, start_seed: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Let the expert act without rendering, to see whether it succeeds.

    Returns:
        `tuple | None`: Clean and executed actions, `(F, A)` float32 each, up to a few frames after the first
        success; `None` without success.
    """
    sim.reset(start_seed)
    labels, executed = [], []
    detour, motion = 0, np.zeros(3)
    if recording.detour:
        detour, motion = generator.integers(recording.detour + 1), generator.uniform(-1.0, 1.0, size=3)
    succeeded_at: int | None = None
    while True:
        if succeeded_at is None:
            if len(labels) * recording.stride >= recording.max_steps:
                return None
        elif len(labels) >= succeeded_at + FRAMES_AFTER_SUCCESS or sim.steps_left < recording.stride:
            return np.stack(labels), np.stack(executed)
        label = sim.expert_action()
        intended = np.append(motion, label[3:]) if len(labels) < detour else label
        noisy = intended + generator.normal(0.0, recording.noise, size=label.shape)
        labels.append(label)
        executed.append(np.clip(noisy, -1.0, 1.0).astype(np.float32))
        if sim.step(executed[-1], recording.stride) and succeeded_at is None:
            succeeded_at = len(labels)


def render_episode(
    sim: Simulator,
    recording: Recording,
    start_seed: int,
    executed: np.ndarray,
    generator: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """Replay the executed actions `(F, A)` of a plan with the cameras on; `generator` chooses points.

    Returns:
        `tuple`: Videos by column (`(F, H, W, 3)` uint8 or `(F, H, W)` float32 meters), arrays (state, points,
        visibility, which points move) and facts (counts, intrinsics).
    """
    layout = recording.layout()
    images: dict[str, list] = {image_key(camera): [] for camera in recording.cameras}
    states, labels = [], ExactLabels(sim, recording.cameras, recording.depth_max)
    sim.reset(start_seed)
    for action in executed:
        states.append(sim.state())
        for camera in recording.cameras:
            images[image_key(camera)].append(sim.render_rgb(camera))
        labels.add_frame()
        sim.step(action, recording.stride)
    arrays, facts = labels.make_tracks(recording.n_points, generator)
    videos = {key: np.stack(frames) for key, frames in images.items()} | labels.depth_videos()
    arrays["observation.state"] = np.stack(states)
    return {key: videos[key] for key in layout.video_keys}, arrays, facts
