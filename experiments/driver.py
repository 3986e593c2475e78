"""What all commands share: options, worker processes, one line per error."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from datasets_scripts.command_line import EXPECTED_ERRORS, entry_point

__all__ = ["build_parser", "results_places", "run_command"]


def build_parser(
    command: str, description: str, example: str, plan: str | None = None, workers: str = "cells"
) -> argparse.ArgumentParser:
    """Options of a command that runs the cells of a plan, by default that of its own name."""
    plan = plan or command
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{command}",
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, Path(f"experiments/plans/{plan}.yaml")
    add("--plan", type=Path, default=default, help="what to measure (default: %(default)s)")
    add("--output", type=Path, help=f"results folder (default: outputs/{plan}/NAME_OF_THE_PLAN)")
    add("--threads", type=int, default=1, help="threads of each training (default: %(default)s)")
    add("--workers", type=int, default=1, help=f"{workers} that run side by side (default: %(default)s)")
    add("--tables", action="store_true", help="write tables of finished cells, run nothing")
    add("--results", type=Path, help="results file (default: results.json in the results folder)")
    return parser


def results_places(args: argparse.Namespace, command: str) -> tuple[Path, Path]:
    """Folder and file of a plan's results."""
    folder = args.output or Path("outputs") / command / args.plan.stem
    return folder, args.results or folder / "results.json"


@entry_point(resumes=True, errors=(*EXPECTED_ERRORS, StrictDataclassError))
def run_command(
    module: str,
    args: argparse.Namespace,
    folder: Path,
    run: bool,
    finish: Callable[..., None],
    check: Callable[..., None] = lambda plan: None,
    needs_results: bool = False,
) -> int:
    """Runs a plan's cells, then `finish(plan)` when all are finished; returns the exit code.

    Args:
        module (`str`): The command, which the other workers run too.
        args (`argparse.Namespace`): Of [`build_parser`].
        folder (`Path`): Results folder.
        run (`bool`): Whether to run cells; otherwise only `finish` is called.
        finish (`Callable`): Writes the results.
        check (`Callable`): Raises a `ValueError` for a plan that the command cannot use.
        needs_results (`bool`): Refuse a folder without results, as `--tables` does, instead of making it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    from datasets_scripts.storage.atomic import check_place
    from experiments.cells import StoppedError, open_results
    from experiments.plans import load_plan

    try:
        if min(args.threads, args.workers) < 1:
            raise ValueError("--threads and --workers must be at least 1")
        if args.results:
            check_place(args.results, "--results")
        plan = load_plan(args.plan)
        check(plan)
        open_results(plan, folder, only_read=needs_results or args.tables)
        if run:
            run_plan(plan, module, args, folder)
        if os.environ.get(WORKER) is None:
            finish(plan)
    except StoppedError as stopped:
        print("stopped; the same command resumes", file=sys.stderr)
        return stopped.args[0]
    return 0


WORKER = "FORESIGHT_EXPERIMENT_WORKER"  # set in the processes that another one started


def run_plan(plan, module: str, args: argparse.Namespace, folder: Path) -> None:
    """Prepares the data and runs the cells, with other workers beside this process."""
    from experiments.cells import prepare_results, run_cells

    steps = prepare_results(plan, folder, args.workers)
    count = 0 if os.environ.get(WORKER) else args.workers - 1
    command = [sys.executable, "-m", module, "--plan", str(args.plan), "--output", str(folder)]
    command += ["--threads", str(args.threads)]
    with started(command, count) as others:
        run_cells(plan, folder, steps, args.threads)
        while any(other.poll() is None for other in others):
            time.sleep(0.2)  # `wait` would sleep on if the system gave a signal to another thread
        failed = [other.returncode for other in others if other.returncode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} workers failed; the same command resumes")


@contextmanager
def started(command: list[str], count: int) -> Iterator[list[subprocess.Popen]]:
    """Worker processes that end with this one: a signal that ends it is passed on to them."""
    others = [subprocess.Popen(command, env=os.environ | {WORKER: "1"}) for _ in range(count)]
    if others:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield others
    finally:
        for other in others:
            if other.poll() is None:
                other.terminate()
        for other in others:
            other.wait()
