"""Time of a training step in the loop of `training/train.py`, beside a bare loop and the computation alone.

All three train the model of a config on the same windows, in turns of one short run each, order reversed
every round:

- `loop`: `train.py`'s own, with its global means over processes, checks, log and requests to stop. Validation
  and checkpoints are not counted.
- `bare`: windows from the same loader, forward, backward, clipping, AdamW, and nothing else.
- `computation`: the same on one batch that is ready. Beside it, `bare` shows what reading costs.

A time counts the steps after the first interval, when loader processes have started, frames are decoded and
the model is warm. The last line is one JSON object with the ratios.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from _measure import (
    add_run_options,
    build_parser,
    describe_machine,
    paired_ratio,
    print_table,
    spread,
    take_turns,
    write_csv,
)

from datasets_scripts.command_line import entry_point, list_some
from training.config import RunConfig
from training.config_reading import load_config
from training.engines.stopping import StopRequest
from training.loop import run_steps
from training.models.starting_model import build_model, starting_config
from training.monitoring.run_log import RunLog
from training.run_data import RunData, training_loader
from training.run_state import Run, build_accelerator, build_run

EXAMPLE = """examples:
  python benchmarks/training_loop.py                             # the quickstart's run, minutes
  python benchmarks/training_loop.py --data.num_workers 0        # windows read in the same process
"""


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; the remaining arguments belong to the config."""
    parser = build_parser(__doc__, EXAMPLE)
    add_run_options(parser, interval=30, rounds=6)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training_loop.csv"))
    args, overrides = parser.parse_known_args(arguments)
    if min(args.interval, args.rounds, args.threads) < 1:
        parser.error("--interval, --rounds and --threads must be at least 1")
    return args, overrides


def read_config(args: argparse.Namespace, overrides: list[str]) -> RunConfig:
    """The run, as long as one round."""
    config = load_config(args.config, [f"--dataset={args.dataset}", *overrides])
    train = dataclasses.replace(
        config.train,
        steps=2 * args.interval,
        warmup_steps=0,
        log_every=args.interval,
        val_every=0,
        picture_every=0,
        checkpoint_every=0,
    )
    return dataclasses.replace(config, train=train)


def time_loop(run: Run, folder: Path) -> float:
    """Milliseconds of a step in our loop, by its own log."""
    output = Path(tempfile.mkdtemp(dir=folder))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, output=str(output)))
    log = RunLog(run.accelerator, output, start=0, steps=run.config.train.steps)
    with contextlib.closing(log.bar), contextlib.closing(StopRequest(run.accelerator, None)) as stop:
        run_steps(run, log, stop)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    return (last["data_s"] + last["step_s"]) * 1000


class BareLoop:
    """The same training without Accelerate and without us, in `step`."""

    def __init__(self, run: Run):
        self.run, self.options = run, run.config.train
        self.model, self.processor = build_model(run.config, run.data)
        self.model.to(run.accelerator.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.options.learning_rate, fused=True)

    def prepare(self, raw: dict) -> dict[str, torch.Tensor]:
        """A raw batch as a model batch."""
        history_length = self.model.config.history_length
        return self.processor.prepare_batch(raw, self.run.accelerator.device, history_length)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step."""
        with self.run.accelerator.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, reads: bool) -> float:
        """Milliseconds of a step, with windows from the loader or with the first of them over and over."""
        run = dataclasses.replace(self.run)  # with a sampler at its start
        raws = iter(training_loader(run.config, run.data, run.sampler, run.accelerator.device))
        batches = map(self.prepare, raws) if reads else itertools.repeat(self.prepare(next(raws)))
        started = 0.0
        for i, batch in enumerate(itertools.islice(batches, self.options.steps)):
            self.step(batch)
            if i + 1 == self.options.steps // 2:
                started = time.perf_counter()
        return (time.perf_counter() - started) * 1000 / (self.options.steps // 2)


def check_comparable(config: RunConfig) -> None:
    """Refuses what the bare loop does not do; the loops would compute different things.

    Raises:
        ValueError: Names the setting.
    """
    given = {
        "train.gradient_accumulation_steps": config.train.gradient_accumulation_steps > 1,
        "train.ema_decay": config.train.ema_decay is not None,
        "lora.r": config.lora.r > 0,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"the bare loop has no {list_some(names)}: leave it out")


@entry_point()
def main(arguments: list[str] | None = None) -> int:
    """Command line entry: a table, a CSV file, then one JSON line."""
    args, overrides = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    config = read_config(args, overrides)
    check_comparable(config)
    accelerator = build_accelerator(config)
    torch.manual_seed(config.seed)
    data = RunData(config, starting_config(config))
    run = build_run(accelerator, config, data)
    run.model.train()
    bare = BareLoop(run)
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "loop": partial(time_loop, run, Path(folder)),
            "bare": partial(bare.time, reads=True),
            "computation": partial(bare.time, reads=False),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for turn, name in take_turns(calls, args.rounds):
            found[name].append(calls[name]())
            print(f"round {turn + 1}, {name}: {found[name][-1]:.1f} ms", flush=True)
    machine = {"machine": describe_machine(accelerator.device), "rounds": args.rounds}
    rows = [{"way": name, **spread(times), **machine} for name, times in found.items()]
    print_table(rows)
    write_csv(args.output, rows)
    pairs = [("loop", "bare"), ("bare", "computation"), ("loop", "computation")]
    ratios = {f"{a} / {b}": round(paired_ratio(found[a], found[b]), 4) for a, b in pairs}
    print(json.dumps({"benchmark": "training_loop", **ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
