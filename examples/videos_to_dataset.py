"""Makes a LeRobot v3 dataset of videos alone, without states and actions: RH20T's human hands, for example.

python examples/videos_to_dataset.py clips.csv --fps 10 --height 256 --output outputs/rh20t_human

Each line of `clips.csv` is `VIDEO,INSTRUCTION`: `RH20T_cfg3/TASK_human/CAMERA/color.mp4,Open the drawer`.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.storage.atomic import write_whole_folder

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "hub_cards/sample_data/metaworld/videos/observation.images.main/chunk-000/file-000.mp4"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", nargs="?", help="CSV file (default: the video of the shipped sample)")
    parser.add_argument("--fps", type=int, default=10, help="frames a second to keep (%(default)s)")
    parser.add_argument("--height", type=int, default=256, help="in pixels; the width follows (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/videos"))
    args = parser.parse_args()
    clips = [(str(SAMPLE), "Open and close things")]
    if args.clips:
        with open(args.clips, newline="") as file:
            clips = [read_line(row, number) for number, row in enumerate(csv.reader(file), 1) if row]
    if args.output.exists() or not clips:
        what = f"{args.output} exists: delete it" if clips else f"{args.clips} has no line VIDEO,INSTRUCTION"
        raise ValueError(f"{what}, or give another one")

    with write_whole_folder(args.output) as folder:  # appears when it is whole
        folder.rmdir()  # LeRobot makes the folder
        dataset, size = None, (0, 0)
        for video, instruction in clips:
            for image in read_frames(video, args.fps, args.height, size):
                if dataset is None:
                    size = image.shape[:2]
                    column = {
                        "dtype": "video",
                        "shape": image.shape,
                        "names": ["height", "width", "channels"],
                    }
                    features = {"observation.images.main": column}
                    dataset = LeRobotDataset.create("local/videos", args.fps, features, root=folder)
                dataset.add_frame({"observation.images.main": image, "task": instruction})
            dataset.save_episode()
        dataset.finalize()
    print(f"{args.output}: {dataset.num_episodes} episodes, {dataset.num_frames} frames")


def read_line(row: list[str], number: int) -> tuple[str, str]:
    """Video and instruction of a line of the CSV file."""
    if len(row) != 2 or not row[1].strip():
        raise ValueError(
            f"line {number} has {len(row)} fields and not VIDEO,INSTRUCTION: put an instruction with a comma "
            "into double quotes"
        )
    return row[0], row[1].strip()


def read_frames(video: str, fps: int, height: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames `(H, W, 3)` uint8 RGB, `fps` of them a second: at each time the one that is then shown.

    `size` is H, W of earlier videos, or zeros. A slower video has its frames repeated.
    """
    wanted = 0
    try:
        with av.open(video) as container:
            first = last = None
            for frame in container.decode(video=0):
                first = frame.time if first is None else first
                high, wide = height, round(height * frame.width / frame.height / 2) * 2
                if size[0] and abs(wide - size[1]) > 2:
                    raise ValueError(
                        f"{video} has pictures of {frame.width}x{frame.height}, another shape than the "
                        f"videos before it: crop it to {size[1]}:{size[0]}"
                    )
                picture = frame.reformat(size[1] or wide, high, "rgb24").to_ndarray()
                # Those before this one show the picture before it.
                while last is not None and wanted / fps < frame.time - first - 1e-4:
                    wanted += 1
                    yield last
                last, now = picture, frame.time - first
            if last is not None and wanted / fps < now + 1e-4:
                wanted += 1
                yield last
    except (av.FFmpegError, IndexError) as error:  # the latter: a file without a video stream
        raise ValueError(f"{video} cannot be read as a video: {error}") from None
    if not wanted:
        raise ValueError(f"{video} has no frames")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
