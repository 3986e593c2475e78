"""One control step alone, and with a goal generator that draws all the time.

The policy and the generator have random weights: the time does not depend on them. All settings see the same
observations and run in turns, `--steps` control steps each. `process` is this project's `GoalWorker`, and
`thread` the same in a thread of the control loop's process. Both are asked for the next goal as soon as one
is ready, so that they draw all the time, more than in control. `awaited` draws a goal inside of the step; on
a robot that would be every twentieth one.

Each row has the median, 90th percentile and maximum of a control step in milliseconds, and the goals given.
"""

import argparse
import functools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from _measure import build_parser, describe_machine, model_sizes, print_table, spread, take_turns, write_csv

from datasets_scripts.command_line import entry_point, pick_device
from goal_images.background import GoalWorker
from goal_images.control import GoalStream
from goal_images.generator import GoalGenerator, Sampling
from modeling_foresight import (
    ForesightConfig,
    ForesightForActionPrediction,
    ForesightProcessor,
    build_small_tokenizer,
)

INSTRUCTION = "open the drawer"
SIDE_PX = 200
EXAMPLE = """examples:
  python benchmarks/goal_refresh.py   # this CPU; the U-Net is a quarter as wide as Stable Diffusion's
  python benchmarks/goal_refresh.py --device cuda --width 1 --denoising-steps 50 --steps 40
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, EXAMPLE)
    parser.add_argument("--device", default=str(pick_device()))
    parser.add_argument(
        "--width", type=float, default=0.25, help="width of the U-Net; 1 is Stable Diffusion's"
    )
    parser.add_argument("--denoising-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="control steps of a setting in each round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a tiny policy and U-Net, to try the script")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/goal_refresh.csv"))
    return parser.parse_args(arguments)


class RandomGenerator(GoalGenerator):
    """A goal generator of random weights in Stable Diffusion's layout."""

    def __init__(self, device: str, width: float, denoising_steps: int, small: bool):
        from diffusers import (
            AutoencoderKL,
            EulerAncestralDiscreteScheduler,
            StableDiffusionInstructPix2PixPipeline,
            UNet2DConditionModel,
        )
        from transformers import CLIPTextConfig, CLIPTextModel

        self.seed, self.sampling = 0, Sampling(32 if small else 256, denoising_steps)
        channels = (32, 32) if small else tuple(32 * round(width * c / 32) for c in (320, 640, 1280, 1280))
        blocks, text = len(channels) - 1, 64 if small else 768
        tokenizer = build_small_tokenizer([INSTRUCTION], 300, 77)
        pipeline = StableDiffusionInstructPix2PixPipeline(
            vae=AutoencoderKL(
                block_out_channels=(32, 32)
                if small
                else tuple(round(width * c) for c in (128, 256, 512, 512)),
                down_block_types=("DownEncoderBlock2D",) * (2 if small else 4),
                up_block_types=("UpDecoderBlock2D",) * (2 if small else 4),
                layers_per_block=1 if small else 2,
            ),
            unet=UNet2DConditionModel(
                in_channels=8,
                block_out_channels=channels,
                down_block_types=("CrossAttnDownBlock2D",) * blocks + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * blocks,
                cross_attention_dim=text,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=text,
                    intermediate_size=4 * text,
                    num_attention_heads=text // 64,
                    projection_dim=text,
                )
            ),
            tokenizer=tokenizer,
            scheduler=EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.to(device, dtype)
        self.pipeline = pipeline


class ThreadWorker(GoalWorker):
    """As a `GoalWorker`, in a thread."""

    def __init__(self, source):
        self.source, self.busy, self.needs_progress = source, False, source.needs_progress
        self._pool = ThreadPoolExecutor(1)

    def send(self, requests):
        """Starts drawing."""
        self.busy, self._goals = True, self._pool.submit(self.source.draw, list(requests))

    def is_ready(self):
        """Whether it is done."""
        return self.busy and self._goals.done()

    def receive(self):
        """The goals."""
        goals, self.busy = self._goals.result(), False
        return goals

    def close(self):
        """Waits for what is being drawn."""
        self._pool.shutdown()


def build_policy(args: argparse.Namespace):
    """A policy with goals and its processor."""
    tokenizer = build_small_tokenizer([INSTRUCTION])
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = ForesightConfig.from_preset("foresight_3d", **model_sizes(args.small, **token_ids))
    model = ForesightForActionPrediction(config).eval().to(args.device)
    return model, ForesightProcessor.from_config(config, tokenizer)


class Setting:
    """A stream whose window is full, and the durations of its steps."""

    def __init__(self, policy, source=None):
        model, processor = policy
        self.stream = model.stream(processor, with_progress=True)
        self.goals, self._give = 0, self.stream.set_goal
        self.stream.set_goal = self._count_goal
        if source is not None:
            self.stream = GoalStream(self.stream, source, every=1)
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, (model.config.history_length, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        self.images = [dict.fromkeys(model.config.views, frame) for frame in frames]
        self.state = np.zeros(model.config.state_dim, np.float32)
        self.durations_ms: list[float] = []
        self.stream.reset(INSTRUCTION)
        if source is None:
            self.stream.set_goal(frames[0])
        self.run(1 if isinstance(source, RandomGenerator) else len(self.images))  # fills the window
        self.rest()
        self.goals, self.durations_ms = 0, []

    def _count_goal(self, image, envs=None) -> None:
        self.goals += 1
        self._give(image, envs)

    def run(self, steps: int) -> None:
        """Times control steps."""
        for step in range(steps):
            begun = time.perf_counter()
            self.stream.step(self.images[step % len(self.images)], self.state)
            self.durations_ms.append(1000 * (time.perf_counter() - begun))

    def rest(self) -> None:
        """Waits for goals that are being drawn."""
        worker = getattr(self.stream, "worker", None)
        if worker is not None and worker.busy:
            worker.receive()


def measure(args: argparse.Namespace) -> dict[str, Setting]:
    """All settings after their rounds.

    They run in turns of a few steps, and nothing is drawn between the turns.
    """
    policy, sizes = build_policy(args), (args.device, args.width, args.denoising_steps, args.small)
    generator = RandomGenerator(*sizes)
    with (
        GoalWorker(functools.partial(RandomGenerator, *sizes)) as process,
        ThreadWorker(generator) as thread,
    ):
        sources = {"alone": None, "process": process, "thread": thread, "awaited": generator}
        settings = {name: Setting(policy, source) for name, source in sources.items()}
        for turn, name in take_turns(settings, args.rounds):
            settings[name].run(1 if name == "awaited" else args.steps)
            settings[name].rest()
            print(f"round {turn + 1} of {args.rounds}: {name} done", flush=True)
    return settings


@entry_point()
def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(arguments)
    facts = {"machine": describe_machine(torch.device(args.device)), "width": args.width}
    facts |= {"denoising_steps": args.denoising_steps, "rounds": args.rounds, "steps": args.steps}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = [
        {
            "way": name,
            **spread(found.durations_ms),
            "max_ms": round(max(found.durations_ms), 3),
            "goals": found.goals,
        }
        for name, found in measure(args).items()
    ]
    write_csv(args.output, [{**row, **facts} for row in rows])
    print_table(rows)
    print(f"written: {args.output}")
    medians = {row["way"]: row["median_ms"] for row in rows}
    print(json.dumps({f"{name} / alone": round(medians[name] / medians["alone"], 3) for name in medians}))


if __name__ == "__main__":
    sys.exit(main())
