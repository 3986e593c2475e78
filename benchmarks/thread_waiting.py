"""Seconds of a training step by how threads wait for each other (OpenMP), idle and beside busy processes.

Every run is a new process of `training/train.py` with the quickstart's config: OpenMP reads its settings
once; runs of all settings take turns, in an order that is reversed every round. PyTorch's wheels for Linux
bring GNU's libgomp: a thread that waits spins `GOMP_SPINCOUNT` times before it sleeps, and by default for
milliseconds. The process beside it then runs instead of the thread that is waited for.

`fair` is the time that a step would take idle, by default, if its threads got an equal share of the cores.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from _measure import build_parser, describe_machine, print_table, take_turns, write_csv

from datasets_scripts.command_line import count_cores, entry_point

REPO = Path(__file__).resolve().parents[1]
DEFAULT = "default"
SETTINGS = [DEFAULT, "OMP_WAIT_POLICY=PASSIVE", *(f"GOMP_SPINCOUNT={n}" for n in (0, 1000, 10_000, 100_000))]
EXAMPLE = """examples:
  python benchmarks/thread_waiting.py                           # about 15 minutes on an idle machine
  python benchmarks/thread_waiting.py --settings default GOMP_SPINCOUNT=3000 OMP_WAIT_POLICY=ACTIVE
"""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that use a core each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure_steps(setting: str, args) -> list[float]:
    """Seconds of the steps after the first two of a training under a setting."""
    clean = {n: v for n, v in os.environ.items() if n not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    chosen = {} if setting == DEFAULT else dict(pair.split("=") for pair in setting.split(","))
    threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPO / "training" / "train.py"), "--dataset", str(args.dataset)]
        command += ["--config", str(REPO / "training" / "configs" / "quickstart.yaml")]
        command += ["--train.log_every", "1", "--output", f"{folder}/run"]
        with open(f"{folder}/out", "w+") as said:
            run = subprocess.Popen(command, env=clean | threads | chosen, stdout=said, stderr=said)
            log, lines = Path(folder, "run", "metrics.jsonl"), []
            try:
                while len(lines) < args.steps + 2 and run.poll() is None:
                    time.sleep(0.2)
                    lines = log.read_text().splitlines() if log.exists() else []
            finally:
                run.kill()
                run.wait()
            if len(lines) < args.steps + 2:
                raise RuntimeError(f"{setting}: {Path(said.name).read_text()[-2000:]}")
    return [json.loads(line)["step_s"] for line in lines[2 : args.steps + 2]]


@entry_point()
def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EXAMPLE)
    cores = count_cores()
    parser.add_argument(
        "--settings", nargs="+", default=SETTINGS, help="VARIABLE=VALUE, several joined by commas"
    )
    parser.add_argument("--dataset", type=Path, default=REPO / "hub_cards" / "sample_data" / "metaworld")
    parser.add_argument("--threads", type=int, default=min(cores, 4), help="threads of the training")
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/thread_waiting.csv"))
    args = parser.parse_args()
    settings = list(dict.fromkeys([DEFAULT, *args.settings]))
    seconds: dict[tuple[str, int], list[float]] = {(s, b): [] for s in settings for b in (0, args.busy)}
    for _, (setting, busy) in take_turns(seconds, args.rounds):
        with busy_processes(busy):
            measured = measure_steps(setting, args)
        seconds[setting, busy] += measured
        print(f"{setting}, {busy} busy: {median(measured):.3f} s a step", flush=True)
    idle_s = median(seconds[DEFAULT, 0])
    fair_s = idle_s * max(1, (args.threads + args.busy) / cores)
    rows = [
        {
            "setting": setting,
            "idle_s": round(median(seconds[setting, 0]), 4),
            "busy_s": round(median(seconds[setting, args.busy]), 4),
            "idle_ratio": round(median(seconds[setting, 0]) / idle_s, 3),
            "busy_over_fair": round(median(seconds[setting, args.busy]) / fair_s, 3),
        }
        for setting in settings
    ]
    print_table(rows)
    write_csv(args.output, rows)
    machine = describe_machine(torch.device("cpu"))
    print(json.dumps({"machine": machine, "threads": args.threads, "busy": args.busy, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
