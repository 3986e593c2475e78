"""Measure how far the depth and tracks that `annotate.py` would make are from exact labels."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_scripts.command_line import entry_point
from datasets_scripts.depth import DEPTH_SOURCES, choose_depth_models, open_depth
from datasets_scripts.inspection.source_errors import ExactEpisodes, format_report, measure_sources
from datasets_scripts.storage.atomic import check_place, write_json, write_whole_file
from datasets_scripts.storage.dataset_rows import parse_episodes
from datasets_scripts.tracks import TRACK_SOURCES, choose_tracker, open_tracker

EXAMPLE = """examples:
  python datasets_scripts/simulate.py --output outputs/exact --image-size 224 --episodes 2
  python datasets_scripts/measure_sources.py --dataset outputs/exact --output outputs/errors.json
  python datasets_scripts/measure_sources.py --dataset outputs/exact --depth depth-anything-v2 \\
      --output outputs/errors-dav2.json"""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for, and writes the report."""
    if args.steps < 0:
        raise ValueError(f"--steps is {args.steps}; it must be 0 (to the end) or more")
    check_place(args.output, "--output")
    if args.output.suffix == ".md":
        raise ValueError(f"--output {args.output} must be a JSON file; tables go to a .md file beside it")
    exact = ExactEpisodes(args.dataset, args.camera)
    episodes = range(exact.rows.n_episodes)
    if args.episodes is not None:
        episodes = parse_episodes(args.episodes, exact.rows.n_episodes)
    choose_depth_models(args.depth, args.depth_model, args.align_with)
    choose_tracker(args.tracks, args.track_model)
    depth = open_depth(args.depth, args.depth_model, args.align_with, args.device)
    tracker = open_tracker(args.tracks, args.track_model, args.device)
    errors = measure_sources(exact, episodes, depth, tracker, args.steps)
    report = {
        "dataset": Path(exact.rows.name).name,
        "truth": exact.made_by,
        "camera": exact.camera,
        "episodes": list(episodes),
        "frames": errors["frames"],
        "steps": args.steps,
        "depth": {
            "source": "exact" if depth is None else args.depth,
            **({} if depth is None else depth.describe()),
            "errors": errors["depth"],
            "clips": errors["clips"],
        },
        "tracks": {"source": args.tracks, **tracker.describe(), "errors": errors["tracks"]},
    }
    write_json(args.output, report)
    with write_whole_file(args.output.with_suffix(".md")) as temporary:
        temporary.write_text(format_report(report))
    return report


def build_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, help="LeRobot v3 dataset with exact labels: folder or Hub id")
    add(
        "--depth",
        default="sensor",
        help=f"source of depth: {', '.join(DEPTH_SOURCES)}, or a model (%(default)s: the exact)",
    )
    add("--depth-model", help="weights of the depth source")
    add("--align-with", help="metric depth model that gives a relative one its scale and shift")
    add(
        "--tracks", default="lucas-kanade", help=f"source of tracks: {', '.join(TRACK_SOURCES)} (%(default)s)"
    )
    add("--track-model", help="weights of the tracker")
    add("--camera", help="camera with exact tracks (default: the first)")
    add("--episodes", help="only these episodes, such as 0:10,15 (default: all)")
    add("--steps", type=int, default=6, help="frames to follow points through; 0: to the end (%(default)s)")
    add("--device", default="auto", help="device for learned sources (%(default)s)")
    add("--output", type=Path, required=True, metavar="FILE.json", help="report; FILE.md gets the tables")
    return parser


@entry_point()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    print(format_report(measure(build_parser().parse_args(arguments))), end="")


if __name__ == "__main__":
    sys.exit(main())
