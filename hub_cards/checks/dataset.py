"""Check that a LeRobot dataset is complete and can be read."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.command_line import list_some
from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.dataset_folder import data_files, episode_files, load_info
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.checks.wording import shorten_error

__all__ = ["check_dataset"]

AGAIN = "make or download it again"


def check_dataset(folder: Path) -> list[str]:
    """Problems of metadata, statistics, rows and video files, and of the first and the last frame."""
    try:
        info, n_rows = load_info(folder), sum(pq.read_metadata(path).num_rows for path in data_files(folder))
        read_provenance(folder)
    except (ValueError, OSError) as error:
        return [shorten_error(error)]
    problems = []
    if n_rows != info.get("total_frames"):
        problems.append(f"data/ has {n_rows} frames, meta/info.json says {info.get('total_frames')}: {AGAIN}")
    try:
        statistics = read_json(folder / "meta" / "stats.json")
    except (ValueError, OSError):
        statistics = {}
    needed = {"action", "observation.state"} & info["features"].keys()
    if lacking := sorted(needed - statistics.keys(), reverse=True):
        problems.append(
            f"meta/stats.json lacks {' and '.join(lacking)}: compute them with LeRobot's recompute_stats"
        )
    episodes = episode_files(folder)
    if not episodes or not (folder / "meta" / "tasks.parquet").is_file():
        return [*problems, f"meta/episodes or meta/tasks.parquet is missing: {AGAIN}"]
    try:
        missing = {name for path in episodes for name in _missing_videos(pq.read_table(path), info, folder)}
    except (ValueError, OSError) as error:  # Arrow's are subclasses of these
        return [*problems, f"meta/episodes cannot be read: {shorten_error(error)}: {AGAIN}"]
    if missing:
        return [*problems, f"videos are missing: {list_some(sorted(missing))}: {AGAIN}"]
    try:
        dataset = LeRobotDataset("local/check", root=folder)
        dataset[0], dataset[len(dataset) - 1]  # a truncated file lacks its end
    except Exception as error:  # LeRobot, its decoders and Arrow raise their own types
        problems.append(f"LeRobot does not read it: {shorten_error(error)}: {AGAIN}")
    return problems


def _missing_videos(episodes, info: dict, folder: Path) -> Iterator[str]:
    """Video files that the table of episodes names and the folder does not hold."""
    for key, feature in info["features"].items():
        columns = [f"videos/{key}/{part}" for part in ("chunk_index", "file_index")]
        if feature["dtype"] != "video" or columns[0] not in episodes.column_names:
            continue
        for chunk, file in zip(*(episodes[column].to_pylist() for column in columns), strict=True):
            name = info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
            if not (folder / name).is_file():
                yield name
