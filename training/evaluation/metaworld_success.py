"""Success of a checkpoint in MetaWorld, from starts that its training never saw.

Episodes run side by side, each simulator in its own process, and share one forward pass per control
step. The outcome does not depend on how many run at a time.
"""

# No import of PyTorch at the top: every simulator process imports its command, which may import this file.
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from datasets_scripts.columns import image_key
from datasets_scripts.simulation.metaworld import (
    ACTION_DIM,
    CAMERAS,
    MAX_STEPS,
    QUALITIES,
    SIMULATION_HZ,
    STATE_DIM,
    resolve_tasks,
)
from datasets_scripts.simulation.perturbation import Perturbation
from datasets_scripts.storage.atomic import write_json
from datasets_scripts.storage.dataset_folder import load_features
from datasets_scripts.storage.provenance import read_provenance
from training.evaluation.benchmark import (
    describe_checkpoint,
    open_policy,
    option,
    percentiles_ms,
    success_figures,
)
from training.run_facts import count_cores, describe_run

__all__ = ["SuccessOptions", "format_success", "measure_success"]

MAX_FILMED = 20  # rollouts in one video


@dataclasses.dataclass
class SuccessOptions:
    """What to measure, and how; `evaluate.py` has a flag for every field and explains it.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    checkpoint: str = option("folder of a trained model, or Hub id")
    tasks: str = option("comma-separated MetaWorld tasks, or easy, medium, hard, very_hard, all")
    revision: str | None = option("commit, branch or tag of a Hub id", None)
    episodes: int = option("per task (default: %(default)s)", 20)
    seed: int = option("start of the first episode; the others follow (default: %(default)s)", 10000)
    output: Path = option("results (default: %(default)s)", Path("eval.json"))
    video: Path | None = option(f"film of the first {MAX_FILMED} episodes, .mp4", None)
    dataset: str | None = option("also measure errors on the held-out episodes of this dataset", None)
    num_envs: int = option("simulators side by side (default: one per core, %(default)s here)", count_cores)
    max_steps: int = option(
        f"simulation steps until an episode has failed (default, and MetaWorld's limit: {MAX_STEPS})",
        MAX_STEPS,
    )
    stride: int | None = option(
        f"simulation steps ({SIMULATION_HZ} a second) per action (default: as in the training data)", None
    )
    execute_steps: int = option(
        "actions of a chunk to execute before the next plan (default: %(default)s)", 1
    )
    quality: str = option("rendering (default: %(default)s, as simulate.py)", "fast", choices=QUALITIES)
    image_size: int | None = option("rendered pixels per side (default: as in the training data)", None)
    camera_shift_m: float = option(
        "meters by which the main camera moves, in one of six directions by the start's seed", 0.0
    )
    object_shift_m: float = option(
        "meters beyond MetaWorld's range of starts at which the object begins: farther from the camera, or "
        "nearer if negative",
        0.0,
    )
    table_color: list[float] | None = option("red, green, blue (0 to 1): factors of the table's color", None)
    threads: int | None = option("threads of PyTorch (default: 1 for a small model)", None)
    device: str | None = option("default: cuda if there is one, otherwise cpu", None)

    def __post_init__(self):
        for name in ("episodes", "num_envs", "execute_steps", "max_steps", "stride", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        if self.max_steps > MAX_STEPS:
            raise ValueError(f"--max-steps is {self.max_steps}; MetaWorld stops at {MAX_STEPS}")
        if self.video and self.video.suffix != ".mp4":
            raise ValueError(f"--video is {self.video}; its name must end in .mp4")
        self.perturbation  # noqa: B018 - checks its values

    @property
    def perturbation(self) -> Perturbation:
        """How the scenes differ from those of the demonstrations."""
        color = self.table_color and tuple(self.table_color)
        return Perturbation(self.camera_shift_m, self.object_shift_m, color)


def measure_success(options: SuccessOptions, arguments: Sequence[str] | None = None) -> dict:
    """Run the episodes, and measure the held-out episodes of `options.dataset` if it is given.

    Args:
        options (`SuccessOptions`): What to measure.
        arguments (`Sequence[str]`, *optional*): Arguments of `training/evaluate.py` for the recorded command;
            by default the command of this process is recorded.

    Returns:
        `dict`: What goes into the JSON file: `tasks` and `mean` (success rate with its 95 % Wilson interval),
        `episodes`, `settings`, `timing`, `checkpoint`, what `describe_run` gives; `open_loop` with a dataset.

    Raises:
        ValueError: If checkpoint, tasks and dataset do not fit together; names the remedy.
        RuntimeError: If the simulator is missing or fails.
    """
    tasks = resolve_tasks(options.tasks)  # before anything slow
    with open_policy(options, _check_robot) as (model, processor):
        run = describe_run("training/evaluate.py" if arguments is not None else None, arguments)
        return _measure(options, tasks, model, processor, run)


def _measure(options: SuccessOptions, tasks: list[str], model, processor, run: dict) -> dict:
    from training.evaluation.metric_loader import load_metric
    from training.evaluation.open_loop import held_out_data, measure_recorded
    from training.model_folder import read_summary

    metric = load_metric("success_rate")  # before the episodes: the cache of such scripts may be read-only
    demonstrations = _find_demonstrations(options)
    settings = _choose_settings(options, model.config, read_summary(options.checkpoint), demonstrations)
    seeds = range(options.seed, options.seed + options.episodes)
    checked = _check_unseen(tasks, seeds, demonstrations)
    recorded = held_out_data(options.checkpoint, model.config, options.dataset) if options.dataset else None
    episodes, timing = _run_trials(model, processor, list(itertools.product(tasks, seeds)), settings, options)
    results = {
        "version": 1,
        "benchmark": "MetaWorld",
        "checkpoint": describe_checkpoint(options, model.config),
        "tasks": {
            task: success_figures(metric, [e.success for e in episodes if e.task == task]) for task in tasks
        },
        "mean": success_figures(metric, [e.success for e in episodes]),
        "seeds": {"first": seeds[0], "last": seeds[-1], **checked},
        "settings": settings,
        "timing": timing,
        "episodes": [
            {name: getattr(e, name) for name in ("task", "seed", "success", "steps", "simulation_steps")}
            for e in episodes
        ],
        **run,
    }
    if recorded is not None:
        write_json(options.output, results)  # what fails from here on must not cost the results
        results["open_loop"] = measure_recorded(model, processor, recorded)
    if options.video:
        write_json(options.output, results)
        _write_film(options.video, episodes[:MAX_FILMED], len(tasks) > 1, settings["control_hz"])
    return results


def format_success(results: dict) -> str:
    """A line for people per task, and the errors on recorded episodes if they were measured."""
    lines = []
    for task, figures in {**results["tasks"], "all": results["mean"]}.items():
        low, high = figures["ci95"]
        lines.append(
            f"{task}: {figures['successes']}/{figures['episodes']} = {figures['success_rate']:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%})"
        )
    if "open_loop" in results:
        from training.evaluation.open_loop import format_open_loop

        lines.append(format_open_loop(results["open_loop"]["metrics"]))
        lines.append("in real units, newest frames of windows:")
        lines.append(format_open_loop(results["open_loop"]["real_units"]))
    return "\n".join(lines)


def _run_trials(
    model, processor, trials: list[tuple[str, int]], settings: dict, options: SuccessOptions
) -> tuple:
    """Runs all trials under a progress bar; gives the episodes and the `timing` entry of the results."""
    from modeling_foresight import ForesightStream
    from training.evaluation.closed_loop import run_episodes
    from training.evaluation.simulation_pool import SimulationPool

    size = min(options.num_envs, len(trials))
    scenes = (model.config.views, settings["image_size"], options.quality, options.perturbation)
    stream = ForesightStream(model, processor, num_envs=size)
    outcomes: list[bool] = []
    begun = time.perf_counter()
    with (
        SimulationPool(size, *scenes) as pool,
        tqdm(total=len(trials), desc="evaluate", unit="episode") as bar,
    ):

        def report(episode) -> None:
            outcomes.append(episode.success)
            rate = sum(outcomes) / len(outcomes)
            bar.set_postfix_str(f"success {sum(outcomes)}/{len(outcomes)} = {rate:.0%}")
            bar.update()

        steps = {name: settings[name] for name in ("stride", "max_steps", "execute_steps")}
        film = MAX_FILMED if options.video else 0
        episodes, timing = run_episodes(stream, pool, trials, **steps, film=film, on_done=report)
    return episodes, {
        "wall_s": round(time.perf_counter() - begun, 2),
        "parallel_environments": size,
        "policy_ms": percentiles_ms(timing.policy),
        "control_step_ms": percentiles_ms(timing.step),
    }


def _check_robot(config) -> None:
    """Refuses a policy that does not fit MetaWorld's robot and cameras."""
    if not config.has("action"):
        raise ValueError(f"the checkpoint has no action head; its objectives are {list(config.objectives)}")
    unknown = [view for view in config.views if view not in CAMERAS]
    if unknown:
        raise ValueError(
            f"the checkpoint sees the cameras {list(config.views)}, but the simulator has {list(CAMERAS)}; "
            f"it cannot show {unknown}: train with views named as the simulator's cameras"
        )
    for name, sizes in {"action_dim": (ACTION_DIM,), "state_dim": (0, STATE_DIM)}.items():
        if getattr(config, name) not in sizes:
            raise ValueError(
                f"the checkpoint has {name} {getattr(config, name)}, MetaWorld's robot {sizes[-1]}"
            )


def _find_demonstrations(options: SuccessOptions) -> list[Path]:
    """The training data that this machine has: named, in the run's settings, or beside the model."""
    from training.model_folder import read_run_config

    trained_on = [source.path for source in read_run_config(options.checkpoint).data.datasets]
    beside = Path(options.checkpoint).resolve().parent / "dataset"
    folders = map(Path, [*([options.dataset] if options.dataset else trained_on), beside])
    return [folder for folder in dict.fromkeys(folders) if (folder / "meta" / "info.json").is_file()]


def _choose_settings(
    options: SuccessOptions, config, summary: dict, demonstrations: list[Path] | None
) -> dict:
    """How the loop runs; what the options leave open follows the training data."""
    stride, size, first, fps = options.stride, options.image_size, config.views[0], config.fps
    if stride is None:
        stride = round(SIMULATION_HZ / fps) if fps else 4
        if not fps:
            print("the checkpoint does not say its frame rate: --stride 4 (20 actions a second) is assumed")
        elif stride < 1 or abs(SIMULATION_HZ / fps - stride) > 1e-6:
            raise ValueError(
                f"the checkpoint acts at {fps} steps a second, which does not divide MetaWorld's "
                f"{SIMULATION_HZ}; choose --stride"
            )
    if size is None:
        labels = [dataset.get("labels", {}).get(first, {}) for dataset in summary.get("datasets", [])]
        recorded = [label["intrinsics"]["height"] for label in labels if "intrinsics" in label]
        if not recorded and demonstrations:
            recorded = load_features(demonstrations[0]).get(image_key(first), {}).get("shape")
        size = recorded[0] if recorded else config.image_size
    if options.execute_steps > config.chunk_size:
        raise ValueError(
            f"--execute-steps is {options.execute_steps}, but the model plans {config.chunk_size} actions"
        )
    settings = {
        "control_hz": SIMULATION_HZ / stride,
        "stride": stride,
        "execute_steps": options.execute_steps,
        "max_steps": max(1, options.max_steps // stride),
        "max_simulation_steps": options.max_steps,
        "render_quality": options.quality,
        "image_size": int(size),
        "success": "info['success'] at any simulation step",
    }
    if changes := options.perturbation.changes():
        settings["perturbation"] = changes
    return settings


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


def _write_film(path: Path, episodes: list, name_tasks: bool, fps: float) -> None:
    from training.evaluation.videos import rollout_grid, write_video

    captions = [f"{e.task + ' ' if name_tasks else ''}{e.seed}" for e in episodes]
    write_video(
        path, rollout_grid([e.frames for e in episodes], captions, [e.success for e in episodes]), fps
    )
