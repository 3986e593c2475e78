"""Steps per second of `lerobot-train` and of `training/train.py` for the same run.

Both train the model and recipe of a config of `training/configs` on the same episodes, in turns of one short
run each, order reversed every round. A rate counts the steps after the first interval of log lines, when
programs have started, frames are decoded and models are warm. With `--losses` both also do the whole run
once, and both models are measured on the held-out episodes. LeRobot's windows are the trainer's and, in every
episode, the T - 1 that begin before it. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from _measure import add_run_options, build_parser, describe_machine, print_table, take_turns, write_csv

from datasets_scripts.command_line import entry_point, pick_device
from datasets_scripts.storage.dataset_rows import DatasetRows
from training.config import DataConfig, RunConfig
from training.config_reading import load_config
from training.windows import split_episodes

ROOT = Path(__file__).resolve().parents[1]
LAST = 100  # steps over which the final loss is averaged

EXAMPLE = """examples:
  python benchmarks/lerobot_train.py                       # the quickstart's run, minutes
  python benchmarks/lerobot_train.py --losses              # and what both have learned at its end
  python benchmarks/lerobot_train.py --show                # only print the command of lerobot-train
"""


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; the remaining arguments belong to the config."""
    parser = build_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add_run_options(parser, interval=20, rounds=3)
    add("--intervals", type=int, default=4, help="intervals of a short run, the first not counted")
    add("--losses", action="store_true", help="also compare the losses of whole runs")
    add("--show", action="store_true", help="print the command of lerobot-train and stop")
    add("--output", type=Path, default=Path("outputs/benchmarks/lerobot_train.csv"))
    args, overrides = parser.parse_known_args(arguments)
    if min(args.interval, args.rounds) < 1 or args.intervals < 2:
        parser.error("--interval and --rounds must be at least 1, --intervals at least 2")
    return args, overrides


def lerobot_options(config: RunConfig) -> list[str]:
    """Options of `lerobot-train` for the run of a config of `training/train.py`.

    Raises:
        ValueError: If `lerobot-train` lacks something that the run needs; names it.
    """
    plain, data, train = DataConfig(random_shift=0.0), config.data, config.train
    absent = [
        f"data.{name}"
        for name in ("random_shift", "p_moving", "occluded_weight", "state_key", "action_key", "statistics")
        if getattr(data, name) != getattr(plain, name)
    ]
    absent += ["several datasets"] * (len(data.datasets) != 1)
    absent += ["frame_stride"] * any(source.frame_stride != 1 for source in data.datasets)
    absent += ["train.gradient_accumulation_steps"] * (train.gradient_accumulation_steps != 1)
    absent += ["lora (see docs/lora.md)"] * bool(config.lora.r)
    if absent:
        raise ValueError(f"lerobot-train has nothing for {', '.join(absent)}")
    source = data.datasets[0]
    policy = {
        "push_to_hub": False,
        "device": str(pick_device()),
        "dtype": {"no": "float32", "bf16": "bfloat16"}[train.mixed_precision],
        "attn_implementation": train.attn_implementation,
        "tokenizer": config.towers.tokenizer,
        "text_tower": config.towers.text,
        "vision_tower": config.towers.vision,
        "cameras": {view: f"observation.images.{name}" for view, name in source.cameras.items()} or None,
        "frame_cache": data.frame_cache,
        "optimizer_lr": train.learning_rate,
        "optimizer_betas": train.betas,
        "optimizer_weight_decay": train.weight_decay,
        "optimizer_grad_clip_norm": train.max_grad_norm,
        "scheduler_warmup_steps": train.warmup_steps,
        "scheduler_min_lr_ratio": train.min_learning_rate_ratio,
    }
    rows = DatasetRows(source.path)
    chosen, _ = split_episodes(rows.n_episodes, data.val_fraction, config.seed)
    named = {f"policy.{name}": value for name, value in {**config.model, **policy}.items()}
    options = {
        **({"policy.path": config.init_from} if config.init_from else {"policy.type": "foresight"}),
        **{name: value for name, value in named.items() if value is not None},
        "dataset.repo_id": source.path if not Path(source.path).exists() else f"local/{rows.root.name}",
        "dataset.root": str(rows.root),
        "dataset.episodes": chosen,
        "num_workers": data.num_workers,
        "batch_size": train.batch_size,
        "steps": train.steps,
        "log_freq": train.log_every,
        "save_freq": train.checkpoint_every or train.steps,
        "seed": config.seed,
        "output_dir": config.output,
    }
    return [f"--{name}={_to_yaml(value)}" for name, value in options.items()]


def _to_yaml(value: object) -> str:
    """A value on one line. YAML, because LeRobot reads JSON's `1e-05` as a string."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]


def build_commands(config: RunConfig) -> dict[str, list[str]]:
    """The two commands for one run; each writes to its own folder under `config.output`."""
    output = Path(config.output)
    ours = dataclasses.replace(config, output=str(output / "train"), export=None)
    file = output / "config.yaml"
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dataclasses.asdict(ours), sort_keys=False))
    theirs = lerobot_options(dataclasses.replace(config, output=str(output / "lerobot")))
    return {
        "train.py": [sys.executable, str(ROOT / "training" / "train.py"), "--config", str(file)],
        "lerobot-train": [sys.executable, "-m", "lerobot.scripts.lerobot_train", *theirs],
    }


def run_command(command: list[str], threads: int, log: Path) -> list[tuple[float, str]]:
    """Run a command; gives the lines of its output with their times.

    Raises:
        RuntimeError: If it fails; with the end of the output.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    lines = []
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout:
            lines.append((time.perf_counter(), line))
            file.write(line)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{''.join(line for _, line in lines[-20:])}")
    return lines


def run_trainer(command: list[str], threads: int, output: Path) -> tuple[list[float], list[float]]:
    """Times in seconds and mean losses of the log lines of `train.py`."""
    run_command(command, threads, output / "train.log")
    lines = [json.loads(line) for line in (output / "train" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step_s" in line]
    return [line["seconds"] for line in lines], [line["loss"] for line in lines]


def run_lerobot(command: list[str], threads: int, output: Path) -> tuple[list[float], list[float]]:
    """Times in seconds and mean losses of the log lines that `lerobot-train` prints."""
    lines = run_command(command, threads, output / "lerobot.log")
    found = [(at, match) for at, line in lines if (match := re.search(r" loss:(\S+) .*updt_s:", line))]
    return [at for at, _ in found], [float(match.group(1)) for _, match in found]


RUNNERS = {"train.py": run_trainer, "lerobot-train": run_lerobot}


def measure_speed(config: RunConfig, args: argparse.Namespace, scratch: Path) -> list[dict]:
    """One row per short run."""
    steps = args.interval * args.intervals
    often = {"steps": steps, "log_every": args.interval, "checkpoint_every": 0, "val_every": 0}
    rows = []
    for turn, name in take_turns(RUNNERS, args.rounds):
        output = scratch / f"round-{turn}"
        short = dataclasses.replace(
            config, output=str(output), train=dataclasses.replace(config.train, **often)
        )
        at, _ = RUNNERS[name](build_commands(short)[name], args.threads, output)
        rate = (len(at) - 1) * args.interval / (at[-1] - at[0])
        rows.append({"round": turn, "command": name, "steps_per_s": round(rate, 3)})
        print(rows[-1], flush=True)
    return rows


def measure_losses(config: RunConfig, args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    """Losses of both whole runs, at the end of training and on the held-out episodes."""
    output = scratch / "whole"
    whole = dataclasses.replace(
        config, output=str(output), train=dataclasses.replace(config.train, checkpoint_every=0)
    )
    models = {
        "train.py": output / "train" / "model",
        "lerobot-train": output / "lerobot" / "checkpoints" / "last" / "pretrained_model",
    }
    results = {}
    for name, command in build_commands(whole).items():
        _, losses = RUNNERS[name](command, args.threads, output)
        lines = max(1, LAST // config.train.log_every)
        results[name] = {"training": round(float(np.mean(losses[-lines:])), 4)}
        results[name] |= held_out_losses(models[name], config)
        print(name, results[name], flush=True)
    return results


def held_out_losses(folder: Path, config: RunConfig) -> dict[str, float]:
    """Mean losses of a trained model on the windows of the held-out episodes."""
    from transformers import AutoModel, AutoProcessor

    from training.evaluation.open_loop import measure_losses
    from training.run_data import RunData, evaluation_loader

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    held_out = RunData(config, model.config).val
    if held_out is None:
        return {}
    torch.manual_seed(0)
    losses = measure_losses(model, processor, evaluation_loader(held_out, config.train.batch_size))
    return {f"held-out {name}": round(value, 4) for name, value in losses.items()}


@entry_point()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables and one line of JSON."""
    args, overrides = parse_arguments(arguments)
    config = load_config(args.config, ["--dataset", str(args.dataset), *overrides])
    if args.show:
        print(shlex.join(["lerobot-train", *lerobot_options(config)]))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure_speed(config, args, Path(scratch))
        machine = describe_machine(torch.device("cpu"))
        write_csv(args.output, [{**row, "machine": machine} for row in rows])
        losses = measure_losses(config, args, Path(scratch)) if args.losses else {}
    rates = {name: [row["steps_per_s"] for row in rows if row["command"] == name] for name in RUNNERS}
    ratios = np.divide(rates["lerobot-train"], rates["train.py"])
    print_table([{"command": name, "steps_per_s": np.median(found)} for name, found in rates.items()])
    if losses:
        print_table([{"command": name, **found} for name, found in losses.items()])
    figures = {
        "benchmark": "lerobot_train",
        "config": Path(args.config).stem,
        "steps_per_s": {name: round(float(np.median(found)), 3) for name, found in rates.items()},
        "ratio": round(float(np.median(ratios)), 3),
        "ratios": [round(float(ratio), 3) for ratio in ratios],
        "losses": losses,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
