"""Success of a checkpoint in closed loop: what all simulated benchmarks share.

Episodes run side by side, each simulator in its own process, and share one forward pass per control step. The
outcome does not depend on how many run at a time. How an evaluation resumes and grows: `kept_episodes.py`.
"""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from datasets_scripts.columns import image_key
from datasets_scripts.command_line import pick_device
from datasets_scripts.storage.atomic import read_json, write_json
from datasets_scripts.storage.dataset_folder import is_dataset_folder, load_features
from training.evaluation.simulated.film import Film, describe_films, write_film
from training.evaluation.simulated.goal_sources import check_goal_options, describe_goals, open_stream
from training.evaluation.simulated.kept_episodes import (
    check_growth,
    claim_evaluation,
    episode_file,
    evaluation_job,
    read_finished,
    reopen,
)
from training.evaluation.simulated.options import EvaluationOptions, PolicyOptions
from training.evaluation.simulated.timing import Sessions, describe_timing
from training.run_record import describe_run, portable_path

__all__ = [
    "Benchmark",
    "StreamChange",
    "describe_checkpoint",
    "format_rates",
    "measure",
    "measure_policy",
    "open_policy",
    "outcomes_by_task",
    "rate_figures",
    "recorded_image_size",
    "refuse_data_for_exported",
]

SMALL_MODEL = 20_000_000  # parameters
EPISODE_FACTS = ("task", "seed", "success", "steps", "simulation_steps", "failed_at")


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

    refuse_data_for_exported(options)
    if is_exported(options.checkpoint):
        if options.device not in (None, "cpu"):
            raise ValueError(f"--device {options.device}: an exported policy acts on the CPU, leave it out")
        model, processor = load_exported(options.checkpoint)
    else:
        device = pick_device(options.device)
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


def refuse_data_for_exported(options: PolicyOptions) -> None:
    """Refuses a `--dataset` for an exported policy, which has no heads whose errors could be measured."""
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
    first = {"first": options.seeds[0]}
    job = evaluation_job(options.output, {**facts, "tasks": benchmark.tasks, "seeds": first})
    results = read_finished(job)
    finished = results["seeds"]["last"] + 1 - options.seed if results else 0
    check_growth(finished, options.episodes, "--episodes", options.output)
    kept = {name: results[name] for name in ("open_loop",) if results and name in results}
    if recorded is not None and kept:
        _refuse_other_errors(options.output, kept["open_loop"], recorded)
    is_whole = finished == options.episodes and not job.partial.exists()
    films = results.get("films", {}) if results else {}
    if is_whole and films | describe_films(options.films) == films:
        print(f"{options.output} holds this evaluation, which is finished")
    else:
        with claim_evaluation(job):
            if results:
                reopen(job.partial, results, lambda e: episode_file(e["task"], e["seed"]))
            sessions = Sessions(job.partial, run)
            episodes, timing = _run_trials(
                benchmark, model, processor, settings, job.partial, sessions, change
            )
            outcomes = _count_successes(benchmark, episodes, metric)
            results = {"version": 1, **facts, **outcomes, "seeds": facts["seeds"] | checked, "timing": timing}
            results |= {"episodes": [_episode_facts(episode) for episode in episodes], **run}
            results |= sessions.describe() | kept
            write_json(options.output, results)  # what fails from here on must not cost the results
            _use_films(benchmark, episodes, config, facts)
            if films := describe_films(options.films):
                results["films"] = films
                write_json(options.output, results)
    if recorded is not None:
        results["open_loop"] = measure_recorded(model, processor, recorded)
    return results


def _count_successes(benchmark: Benchmark, episodes: Sequence, metric) -> dict:
    """Success rates of the tasks, of all together, and those that the benchmark adds."""

    def rate(tasks: Sequence[str]) -> dict:
        return rate_figures(metric, [e.success for e in episodes if e.task in tasks])

    each = {task: rate([task]) for task in benchmark.tasks}
    return {"tasks": each, "mean": rate(benchmark.tasks), **benchmark.summarize(rate)}


def _use_films(benchmark: Benchmark, episodes: Sequence, config, facts: Mapping) -> None:
    """Writes what the options ask for of the filmed episodes, failures first."""
    filmed = sorted((episode for episode in episodes if episode.frames), key=lambda episode: episode.success)
    if benchmark.options.video and filmed:
        name_tasks, fps = len(benchmark.tasks) > 1, facts["settings"]["control_hz"]
        write_film(benchmark.options.video, filmed, name_tasks, fps)
    if filmed:
        benchmark.use_film(filmed, config, facts)


def format_rates(rates: Mapping[str, Mapping]) -> list[str]:
    """A line for people per name, with its 95 % interval."""
    return [
        f"{name}: {figures['successes']}/{figures['episodes']} = {figures['success_rate']:.1%} "
        f"(95 % interval {figures['ci95'][0]:.1%} to {figures['ci95'][1]:.1%})"
        for name, figures in rates.items()
    ]


def outcomes_by_task(results: Mapping) -> dict[str, list[int]]:
    """By task, 1 for each episode that was solved and 0 for the others, in the order of the starts.

    Empty for results without episodes.
    """
    found: dict[str, list[int]] = {}
    for episode in results.get("episodes", ()):
        found.setdefault(episode["task"], []).append(int(episode["success"]))
    return found


def rate_figures(metric, successes: Sequence[bool]) -> dict:
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
    """Path, as it may be published beside `options.output`, revision, and digests of a folder's files."""
    from training.models.model_folder import find_commit, settings_digest, weights_digest

    source, digest, settings = options.checkpoint, None, None
    if Path(source).is_dir():
        digest, settings = weights_digest(source), settings_digest(source)
        source = portable_path(source, options.output.parent)
    commit = find_commit(options.checkpoint, options.revision) or options.revision
    return {"path": source, "revision": commit, "weights_sha256": digest, "settings_sha256": settings}


def _refuse_other_errors(output: Path, known: Mapping, recorded) -> None:
    """Refuses to replace the errors on one dataset in the results by those on another."""
    (described,) = recorded.describe()
    if known["dataset"] != described["name"]:
        raise ValueError(
            f"{output} has the errors on {known['dataset']}, which those on {described['name']} would "
            "replace: choose another --output"
        )


def _find_demonstrations(options: EvaluationOptions) -> list[Path]:
    """The training data that this machine has: named, in the run's settings, or beside the model."""
    from training.models.model_folder import read_run_config

    sources = read_run_config(options.checkpoint).data.datasets
    named = options.embodiment
    trained_on = [source.path for source in sources if named in (None, source.embodiment)]
    beside = Path(options.checkpoint).resolve().parent / "dataset"
    named_too = [options.dataset] if options.dataset else []
    folders = [Path(place) for place in (*trained_on, *named_too, beside)]
    found = [folder for folder in dict.fromkeys(folders) if is_dataset_folder(folder)]
    absent = [folder.name for folder in map(Path, trained_on) if folder not in found]
    if absent and beside not in found:
        print(f"starts are not compared with the demonstrations of {', '.join(absent)}, which are not here")
    return found


def _run_trials(
    benchmark: Benchmark,
    model,
    processor,
    settings: dict,
    folder: Path,
    sessions: Sessions,
    change: StreamChange | None,
) -> tuple:
    """Runs the missing trials under a progress bar; gives all episodes and the `timing` of the results."""
    from training.evaluation.simulated.closed_loop import Timing, run_episodes
    from training.evaluation.simulated.simulation_pool import SimulationPool

    options = benchmark.options
    trials = list(itertools.product(benchmark.tasks, options.seeds))
    film = Film(folder, trials, len(benchmark.tasks)) if options.films else None
    known = {(e.task, e.seed): e for e in _read_episodes(folder)}
    done = max((seed + 1 - options.seed for _, seed in known), default=0)
    check_growth(done, options.episodes, "--episodes", folder)
    unfilmed = film.lacks(known) if film else set()
    missing = [trial for trial in trials if trial not in known or trial in unfilmed]
    size = min(options.num_envs, len(missing))
    outcomes = [episode.success for episode in known.values()]
    timing = Timing()
    with tqdm(total=len(trials), initial=len(known), desc="evaluate", unit="episode") as bar:

        def keep(episode) -> None:
            first = known.get((episode.task, episode.seed))
            _keep_episode(episode, first, film, folder)
            sessions.save()
            if first is not None:  # what a film shows decides no outcome
                return
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
            known = {(e.task, e.seed): e for e in episodes} | known
    if film:
        film.load(known)
    figures = describe_timing(timing, sessions, size, len(trials) - len(missing))
    return [known[trial] for trial in trials], figures


def _keep_episode(episode, first, film: Film | None, folder: Path) -> None:
    """Writes an episode, and its pictures; of one that ran again for the film, the `first` outcome stays."""
    is_shown = first is None or (first.success, first.steps) == (episode.success, episode.steps)
    if film and is_shown:
        film.keep(episode)
    if first is not None and is_shown:
        first.failed_at = episode.failed_at
    elif first is not None:
        episode.frames, episode.actions = [], []
        print(f"{first.task}, start {first.seed}: ended otherwise again, so the film leaves it out")
    kept = first or episode
    write_json(folder / episode_file(kept.task, kept.seed), _episode_facts(kept))


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
