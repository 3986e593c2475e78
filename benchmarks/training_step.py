"""Samples per second of a training step: by batch, checkpointing and compilation; cost of each objective.

A step is forward, backward and AdamW on a random batch of full windows that lies on the device already: no
loading (see loader.py). Frozen towers, as in the paper. Every row is one setting: median and 90th percentile
of `--repeats` steps after `--warmup` steps, the device synchronised around each, and peak memory. Settings
that are compared run in turns. `rate` is the share of the machine's own matrix multiplication rate, measured
here in the same dtype, that the step's multiply-accumulates reach; they are counted by PyTorch, which leaves
out attention kernels that it does not know.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import (
    DTYPES,
    describe_machine,
    paired_ratio,
    peak_memory_mb,
    print_table,
    spread,
    synchronise,
    time_in_turns,
    write_csv,
)
from control_step import SMALL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from modeling_foresight import ForesightConfig, ForesightForActionPrediction

ABLATIONS = ("foresight_3d", "no_depth", "no_future", "no_flow", "foresight_2d", "grmg", "gr1")

EXAMPLE = """examples:
  python benchmarks/training_step.py                                  # this CPU, paper size, minutes
  python benchmarks/training_step.py --device cuda --dtype bfloat16 --batches 8 32 64 \\
      --checkpointing off on --compile off on --repeats 20 --warmup 5
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of autocast; weights are float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off"])
    parser.add_argument(
        "--presets", nargs="+", default=list(ABLATIONS), help="the first is compared with each of the others"
    )
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training_step.csv"))
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
    """One optimiser step of a variant."""
    config = ForesightConfig.from_preset(
        preset,
        text_config=CLIPTextConfig(projection_dim=512, bos_token_id=49406, eos_token_id=49407),
        **(SMALL if args.small else {}),
    )
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).to(args.device).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=torch.device(args.device).type == "cuda")
    batch = random_batch(config, size, torch.device(args.device))
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
    """Billions of multiply-accumulates a second that one large matrix product reaches here."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronise(device)
    times = time_in_turns({"matmul": lambda: left @ right}, device, 2, 10)["matmul"]
    return side**3 / 1e6 / min(times)


def measure(args: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    """All rows, and the ratios that matter."""
    device, rows, ratios = torch.device(args.device), [], {}
    rate = matmul_rate(args)
    print(f"matrix multiplication: {rate:.0f} GMAC/s in {args.dtype}")

    def add(facts: dict, steps: dict[str, Callable[[], None]], gmac: dict[str, float]) -> dict:
        durations = time_in_turns(steps, device, args.warmup, args.repeats)
        for name, step in steps.items():
            times, peak = spread(durations[name]), peak_memory_mb(step, device)
            seconds = times["median_ms"] / 1000
            rows.append(
                {
                    "preset": name,
                    **facts,
                    **times,
                    "samples_per_s": round(facts["batch"] / seconds, 3),
                    "gmac": round(gmac[name], 1),
                    "rate": f"{gmac[name] / seconds / rate:.0%}",
                    "peak_memory_mb": None if peak is None else round(peak),
                }
            )
        return durations

    plain = build_step("foresight_3d", 1, args)
    gmac_of_one = count_gmac(plain)  # of the plain step: what checkpointing repeats is no work done
    del plain
    for batch in args.batches:
        for compiled in args.compile:
            for checkpointing in args.checkpointing:
                facts = {"batch": batch, "checkpointing": checkpointing, "compiled": compiled}
                gmac = {"foresight_3d": batch * gmac_of_one}
                try:
                    step = build_step("foresight_3d", batch, args, checkpointing == "on", compiled == "on")
                    add(facts, {"foresight_3d": step}, gmac)
                    del step
                except torch.cuda.OutOfMemoryError:
                    print(f"{facts}: out of memory")
                    rows.append({"preset": "foresight_3d", **facts, "rate": "out of memory"})
                    torch.cuda.empty_cache()
                gc.collect()
    batch, whole = args.batches[0], args.presets[0]
    facts = {"batch": batch, "checkpointing": "off", "compiled": "off"}
    for preset in args.presets[1:]:  # two at a time: more would crowd the memory
        steps = {name: build_step(name, batch, args) for name in (whole, preset)}
        gmac = {name: count_gmac(step) for name, step in steps.items()}
        durations = add({**facts, "beside": f"{whole}, {preset}"}, steps, gmac)
        ratios[f"{whole} / {preset}"] = paired_ratio(durations[whole], durations[preset])
        del steps
        gc.collect()
    return rows, ratios


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(arguments)
    machine = describe_machine(torch.device(args.device))
    print(f"{machine}; autocast {args.dtype}, warm-up {args.warmup}, {args.repeats} repeats in turns")
    rows, ratios = measure(args)
    print_table(rows, list(dict.fromkeys(column for row in rows for column in row)))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    facts = {"dtype": args.dtype, "machine": machine, "warmup": args.warmup, "repeats": args.repeats}
    write_csv(args.output, [{**row, **facts} for row in rows])
    print(json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
