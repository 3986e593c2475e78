"""Success of a checkpoint in closed loop: what all simulated benchmarks share.

Episodes run side by side, each simulator in its own process, and share one forward pass per control step. The
outcome does not depend on how many run at a time. Finished episodes of an interrupted evaluation are kept in
`OUTPUT.partial`; the same command resumes it.
"""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import contextlib
import dataclasses
import itertools
import json
import shutil
import time
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from datasets_scripts.columns import image_key
from datasets_scripts.storage.atomic import check_place, name_changes, read_json, write_json, write_whole_file
from datasets_scripts.storage.dataset_folder import load_features
from datasets_scripts.storage.episode_job import EVALUATION, EpisodeJob
from training.evaluation.simulated.goal_sources import check_goal_options, describe_goals, open_stream
from training.run_facts import count_cores, describe_run, portable_path

__all__ = [
    "Benchmark",
    "EvaluationOptions",
    "GoalOptions",
    "PolicyOptions",
    "StreamChange",
    "check_heads",
    "claim_evaluation",
    "describe_checkpoint",
    "evaluation_job",
    "format_rates",
    "measure",
    "measure_policy",
    "open_policy",
    "option",
    "parse_benchmark",
    "percentiles_ms",
    "read_finished",
    "recorded_image_size",
    "success_figures",
]

MAX_SEED = 2**32  # of NumPy's generator, which the simulators use
MAX_FILMED = 20  # rollouts in one video
# Options that count something, where a benchmark has them.
COUNTS = ("episodes", "chains", "num_envs", "execute_steps", "max_steps", "stride", "threads")
SMALL_MODEL = 20_000_000  # parameters
EPISODE_FACTS = ("task", "seed", "success", "steps", "simulation_steps", "failed_at")


def option(help: str, default=dataclasses.MISSING, **more):
    """A field with its help text; `default` may be a function that gives the value."""
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"help": help, **more})


def parse_benchmark(
    kinds: Mapping[str, type], description: str, examples: str, arguments: Sequence[str] | None
) -> tuple[str, Any]:
    """The `--benchmark` of a command line, the first by default, and the options that this one has.

    Args:
        kinds (`Mapping[str, type]`): Options of each benchmark, a dataclass with a flag per field.
        description, examples (`str`): For `--help`.
        arguments (`Sequence[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: If a value makes no sense; names it.
    """
    from transformers import HfArgumentParser

    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    names = list(kinds)
    chooser.add_argument("--benchmark", choices=names, default=names[0], help="(default: %(default)s)")
    name = chooser.parse_known_args(arguments)[0].benchmark
    help_page = {"description": description, "epilog": examples}
    help_page["formatter_class"] = RawDescriptionHelpFormatter
    given = vars(HfArgumentParser(kinds[name], parents=[chooser], **help_page).parse_args(arguments))
    del given["benchmark"]
    return name, kinds[name](**given)


@dataclasses.dataclass(kw_only=True)
class GoalOptions:
    """Where a policy that was trained with goal images gets them."""

    goal_source: str | None = option(
        "goal images of recorded demonstrations or of a generator; with none, a policy that was trained with "
        "them acts without",
        None,
        choices=["none", "recorded", "generator"],
    )
    goal_dataset: str | None = option("LeRobot v3 dataset of --goal_source recorded, folder or Hub id", None)
    goal_camera: str | None = option(
        "camera of --goal_dataset for the policy's first view (default: the one that it was trained on, if "
        "the run is beside the checkpoint, otherwise the one of the view's name)",
        None,
    )
    goal_generator: str | None = option("InstructPix2Pix pipeline of --goal_source generator", None)
    goal_background: bool = option(
        "draw goals beside the simulation, as on a robot: results then depend on the machine's speed", False
    )


@dataclasses.dataclass
class PolicyOptions(GoalOptions):
    """Which policy acts in simulation, and on what machine.

    Raises:
        ValueError: If a number that counts something is below 1; names it.
    """

    checkpoint: str = option("folder of a trained model, or Hub id")
    _: dataclasses.KW_ONLY
    revision: str | None = option("commit, branch or tag of a Hub id", None)
    embodiment: str | None = option("name of the robot, of a checkpoint for several", None)
    num_envs: int = option("simulators side by side (default: one per core, %(default)s here)", count_cores)
    threads: int | None = option("threads of PyTorch (default: 1 for a small model)", None)
    device: str | None = option("default: cuda if there is one, otherwise cpu", None)

    def __post_init__(self):
        for name in COUNTS:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclasses.dataclass
class EvaluationOptions(PolicyOptions):
    """What every benchmark asks; `evaluate.py` has a flag for every field and explains it.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    checkpoint: str = option("folder of a trained model or of an exported policy, or Hub id")
    _: dataclasses.KW_ONLY
    episodes: int = option("per task (default: %(default)s)", 20)
    seed: int = option("start of the first episode; the others follow (default: %(default)s)", 10000)
    output: Path = option("results (default: %(default)s)", Path("eval.json"))
    video: Path | None = option(
        f"film of up to {MAX_FILMED} episodes, .mp4: failures first, of all tasks alike, each marked at the "
        "step where the progress that the policy predicts was highest",
        None,
    )
    dataset: str | None = option("also measure errors on the held-out episodes of this dataset", None)
    execute_steps: int = option(
        "actions of a chunk to execute before the next plan (default: %(default)s)", 1
    )
    image_size: int | None = option("rendered pixels per side (default: as in the training data)", None)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed <= self.seeds[-1] < MAX_SEED:
            raise ValueError(f"--seed is {self.seed}; the starts must be in 0 to {MAX_SEED - 1}")
        check_place(self.output, "--output")
        if self.video:
            check_place(self.video, "--video", ".mp4")

    @property
    def films(self) -> list[Path]:
        """What is made of the pictures and actions of episodes, for which they are kept."""
        return [self.video] if self.video else []

    @property
    def seeds(self) -> range:
        """Starts of the episodes of each task."""
        return range(self.seed, self.seed + self.episodes)


class Benchmark(Protocol):
    """What distinguishes one benchmark from another.

    Attributes:
        name (`str`): Its name in the results.
        options (`EvaluationOptions`): What to measure.
        tasks (`Sequence[str]`): Tasks to try.
    """

    name: str
    options: EvaluationOptions
    tasks: Sequence[str]

    def check_policy(self, config: Any) -> None:
        """Raise a `ValueError` for a policy that does not fit robot and cameras."""
        ...

    def check_starts(self, demonstrations: Sequence[Path]) -> dict:
        """What the results say about the starts; raises a `ValueError` if one was demonstrated."""
        ...

    def choose_settings(self, config: Any, image_size: int) -> dict:
        """How the loop runs: `control_hz`, `stride`, and what else determines the results."""
        ...

    def summarize(self, rate: Callable[[Sequence[str]], dict]) -> dict:
        """Further entries of the results; `rate` gives the success rate of some tasks together."""
        ...

    def step_limits(self, settings: Mapping) -> Mapping[str, int]:
        """Control steps after which an episode has failed, by task."""
        ...

    def make_simulator(self, config: Any, settings: Mapping) -> Callable[[str], Any]:
        """Gives the simulator of a task in the process that calls it; must be picklable."""
        ...

    def use_film(self, episodes: Sequence, config: Any, facts: Mapping) -> None:
        """Make of the filmed episodes, failures first, what the options ask for beside the video."""
        ...


class StreamChange(Protocol):
    """What a diagnostic changes of what the policy gets.

    Attributes:
        name (`str`): Distinguishes results from those of the unchanged policy.
    """

    name: str

    def apply(self, stream: Any) -> Any:
        """The stream that acts in place of the given one."""
        ...


def measure(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> dict:
    """Run the episodes, and measure the held-out episodes of the dataset of the options if there is one.

    Args:
        benchmark (`Benchmark`): What to measure, and where.
        arguments (`Sequence[str]`, *optional*): Arguments of `training/evaluate.py` for the recorded command;
            by default the command of this process is recorded.

    Returns:
        `dict`: What goes into the JSON file: `tasks` and `mean` (success rate with its 95 % Wilson interval),
        `episodes`, `settings`, `timing`, `checkpoint`, what `describe_run` gives; `open_loop` with a dataset.

    Raises:
        ValueError: If checkpoint, tasks and dataset do not fit together, or an unfinished evaluation is of
            another policy or other settings; names the remedy.
        RuntimeError: If the simulator is missing or fails.
    """
    with open_policy(benchmark.options, benchmark.check_policy) as (model, processor):
        return measure_policy(benchmark, model, processor, arguments)


@contextlib.contextmanager
def open_policy(options: PolicyOptions, check: Callable[[Any], None]) -> Iterator[tuple]:
    """Yields model and processor of `options.checkpoint`, with `options.threads` threads of PyTorch.

    The processor is for the robot of the options, and `check` is called with the model's config for it.

    Raises:
        ValueError: If the checkpoint cannot be loaded, does not act, or has no source of its goals; what
            `check` raises.
    """
    import torch

    from training.models.model_folder import is_exported, load_checkpoint, load_exported

    check_heads(options)
    if is_exported(options.checkpoint):
        if options.device not in (None, "cpu"):
            raise ValueError(f"--device {options.device}: an exported policy acts on the CPU, leave it out")
        model, processor = load_exported(options.checkpoint)
    else:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_checkpoint(options.checkpoint, device, options.revision)
    if not model.config.has("action"):
        raise ValueError(f"the checkpoint has no action head; its objectives are {model.config.objectives}")
    processor = processor.for_embodiment(options.embodiment)
    check(model.config.for_robot(processor.embodiment))
    check_goal_options(model.config, options)
    threads = torch.get_num_threads()
    # Threads of a small model mostly wait for each other, and for long where other processes want the cores.
    torch.set_num_threads(options.threads or (1 if model.num_parameters() < SMALL_MODEL else threads))
    try:
        yield model, processor
    finally:
        torch.set_num_threads(threads)


def check_heads(options: PolicyOptions) -> None:
    """Refuses recorded data for an exported policy."""
    from training.models.model_folder import is_exported

    if getattr(options, "dataset", None) and is_exported(options.checkpoint):
        raise ValueError(
            "--dataset needs all heads, and an exported policy acts only: measure the errors of the model "
            "that it came from"
        )


def measure_policy(
    benchmark: Benchmark,
    model,
    processor,
    arguments: Sequence[str] | None = None,
    change: StreamChange | None = None,
) -> dict:
    """[`measure`] of a policy that [`open_policy`] has opened.

    `change` is what a diagnostic changes of what the policy gets; it is named in the settings.
    """
    from training.evaluation.metric_loader import load_metric
    from training.evaluation.open_loop import measure_recorded
    from training.policy_data import held_out_data

    run = describe_run("training/evaluate.py" if arguments is not None else None, arguments)
    options, config = benchmark.options, model.config.for_robot(processor.embodiment)
    metric = load_metric("success_rate")  # before the episodes: the cache of such scripts may be read-only
    demonstrations = _find_demonstrations(options)
    settings = _choose_settings(benchmark, config, demonstrations, processor.embodiment)
    settings |= {"change": change.name} if change else {}
    checked = benchmark.check_starts(demonstrations)
    recorded = held_out_data(options.checkpoint, config, options.dataset) if options.dataset else None
    facts = {
        "benchmark": benchmark.name,
        "checkpoint": describe_checkpoint(options, config),
        "seeds": {"first": options.seeds[0], "last": options.seeds[-1]},
        "settings": settings,
    }
    job = evaluation_job(options.output, {**facts, "tasks": benchmark.tasks})
    results = read_finished(job)
    if results and not job.partial.exists() and all(place.exists() for place in options.films):
        print(f"{options.output} holds this evaluation, which is finished")
    else:
        with claim_evaluation(job):
            episodes, timing = _run_trials(benchmark, model, processor, settings, job.partial, change)
            outcomes = _count_successes(benchmark, episodes, metric)
            results = {"version": 1, **facts, **outcomes, "seeds": facts["seeds"] | checked, "timing": timing}
            results |= {"episodes": [_episode_facts(episode) for episode in episodes], **run}
            write_json(options.output, results)  # what fails from here on must not cost the results
            _use_films(benchmark, episodes, config, facts)
    if recorded is not None:
        results["open_loop"] = measure_recorded(model, processor, recorded)
    return results


def _count_successes(benchmark: Benchmark, episodes: Sequence, metric) -> dict:
    """Success rates of the tasks, of all together, and those that the benchmark adds."""

    def rate(tasks: Sequence[str]) -> dict:
        return success_figures(metric, [e.success for e in episodes if e.task in tasks])

    each = {task: rate([task]) for task in benchmark.tasks}
    return {"tasks": each, "mean": rate(benchmark.tasks), **benchmark.summarize(rate)}


def _use_films(benchmark: Benchmark, episodes: Sequence, config, facts: Mapping) -> None:
    """Writes what the options ask for of the filmed episodes, failures first."""
    filmed = sorted((episode for episode in episodes if episode.frames), key=lambda episode: episode.success)
    if benchmark.options.video:
        name_tasks, fps = len(benchmark.tasks) > 1, facts["settings"]["control_hz"]
        _write_film(benchmark.options.video, filmed, name_tasks, fps)
    if filmed:
        benchmark.use_film(filmed, config, facts)


def format_rates(rates: Mapping[str, Mapping]) -> list[str]:
    """A line for people per name, with its 95 % interval."""
    return [
        f"{name}: {figures['successes']}/{figures['episodes']} = {figures['success_rate']:.1%} "
        f"(95 % interval {figures['ci95'][0]:.1%} to {figures['ci95'][1]:.1%})"
        for name, figures in rates.items()
    ]


def evaluation_job(output: Path, facts: Mapping) -> EpisodeJob:
    """Where the finished episodes of an evaluation are kept; only one with equal facts resumes it.

    `facts` has what [`describe_checkpoint`] gives as `checkpoint`.
    """
    return EpisodeJob(output, EVALUATION, _comparable(facts))


def _comparable(facts: Mapping) -> dict:
    """The facts as JSON has them, with the policy by its weights: a folder may move."""
    digest, commit = facts["checkpoint"]["weights_sha256"], facts["checkpoint"]["revision"]
    policy = f"weights {digest[:12]}" if digest else f"{facts['checkpoint']['path']}@{commit}"
    return json.loads(json.dumps({**facts, "checkpoint": policy}))


def read_finished(job: EpisodeJob) -> dict | None:
    """The results in the output of an evaluation; `None` if it has none yet.

    Raises:
        ValueError: If they are of another evaluation, or of none: they would be lost.
    """
    if not job.output.exists():
        return None
    remedy = f"choose another --output, or delete {job.output}"
    results = read_json(job.output, remedy)
    try:
        known = {name: results[name] for name in job.parameters}
        if "tasks" in known:  # the results have more about tasks and seeds
            known["tasks"] = list(known["tasks"])
            known["seeds"] = {name: known["seeds"][name] for name in ("first", "last")}
        known = _comparable(known)
    except (KeyError, TypeError):
        raise ValueError(f"{job.output} exists and holds no results of this benchmark; {remedy}") from None
    if known != job.parameters:
        changed = name_changes(known, job.parameters)
        raise ValueError(f"{job.output} holds an evaluation with other parameters ({changed}); {remedy}")
    return results


@contextlib.contextmanager
def claim_evaluation(job: EpisodeJob) -> Iterator[None]:
    """Opens and locks the folder of finished episodes; an end, or an error before the first, removes it."""
    with job.claim():
        try:
            yield
        except BaseException:
            if not any(job.partial.glob("[0-9]*.json")):
                shutil.rmtree(job.partial)  # nothing is lost
            raise
    shutil.rmtree(job.partial, ignore_errors=True)


def success_figures(metric, successes: Sequence[bool]) -> dict:
    """`successes`, `episodes`, `success_rate` and its 95 % Wilson interval `ci95`."""
    figures = metric.compute(predictions=[int(success) for success in successes])
    interval = figures.pop("interval")
    return {**figures, "ci95": [round(bound, 4) for bound in interval]}


def recorded_image_size(
    config, summary: dict, demonstrations: Sequence[Path] | None, embodiment: str | None = None
) -> int:
    """Side of the first view's images in the robot's data, as far as known; otherwise the model's own."""
    first = config.views[0]
    datasets = [d for d in summary.get("datasets", []) if d.get("embodiment") == embodiment]
    labels = [dataset.get("labels", {}).get(first, {}) for dataset in datasets]
    recorded = [label["intrinsics"]["height"] for label in labels if "intrinsics" in label]
    if not recorded and demonstrations:
        recorded = load_features(demonstrations[0]).get(image_key(first), {}).get("shape")
    return int(recorded[0] if recorded else config.image_size)


def _choose_settings(benchmark: Benchmark, config, demonstrations: list[Path], robot: str | None) -> dict:
    """How the loop runs; what the options leave open follows the training data."""
    from training.models.model_folder import read_summary

    options = benchmark.options
    if options.execute_steps > config.chunk_size:
        raise ValueError(
            f"--execute-steps is {options.execute_steps}, but the model plans {config.chunk_size} actions"
        )
    summary = read_summary(options.checkpoint)
    size = options.image_size or recorded_image_size(config, summary, demonstrations, robot)
    settings = {"execute_steps": options.execute_steps, "image_size": int(size)}
    settings |= {"embodiment": robot} if robot else {}
    return benchmark.choose_settings(config, int(size)) | settings | describe_goals(config, options)


def describe_checkpoint(options, config) -> dict:
    """Path, as it may be published beside `options.output`, revision, and digest of a folder's weights."""
    from training.models.model_folder import weights_digest

    source, digest = options.checkpoint, None
    if Path(source).is_dir():
        source, digest = portable_path(source, options.output.parent), weights_digest(source)
    commit = options.revision or getattr(config, "_commit_hash", None)
    return {"path": source, "revision": commit, "weights_sha256": digest}


def _find_demonstrations(options: EvaluationOptions) -> list[Path]:
    """The training data that this machine has: named, in the run's settings, or beside the model."""
    from training.models.model_folder import read_run_config

    sources = read_run_config(options.checkpoint).data.datasets
    named = options.embodiment
    trained_on = [source.path for source in sources if named in (None, source.embodiment)]
    beside = Path(options.checkpoint).resolve().parent / "dataset"
    folders = map(Path, [*([options.dataset] if options.dataset else trained_on), beside])
    return [folder for folder in dict.fromkeys(folders) if (folder / "meta" / "info.json").is_file()]


def _run_trials(
    benchmark: Benchmark, model, processor, settings: dict, folder: Path, change: StreamChange | None
) -> tuple:
    """Runs the missing trials under a progress bar; gives all episodes and the `timing` of the results."""
    from training.evaluation.simulated.closed_loop import Timing, run_episodes
    from training.evaluation.simulated.simulation_pool import SimulationPool

    options = benchmark.options
    trials = list(itertools.product(benchmark.tasks, options.seeds))
    film = Film(folder, trials, len(benchmark.tasks)) if options.films else None
    known = {(e.task, e.seed): e for e in _read_episodes(folder) if (e.task, e.seed) in trials}
    if film:  # what is to be filmed and was not is run again
        known = {trial: e for trial, e in known.items() if film.has(trial) or trial not in film.always}
    missing = [trial for trial in trials if trial not in known]
    size = min(options.num_envs, len(missing))
    outcomes = [episode.success for episode in known.values()]
    begun, timing = time.perf_counter(), Timing()
    with tqdm(total=len(trials), initial=len(known), desc="evaluate", unit="episode") as bar:

        def keep(episode) -> None:
            if film:
                film.keep(episode)
            number = trials.index((episode.task, episode.seed))
            write_json(folder / f"{number:06d}.json", _episode_facts(episode))
            outcomes.append(episode.success)
            rate = sum(outcomes) / len(outcomes)
            bar.set_postfix_str(f"success {sum(outcomes)}/{len(outcomes)} = {rate:.0%}")
            bar.update()

        if missing:
            simulator = benchmark.make_simulator(model.config.for_robot(processor.embodiment), settings)
            with (
                open_stream(model, processor, options, size, settings["control_hz"], bool(film)) as stream,
                SimulationPool(size, simulator) as pool,
            ):
                episodes, timing = run_episodes(
                    change.apply(stream) if change else stream,
                    pool,
                    missing,
                    settings["stride"],
                    benchmark.step_limits(settings),
                    settings["execute_steps"],
                    set(missing) if film else (),
                    on_done=keep,
                )
            known |= {(e.task, e.seed): e for e in episodes}
    if film:
        film.load(known)
    return [known[trial] for trial in trials], {
        "wall_s": round(time.perf_counter() - begun, 2),
        "parallel_environments": size,
        **({"resumed_after": len(trials) - len(missing)} if len(missing) < len(trials) else {}),
        "policy_ms": percentiles_ms(timing.policy),
        "control_step_ms": percentiles_ms(timing.step),
        **({"goal_ms": percentiles_ms(timing.goal)} if timing.goal else {}),
    }


class Film:
    """Pictures and actions of the trials that the video may show, in files of the folder of episodes.

    These are the first trials of every task, and as many failures of each. Pictures of the others are dropped
    when they end.

    Attributes:
        always (`set`): The trials that are kept whatever their outcome.
    """

    def __init__(self, folder: Path, trials: Sequence[tuple[str, int]], tasks: int):
        self._folder, self._trials = folder, trials
        self._each, episodes = max(1, MAX_FILMED // tasks), len(trials) // tasks
        first = [trial for i, trial in enumerate(trials) if i % episodes < self._each]
        self.always = set(first[:MAX_FILMED])
        self._failures: Counter[str] = Counter()

    def _path(self, trial: tuple[str, int]) -> Path:
        return self._folder / f"{self._trials.index(trial):06d}.npz"

    def has(self, trial: tuple[str, int]) -> bool:
        """Whether its pictures are kept."""
        return zipfile.is_zipfile(self._path(trial))  # and not empty, after a power cut

    def keep(self, episode) -> None:
        """Notes where an episode failed, writes what is kept of it, and frees its memory."""
        trial, episode.failed_at = (episode.task, episode.seed), episode.find_failure()
        self._failures[episode.task] += not episode.success
        if trial in self.always or (not episode.success and self._failures[episode.task] <= self._each):
            with write_whole_file(self._path(trial)) as temporary, temporary.open("wb") as file:
                arrays = {"frames": np.stack(episode.frames), "actions": np.stack(episode.actions)}
                np.savez_compressed(file, **arrays)
        episode.frames, episode.actions = [], []

    def load(self, episodes: Mapping[tuple[str, int], Any]) -> None:
        """Gives back pictures and actions to the episodes that the video shows."""
        turns: Counter[tuple[str, bool]] = Counter()
        ranked = []
        for number, trial in enumerate(self._trials):
            if self.has(trial):
                kind = (trial[0], episodes[trial].success)
                ranked.append((episodes[trial].success, turns[kind], number))
                turns[kind] += 1
        for *_, number in sorted(ranked)[:MAX_FILMED]:
            with np.load(self._path(self._trials[number])) as arrays:
                episode = episodes[self._trials[number]]
                episode.frames, episode.actions = list(arrays["frames"]), list(arrays["actions"])


def _episode_facts(episode) -> dict:
    """What the results say of an episode."""
    facts = {name: getattr(episode, name) for name in EPISODE_FACTS}
    return {name: value for name, value in facts.items() if value is not None}


def _read_episodes(folder: Path) -> Iterator:
    """Episodes that an interrupted evaluation finished."""
    from training.evaluation.simulated.closed_loop import Episode

    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            yield Episode(**read_json(path))
        except (ValueError, TypeError):
            print(f"{path} is damaged: its episode is run again")


def percentiles_ms(durations_s: Sequence[float]) -> dict:
    """Median and 90th percentile of durations, in milliseconds; without durations only their count."""
    if not durations_s:
        return {"count": 0}
    median, p90 = np.percentile(np.asarray(durations_s) * 1000, [50, 90])
    return {"median": round(float(median), 3), "p90": round(float(p90), 3), "count": len(durations_s)}


def _write_film(path: Path, episodes: list, name_tasks: bool, fps: float) -> None:
    from training.evaluation.videos import rollout_grid, write_video

    # Long names of tasks are cut off, so they come last.
    captions = [f"{e.seed} {e.task.rpartition('/')[2] if name_tasks else ''}".strip() for e in episodes]
    write_video(
        path, rollout_grid([e.frames for e in episodes], captions, [e.failed_at for e in episodes]), fps
    )
