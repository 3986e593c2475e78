"""Adds 3D tracks to a dataset that was recorded with a depth camera, looks at their quality, and reads them.

python examples/annotate_dataset.py --dataset YOU/DATASET --cameras front wrist --output outputs/annotated
"""

import argparse
import sys
from pathlib import Path

from lerobot.datasets.dataset_tools import remove_feature
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.annotation.job import AnnotationJob, annotate
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import points_key, points_visible_key, unpack_points
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import flagged_episodes, moving_flags, read_provenance

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="folder or Hub id (default: the sample without its tracks)")
    parser.add_argument("--cameras", nargs="+", default=["main"], help="one that stands still first (main)")
    parser.add_argument("--limit", type=int, default=2, help="episodes (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/annotated"))
    args = parser.parse_args()

    # Other sources by name: depth="vda+dav2", tracks="cotracker3", ...: docs/annotate.md
    labels = Annotation(tuple(args.cameras), depth="sensor", tracks="lucas-kanade")
    dataset = args.dataset or without_tracks(REPOSITORY / "hub_cards/sample_data/metaworld", args.output)
    annotate(AnnotationJob(str(dataset), args.output, labels, limit=args.limit))  # run again: continues

    camera, rows, provenance = args.cameras[0], DatasetRows(args.output), read_provenance(args.output)
    doubtful = flagged_episodes(provenance)
    for episode in range(rows.n_episodes):
        frames = rows.rows_of(episode)
        # (F, n, 3): x, y as fractions of the image, z in meters; (F, n): seen or hidden
        points = unpack_points(rows.column(points_key(camera)).read(frames))
        visible = rows.column(points_visible_key(camera)).read(frames)
        moving = moving_flags(provenance, episode, camera, points.shape[1])  # (n,)
        print(
            f"episode {episode}: {len(points)} frames, {visible.any(0).sum()} points of camera {camera}, "
            f"{moving.sum()} move; flags: {', '.join(doubtful.get(episode, ['none']))}"
        )
    look = f"python datasets_scripts/inspect_dataset.py {args.output} --report {args.output}.html"
    print(f"look at them: {look}")


def without_tracks(sample: Path, output: Path) -> Path:
    """The sample as a depth camera would have recorded it, without the simulator's exact tracks."""
    plain = output.with_name("plain")
    if not plain.exists():
        dataset = LeRobotDataset(f"local/{sample.name}", root=sample)
        remove_feature(dataset, [points_key("main"), points_visible_key("main")], plain, "local/plain")
    return plain


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
