"""Frames per second of `annotate.py` without weights (sensor depth, Lucas-Kanade), and its peak memory.

One episode of `--minutes` is recorded with LeRobot's writer: a textured patch that moves over a textured
wall, with noise, seen by a camera with depth. It is then annotated: decoding, tracks, sampling, figures, the
new dataset. With one worker the time excludes loading, and the memory is all that the command takes; more
workers share several `--episodes`, and their start counts. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from _measure import build_parser, describe_machine, memory_mb
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.annotation.job import AnnotationJob, annotate
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import depth_key, image_key, recorded_features
from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.videos.writing import lerobot_depth_encoder

CAMERA = "main"
WALL_M, PATCH_M, DEPTH_MAX_M = 1.5, 1.0, 4.0
NOISE_LEVELS = 2.0

EXAMPLE = """examples:
  python benchmarks/annotation.py
  python benchmarks/annotation.py --minutes 10    # the memory of a long episode
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--minutes", type=float, default=0.5, help="length of an episode (%(default)s)")
    add("--episodes", type=int, default=1, help="number of episodes (%(default)s)")
    add("--fps", type=int, default=30, help="frames per second of the camera (%(default)s)")
    add("--image-size", type=int, default=224, help="side of the images in px (%(default)s)")
    add("--n-points", type=int, default=1250, help="tracks per episode (%(default)s)")
    add("--workers", type=int, default=1, help="processes (%(default)s)")
    add("--folder", type=Path, help="where the datasets are made (a temporary folder if omitted)")
    return parser.parse_args(arguments)


def record(root: Path, args: argparse.Namespace) -> int:
    """Record the dataset; gives the number of its frames."""
    side, draw = args.image_size, np.random.default_rng(0)
    textures = [cv2.GaussianBlur(draw.integers(0, 256, (side, side, 3), np.uint8), (0, 0), 2) for _ in "ab"]
    wall, patch = (cv2.normalize(texture, None, 20, 235, cv2.NORM_MINMAX) for texture in textures)
    noise = draw.normal(0, NOISE_LEVELS, (2 * side, 2 * side, 3)).astype(np.float32)
    dataset = LeRobotDataset.create(
        "local/benchmark",
        fps=args.fps,
        root=root,
        features=recorded_features({CAMERA: (side, side)}, True, ["x", "y"], ["x", "y"]),
        depth_encoder=lerobot_depth_encoder(DEPTH_MAX_M),
        streaming_encoding=True,
    )
    n_frames = max(2, round(60 * args.minutes * args.fps))
    for _ in range(args.episodes):
        for frame in range(n_frames):
            phase = 2 * np.pi * frame / (4 * args.fps)
            x, y = ((0.5 + 0.25 * np.array([np.cos(phase), np.sin(2 * phase)])) * side).astype(int)
            part = (slice(y - side // 6, y + side // 6), slice(x - side // 6, x + side // 6))
            image, depth_m = wall.copy(), np.full((side, side, 1), WALL_M, np.float32)
            image[part], depth_m[part] = patch[: 2 * (side // 6), : 2 * (side // 6)], PATCH_M
            down, right = draw.integers(0, side, 2)
            image = image + noise[down : down + side, right : right + side]
            state = np.array([x, y], np.float32) / side
            dataset.add_frame(
                {
                    image_key(CAMERA): image.clip(0, 255).astype(np.uint8),
                    depth_key(CAMERA): depth_m,
                    "observation.state": state,
                    "action": state,
                    "task": "move the patch",
                }
            )
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return args.episodes * n_frames


def run(args: argparse.Namespace, scratch: Path) -> dict:
    """Record and annotate; gives the figures."""
    start = time.perf_counter()
    n_frames = record(scratch / "recorded", args)
    print(f"{n_frames} frames recorded in {time.perf_counter() - start:.0f} s", flush=True)
    annotation = Annotation((CAMERA,), n_points=args.n_points)
    job = AnnotationJob(str(scratch / "recorded"), scratch / "annotated", annotation)
    summary = {}
    start = time.perf_counter()
    memory = memory_mb(lambda: summary.update(annotate(job, args.workers)), torch.device("cpu"))
    seconds = time.perf_counter() - start
    if args.workers > 1:
        memory = {}  # it does not include the workers
    return {
        "frames": n_frames,
        "episodes": args.episodes,
        "image_size": args.image_size,
        "n_points": args.n_points,
        "workers": args.workers,
        "moving_share": round(summary["moving"], 3),
        "seconds": round(seconds, 1),
        "frames_per_s": round(n_frames / seconds, 1),
        **memory,
    }


@entry_point()
def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_arguments(arguments)
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, args.folder or Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
