"""Samples per second of a training step: by batch, checkpointing and compilation; cost of each objective.

A step is forward, backward and AdamW on a random batch of full windows on the device, without loading (see
loader.py). Towers are frozen, as in the paper. Every row is one setting: median and 90th percentile of
`--repeats` steps after `--warmup` steps, the device synchronized around each, and peak memory with only that
model resident. Presets that are compared run in turns. `rate` is the share of the machine's matrix
multiplication rate, measured here in the same dtype, that the step reaches; PyTorch counts its
multiply-accumulates, without attention kernels that it does not know. A setting that does not fit into a
GPU's memory gets a row that says so.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _measure import (
    DTYPES,
    Results,
    build_parser,
    catch_out_of_memory,
    memory_mb,
    model_sizes,
    paired_ratio,
    spread,
    start_afresh,
    time_in_turns,
)
from torch.utils.flop_counter import FlopCounterMode

from datasets_scripts.command_line import entry_point, pick_device
from modeling_foresight import ForesightConfig, ForesightForActionPrediction

ABLATIONS = ("foresight_3d", "no_depth", "no_future", "no_flow", "foresight_2d", "grmg", "gr1")

EXAMPLE = """examples:
  python benchmarks/training_step.py                                  # this CPU, paper size, minutes
  python benchmarks/training_step.py --device cuda --dtype bfloat16 --batches 8 32 64 \\
      --checkpointing off on --compile off on --repeats 20 --warmup 5
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--device", default=str(pick_device()))
    add("--dtype", choices=DTYPES, default="float32", help="type of autocast; weights are float32")
    add("--batches", type=int, nargs="+", default=[1])
    add("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    add("--compile", nargs="+", choices=["off", "on"], default=["off"])
    add("--presets", nargs="+", default=ABLATIONS, help="the first is compared with each of the others")
    add("--warmup", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--small", action="store_true", help="a tiny model, to try the script")
    add("--output", type=Path, default=Path("outputs/benchmarks/training_step.csv"))
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.warmup < 0 or min(args.batches) < 1:
        parser.error("--repeats and --batches must be at least 1, --warmup at least 0")
    return args


def random_batch(config: ForesightConfig, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A full model batch with the targets of all objectives."""
    torch.manual_seed(0)
    frames, views, side = config.history_length, len(config.views), config.image_size
    steps = (size, frames, config.flow_length, config.num_flow_points)
    text = torch.full((size, 8), config.text_config.eos_token_id)
    text[:, 0] = config.text_config.bos_token_id
    batch = {
        "pixel_values": torch.randn(size, frames, views, 3, side, side),
        "input_ids": text,
        "state": torch.randn(size, frames, config.state_dim),
        "actions": torch.rand(size, frames, config.chunk_size, config.action_dim),
        "depth": 0.5 + torch.rand(size, frames, views, side, side),
        "track_start": torch.rand(size, frames, config.num_flow_points, 2),
        "track": torch.rand(*steps, 3),
        "progress": torch.rand(size, frames),
    }
    if config.goal_image:
        batch["goal_pixel_values"] = torch.randn(size, 3, side, side)
    if not config.state_dim:
        del batch["state"]
    return {name: value.to(device) for name, value in batch.items()}


def build_step(
    preset: str, size: int, args: argparse.Namespace, checkpointing: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """One optimizer step of a preset."""
    torch.compiler.reset()
    sizes = model_sizes(args.small, bos_token_id=49406, eos_token_id=49407)
    config = ForesightConfig.from_preset(preset, **sizes)
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).to(args.device).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=torch.device(args.device).type == "cuda")
    batch = random_batch(config, size, torch.device(args.device))
    model.model.layout(config.history_length)  # before compilation, as building it is plain Python
    forward = torch.compile(model) if compiled else model
    dtype = DTYPES[args.dtype]

    def step() -> None:
        with torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_gmac(step: Callable[[], None]) -> float:
    """Billions of multiply-accumulates of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2e9


def matmul_rate(args: argparse.Namespace) -> float:
    """Billions of multiply-accumulates a second of one large matrix product."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    side = 8192 if device.type == "cuda" else 256 if args.small else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = time_in_turns({"matmul": lambda: left @ right}, device, 5, 10)["matmul"]
    return side**3 / 1e6 / min(times)


class TrainingResults(Results):
    """[`Results`] of training steps, with the share of the machine's rate that they reach."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, {"dtype": args.dtype})
        self.rate = matmul_rate(args)

    def add(self, setting: dict, measured: tuple[list[float], float, dict[str, float]] | None) -> None:
        """Add the row of a setting.

        Args:
            setting (`dict`): Its columns.
            measured (`tuple`, *optional*): Milliseconds of every step, billions of multiply-accumulates of a
                step, and memory; `None` if the memory ran out.
        """
        row = {**setting, "rate": "out of memory"}
        if measured is None:
            print(f"{setting}: out of memory")
        else:
            durations, gmac, memory = measured
            times = spread(durations)
            seconds = times["median_ms"] / 1000
            rates = {"samples_per_s": round(setting["batch"] / seconds, 3), "gmac": round(gmac, 1)}
            row = {**setting, **times, **rates, "rate": f"{gmac / seconds / self.rate:.0%}", **memory}
        self.keep([row])


def describe_setting(
    preset: str, batch: int, checkpointing: str = "off", compiled: str = "off", beside: str = ""
) -> dict:
    """Columns of a setting; `beside` is the preset that runs in turns with it."""
    columns = {"preset": preset, "batch": batch, "checkpointing": checkpointing}
    return columns | {"compiled": compiled, "beside": beside}


def measure_settings(results: TrainingResults) -> None:
    """The whole method by batch, checkpointing and compilation."""
    args, device, preset = results.args, results.device, "foresight_3d"
    # Of the plain step: what checkpointing computes again does not count.
    gmac_of_one = count_gmac(build_step(preset, 1, args))

    def measure(batch: int, checkpointing: str, compiled: str) -> tuple:
        step = build_step(preset, batch, args, checkpointing == "on", compiled == "on")
        durations = time_in_turns({preset: step}, device, args.warmup, args.repeats)
        return durations[preset], batch * gmac_of_one, memory_mb(step, device)

    for batch, compiled, checkpointing in product(args.batches, args.compile, args.checkpointing):
        start_afresh(device)
        measured = catch_out_of_memory(partial(measure, batch, checkpointing, compiled), device)
        results.add(describe_setting(preset, batch, checkpointing, compiled), measured)


def compare_presets(results: TrainingResults) -> None:
    """The first preset with each of the others, two at a time because more would fill the memory."""
    args, device, batch = results.args, results.device, results.args.batches[0]
    whole, *others = args.presets

    def measure_alone(preset: str) -> tuple:
        step = build_step(preset, batch, args)
        gmac = count_gmac(step)  # a step too, so that the optimizer's state counts as memory
        return gmac, memory_mb(step, device)

    def time_pair(other: str) -> dict[str, list[float]]:
        steps = {name: build_step(name, batch, args) for name in (whole, other)}
        return time_in_turns(steps, device, args.warmup, args.repeats)

    alone = {}
    for preset in args.presets if others else []:
        start_afresh(device)
        alone[preset] = catch_out_of_memory(partial(measure_alone, preset), device)
    for other in others:
        start_afresh(device)
        durations = None
        if alone[whole] and alone[other]:
            durations = catch_out_of_memory(partial(time_pair, other), device)
        for name, beside in ((whole, other), (other, whole)):
            measured = durations and (durations[name], *alone[name])
            results.add(describe_setting(name, batch, beside=beside), measured)
        if durations:
            results.ratios[f"{whole} / {other}"] = paired_ratio(durations[whole], durations[other])


@entry_point()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = parse_arguments(arguments)
    results = TrainingResults(args)
    machine = results.machine["machine"]
    print(f"{machine}; autocast {args.dtype}, warm-up {args.warmup}, {args.repeats} repeats in turns")
    print(f"matrix multiplication: {results.rate:.0f} GMAC/s in {args.dtype}")
    measure_settings(results)
    compare_presets(results)
    results.report()


if __name__ == "__main__":
    sys.exit(main())
