"""Run the cells of a plan: simulate, train, try, write one row each.

The results folder holds `plan.json` (the settings), `data/`, `clock.json`, `cells/NAME/` (the run, the model,
`eval.json`: all that `hub_cards/build.py` needs) and `rows/NAME.json`. A row appears when its cell is
finished, which is then never run again; an unfinished cell resumes from its newest checkpoint and the
episodes it has tried. Several processes may work on one folder: each takes cells that no other
has locked.

**Equal time.** The steps of each variant are timed beforehand in short trainings, in turns (every variant
once, then every variant again), by the processor time of the training process (`cpu_s` in `metrics.jsonl`),
and the median counts. A busy machine lets a process wait, which its processor time does not count. It also
slows down what is shared (caches, memory), for all variants alike while they take turns. Windows are read
in the same process, so their time counts too. The number of steps follows from the clock once and is written
to `clock.json`, and the schedule of the learning rate is made for it: nothing reads a clock while a cell is
trained. What the steps of each training took in the end is in the tables.
"""

import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from datasets_scripts.simulation.job import simulate
from datasets_scripts.simulation.libero_files import resolve_libero_tasks
from datasets_scripts.storage.atomic import read_json, write_json
from datasets_scripts.storage.settings_changes import flatten, name_changes
from experiments.depth_motion import depth_shares
from experiments.plans import STEPS, TIME, Cell, Plan
from modeling_foresight.configuration_foresight import PRESETS, ForesightConfig
from training.config import RunConfig
from training.config_reading import load_config, rename_setting, write_overrides
from training.evaluation.simulated.libero_success import LiberoOptions, measure_libero
from training.evaluation.simulated.metaworld_success import MetaWorldOptions, measure_metaworld
from training.evaluation.simulated.success import outcomes_by_task
from training.loop import train
from training.run_record import describe_run

__all__ = [
    "StoppedError",
    "measure_shares",
    "open_results",
    "prepare_results",
    "read_rows",
    "run_cells",
    "run_config",
    "try_policy",
]

# Fields of a preset; the others suit CALVIN.
FORM_FIELDS = ("objectives", "depth_form", "flow_form", "flow_loss_weight")
CLOCK_ROUNDS = 2


class StoppedError(Exception):
    """A signal ended the training; the argument is the exit code."""


def model_fields(plan: Plan, variant: str) -> dict:
    """Fields of `ForesightConfig` by which a variant differs from the plan's config."""
    preset = {"objectives": ["action"]} if variant == "action_only" else PRESETS.get(variant, {})
    if not preset and not plan.variants[variant]:
        raise ValueError(f"variants.{variant} is not a preset and has no fields that differ")
    # What a preset does not name, it has from the model's defaults: the config may have another form.
    form = {name: preset.get(name, getattr(ForesightConfig, name)) for name in FORM_FIELDS if preset}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in form.items()}
    return fields | plan.variants[variant]


def run_config(plan: Plan, variant: str, **settings) -> RunConfig:
    """The training of a variant; `settings` by dotted name, with `__` for the dot, win over the plan's."""
    given = {"data.num_workers": 0, "train.val_every": 0} | plan.overrides
    given |= {f"model.{name}": value for name, value in model_fields(plan, variant).items()}
    given |= {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(plan.config, write_overrides(given))


def pretraining_config(plan: Plan, folder: Path, seed: int) -> RunConfig:
    """The training that the pretrained variants of one seed start from."""
    home = folder / "pretraining" / f"seed{seed}"
    given = plan.pretraining_overrides | {"data.num_workers": 0, "seed": seed}
    given |= {"output": str(home / "training"), "export": str(home / "model")}
    return load_config(plan.pretraining, write_overrides(given))


def pretrain(plan: Plan, folder: Path, seed: int) -> RunConfig:
    """Trains what the pretrained variants of one seed start from, once; other processes wait meanwhile."""
    config = pretraining_config(plan, folder, seed)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(config.output).with_name(".lock")):
        if exit_code := train(config, resume=True):
            raise StoppedError(exit_code)
    return config


def open_results(plan: Plan, folder: Path, only_read: bool = False) -> None:
    """Makes the results folder, or checks that the one that exists is of this plan.

    Raises:
        ValueError: If its settings differ (names them), an objective that is measured does not exist, or with
            `only_read` there is no folder.
    """
    configs = {variant: run_config(plan, variant) for variant in plan.variants}
    for variant, config in configs.items():
        if "action" not in config.model.get("objectives", ()):
            raise ValueError(f"variants.{variant} has no action objective, so its success cannot be measured")
    trained = {part for config in configs.values() for part in config.model["objectives"]}
    for name in plan.losses:
        if not any(part == name or part.startswith(f"{name}_") for part in trained):
            raise ValueError(f"losses has {name!r}, but no variant is trained with that objective")
    if plan.simulator == "libero":
        for tasks in plan.task_groups():
            name_libero_tasks(tasks)
    path = folder / "plan.json"
    if only_read and not path.exists():
        raise ValueError(f"{folder} holds no results: run its cells first, or name their folder (--output)")
    settings = dataclasses.asdict(plan)
    for name in ("seeds", "demonstrations", "budgets", "variants", "losses"):
        del settings[name]
    if plan.pretraining:
        settings["pretraining"] = dataclasses.asdict(pretraining_config(plan, Path(), 0))
    if plan.simulator == "metaworld":
        del settings["simulator"]  # which folders of earlier versions do not name
    settings["variants"] = {variant: dataclasses.asdict(config) for variant, config in configs.items()}
    now = flatten(json.loads(json.dumps(settings)))
    known = read_json(path) if path.exists() else {}
    before = {rename_setting(name): value for name, value in known.items()}

    def group(key: str) -> str:
        """`variants/NAME` for the settings of a variant."""
        return "/".join(key.split("/")[:2]) if key.startswith("variants/") else ""

    # A variant that only one of them has is new, or left out this time.
    shared = {group(key) for key in before} & {group(key) for key in now}
    there, here = ({k: v for k, v in side.items() if group(k) in shared} for side in (before, now))
    if changed := name_changes(there, here):
        raise ValueError(
            f"{folder} holds results of other settings ({changed}): choose another --output, or bring the "
            "settings back"
        )
    if before != before | now and not only_read:
        write_json(path, before | now)


def prepare_results(plan: Plan, folder: Path, workers: int) -> dict[str, int]:
    """Simulates what is missing, and measures the time of a step if a budget needs it.

    Returns:
        `dict`: Steps of each variant under the budget of time.
    """
    for n, recording in plan.recordings().items():
        for tasks in plan.task_groups():
            simulate(
                dataclasses.replace(recording, tasks=tasks), data_folder(plan, folder, n, tasks), workers
            )
    measure_shares(plan, folder)
    return measure_steps(plan, folder) if TIME in plan.budgets else {}


def data_folder(plan: Plan, folder: Path, demonstrations: int, tasks: Sequence[str]) -> Path:
    """The dataset that a policy is trained on."""
    part = f"-{tasks[0].replace('/', '-')}" if plan.policies == "per_task" else ""
    return folder / "data" / f"{demonstrations}demos{part}"


def measure_shares(plan: Plan, folder: Path) -> dict[str, float]:
    """Share of motion in depth of each task, from the plan's largest data; measured once.

    Raises:
        ValueError: If neither the figures nor the data are there.
    """
    path = folder / "depth_motion.json"
    if not path.exists():
        n, shares = max(plan.demonstrations), {}
        length = run_config(plan, plan.reference).model.get("flow_length", ForesightConfig.flow_length)
        for tasks in plan.task_groups():
            data = data_folder(plan, folder, n, tasks)
            if not data.exists():
                raise ValueError(
                    f"{path} is missing, and so are the demonstrations in {data}: copy one of them from "
                    "where the cells were run, or leave out --tables to simulate them again"
                )
            shares |= depth_shares(data, plan.recordings()[n].cameras[0], length)
        write_json(path, shares)
    return read_json(path)


def measure_steps(plan: Plan, folder: Path) -> dict[str, int]:
    """Steps that each variant may take in the reference's time; what is measured already is kept.

    One process measures; others that work on the folder wait for its figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".clock.lock"):
        known = read_clock(folder)
        if missing := [variant for variant in plan.variants if variant not in known]:
            # The reference is timed again with variants that were added later: the machine may have changed.
            variants = list(dict.fromkeys([plan.reference, *missing]))
            seconds = time_steps(plan, folder, variants)
            of_reference = statistics.median(seconds[plan.reference])
            for variant in variants:
                median = statistics.median(seconds[variant])
                steps = max(1, round(plan.steps * of_reference / median))
                known.setdefault(variant, {"cpu_s": median, "reference_cpu_s": of_reference, "steps": steps})
            write_json(folder / "clock.json", known)
    return {variant: known[variant]["steps"] for variant in plan.variants}


def read_clock(folder: Path) -> dict[str, dict]:
    """Measured time and steps of each variant; none yet if nothing was measured."""
    path = folder / "clock.json"
    return read_json(path) if path.exists() else {}


def time_steps(plan: Plan, folder: Path, variants: Sequence[str]) -> dict[str, list[float]]:
    """Processor seconds of single training steps, variant by variant in turns."""
    shutil.rmtree(folder / "clock", ignore_errors=True)
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    data = str(data_folder(plan, folder, min(plan.demonstrations), plan.task_groups()[0]))
    options = {"train__steps": plan.clock_steps, "train__log_every": 1, "train__checkpoint_every": 0}
    options |= {"data__val_fraction": 0.0, "dataset": data}
    for turn in range(CLOCK_ROUNDS):
        for variant in variants:
            output = folder / "clock" / f"{variant}-{turn}"
            config = run_config(plan, variant, **options, output=str(output))
            if exit_code := train(config, resume=True):
                raise StoppedError(exit_code)
            found[variant] += [line["cpu_s"] for line in read_log(output)]
    shutil.rmtree(folder / "clock")
    return found


def read_log(output: Path) -> list[dict]:
    """Lines of a run's log about training steps."""
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "cpu_s" in line]


def run_cells(plan: Plan, folder: Path, steps: Mapping[str, int], threads: int) -> None:
    """Runs the unfinished cells that no other process is at work on.

    Raises:
        StoppedError: If a signal ended a training.
    """
    torch.set_num_threads(threads)
    cells = plan.cells()
    made_with = describe_run()  # now: in hours, the checkout may hold other code than this process runs
    for cell in cells:
        done = read_rows(plan, folder)
        if cell in done:
            continue
        home = folder / "cells" / cell.name
        home.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(home / ".lock", timeout=0):
                if not row_path(folder, cell).exists():
                    run_cell(plan, cell, folder, steps, made_with)
        except Timeout:
            continue
        done = read_rows(plan, folder)
        row, left = done[cell], len(cells) - len(done)
        mean_h = statistics.mean(one["hours"] for one in done.values())
        print(
            f"[{len(done)}/{len(cells)}] {cell.name}: {row['successes']}/{row['trials']} solved, "
            f"{row['hours'] * 60:.1f} min; {left} cells of {mean_h * 60:.1f} min are left: "
            f"{left * mean_h:.1f} h for one process",
            flush=True,
        )


def run_cell(plan: Plan, cell: Cell, folder: Path, steps: Mapping[str, int], made_with: Mapping) -> None:
    """Trains and tries one policy, or what is left of it, and writes its row, with commit and hardware."""
    home = folder / "cells" / cell.name
    count = plan.steps if cell.budget == STEPS else steps[cell.variant]
    start, pretraining = {}, {}
    if cell.variant in plan.pretrained:
        first = pretrain(plan, folder, cell.seed)
        start, summary = {"init_from": first.export}, read_json(Path(first.output) / "summary.json")
        pretraining = {name: summary[name] for name in ("steps", "epochs", "train_seconds")}
    config = run_config(
        plan,
        cell.variant,
        **start,
        train__steps=count,
        seed=cell.seed,
        dataset=str(data_folder(plan, folder, cell.demonstrations, cell.tasks)),
        output=str(home / "training"),
        export=str(home / "model"),
    )
    if exit_code := train(config, resume=True):
        raise StoppedError(exit_code)
    outcome = try_policy(plan, home, ",".join(cell.tasks), home / "eval.json")
    summary = read_json(home / "training" / "summary.json")
    evaluation_s = outcome["timing"]["wall_s"]
    log = read_log(home / "training")
    success = outcomes_by_task(outcome)
    row = {
        **dataclasses.asdict(cell),
        "steps": count,
        "success": success,
        "successes": sum(map(sum, success.values())),
        "trials": sum(map(len, success.values())),
        "first_start": plan.first_start,
        "validation": summary["validation"],
        "parameters": summary["parameters"],
        "pretraining": pretraining,
        "step_cpu_s": statistics.median(line["cpu_s"] for line in log),
        "train_s": summary["train_seconds"],
        "evaluation_s": evaluation_s,
        "hours": (summary["train_seconds"] + evaluation_s) / 3600,
        **made_with,
    }
    write_json(row_path(folder, cell), row)
    shutil.rmtree(home / "training" / "checkpoints", ignore_errors=True)


def try_policy(plan: Plan, home: Path, tasks: str, path: Path, **changes) -> dict:
    """Outcomes of a cell's policy at the plan's starts; kept in a file. `changes` are of the options."""
    if not path.exists():
        options = {
            "checkpoint": str(home / "model"),
            "episodes": plan.episodes,
            "seed": plan.first_start,
            "output": path,
            "num_envs": 1,
            "max_steps": plan.max_steps,
            "threads": torch.get_num_threads(),
        }
        if plan.simulator == "libero":
            options |= name_libero_tasks(tasks.split(","))
            measure_libero(LiberoOptions(**options | changes))  # writes it
        else:
            measure_metaworld(MetaWorldOptions(**options | {"tasks": tasks} | changes))
    return read_json(path)


def name_libero_tasks(tasks: Sequence[str]) -> dict:
    """Tasks `suite/name` as options of the evaluation.

    Raises:
        ValueError: If they are not the same numbers of every suite, which the evaluation cannot choose.
    """
    suites = list(dict.fromkeys(task.partition("/")[0] for task in tasks))
    numbers = sorted({resolve_libero_tasks(task.partition("/")[0]).index(task) for task in tasks})
    if set(resolve_libero_tasks(",".join(suites), numbers)) != set(tasks):
        raise ValueError(
            f"tasks are {', '.join(tasks)}: one policy is tried at the same task numbers of every suite; "
            "choose them so, or use policies: per_task"
        )
    return {"suite": ",".join(suites), "tasks": numbers}


def row_path(folder: Path, cell: Cell) -> Path:
    """File of a finished cell."""
    return folder / "rows" / f"{cell.name}.json"


def read_rows(plan: Plan, folder: Path) -> dict[Cell, dict]:
    """Rows of the finished cells.

    Raises:
        ValueError: If one was made with other settings, on another machine for instance; names it.
    """
    finished = [cell for cell in plan.cells() if row_path(folder, cell).exists()]
    rows = {cell: read_json(row_path(folder, cell)) for cell in finished}
    steps = {name: entry["steps"] for name, entry in read_clock(folder).items()}
    for cell, row in rows.items():
        wanted = {
            "steps": plan.steps if cell.budget == STEPS else steps.get(cell.variant, row["steps"]),
            "trials": plan.episodes * len(cell.tasks),
            "first_start": plan.first_start,
        }
        if changed := name_changes({name: row[name] for name in wanted}, wanted):
            raise ValueError(
                f"{row_path(folder, cell)} was made with other settings ({changed}): bring the plan's (and "
                "clock.json's) back, or move the file away, and its cell is run again"
            )
    return rows
