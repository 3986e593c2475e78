"""One control step of a full window: streaming, whole window, and encoding everything again.

All methods see the same observations and run in turns in this process. `everything` is GR-MG as published:
the whole window through all towers, queries and decoders; `window` encodes all images but decodes only the
newest action (`predict_action`); `stream` encodes only the new images (`ForesightStream`), and the text once
per instruction. Weights are random: the time does not depend on them. `stream` runs in every mode given:
eager, compiled (`torch.compile`), graphed (the eager step as a CUDA graph), compiled-graphed (the compiled
step as a CUDA graph), or exported for a CPU (`modeling_foresight.export`): torch-export, onnx, onnx-int8. The
other two are always eager and are timed again beside each mode. The parts of an eager step are timed too.
With `--compare modes` the modes of the stream run in turns with each other instead.

Each row has the median and 90th percentile of `--repeats` calls after `--warmup` calls, with the device
synchronized around each call, and the memory with only that row's model resident. PyTorch sees no peak inside
a CUDA graph: those rows have the memory reserved, graphs included.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _measure import (
    DTYPES,
    Results,
    memory_mb,
    model_sizes,
    paired_ratio,
    spread,
    start_afresh,
    time_in_turns,
)

from datasets_scripts.command_line import entry_point, pick_device
from modeling_foresight import (
    ForesightConfig,
    ForesightForActionPrediction,
    ForesightProcessor,
    ForesightStream,
    build_small_tokenizer,
)
from modeling_foresight.base_model import EmbeddedInputs
from modeling_foresight.export import write_policy
from modeling_foresight.exported_policy import ExportedPolicy

INSTRUCTION = "open the drawer"
CAMERA_PX = {"main": 200, "wrist": 84}  # CALVIN's
MODES = {  # options of the stream
    "eager": {},
    "compiled": {"compile": True},
    "graphed": {"cuda_graph": True},
    "compiled-graphed": {"compile": True, "cuda_graph": True},
}
EXPORTS = {  # what is written
    "torch-export": {"form": "torch-export"},
    "onnx": {"form": "onnx"},
    "onnx-int8": {"form": "onnx", "int8": True},
}

COMPARISONS = ("methods", "presets", "modes")

EXAMPLE = """examples:
  python benchmarks/control_step.py                                   # this CPU, paper size, minutes
  python benchmarks/control_step.py --device cuda --dtypes bfloat16 float32 --batches 1 16 \\
      --modes eager compiled graphed compiled-graphed --repeats 100 --warmup 10
  python benchmarks/control_step.py --compare modes --modes eager compiled onnx --checkpoint ORG/NAME
"""


def is_graphed(mode: str) -> bool:
    """Whether a mode replays a CUDA graph."""
    return "cuda_graph" in MODES.get(mode, {})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default=str(pick_device()))
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="robots side by side")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--modes", nargs="+", choices=[*MODES, *EXPORTS], default=["eager"])
    parser.add_argument(
        "--threads", type=int, help="threads of PyTorch and ONNX Runtime (default: all cores)"
    )
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, default=["methods", "presets"])
    parser.add_argument("--checkpoint", help="policy of --compare modes (default: paper size)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/control_step.csv"))
    args = parser.parse_args(arguments)
    graphed = [mode for mode in args.modes if is_graphed(mode)]
    if graphed and torch.device(args.device).type != "cuda":
        parser.error(f"--modes {' '.join(graphed)} needs --device cuda")
    exported = [mode for mode in args.modes if mode in EXPORTS]
    if exported and (torch.device(args.device).type != "cpu" or args.dtypes != ["float32"]):
        parser.error(f"--modes {' '.join(exported)} needs --device cpu --dtypes float32")
    if args.checkpoint and args.compare != ["modes"]:
        parser.error("--checkpoint is for --compare modes")
    if args.repeats < 1 or args.warmup < 0 or min(args.batches) < 1:
        parser.error("--repeats and --batches must be at least 1, --warmup at least 0")
    return args


def build(preset: str, args: argparse.Namespace, dtype: str, **fields):
    """A model of random weights and its processor."""
    tokenizer = build_small_tokenizer([INSTRUCTION])
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = ForesightConfig.from_preset(preset, **model_sizes(args.small, **token_ids), **fields)
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval().to(args.device, DTYPES[dtype])
    return model, ForesightProcessor.from_config(config, tokenizer)


@dataclasses.dataclass
class Robots:
    """Random observations of `batch` robots, always the same ones."""

    batch: int
    history: int
    sides_px: dict[str, int] = dataclasses.field(default_factory=CAMERA_PX.copy)
    state_dim: int = 7

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.images = {
            view: rng.integers(0, 256, (self.batch, self.history, side, side, 3), dtype=np.uint8)
            for view, side in self.sides_px.items()
        }
        self.states = rng.normal(size=(self.batch, self.history, self.state_dim)).astype(np.float32)
        self.goals = rng.integers(0, 256, (self.batch, 200, 200, 3), dtype=np.uint8)

    def newest(self) -> tuple[dict, np.ndarray]:
        """Images and states of one step."""
        return {view: frames[:, -1] for view, frames in self.images.items()}, self.states[:, -1]


def streaming(model, processor, robots: Robots, mode: str) -> Callable[[], object]:
    """The step of a stream whose window is full, with a goal."""
    if mode in EXPORTS:
        with tempfile.TemporaryDirectory() as folder:
            write_policy(Path(folder), model.requires_grad_(False), processor, **EXPORTS[mode])
            stream = ExportedPolicy(folder).stream(processor, num_envs=robots.batch)
    else:
        stream = ForesightStream(model, processor, num_envs=robots.batch, **MODES[mode])
    stream.reset(INSTRUCTION)
    if model.config.goal_image:
        stream.set_goal(robots.goals)
    for _ in range(robots.history):
        stream.step_chunk(*robots.newest())
    return lambda: stream.step_chunk(*robots.newest())


def whole_window(model, processor, robots: Robots, everything: bool) -> Callable[[], object]:
    """The window from pixels to the newest chunk; with `everything`, all frames and heads as published."""
    goal = robots.goals if model.config.goal_image else None

    @torch.no_grad()
    def step():
        texts = [INSTRUCTION] * robots.batch
        batch = processor(robots.images, texts, robots.states, goal_image=goal, device=model.device)
        chunk = model(**batch).actions[:, -1] if everything else model.predict_action(**batch)
        return processor.decode_actions(chunk.cpu(), state=robots.states[:, -1])

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
    place, width = {"device": device, "dtype": dtype}, config.hidden_size
    goal = torch.randn(batch, config.num_latents + 1, width, **place) if config.goal_image else None
    embedded = EmbeddedInputs(
        language=torch.randn(batch, width, **place),
        images=window,
        frame_mask=torch.ones(window.shape[:2], dtype=torch.bool, device=device),
        goal=goal,
        state=processor.normalize_state(torch.from_numpy(robots.states)).to(device),
    )
    query, style = torch.randn(batch, width, **place), torch.zeros(batch, config.latent_dim, **place)

    def prepare():
        for view, frame in images.items():
            frames = processor.read_images(frame, view, False)[:, 0]
            processor.normalize_images(frames.to(device))
        processor.normalize_state(torch.from_numpy(robots.states))

    parts = {
        "images to pixels, relative states": prepare,
        "vision tower, new images": lambda: trunk.encode_images(pixels),
        "resampler and projections": lambda: trunk.embed_images(cls[:, None], patches[:, None]),
        "transformer": lambda: trunk.read_newest(embedded),
        "action decoder": lambda: model.action_decoder(query, style),
    }
    return {name: torch.no_grad()(part) for name, part in parts.items()}


def weights_mb(model) -> float:
    """Size of the weights in MB."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


class ControlResults(Results):
    """[`Results`] of control steps that run in turns."""

    def add(
        self, columns: dict, calls: dict[str, Callable], modes: dict[str, str], memory: dict | None = None
    ) -> dict[str, list[float]]:
        """Times calls in turns and adds a row for each.

        Args:
            columns (`dict`): Columns of every row.
            calls (`dict[str, Callable]`): The methods, by name.
            modes (`dict[str, str]`): Mode of each method.
            memory (`dict[str, dict]`, *optional*): Memory of each method; measured here by default.

        Returns:
            `dict[str, list[float]]`: Milliseconds of every call of every method.
        """
        durations = time_in_turns(calls, self.device, self.args.warmup, self.args.repeats)
        rows = []
        for name, call in calls.items():
            mode = modes[name]
            used = memory[name] if memory else memory_mb(call, self.device, is_graphed(mode))
            rows.append({**columns, "mode": mode, "way": name, **spread(durations[name]), **used})
        self.keep(rows)
        return durations


def compare_methods(results: ControlResults, batch: int, dtype: str) -> None:
    """Everything, window and stream of one model with all heads, beside each mode of the stream; parts."""
    args, label = results.args, f"batch {batch}, {dtype}"
    model, processor = build("foresight_3d", args, dtype)
    print(f"{label}: {weights_mb(model):.0f} MB of weights with all heads")
    robots = Robots(batch, model.config.history_length)
    for mode in args.modes:
        start_afresh(results.device)
        columns = {"preset": "foresight_3d", "batch": batch, "dtype": dtype, "setting": f"{label}, {mode}"}
        calls = {
            "everything": whole_window(model, processor, robots, everything=True),
            "window": whole_window(model, processor, robots, everything=False),
            "stream": streaming(model, processor, robots, mode),
        }
        modes = {"everything": "eager", "window": "eager", "stream": mode}
        durations = results.add(columns, calls, modes)
        for slow in ("everything", "window"):
            ratio = paired_ratio(durations[slow], durations["stream"])
            results.ratios[f"{label}: {slow} eager / stream {mode}"] = ratio
        del calls
    start_afresh(results.device)
    parts = components(model, processor, robots)
    columns = {"preset": "foresight_3d, parts", "batch": batch, "dtype": dtype, "setting": f"{label}, parts"}
    results.add(columns, parts, dict.fromkeys(parts, "eager"))


def compare_presets(results: ControlResults, batch: int, dtype: str) -> None:
    """Streams of 3D Foresight and of GR-MG, both without auxiliary heads."""
    args, device, label = results.args, results.device, f"batch {batch}, {dtype}"
    names, memory = ("foresight_3d", "grmg"), {mode: {} for mode in args.modes}
    for name in names:  # one model at a time
        start_afresh(device)
        model, processor = build(name, args, dtype, auxiliary_heads=False)
        print(f"{label}: {weights_mb(model):.0f} MB of weights to act, {name}")
        robots = Robots(batch, model.config.history_length)
        for mode in args.modes:
            start_afresh(device)
            step = streaming(model, processor, robots, mode)
            step()
            memory[mode][name] = memory_mb(step, device, is_graphed(mode))
            del step
        del model, processor

    start_afresh(device)
    acting = {name: build(name, args, dtype, auxiliary_heads=False) for name in names}
    for mode in args.modes:
        start_afresh(device)
        calls = {name: streaming(*acting[name], robots, mode) for name in names}
        columns = {"preset": "to act", "batch": batch, "dtype": dtype, "setting": f"{label}, {mode}"}
        durations = results.add(columns, calls, dict.fromkeys(names, mode), memory[mode])
        ratio = paired_ratio(durations["foresight_3d"], durations["grmg"])
        results.ratios[f"{label}, {mode}: stream foresight_3d / stream grmg"] = ratio
        del calls


def compare_modes(results: ControlResults, batch: int, dtype: str) -> None:
    """Streams of one policy without auxiliary heads in every mode."""
    args, label = results.args, f"batch {batch}, {dtype}"
    if args.checkpoint:
        model = ForesightForActionPrediction.from_pretrained(
            args.checkpoint, auxiliary_heads=False, dtype=DTYPES[dtype]
        ).eval()
        model, processor = model.to(args.device), ForesightProcessor.from_pretrained(args.checkpoint)
        preset, sides = Path(args.checkpoint).name, dict.fromkeys(processor.views, processor.image_size)
    else:
        model, processor = build("foresight_3d", args, dtype, auxiliary_heads=False)
        preset, sides = "to act", CAMERA_PX
    robots = Robots(batch, model.config.history_length, sides, model.config.state_dim)
    calls = {mode: streaming(model, processor, robots, mode) for mode in args.modes}
    columns = {"preset": preset, "batch": batch, "dtype": dtype, "setting": f"{label}, modes in turns"}
    durations = results.add(columns, calls, {mode: mode for mode in args.modes})
    for mode in args.modes[1:]:
        ratio = paired_ratio(durations[args.modes[0]], durations[mode])
        results.ratios[f"{label}: stream {args.modes[0]} / stream {mode}"] = ratio


@entry_point()
def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = ControlResults(args)
    print(f"{results.machine['machine']}; warm-up {args.warmup}, {args.repeats} repeats in turns")
    for dtype in args.dtypes:
        for batch in args.batches:
            for name in args.compare:
                start_afresh(results.device)
                {"methods": compare_methods, "presets": compare_presets, "modes": compare_modes}[name](
                    results, batch, dtype
                )
    results.report()


if __name__ == "__main__":
    sys.exit(main())
