"""Closed-loop success of a checkpoint in MetaWorld, from starts that its training never saw.

Episodes run side by side, each simulator in a process of its own, and share one forward pass per control
step. The outcome does not depend on how many run at a time.
"""

# Nothing here imports PyTorch at the top: every simulator process imports this file again.
import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from datasets_scripts.simulation.metaworld import (
    ACTION_DIM,
    CAMERAS,
    MAX_STEPS,
    QUALITIES,
    SIMULATION_HZ,
    STATE_DIM,
    resolve_tasks,
)
from datasets_scripts.storage.atomic import write_json
from datasets_scripts.storage.provenance import read_provenance

EXAMPLE = """example:
  python training/evaluate.py --checkpoint outputs/quickstart/model --tasks drawer-open-v3 \\
      --episodes 20 --seed 10000 --output eval.json --video rollout.mp4"""
MAX_FILMED = 20  # rollouts in one video
SMALL_MODEL = 20_000_000  # parameters


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parse(arguments)
    try:
        results = evaluate(args)
        write_json(args.output, results)
    except KeyboardInterrupt:
        print("interrupted: the results are not written, or not complete", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for task, figures in {**results["tasks"], "all": results["mean"]}.items():
        low, high = figures["ci95"]
        print(
            f"{task}: {figures['successes']}/{figures['episodes']} = {figures['success_rate']:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%})"
        )
    if "open_loop" in results:
        from training.evaluation.open_loop import format_open_loop

        print(format_open_loop(results["open_loop"]["metrics"]))
        print("in real units, newest frames of windows:")
        print(format_open_loop(results["open_loop"]["real_units"]))
    return 0


def evaluate(args: argparse.Namespace) -> dict:
    """Run the evaluation that the command line asks for.

    Args:
        args (`argparse.Namespace`): See `python training/evaluate.py --help`.

    Returns:
        `dict`: What goes into the JSON file: `tasks` and `mean` (success rate with its 95 % Wilson interval),
        `episodes`, `settings`, `timing`, `checkpoint`, and what `describe_run` gives; `open_loop` with
        `--dataset`.

    Raises:
        ValueError: If something asked for makes no sense; names it and the remedy.
        RuntimeError: If the simulator is missing or fails.
    """
    tasks = resolve_tasks(args.tasks)  # before anything slow
    _check_numbers(args)
    import torch

    from training.checkpoint_folder import load_checkpoint

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_checkpoint(args.checkpoint, device, args.revision)
    _check_robot(model.config)
    threads = torch.get_num_threads()
    # Threads of a small model mostly wait for each other, and for long where other processes want the cores.
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    torch.set_num_threads(args.threads or (1 if small else threads))
    try:
        return _measure(args, tasks, model, processor)
    finally:
        torch.set_num_threads(threads)


def _measure(args: argparse.Namespace, tasks: list[str], model, processor) -> dict:
    """The evaluation proper; see [`evaluate`]."""
    from training.checkpoint_folder import read_summary, weights_digest
    from training.evaluation.metric_loader import load_metric
    from training.run_facts import describe_run, portable_path

    metric = load_metric("success_rate")  # before the episodes: the cache of such scripts may be read-only
    demonstrations = _find_demonstrations(args)
    settings = _settings(args, model.config, read_summary(args.checkpoint), demonstrations)
    seeds = range(args.seed, args.seed + args.episodes)
    checked = _check_unseen(tasks, seeds, demonstrations)
    recorded = held_out_data(args.checkpoint, model.config, args.dataset) if args.dataset else None
    trials = list(itertools.product(tasks, seeds))
    film = MAX_FILMED if args.video else 0
    episodes, timing = _roll_out(model, processor, trials, settings, args.num_envs, film)
    source, digest = args.checkpoint, None
    if Path(source).is_dir():
        source, digest = portable_path(source, args.output.parent), weights_digest(source)
    results = {
        "version": 1,
        "benchmark": "MetaWorld",
        "checkpoint": {
            "path": source,
            "revision": args.revision or getattr(model.config, "_commit_hash", None),
            "weights_sha256": digest,
        },
        "tasks": {task: _success_rate(metric, [e for e in episodes if e.task == task]) for task in tasks},
        "mean": _success_rate(metric, episodes),
        "seeds": {"first": seeds[0], "last": seeds[-1], **checked},
        "settings": settings,
        "timing": timing,
        "episodes": [
            {name: getattr(e, name) for name in ("task", "seed", "success", "steps", "simulation_steps")}
            for e in episodes
        ],
        **describe_run("training/evaluate.py", args.given),
    }
    if args.dataset or args.video:
        write_json(args.output, results)  # what fails from here on must not cost the results
    if recorded is not None:
        results["open_loop"] = open_loop(model, processor, recorded)
    if args.video:
        write_json(args.output, results)
        _film(args.video, episodes[:MAX_FILMED], len(tasks) > 1, settings["control_hz"])
    return results


def _roll_out(
    model, processor, trials: list[tuple[str, int]], settings: dict, num_envs: int, film: int
) -> tuple:
    """Runs all trials under a progress bar; gives the episodes and the `timing` entry of the results."""
    from modeling_foresight import ForesightStream
    from training.evaluation.closed_loop import run_episodes
    from training.evaluation.simulation_pool import SimulationPool

    size, views = min(num_envs, len(trials)), model.config.views
    stream = ForesightStream(model, processor, num_envs=size)
    outcomes: list[bool] = []
    begun = time.perf_counter()
    with (
        SimulationPool(size, views, settings["image_size"], settings["render_quality"]) as pool,
        tqdm(total=len(trials), desc="evaluate", unit="episode") as bar,
    ):

        def on_done(episode) -> None:
            outcomes.append(episode.success)
            rate = sum(outcomes) / len(outcomes)
            bar.set_postfix_str(f"success {sum(outcomes)}/{len(outcomes)} = {rate:.0%}")
            bar.update()

        stride, max_steps, execute_steps = (settings[k] for k in ("stride", "max_steps", "execute_steps"))
        episodes, timing = run_episodes(
            stream, pool, trials, stride, max_steps, execute_steps, film=film, on_done=on_done
        )
    return episodes, {
        "wall_s": round(time.perf_counter() - begun, 2),
        "parallel_environments": size,
        "policy_ms": _spread(timing.policy),
        "control_step_ms": _spread(timing.step),
    }


def _success_rate(metric, episodes: list) -> dict:
    """Success rate with its 95 % Wilson interval, by the metric `success_rate`."""
    figures = metric.compute(predictions=[int(e.success) for e in episodes])
    interval = figures.pop("interval")
    return {**figures, "ci95": [round(bound, 4) for bound in interval]}


def held_out_data(checkpoint: str, config, dataset: str):
    """A dataset, split as the run split it that made the checkpoint.

    Args:
        checkpoint (`str`): Where the model comes from; the run's settings are looked up beside it.
        config (`ForesightConfig`): The model's.
        dataset (`str`): Folder or Hub id.

    Returns:
        `RunData`: Of this one dataset; `val` are the windows of the episodes that the run held out.

    Raises:
        ValueError: If it is unknown which episodes the run held out, or it held out none.
    """
    from training.checkpoint_folder import read_run_config
    from training.run_data import RunData

    run = read_run_config(checkpoint)
    known = [source for source in run.data.datasets if Path(source.path).name == Path(dataset).name]
    if not known:
        raise ValueError(
            f"{Path(dataset).name} is not among the data of the run that made {Path(checkpoint).name}, or "
            "that run's config.yaml is not beside it: which episodes it held out is unknown"
        )
    source = known[0]
    source.path = dataset
    run.data.datasets = [source]
    data = RunData(run, config)
    if data.val is None:
        raise ValueError(f"the run that made {checkpoint} held no episodes back (data.val_fraction is 0)")
    return data


def open_loop(model, processor, data, batch_size: int = 32, baseline_windows: int = 2000) -> dict:
    """Errors on the held-out episodes of a dataset.

    Args:
        model, processor: The policy.
        data (`RunData`): From [`held_out_data`].
        batch_size (`int`): Windows per forward pass.
        baseline_windows (`int`): Training windows that the trivial predictors are fitted to.

    Returns:
        `dict`: `dataset` (name), `episodes` (held out), `metrics` of `evaluate_open_loop` and `real_units` of
        `measure_in_real_units`.
    """
    from training.evaluation.open_loop import measure_held_out
    from training.evaluation.real_units import measure_in_real_units

    facts = data.describe()[0]
    intrinsics = facts["labels"].get(model.config.views[0], {}).get("intrinsics")
    if intrinsics is not None:
        intrinsics = {name: intrinsics[name] for name in ("fx", "fy", "cx", "cy")}
    return {
        "dataset": facts["name"],
        "episodes": facts["validation_episodes"],
        "metrics": measure_held_out(model, processor, data, batch_size, baseline_windows),
        "real_units": measure_in_real_units(model, processor, data.val.datasets[0], intrinsics),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model, or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument(
        "--tasks",
        required=True,
        help="comma-separated MetaWorld tasks, or easy, medium, hard, very_hard, all",
    )
    parser.add_argument("--episodes", type=int, default=20, help="per task (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=10000,
        help="start of the first episode; the others follow (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("eval.json"), help="results (default: %(default)s)"
    )
    parser.add_argument("--video", type=Path, help=f"film of the first {MAX_FILMED} episodes, .mp4")
    parser.add_argument("--dataset", help="also measure errors on the held-out episodes of this dataset")
    parser.add_argument(
        "--num-envs",
        type=int,
        default=_usable_cores(),
        help="simulators side by side (default: one per core, %(default)s here)",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        default=MAX_STEPS,
        help=f"simulation steps until an episode has failed (default, and MetaWorld's limit: {MAX_STEPS})",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help=f"simulation steps ({SIMULATION_HZ} a second) per action (default: as in the training data)",
    )
    parser.add_argument(
        "--execute-steps",
        type=int,
        default=1,
        help="actions of a chunk to execute before the policy is asked again (default: %(default)s)",
    )
    parser.add_argument(
        "--quality",
        choices=QUALITIES,
        default="fast",
        help="rendering (default: %(default)s, as simulate.py)",
    )
    parser.add_argument(
        "--image-size", type=int, help="rendered pixels per side (default: as in the training data)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="threads of PyTorch (default: 1 for a small model, else PyTorch's own choice)",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    given = list(sys.argv[1:] if arguments is None else arguments)
    return parser.parse_args(given, namespace=argparse.Namespace(given=given))


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("episodes", "num_envs", "execute_steps", "max_steps", "stride", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must not be negative")
    if args.max_steps > MAX_STEPS:
        raise ValueError(f"--max-steps is {args.max_steps}; MetaWorld stops at {MAX_STEPS} simulation steps")
    if args.video and args.video.suffix != ".mp4":
        raise ValueError(f"--video is {args.video}; its name must end in .mp4")


def _check_robot(config) -> None:
    """The policy must fit MetaWorld's robot and cameras."""
    if not config.has("action"):
        raise ValueError(f"the checkpoint has no action head; its objectives are {list(config.objectives)}")
    unknown = [view for view in config.views if view not in CAMERAS]
    if unknown:
        raise ValueError(
            f"the checkpoint sees the cameras {list(config.views)}, but the simulator has {list(CAMERAS)}; "
            f"it cannot show {unknown}: train with views named as the simulator's cameras"
        )
    for name, size in (("action_dim", ACTION_DIM), ("state_dim", STATE_DIM)):
        if getattr(config, name) not in ((size,) if name == "action_dim" else (0, size)):
            raise ValueError(f"the checkpoint has {name} {getattr(config, name)}, MetaWorld's robot {size}")


def _find_demonstrations(args: argparse.Namespace) -> list[Path]:
    """The training data as far as it is at hand: named, in the run's settings, or beside the model."""
    from training.checkpoint_folder import read_run_config

    named = (
        [args.dataset] if args.dataset else [s.path for s in read_run_config(args.checkpoint).data.datasets]
    )
    beside = Path(args.checkpoint).resolve().parent / "dataset"
    return [p for p in dict.fromkeys(map(Path, [*named, beside])) if (p / "meta" / "info.json").is_file()]


def _settings(args: argparse.Namespace, config, summary: dict, demonstrations: list[Path]) -> dict:
    """How the loop runs; what the command leaves open follows the training data."""
    features, fps = {}, getattr(config, "fps", None)
    if demonstrations:
        from datasets_scripts.columns import image_key
        from datasets_scripts.storage.dataset_folder import load_features

        features = load_features(demonstrations[0]).get(image_key(config.views[0]), {})
    stride = args.stride
    if stride is None:
        stride = round(SIMULATION_HZ / fps) if fps else 4
        if not fps:
            print("the checkpoint does not say its frame rate: --stride 4 (20 actions a second) is assumed")
        elif stride < 1 or abs(SIMULATION_HZ / fps - stride) > 1e-6:
            raise ValueError(
                f"the checkpoint acts at {fps} steps a second, which does not divide MetaWorld's "
                f"{SIMULATION_HZ}; choose --stride"
            )
    size = args.image_size
    if size is None:
        recorded = [
            dataset["labels"][config.views[0]]["intrinsics"]["height"]
            for dataset in summary.get("datasets", [])
            if "intrinsics" in dataset.get("labels", {}).get(config.views[0], {})
        ]
        size = recorded[0] if recorded else features.get("shape", [config.image_size])[0]
    if args.execute_steps > config.chunk_size:
        raise ValueError(
            f"--execute-steps is {args.execute_steps}, but the model plans {config.chunk_size} actions"
        )
    return {
        "control_hz": SIMULATION_HZ / stride,
        "stride": stride,
        "execute_steps": args.execute_steps,
        "max_steps": max(1, args.max_steps // stride),
        "max_simulation_steps": args.max_steps,
        "render_quality": args.quality,
        "image_size": int(size),
        "success": "info['success'] at any simulation step",
    }


def _check_unseen(tasks: list[str], seeds: range, demonstrations: list[Path]) -> dict:
    """Refuses starts that were demonstrated, as far as the demonstrations tell their seeds."""
    counted = []
    for dataset in demonstrations:
        known = read_provenance(dataset).get("episodes", {}).values()
        shown = {(facts.get("task"), facts["seed"]) for facts in known if "seed" in facts}
        seen = sorted({seed for task in tasks for seed in seeds if (task, seed) in shown})
        if seen:
            raise ValueError(
                f"the dataset {dataset.name} has demonstrations from the starts {seen[:5]}: choose another "
                "--seed"
            )
        if shown:
            counted.append(f"{len(shown)} demonstrations of {dataset.name}")
    *others, last = counted or [None]
    return {"checked_against": f"{', '.join(others)} and {last}" if others else last}


def _spread(durations_s: Sequence[float]) -> dict:
    """Median and 90th percentile in milliseconds."""
    import numpy as np

    median, p90 = np.percentile(np.asarray(durations_s) * 1000, [50, 90])
    return {"median": round(float(median), 3), "p90": round(float(p90), 3), "count": len(durations_s)}


def _film(path: Path, episodes: list, name_tasks: bool, fps: float) -> None:
    from training.evaluation.videos import rollout_grid, write_video

    captions = [f"{e.task + ' ' if name_tasks else ''}{e.seed}" for e in episodes]
    grid = rollout_grid([e.frames for e in episodes], captions, [e.success for e in episodes])
    write_video(path, grid, fps)


if __name__ == "__main__":
    sys.exit(main())
