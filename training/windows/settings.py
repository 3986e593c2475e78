"""What a training window holds: lengths, views, columns, augmentation; and the split by episode."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from modeling_foresight.configuration_foresight import CHOICES, FAMILIES, OBJECTIVES, ForesightConfig

__all__ = ["WindowConfig", "split_episodes"]

STRIDED_COMMANDS = ("refuse", "sum", "last")


@dataclasses.dataclass
class WindowConfig:
    """What a window holds. Lengths are in frames of the dataset times `frame_stride`.

    Args:
        views (`list[str]`): View names in the model's order; the first is the flow view.
        cameras (`dict[str, str | None]`): Dataset camera of each view; a view not listed uses the camera of
            its own name, `None` says that this dataset has no such view.
        history_length (`int`): T.
        future_shift (`int`): S, distance of the future target.
        lookahead (`bool`): Deliver S more frames after the window, as targets only.
        chunk_size (`int`): K.
        flow_length (`int`): L, the current step included.
        flow_grid (`tuple[int, int]`): Rows and columns of the query grid.
        objectives (`list[str]`): Some of the model's; they decide the columns needed: `depth` and `future`
            read depth, `flow` and `flow_2d` tracks, `action` actions; `future_rgb` and `progress` nothing.
        p_moving (`float`): Probability that a node with a moving candidate takes a moving one.
        occluded_weight (`float`): Weight of a track's hidden steps; 1 is the paper's plain mean.
        random_shift (`float`): Largest shift as a fraction of the side; 0 for evaluation, 0.05 in GR-MG.
        goal_image (`bool`): Deliver a goal image.
        frame_stride (`int`): Frames of the dataset per step of the window.
        state_key (`str`, *optional*): State column, used if the dataset has it; `None` ignores it.
        action_key (`str`): Action column; not read with `local_delta`.
        action_codec (`str`): `"recorded"`: actions are those of the action column. `"local_delta"`: they are
            made from the poses that the state column measured (`action_codec.encode_local_delta`); it must
            begin with x, y, z in meters, roll, pitch, yaw in radians, and the gripper as -1 or 1, or 0 or 1.
        strided_commands (`str`): What a `recorded` action is where `frame_stride` is above 1 and a step spans
            several commands: `"sum"` for motions per frame, `"last"` for targets (`combine_commands`).
            `"refuse"` accepts no such dataset, because the column does not say which it holds. `local_delta`
            actions are measured from step to step and need no choice.
        binary_action_indices (`list[int]`): Entries of an action that are never summed (gripper).
        embodiment (`str`, *optional*): Name of the robot, in a mixture of several.
        episodes (`list[int]`, *optional*): Episodes used; all if omitted.
        frame_cache (`str`): `"auto"`, `"off"`, or a folder; see `frame_cache.open_frames`.
        seed (`int`): Seed of augmentation and of the choice of points.
        skip_flagged (`bool`): Leave out episodes that have a flag (`inspection.quality`) of a camera
            that is used.
        missing_targets (`bool`): Deliver masked zeros for label columns that the dataset lacks (mixtures),
            rather than refuse it.
        image_size (`int`, *optional*): Side of the zeros that stand for a missing view; the size of the first
            present view if omitted.

    Raises:
        ValueError: If a value makes no sense; says which.
    """

    views: list[str] = dataclasses.field(default_factory=lambda: ["main", "wrist"])
    cameras: dict[str, str | None] = dataclasses.field(default_factory=dict)
    history_length: int = 10
    future_shift: int = 3
    lookahead: bool = False
    chunk_size: int = 5
    flow_length: int = 6
    flow_grid: tuple[int, int] = (14, 14)
    objectives: list[str] = dataclasses.field(
        default_factory=lambda: [o for o in OBJECTIVES if o not in FAMILIES]
    )
    p_moving: float = 0.5
    occluded_weight: float = 1.0
    random_shift: float = 0.0
    goal_image: bool = False
    frame_stride: int = 1
    state_key: str | None = "observation.state"
    action_key: str = "action"
    action_codec: str = "recorded"
    strided_commands: str = "refuse"
    binary_action_indices: list[int] = dataclasses.field(default_factory=list)
    embodiment: str | None = None
    episodes: list[int] | None = None
    frame_cache: str = "auto"
    seed: int = 0
    skip_flagged: bool = False
    missing_targets: bool = False
    image_size: int | None = None

    def __post_init__(self):
        at_least_one = ("history_length", "chunk_size", "flow_length", "frame_stride")
        for name, bound in {**dict.fromkeys(at_least_one, 1), "future_shift": 0}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
        if not self.views or len(set(self.views)) != len(self.views):
            raise ValueError(f"views are {self.views}; at least one, each once")
        if unknown := set(self.objectives) - set(OBJECTIVES):
            raise ValueError(f"unknown objectives {sorted(unknown)}; choose among {', '.join(OBJECTIVES)}")
        for name, known in (
            ("action_codec", CHOICES["action_codec"]),
            ("strided_commands", STRIDED_COMMANDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose among {', '.join(known)}")
        if unknown := set(self.cameras) - set(self.views):
            raise ValueError(
                f"cameras are given for {sorted(unknown)}, which are not among the views {self.views}"
            )
        if not 0 <= self.random_shift < 0.5:
            raise ValueError(f"random_shift is {self.random_shift}, a fraction of the side: 0 to below 0.5")
        self.flow_grid = tuple(self.flow_grid)

    @classmethod
    def for_model(cls, model: ForesightConfig, **others) -> "WindowConfig":
        """Windows that hold what a model takes and is supervised with; `others` are the remaining fields."""
        lengths = {name: getattr(model, name) for name in ("history_length", "future_shift", "chunk_size")}
        return cls(
            **lengths,
            lookahead=model.future_targets == "lookahead" and model.has("future"),
            flow_length=model.flow_length,
            flow_grid=tuple(model.flow_grid),
            objectives=[objective for objective in model.objectives if model.has(objective)],
            image_size=model.image_size,
            **others,
        )

    @property
    def wants_depth(self) -> bool:
        """Whether an objective reads depth."""
        return bool({"depth", "future"} & set(self.objectives))

    @property
    def wants_flow(self) -> bool:
        """Whether an objective reads tracks."""
        return bool({"flow", "flow_2d"} & set(self.objectives))

    @property
    def action_source(self) -> str | None:
        """The column that actions are made from."""
        return self.state_key if self.action_codec == "local_delta" else self.action_key

    @property
    def frames_needed(self) -> int:
        """Frames of the shortest episode that gives a window: the history, and a frame after it."""
        return (self.history_length - 1) * self.frame_stride + 2

    @property
    def lookahead_frames(self) -> int:
        """F, frames delivered after the window."""
        return self.future_shift if self.lookahead else 0

    def for_evaluation(self, episodes: Sequence[int] | None = None) -> "WindowConfig":
        """The same windows without augmentation, on other episodes; draw 0 makes them repeatable."""
        return dataclasses.replace(
            self, random_shift=0.0, episodes=None if episodes is None else list(episodes)
        )


def split_episodes(n_episodes: int, val_fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Sorted training and validation episodes, so that no frame of a validation episode is ever trained on.

    Args:
        n_episodes (`int`): Episodes of the dataset.
        val_fraction (`float`): Share kept for validation, in [0, 1); above 0 it is at least one episode, and
            training always keeps one.
        seed (`int`): Seed of the choice.

    Raises:
        ValueError: If the fraction is out of range, or there are too few episodes to split.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
    if val_fraction > 0 and n_episodes < 2:
        raise ValueError(f"{n_episodes} episodes cannot be split; set val_fraction to 0")
    n_val = min(max(1, round(n_episodes * val_fraction)), n_episodes - 1) if val_fraction > 0 else 0
    order = np.random.default_rng(seed).permutation(n_episodes)
    return sorted(order[n_val:].tolist()), sorted(order[:n_val].tolist())
