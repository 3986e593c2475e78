"""Success of a checkpoint in MetaWorld, from starts that its training never saw."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.simulation.metaworld import (
    ACTION_DIM,
    CAMERAS,
    MAX_STEPS,
    QUALITIES,
    SIMULATION_HZ,
    STATE_DIM,
    MetaWorldSim,
    resolve_tasks,
)
from datasets_scripts.simulation.perturbation import Perturbation
from datasets_scripts.storage.dataset_folder import is_dataset_folder
from datasets_scripts.storage.provenance import read_provenance
from training.evaluation.simulated.options import EvaluationOptions, option
from training.evaluation.simulated.success import format_rates, measure

__all__ = ["MetaWorldOptions", "format_metaworld", "measure_metaworld"]

RECORDED_POINTS = 200  # tracked points of a recorded episode


@dataclasses.dataclass
class MetaWorldOptions(EvaluationOptions):
    """What to measure in MetaWorld, and how.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    tasks: str = option("comma-separated MetaWorld tasks, or easy, medium, hard, very_hard, all")
    _: dataclasses.KW_ONLY
    max_steps: int = option(
        f"simulation steps until an episode has failed (default, and MetaWorld's limit: {MAX_STEPS})",
        MAX_STEPS,
    )
    stride: int | None = option(
        f"simulation steps ({SIMULATION_HZ} a second) per action (default: as in the training data)", None
    )
    quality: str = option(
        "quality of rendering (default: %(default)s, as simulate.py)", "fast", choices=QUALITIES
    )
    camera_shift_m: float = option(
        "meters by which the main camera moves, in one of six directions by the start's seed", 0.0
    )
    object_shift_m: float = option(
        "meters beyond MetaWorld's range of starts at which the object begins: farther from the camera, or "
        "nearer if negative",
        0.0,
    )
    table_color: list[float] | None = option("red, green, blue (0 to 1): factors of the table's color", None)
    record: Path | None = option(
        "the episodes of --video (with or without one) as a LeRobot dataset with exact depth and tracks; "
        "replaces one that is there",
        None,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.record and self.perturbation.changes():
            raise ValueError("--record replays in MetaWorld's own scenes: leave out shifts and colors")
        if self.record and self.record.exists() and not is_dataset_folder(self.record):
            raise ValueError(f"--record is {self.record}, which is not a dataset: give a new folder")
        if self.max_steps > MAX_STEPS:
            raise ValueError(f"--max-steps is {self.max_steps}; MetaWorld stops at {MAX_STEPS}")
        self.perturbation  # noqa: B018 - checks its values

    @property
    def films(self) -> list[Path]:
        """Files to make from filmed episodes; without any, pictures are not kept."""
        return [*super().films, *([self.record] if self.record else [])]

    @property
    def perturbation(self) -> Perturbation:
        """How the scenes differ from those of the demonstrations."""
        color = self.table_color and tuple(self.table_color)
        return Perturbation(self.camera_shift_m, self.object_shift_m, color)


def measure_metaworld(options: MetaWorldOptions, arguments: Sequence[str] | None = None) -> dict:
    """Success in MetaWorld; [`measure`] explains arguments, result and errors."""
    return measure(MetaWorld(options), arguments)


def format_metaworld(results: dict) -> str:
    """A line for people per task, and the errors on recorded episodes if they were measured."""
    lines = format_rates({**results["tasks"], "all": results["mean"]})
    if "open_loop" in results:
        from training.evaluation.open_loop import format_open_loop

        lines.append(format_open_loop(results["open_loop"]["metrics"]))
        lines.append("in real units, newest frames of windows:")
        lines.append(format_open_loop(results["open_loop"]["real_units"]))
    return "\n".join(lines)


class MetaWorld:
    """The benchmark, see `success.Benchmark`."""

    name = "MetaWorld"

    def __init__(self, options: MetaWorldOptions):
        self.options, self.tasks = options, resolve_tasks(options.tasks)

    def check_policy(self, config) -> None:
        """Raise a `ValueError` for a policy that does not fit MetaWorld's robot and cameras."""
        unknown = [view for view in config.views if view not in CAMERAS]
        if unknown:
            raise ValueError(
                f"the checkpoint sees the cameras {list(config.views)}, but the simulator has "
                f"{list(CAMERAS)}; it cannot show {unknown}: train with views named as the simulator's "
                "cameras"
            )
        for name, sizes in {"action_dim": (ACTION_DIM,), "state_dim": (0, STATE_DIM)}.items():
            if getattr(config, name) not in sizes:
                raise ValueError(
                    f"the checkpoint has {name} {getattr(config, name)}, MetaWorld's robot {sizes[-1]}"
                )

    def check_starts(self, demonstrations: Sequence[Path]) -> dict:
        """What the starts were compared with; raises a `ValueError` if one was demonstrated."""
        return _check_unseen(self.tasks, self.options.seeds, demonstrations)

    def choose_settings(self, config, image_size: int) -> dict:
        """How the loop runs; what the options leave open follows the training data."""
        options, stride = self.options, _choose_stride(self.options, config.fps)
        settings = {
            "control_hz": SIMULATION_HZ / stride,
            "stride": stride,
            "max_steps": max(1, options.max_steps // stride),
            "max_simulation_steps": options.max_steps,
            "render_quality": options.quality,
            "success": "info['success'] at any simulation step",
        }
        if changes := options.perturbation.changes():
            settings["perturbation"] = changes
        return settings

    def summarize(self, rate: Callable[[Sequence[str]], dict]) -> dict:
        """Nothing beyond tasks and mean."""
        return {}

    def step_limits(self, settings: Mapping) -> dict[str, int]:
        """Control steps after which an episode has failed, by task."""
        return dict.fromkeys(self.tasks, settings["max_steps"])

    def make_simulator(self, config, settings: Mapping) -> functools.partial:
        """Gives the simulator of a task."""
        return functools.partial(
            MetaWorldSim,
            cameras=tuple(config.views),
            image_size=settings["image_size"],
            quality=self.options.quality,
            perturbation=self.options.perturbation,
        )

    def use_film(self, episodes: Sequence, config, facts: Mapping) -> None:
        """Writes the dataset of `--record`."""
        from datasets_scripts.simulation.job import Rollout, record_rollouts
        from datasets_scripts.simulation.simulators import MetaWorldRecording

        if self.options.record is None:
            return
        recording = MetaWorldRecording(
            tasks=tuple(dict.fromkeys(episode.task for episode in episodes)),
            episodes=1,
            image_size=facts["settings"]["image_size"],
            stride=facts["settings"]["stride"],
            noise=0.0,
            n_points=RECORDED_POINTS,
            cameras=tuple(config.views),
            quality=self.options.quality,
        )
        rollouts = []
        for episode in episodes:
            outcome = {"success": episode.success, "steps": episode.steps, "failed_at": episode.failed_at}
            outcome = {name: value for name, value in outcome.items() if value is not None}
            rollouts.append(Rollout(episode.task, episode.seed, np.stack(episode.actions), outcome))
        record_rollouts(recording, rollouts, self.options.record, facts["checkpoint"])


def _choose_stride(options: MetaWorldOptions, fps: int | None) -> int:
    """Simulation steps per action."""
    if options.stride is not None:
        return options.stride
    if not fps:
        print("the checkpoint does not say its frame rate: --stride 4 (20 actions a second) is assumed")
        return 4
    stride = round(SIMULATION_HZ / fps)
    if stride < 1 or abs(SIMULATION_HZ / fps - stride) > 1e-6:
        raise ValueError(
            f"the checkpoint acts at {fps} steps a second, which does not divide MetaWorld's "
            f"{SIMULATION_HZ}; choose --stride"
        )
    return stride


def _check_unseen(tasks: list[str], seeds: range, demonstrations: list[Path]) -> dict:
    """Refuses starts that were demonstrated, if the demonstrations record their seeds."""
    counted = []
    for dataset in demonstrations:
        known = read_provenance(dataset).get("episodes", {}).values()
        shown = {(episode.get("task"), episode["seed"]) for episode in known if "seed" in episode}
        if seen := sorted({seed for task in tasks for seed in seeds if (task, seed) in shown}):
            raise ValueError(
                f"the dataset {dataset.name} has demonstrations from the starts {seen[:5]}: choose another "
                "--seed"
            )
        if shown:
            counted.append(f"{len(shown)} demonstrations of {dataset.name}")
    return {"checked_against": " and ".join(filter(None, (", ".join(counted[:-1]), *counted[-1:]))) or None}
