"""Simulate MetaWorld demonstrations with exact depth and exact 3D tracks, as a LeRobot v3 dataset.

Running the same command again resumes what was interrupted and leaves a finished dataset unchanged.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from datasets_scripts.simulation.job import simulate
from datasets_scripts.simulation.metaworld import QUALITIES, check_cameras, resolve_tasks
from datasets_scripts.simulation.recording import Recording
from datasets_scripts.storage.episode_job import resumable_command


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python datasets_scripts/simulate.py --tasks drawer-open-v3 --episodes 50 "
        "--output outputs/drawer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Recording(tasks=("drawer-open-v3",))
    add = parser.add_argument
    add("--tasks", required=True, help="comma-separated: drawer-open-v3, or groups: easy,medium,hard,all")
    add("--episodes", type=int, default=default.episodes, help="episodes per task (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add("--image-size", type=int, default=default.image_size, help="side of the images in px (%(default)s)")
    add("--stride", type=int, default=default.stride, help="80 Hz steps per frame (%(default)s: 20 fps)")
    add("--seed", type=int, default=default.seed, help="seed of starts, noise and points (%(default)s)")
    add("--noise", type=float, default=default.noise, help="noise on the expert's actions (%(default)s)")
    detour = "most frames of a random motion at the start instead of the expert's (%(default)s)"
    add("--detour", type=int, default=default.detour, help=detour)
    add("--n-points", type=int, default=default.n_points, help="tracked points per episode (%(default)s)")
    add("--cameras", default=",".join(default.cameras), help="the first one gets the tracks (%(default)s)")
    add("--depth-max", type=float, default=default.depth_max, help="farthest depth, meters (%(default)s)")
    add("--max-steps", type=int, default=default.max_steps, help="most 80 Hz steps (%(default)s)")
    add("--retries", type=int, default=default.retries, help="new starts after a failure (%(default)s)")
    add("--quality", choices=QUALITIES, default=default.quality, help="rendering (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser


@resumable_command
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    fields = {name: value for name, value in vars(args).items() if name not in ("output", "workers")}
    cameras = check_cameras([name.strip() for name in args.cameras.split(",") if name.strip()])
    fields |= {"tasks": tuple(resolve_tasks(args.tasks)), "cameras": tuple(cameras)}
    summary = simulate(Recording(**fields), args.output, args.workers)
    with contextlib.suppress(BrokenPipeError):
        print(
            f"{args.output}: {summary['episodes']} episodes, {summary['frames']} frames, "
            f"{summary['bytes'] / 1e6:.1f} MB; "
            f"{summary['failures']} of {summary['attempts']} tries failed and were dropped; "
            f"recording {summary['record_s']:.0f} s, assembling {summary['assemble_s']:.0f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
