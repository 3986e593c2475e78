"""The control loop of a robot: one observation in, one action out. Here the robot is a simulated one.

python examples/streaming_control.py --checkpoint ORG/NAME --task door-open-v3 --instruction "Open a door"
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

import modeling_foresight  # noqa: F401 - registers the model with the Auto classes
from datasets_scripts.simulation.metaworld import SIMULATION_HZ, MetaWorldSim

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=REPOSITORY / "hub_cards/models/3d-foresight-metaworld-tiny")
    parser.add_argument("--task", default="drawer-open-v3", help="MetaWorld task (%(default)s)")
    parser.add_argument("--instruction", help="what the policy is told (default: the task's own)")
    parser.add_argument("--seed", type=int, default=10000, help="seed of the start (%(default)s)")
    parser.add_argument("--steps", type=int, default=125, help="longest episode, in actions (%(default)s)")
    args = parser.parse_args()

    # Acting needs no depth, future and flow heads: they are not even loaded.
    model = AutoModel.from_pretrained(args.checkpoint, auxiliary_heads=False).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    if model.num_parameters() < 20_000_000:  # more threads would wait for each other: docs/performance.md
        torch.set_num_threads(1)
    robot = MetaWorldSim(args.task, cameras=model.config.views, image_size=model.config.image_size)
    robot.reset(args.seed)
    hold = round(SIMULATION_HZ / model.config.fps)  # simulation steps for which an action is held

    stream = model.stream(processor)  # keeps the tokens of past images: each image is encoded once
    stream.reset(args.instruction or robot.task_description)
    success, waited_ms = False, []
    while not success and robot.steps_left and len(waited_ms) < args.steps:
        # From here on the loop is the same for a real robot: camera name -> (H, W, 3) uint8 RGB, and the
        # state in the units of the training data.
        observation = robot.observe()
        begun = time.perf_counter()
        action = stream.step(observation["images"], observation["state"])  # (A,) in the dataset's units
        waited_ms.append(1000 * (time.perf_counter() - begun))
        success = robot.step(action.numpy(), repeat=hold, stop_on_success=True)
    robot.close()
    print(
        f"{args.task}, seed {args.seed}: {'success' if success else 'no success'} after {len(waited_ms)} "
        f"actions, {statistics.median(waited_ms):.1f} ms each (median)"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
