"""What a dataset's labels look like: figures, a page about all of it, a picture, a Rerun recording.

`DIR` alone describes one episode. `--report` reads a sample of the episodes and writes one HTML file: figures
and distributions by camera, flags, and pictures of the episodes to look at first. `--write-flags` reads all
episodes and records figures and flags in `meta/foresight.json`, for datasets that `annotate.py` did not make.
Depth and tracks are checked against each other: a visible point must lie on the depth map. Whatever a dataset
lacks is left out.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.columns import picture_size
from datasets_scripts.inspection.label_pictures import draw_episode
from datasets_scripts.inspection.labelled_episode import Camera, Episode, LabelledDataset, Measures, measure
from datasets_scripts.inspection.pictures import import_matplotlib, save_png
from datasets_scripts.inspection.quality import FAR_FROM_DEPTH, MAX_OFF_DEPTH_SHARE
from datasets_scripts.inspection.report import survey_labels, worst_first, write_flags, write_report
from datasets_scripts.inspection.rerun_recording import record_episode
from datasets_scripts.storage.rows import parse_episodes

EXAMPLE = """examples:
  python datasets_scripts/inspect_dataset.py outputs/quickstart/dataset --report labels.html
  python datasets_scripts/inspect_dataset.py outputs/quickstart/dataset --episode 3 \\
      --picture labels.png --output labels.rrd
  rerun labels.rrd"""


def describe(episode: Episode) -> tuple[list[str], list[str]]:
    """Report on an episode, and what is wrong with it.

    Returns:
        `tuple[list[str], list[str]]`: Lines of the report; problems, none for a good dataset.
    """
    sizes = [f"{key} ({values.shape[1]})" for key, values in episode.series.items()]
    name = Path(episode.rows.name).name
    lines = [
        f"{name}, episode {episode.number} of {episode.rows.n_episodes}: “{episode.task}”",
        f"  {episode.length} frames at {episode.fps} fps; {', '.join(sizes) or 'no state and no action'}",
    ]
    problems: list[str] = []
    measured = measure(episode)
    for camera in episode.cameras:
        height, width = picture_size(episode.rows.features[camera.image_key])
        known = "known" if camera.intrinsics else "unknown"
        lines.append(f"camera {camera.name}: {width} x {height}, intrinsics {known}")
        own = measured[camera.name]
        if own.problem is not None:
            problems.append(own.problem)
        lines.append(_describe_depth(camera, own, problems))
        lines.append(_describe_points(camera, own, problems))
    return lines, problems


def _describe_depth(camera: Camera, own: Measures, problems: list[str]) -> str:
    if own.depth is None:
        return "  depth   none"
    if own.problem is not None:
        return "  depth   cannot be used"
    known = own.depth.facts()
    if known["median_m"] is None:
        problems.append(f"depth column '{camera.depth_key}' has no valid value in this episode")
        return f"  depth   {camera.depth_key}: nothing valid"
    flicker = "" if known["flicker"] is None else f", flicker {known['flicker']:.2%}"
    return (
        f"  depth   {camera.depth_key}: {known['valid_share']:.1%} valid, {known['near_m']:.2f} to "
        f"{known['far_m']:.2f} m (1 % to 99 %), median {known['median_m']:.2f} m{flicker}"
    )


def _describe_points(camera: Camera, own: Measures, problems: list[str]) -> str:
    if own.tracks is None:
        return "  tracks  none"
    known, hidden = own.tracks.facts(), int(np.count_nonzero(~own.tracks.real))
    moving = "unknown how many" if known["n_moving"] is None else known["n_moving"]
    line = (
        f"  tracks  {known['n_points']} points ({hidden} never visible), {moving} moving, "
        f"visible in {known['visible_share']:.1%} of the frames"
    )
    if not known["n_points"]:
        problems.append(f"camera {camera.name}: no point is visible in this episode")
    if (missed := known["off_depth_share"]) is not None:
        line += f"; {1 - missed:.1%} lie on the depth map within {FAR_FROM_DEPTH:.0%}"
        if missed > MAX_OFF_DEPTH_SHARE:
            problems.append(
                f"camera {camera.name}: {missed:.1%} of the visible points miss the depth map by more than "
                f"{FAR_FROM_DEPTH:.0%} of their distance; depth and tracks do not belong together"
            )
    return line


def inspect(args: argparse.Namespace) -> list[str]:
    """Does what the command line asks for; returns the problems.

    Raises:
        ValueError: If the dataset or an episode cannot be read.
        RuntimeError: If matplotlib or Rerun is missing.
    """
    if args.moments < 1:
        raise ValueError(f"--moments is {args.moments}; it must be at least 1")
    if args.episodes and not args.report:
        raise ValueError("--episodes says which episodes --report reads; without it give --episode")
    if args.report or args.picture:
        import_matplotlib()  # before the work
    for path in filter(None, (args.report, args.picture, args.output)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name the file to write")
    dataset = LabelledDataset(args.dataset)
    problems = []
    if args.write_flags:
        flagged = write_flags(dataset, args.workers)
        print(f"wrote figures and flags of {dataset.rows.n_episodes} episodes; {len(flagged)} have a flag")
    if args.report:
        problems += _report(args, dataset)
    wants_episode = args.episode is not None or args.picture or args.output
    if wants_episode or not (args.report or args.write_flags):
        problems += _show(args, Episode(dataset, args.episode or 0))
    return problems


def _report(args: argparse.Namespace, dataset: LabelledDataset) -> list[str]:
    """Writes the page; what cannot be read is a problem, what has a flag is not."""
    chosen = parse_episodes(args.episodes, dataset.rows.n_episodes) if args.episodes else None
    survey = survey_labels(dataset, chosen, args.workers)
    write_report(args.report, dataset, survey)
    first = worst_first(survey.episodes)
    for episode, reasons in first[:5]:
        print(f"look at episode {episode}: {'; '.join(reasons)}")
    print(f"wrote {args.report}: {len(survey.sampled)} episodes read, {len(first)} of all stand out")
    return [
        f"episode {episode}, camera {camera}: {known['problem']}"
        for episode, facts in survey.episodes.items()
        for camera, known in facts.items()
        if isinstance(known, dict) and "problem" in known
    ]


def _show(args: argparse.Namespace, episode: Episode) -> list[str]:
    """Describes one episode, draws it, records it."""
    lines, problems = describe(episode)
    print("\n".join(lines))
    if args.picture:
        save_png(args.picture, draw_episode(episode, args.moments))
        print(f"wrote {args.picture}")
    if args.output:
        record_episode(episode, args.output)
        print(f"wrote {args.output}; look at it with: rerun {args.output}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 as well when the labels have problems."""
    try:
        problems = inspect(_parse(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", metavar="DIR", help="LeRobot v3 dataset: folder or Hub id")
    whole = parser.add_argument_group("the whole dataset")
    whole.add_argument("--report", type=Path, metavar="FILE.html", help="write a page about it")
    whole.add_argument("--episodes", help="read these for the page, as 0:100,205 (default: 32 spread evenly)")
    whole.add_argument("--write-flags", action="store_true", help="record figures and flags of all episodes")
    workers = os.cpu_count() or 1
    whole.add_argument("--workers", type=int, default=workers, help="processes (default: one per core)")
    one = parser.add_argument_group("one episode")
    one.add_argument("--episode", type=int, help="which one (default: 0)")
    one.add_argument("--picture", type=Path, metavar="FILE.png", help="draw moments with their labels")
    one.add_argument("--moments", type=int, default=5, help="of the picture (default: %(default)s)")
    one.add_argument("--output", type=Path, metavar="FILE.rrd", help="write a recording for Rerun's viewer")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
