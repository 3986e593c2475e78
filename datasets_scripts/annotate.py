"""Add metric depth and 3D tracks to any LeRobot v3 dataset.

Depth comes from the dataset's own camera or from a model (`depth/`), tracks from a tracker (`tracks/`).
Running the same command again resumes an interrupted run and leaves a finished dataset unchanged. Videos are
hard links to those of the old dataset: re-encoding one in place changes both.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from datasets_scripts.annotation.distributed import annotate_as_rank, is_rank
from datasets_scripts.annotation.dry_run import describe_plan
from datasets_scripts.annotation.executors import Resources, add_options, run_tasks
from datasets_scripts.annotation.job import AnnotationJob, annotate, check
from datasets_scripts.annotation.push import check_push, push_dataset
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import find_depth_key, list_cameras
from datasets_scripts.command_line import count_cores, entry_point, list_some, split_names
from datasets_scripts.depth import DEPTH_SOURCES
from datasets_scripts.storage.dataset_folder import load_features
from datasets_scripts.storage.dataset_rows import find_dataset
from datasets_scripts.tracks import TRACK_SOURCES


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description="Add metric depth and 3D tracks to a LeRobot v3 dataset.",
        epilog="example:\n  python datasets_scripts/annotate.py --dataset YOU/DATASET "
        "--output outputs/annotated\nRun it again after an interruption to continue.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="folder or Hub id of a LeRobot v3 dataset")
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add(
        "--cameras",
        help="comma-separated cameras, the first one gets the tracks (default: all that can have depth)",
    )
    add(
        "--depth",
        default="sensor",
        help=f"{', '.join(DEPTH_SOURCES)}, or Hub id or folder of a transformers depth model (%(default)s)",
    )
    add(
        "--depth-model",
        help="weights of the depth model: Hub id, folder or checkpoint file; for `worker`, its command",
    )
    add("--align-with", help="metric depth model that gives a relative one its scale and shift")
    add("--depth-max", type=float, default=10.0, help="farthest estimated depth kept, meters (%(default)s)")
    add(
        "--tracks", default="lucas-kanade", help=f"source of tracks: {', '.join(TRACK_SOURCES)} (%(default)s)"
    )
    add("--track-model", help="weights of the tracker")
    add("--n-points", type=int, default=1250, help="most points per episode (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the choice of points (%(default)s)")
    add("--episodes", help="only these episodes, such as 0:100,205 (default: all)")
    add("--limit", type=int, help="at most this many episodes")
    add(
        "--skip-broken",
        action="store_true",
        help="leave out episodes that cannot be read, and record them, instead of stopping",
    )
    add(
        "--linked-videos",
        type=Path,
        metavar="DIR",
        help="folder into which videos of the dataset may be links (default: no link may lead out of it)",
    )
    add("--dry-run", action="store_true", help="print what would be done, time and space; write nothing")
    add(
        "--device",
        default="auto",
        help="device for learned sources: cuda, cuda:1, cpu (default: a GPU if any)",
    )
    add("--batch-size", type=int, help="frames per batch of depth models that take single frames")
    add("--workers", type=int, help="processes (default: one per core; one with learned sources)")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the finished dataset; needs a write token")
    add("--public", action="store_true", help="make a new repository public (default: private)")
    add_options(parser)
    return parser


@entry_point(resumes=True)
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    for name in ("workers", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    cameras = choose_cameras(args)
    names = ("depth", "depth_model", "align_with", "tracks", "track_model", "n_points", "seed")
    options = {name: getattr(args, name) for name in names}
    annotation = Annotation(cameras, depth_max_m=args.depth_max, **options)
    names = ("dataset", "output", "episodes", "limit", "skip_broken", "device", "batch_size", "linked_videos")
    job = AnnotationJob(annotation=annotation, **{name: getattr(args, name) for name in names})
    learned = args.depth != "sensor" or args.tracks != "lucas-kanade"
    workers = args.workers or (1 if learned else count_cores())
    if args.dry_run:
        print(describe_plan(job, workers))
        return
    if args.push_to_hub:
        check(job)  # before a repository is made in vain
        check_push(args.push_to_hub, args.output, not args.public)
    if args.executor:
        if args.executor == "local":
            args.workers = workers
        resources = Resources(**{field.name: getattr(args, field.name) for field in fields(Resources)})
        summary = run_tasks(job, args.executor, resources, args.push_to_hub)
    else:
        summary = annotate_as_rank(job, workers) if is_rank() else annotate(job, workers)
    if summary is None:  # another process prints it
        return
    print(format_summary(summary, args.output, cameras[0]))
    if args.push_to_hub:
        print(f"pushed to {push_dataset(args.output, args.push_to_hub)}")


def choose_cameras(args: argparse.Namespace) -> tuple[str, ...]:
    """The named cameras, or all that have depth or can get it."""
    if args.cameras is not None:
        return tuple(split_names(args.cameras))
    features = load_features(find_dataset(args.dataset, videos=False)[0])
    known = list_cameras(features)
    if not known:
        raise ValueError(f"dataset {args.dataset} has no camera; its columns are {', '.join(features)}")
    cameras = [name for name in known if args.depth != "sensor" or find_depth_key(features, name)]
    if not cameras:
        raise ValueError(
            f"no camera of {args.dataset} has depth ({', '.join(known)}): record it with a depth camera, or "
            f"estimate it with --depth {DEPTH_SOURCES[1]}"
        )
    return tuple(cameras)


def format_summary(summary: dict, output: Path, camera: str) -> str:
    """What was made, in a few lines."""
    lines = [
        f"{output}: {summary['episodes']} episodes, {summary['frames']} frames, tracks of camera {camera}, "
        f"{summary['moving']:.0%} of the points moving"
    ]
    for wording, episodes in (
        ("nothing moves in", summary["still_episodes"]),
        ("see inspect_dataset.py for the flags of", summary["flagged"]),
        ("left out because they cannot be read:", [known["episode"] for known in summary["skipped"]]),
    ):
        if episodes:
            lines.append(f"{wording} {len(episodes)} episodes ({list_some(episodes, most=10)})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
