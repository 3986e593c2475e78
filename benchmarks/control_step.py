"""One control step of a window that is full: streaming, whole window, and re-encoding everything.

All ways see the same observations and run in turns in this process. `everything` is the original way: the
whole window through all towers, queries and decoders (GR-MG as published); `window` re-encodes all images but
decodes the newest action alone (`predict_action`); `stream` encodes the new images alone (`ForesightStream`).
The text feature is computed once per instruction by `stream` and at every step by the other two.

Weights are random: the time does not depend on them. Each row is one way: preset, batch, dtype, mode (eager,
compiled, graphed), median and 90th percentile of `--repeats` calls after `--warmup` calls, with the device
synchronised around each call, and peak memory. Components of a step are measured on their own after it.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _measure import (
    DTYPES,
    describe_machine,
    paired_ratio,
    peak_memory_mb,
    print_table,
    spread,
    time_in_turns,
    write_csv,
)
from transformers import CLIPTextConfig, ViTConfig

from modeling_foresight import (
    ForesightConfig,
    ForesightForActionPrediction,
    ForesightProcessor,
    ForesightStream,
    build_small_tokenizer,
)

INSTRUCTION = "open the drawer"
CAMERA_PX = {"main": 200, "wrist": 84}  # CALVIN's
SMALL = {  # for trying the script, not for figures
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vision_config": ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    ),
}

EXAMPLE = """examples:
  python benchmarks/control_step.py                                   # this CPU, paper size, minutes
  python benchmarks/control_step.py --device cuda --dtypes bfloat16 float32 --batches 1 16 \\
      --modes eager compiled graphed --repeats 100 --warmup 10
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="robots side by side")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled", "graphed"], default=["eager"])
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/control_step.csv"))
    args = parser.parse_args(arguments)
    if "graphed" in args.modes and args.device == "cpu":
        parser.error("--modes graphed needs --device cuda")
    if args.repeats < 1 or args.warmup < 0 or min(args.batches) < 1:
        parser.error("--repeats and --batches must be at least 1, --warmup at least 0")
    return args


def build(preset: str, args: argparse.Namespace, dtype: str, **fields):
    """A model of random weights and its processor."""
    tokenizer = build_small_tokenizer([INSTRUCTION])
    text = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = ForesightConfig.from_preset(
        preset,
        text_config=CLIPTextConfig(projection_dim=512, pad_token_id=tokenizer.pad_token_id, **text),
        **(SMALL if args.small else {}),
        **fields,
    )
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval().to(args.device, DTYPES[dtype])
    return model, ForesightProcessor.from_config(config, tokenizer)


@dataclasses.dataclass
class Robots:
    """Random observations of `batch` robots, always the same ones."""

    batch: int
    history: int

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.images = {
            view: rng.integers(0, 256, (self.batch, self.history, side, side, 3), dtype=np.uint8)
            for view, side in CAMERA_PX.items()
        }
        self.states = rng.normal(size=(self.batch, self.history, 7)).astype(np.float32)
        self.goals = rng.integers(0, 256, (self.batch, 200, 200, 3), dtype=np.uint8)

    def newest(self) -> tuple[dict, np.ndarray]:
        """What a step brings."""
        return {view: frames[:, -1] for view, frames in self.images.items()}, self.states[:, -1]


def streaming(model, processor, robots: Robots, mode: str) -> tuple[Callable[[], object], ForesightStream]:
    """The step of a stream whose window is full, with a goal."""
    stream = ForesightStream(
        model,
        processor,
        num_envs=robots.batch,
        compile=mode != "eager",
        cuda_graph=mode == "graphed",
    )
    stream.reset(INSTRUCTION)
    if model.config.goal_image:
        stream.set_goal(robots.goals)
    for _ in range(robots.history):
        stream.step_chunk(*robots.newest())
    return (lambda: stream.step_chunk(*robots.newest())), stream


def whole_window(model, processor, robots: Robots, everything: bool) -> Callable[[], object]:
    """The window from pixels to the newest chunk; with `everything`, all frames and heads as published."""
    goal = robots.goals if model.config.goal_image else None

    @torch.no_grad()
    def step():
        texts = [INSTRUCTION] * robots.batch
        batch = processor(
            images=robots.images, text=texts, state=robots.states, goal_image=goal, device=model.device
        )
        chunk = model(**batch).actions[:, -1] if everything else model.predict_action(**batch)
        current = torch.from_numpy(robots.states[:, -1])
        return processor.decode_actions(chunk.cpu(), state=current)

    return step


def components(model, processor, robots: Robots) -> dict[str, Callable[[], object]]:
    """The parts of an eager streaming step, each on ready inputs."""
    trunk, config, device, dtype = model.model, model.config, model.device, model.dtype
    images, states = robots.newest()
    views, batch = len(config.views), robots.batch
    pixels = torch.randn(batch, views, 3, config.image_size, config.image_size, device=device)
    with torch.no_grad():
        cls, patches = trunk.encode_images(pixels)
        tokens = trunk.embed_images(cls[:, None], patches[:, None])
    window = tokens.expand(-1, config.history_length, -1, -1, -1).contiguous()
    language = torch.randn(batch, config.hidden_size, device=device, dtype=dtype)
    goal = torch.randn(batch, config.num_latents + 1, config.hidden_size, device=device, dtype=dtype)
    embedded = {
        "language": language,
        "images": window,
        "goal": goal if config.goal_image else None,
        "state": processor.normalise_state(torch.from_numpy(robots.states)).to(device),
    }
    query = torch.randn(batch, config.hidden_size, device=device, dtype=dtype)
    style = torch.zeros(batch, config.latent_dim, device=device, dtype=dtype)

    def prepare():
        for view, frame in images.items():
            frames = processor.read_images(frame, view, False)[:, 0]
            processor.normalise_images(frames.to(device))
        processor.normalise_state(torch.from_numpy(robots.states))

    parts = {
        "images to pixels, relative states": prepare,
        "vision tower, new images": lambda: trunk.encode_images(pixels),
        "resampler and projections": lambda: trunk.embed_images(cls[:, None], patches[:, None]),
        "transformer": lambda: trunk.read_newest(**embedded),
        "action decoder": lambda: model.action_decoder(query, style),
    }
    return {name: torch.no_grad()(part) for name, part in parts.items()}


def weights_mb(model) -> float:
    """Size of the weights in MB."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def measure(args: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    """All rows, and the ratios that matter."""
    device, rows, ratios = torch.device(args.device), [], {}

    def add(facts: dict, ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        durations = time_in_turns(ways, device, args.warmup, args.repeats)
        for name, call in ways.items():
            peak = peak_memory_mb(call, device)
            memory = {"peak_memory_mb": None if peak is None else round(peak, 1)}
            rows.append({**facts, "way": name, **spread(durations[name]), **memory})
        return durations

    for dtype in args.dtypes:
        for batch in args.batches:
            whole, processor = build("foresight_3d", args, dtype)
            robots = Robots(batch, whole.config.history_length)
            facts = {"batch": batch, "dtype": dtype, "mode": "eager"}
            label = f"batch {batch}, {dtype}"
            ways = {
                "everything": whole_window(whole, processor, robots, everything=True),
                "window": whole_window(whole, processor, robots, everything=False),
                "stream": streaming(whole, processor, robots, "eager")[0],
            }
            durations = add({"preset": "foresight_3d", **facts}, ways)
            for slow in ("everything", "window"):
                ratios[f"{label}: {slow} / stream"] = paired_ratio(durations[slow], durations["stream"])
            add({"preset": "foresight_3d, parts", **facts}, components(whole, processor, robots))
            print(f"{label}: {weights_mb(whole):.0f} MB of weights with all heads")
            del whole, ways

            # Without 3D heads in memory, and beside GR-MG: both only act.
            names, acting = ("foresight_3d", "grmg"), {}
            for name in names:
                acting[name] = build(name, args, dtype, auxiliary_heads=False)
                print(f"{label}: {weights_mb(acting[name][0]):.0f} MB of weights to act, {name}")
            for mode in args.modes:
                ways = {name: streaming(*acting[name], robots, mode)[0] for name in names}
                durations = add({"preset": "to act", **facts, "mode": mode}, ways)
                ratios[f"{label}, {mode}: stream foresight_3d / stream grmg"] = paired_ratio(
                    durations["foresight_3d"], durations["grmg"]
                )
    return rows, ratios


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    print(f"{describe_machine(device)}; warm-up {args.warmup}, {args.repeats} repeats in turns")
    rows, ratios = measure(args)
    print_table(rows, list(rows[0]))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    machine = {"machine": describe_machine(device), "warmup": args.warmup, "repeats": args.repeats}
    write_csv(args.output, [{**row, **machine} for row in rows])
    print(json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
