"""Show a dataset's labels: figures, a page about the whole dataset, a picture, a Rerun recording.

`DIR` alone describes one episode. `--report` reads a sample of the episodes and writes one HTML file: figures
and distributions by camera, flags, and pictures of the episodes to look at first. `--write-flags` reads all
episodes and records figures and flags in `meta/foresight_episodes.jsonl`, for datasets that `annotate.py` did
not make. Depth and tracks are checked against each other: a visible point must lie on the depth map. Missing
labels are left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.command_line import count_cores, entry_point
from datasets_scripts.inspection.drawing import import_matplotlib, save_png
from datasets_scripts.inspection.episode_description import describe_episode
from datasets_scripts.inspection.label_pictures import draw_labels
from datasets_scripts.inspection.labeled_episode import LabeledDataset, LabeledEpisode
from datasets_scripts.inspection.report import rank_episodes, survey_labels, write_flags, write_report
from datasets_scripts.inspection.rerun_recording import record_episode
from datasets_scripts.storage.atomic import check_place
from datasets_scripts.storage.dataset_rows import parse_episodes

EXAMPLE = """examples:
  python datasets_scripts/inspect_dataset.py outputs/quickstart/dataset --report labels.html
  python datasets_scripts/inspect_dataset.py outputs/quickstart/dataset --episode 3 \\
      --picture labels.png --output labels.rrd
  rerun labels.rrd"""


def inspect(args: argparse.Namespace) -> list[str]:
    """Does what the command line asks for; returns the problems."""
    if args.moments < 1:
        raise ValueError(f"--moments is {args.moments}; it must be at least 1")
    if args.episodes is not None and not args.report:
        raise ValueError("--episodes says which episodes --report reads; without it give --episode")
    if args.report or args.picture:
        import_matplotlib()  # before the work
    for name, suffix in (("report", ".html"), ("picture", ".png"), ("output", ".rrd")):
        if path := getattr(args, name):
            check_place(path, f"--{name}", suffix)
    dataset = LabeledDataset(args.dataset)
    problems = []
    if args.write_flags:
        flagged = write_flags(dataset, args.workers)
        print(f"wrote figures and flags of {dataset.rows.n_episodes} episodes; {len(flagged)} have a flag")
    if args.report:
        problems += _report(args, dataset)
    wants_episode = args.episode is not None or args.picture or args.output
    if wants_episode or not (args.report or args.write_flags):
        problems += _show(args, LabeledEpisode(dataset, args.episode or 0))
    return problems


def _report(args: argparse.Namespace, dataset: LabeledDataset) -> list[str]:
    """Writes the page; unreadable files are problems, flags are not."""
    n_episodes = dataset.rows.n_episodes
    chosen = None if args.episodes is None else parse_episodes(args.episodes, n_episodes)
    survey = survey_labels(dataset, chosen, args.workers)
    write_report(args.report, dataset, survey)
    first = rank_episodes(survey.episodes)
    for episode, reasons in first[:5]:
        print(f"look at episode {episode}: {'; '.join(reasons)}")
    print(f"wrote {args.report}: {len(survey.sampled)} episodes read, {len(first)} of all stand out")
    return [
        f"episode {episode}, camera {camera}: {known['problem']}"
        for episode, facts in survey.episodes.items()
        for camera, known in facts.items()
        if isinstance(known, dict) and "problem" in known
    ]


def _show(args: argparse.Namespace, episode: LabeledEpisode) -> list[str]:
    """Describes one episode, draws it, records it."""
    text, problems = describe_episode(episode)
    print(text)
    if args.picture:
        save_png(args.picture, draw_labels(episode, args.moments))
        print(f"wrote {args.picture}")
    if args.output:
        record_episode(episode, args.output)
        print(f"wrote {args.output}; look at it with: rerun {args.output}")
    return problems


@entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 as well when the labels have problems, each of them a line."""
    problems = inspect(_parse(arguments))
    for problem in problems:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    return 1 if problems else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", metavar="DIR", help="LeRobot v3 dataset: folder or Hub id")
    whole = parser.add_argument_group("the whole dataset")
    whole.add_argument("--report", type=Path, metavar="FILE.html", help="write a page about the dataset")
    whole.add_argument(
        "--episodes", help="episodes to read for the page, as 0:100,205 (default: 32 spread evenly)"
    )
    whole.add_argument("--write-flags", action="store_true", help="record figures and flags of all episodes")
    workers = count_cores()
    whole.add_argument("--workers", type=int, default=workers, help="processes (default: one per core)")
    one = parser.add_argument_group("one episode")
    one.add_argument("--episode", type=int, help="episode to show (default: 0)")
    one.add_argument("--picture", type=Path, metavar="FILE.png", help="draw moments with their labels")
    one.add_argument(
        "--moments", type=int, default=5, help="moments shown in the picture (default: %(default)s)"
    )
    one.add_argument("--output", type=Path, metavar="FILE.rrd", help="write a recording for Rerun's viewer")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
