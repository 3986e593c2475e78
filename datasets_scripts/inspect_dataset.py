"""What a dataset's labels look like: a report of numbers, a picture, and a Rerun recording to scrub through.

Depth and tracks are checked against each other: a visible point must lie on the depth map. Whatever a dataset
lacks is left out.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.columns import (
    IMAGE_PREFIX,
    check_depth_range,
    clean_depth,
    find_depth_key,
    is_depth_feature,
    moving_flags,
    picture_size,
    points_key,
    points_visible_key,
    read_provenance,
    unpack_points,
)
from datasets_scripts.dataset_rows import DatasetRows
from datasets_scripts.frame_cache import OnDemandFrames
from datasets_scripts.pictures import (
    Flow,
    add_depth_scale,
    depth_range,
    draw_depth,
    draw_flow,
    import_matplotlib,
    save_png,
)
from datasets_scripts.rerun_recording import record_episode

EXAMPLE = """example:
  python datasets_scripts/inspect_dataset.py --dataset outputs/quickstart/dataset --episode 3 \\
      --picture labels.png --output labels.rrd
  rerun labels.rrd"""
CHUNK = 32  # frames decoded at a time
TRAIL_STEPS = 6  # of a moving point in the picture
SAMPLED_PIXELS = 5000  # of each chunk of depth, for its percentiles
FAR_FROM_DEPTH = 0.05  # share of a point's distance by which it misses the depth map


@dataclasses.dataclass
class Camera:
    """One camera of an episode and its labels.

    Attributes:
        name (`str`): Camera.
        image_key (`str`): Its RGB column.
        depth_key (`str`, *optional*): Its depth column.
        intrinsics (`dict`, *optional*): fx, fy, cx, cy in pixels from the image's outer edge, height, width.
        points (`np.ndarray`, *optional*): `(F, n, 3)` x, y as image fractions, z in metres.
        visible (`np.ndarray`, *optional*): Boolean `(F, n)`.
        moving (`np.ndarray`, *optional*): Boolean `(n,)`.
    """

    name: str
    image_key: str
    depth_key: str | None = None
    intrinsics: dict | None = None
    points: np.ndarray | None = None
    visible: np.ndarray | None = None
    moving: np.ndarray | None = None


class Episode:
    """An episode's cameras, labels and series; frames are decoded when they are asked for.

    Args:
        dataset (`str`): Folder, or Hub id.
        episode (`int`): Its number.

    Attributes:
        series (`dict[str, np.ndarray]`): Key -> `(F, size)`: state and action, where there are.

    Raises:
        ValueError: If the dataset cannot be read or has no such episode.
    """

    def __init__(self, dataset: str, episode: int):
        self.rows = rows = DatasetRows(dataset)
        if not 0 <= episode < rows.n_episodes:
            raise ValueError(f"dataset {dataset} has the episodes 0 to {rows.n_episodes - 1}, not {episode}")
        self.number, self.fps = episode, rows.fps
        self.start, stop = int(rows.episode_starts[episode]), int(rows.episode_stops[episode])
        self.length, whole = stop - self.start, range(self.start, stop)
        self.task = rows.tasks[int(rows.column("task_index").read(whole)[0])]
        provenance = read_provenance(rows.root)
        self.cameras = [self._camera(key, whole, provenance) for key in self._image_keys()]
        keys = [key for camera in self.cameras for key in (camera.image_key, camera.depth_key) if key]
        self._frames = OnDemandFrames(rows, keys)
        self.series = {
            key: rows.column(key).read(whole).astype(np.float32).reshape(self.length, -1)
            for key, feature in rows.features.items()
            if key.rsplit(".", 1)[-1] in ("state", "action", "actions") and "float" in feature["dtype"]
        }

    def _image_keys(self) -> list[str]:
        return [
            key
            for key, feature in self.rows.features.items()
            if feature["dtype"] in ("image", "video") and not is_depth_feature(feature)
        ]

    def _camera(self, key: str, whole: range, provenance: dict) -> Camera:
        rows, name = self.rows, key.removeprefix(IMAGE_PREFIX)
        facts = provenance.get("cameras", {}).get(name, {})
        camera = Camera(name, key, find_depth_key(rows.features, name), facts.get("intrinsics"))
        if {points_key(name), points_visible_key(name)} <= set(rows.features):
            camera.points = unpack_points(rows.column(points_key(name)).read(whole))
            camera.visible = rows.column(points_visible_key(name)).read(whole)
            camera.moving = moving_flags(provenance, self.number, name, camera.visible.shape[1])
        return camera

    def read(self, key: str, first: int, count: int = 1) -> np.ndarray:
        """Frames `first` and on: RGB `(count, H, W, 3)` uint8, or depth `(count, H, W)` m, 0 = invalid."""
        frames = self._frames.read(key, range(self.start + first, self.start + first + count))
        return frames if frames.ndim == 3 else frames.transpose(0, 2, 3, 1)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First frame and number of frames of parts that fit into memory."""
        for first in range(0, self.length, CHUNK):
            yield first, min(CHUNK, self.length - first)

    def depth_as_stored(self, key: str, first: int, count: int) -> tuple[np.ndarray, float]:
        """Depth `(count, H, W)` in metres, nothing marked invalid, and the far limit of its storage."""
        decoder = self._frames.decoders[key]
        rows = range(self.start + first, self.start + first + count)
        return decoder.metres(decoder.decode(rows), clean=False), decoder.limit_m


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
    for camera in episode.cameras:
        height, width = picture_size(episode.rows.features[camera.image_key])
        known = "known" if camera.intrinsics else "unknown"
        lines.append(f"camera {camera.name}: {width} x {height}, intrinsics {known}")
        errors = _describe_depth(episode, camera, lines, problems)
        _describe_points(camera, errors, lines, problems)
    return lines, problems


def _describe_depth(
    episode: Episode, camera: Camera, lines: list[str], problems: list[str]
) -> np.ndarray | None:
    """Adds the depth's line; returns by which share visible points miss the depth map."""
    if camera.depth_key is None:
        lines.append("  depth   none")
        return None
    valid = total = 0
    sampled, errors = [], []
    for first, count in episode.chunks():
        stored, limit_m = episode.depth_as_stored(camera.depth_key, first, count)
        try:
            check_depth_range(stored, camera.depth_key, limit_m)
        except ValueError as error:
            problems.append(str(error))
            lines.append("  depth   not in metres")
            return None
        depth = clean_depth(stored, limit_m)
        valid, total = valid + np.count_nonzero(depth), total + depth.size
        measured = depth[depth > 0]
        sampled.append(measured[:: max(1, len(measured) // SAMPLED_PIXELS)])
        if camera.points is not None:
            frames = slice(first, first + count)
            errors.append(_miss(depth, camera.points[frames], camera.visible[frames]))
    values = np.concatenate(sampled)
    if not values.size:
        problems.append(f"depth column '{camera.depth_key}' has no valid value in this episode")
        values = np.zeros(1)
    near, middle, far = np.percentile(values, [1, 50, 99])
    lines.append(
        f"  depth   {camera.depth_key}: {valid / total:.1%} valid, {near:.2f} to {far:.2f} m (1 % to 99 %), "
        f"median {middle:.2f} m"
    )
    return np.concatenate(errors) if errors else None


def _miss(depth: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Share of its distance by which each visible point misses the depth map, where that is valid.

    Against the nearest of 3 x 3 pixels: at an edge a point may belong to either side.
    """
    frames, height, width = depth.shape
    t, p = np.nonzero(visible)
    x = np.clip((points[t, p, 0] * width).astype(int), 0, width - 1)
    y = np.clip((points[t, p, 1] * height).astype(int), 0, height - 1)
    padded = np.pad(depth, ((0, 0), (1, 1), (1, 1)))
    around = np.stack([padded[t, y + dy, x + dx] for dy in range(3) for dx in range(3)])
    z = points[t, p, 2]
    error = np.where(around > 0, np.abs(around - z), np.inf).min(0)
    return (error / np.maximum(z, 1e-6))[np.isfinite(error)]


def _describe_points(
    camera: Camera, errors: np.ndarray | None, lines: list[str], problems: list[str]
) -> None:
    if camera.points is None:
        lines.append("  tracks  none")
        return
    real = camera.visible.any(0)
    share = camera.visible[:, real].mean() if real.any() else 0.0
    line = (
        f"  tracks  {real.sum()} points ({len(real) - real.sum()} never visible), "
        f"{(camera.moving & real).sum()} moving, visible in {share:.1%} of the frames"
    )
    if errors is not None and errors.size:
        bad = float(np.mean(errors > FAR_FROM_DEPTH))
        line += f"; {1 - bad:.1%} lie on the depth map within {FAR_FROM_DEPTH:.0%}"
        if bad > 0.5:
            problems.append(
                f"camera {camera.name}: {bad:.1%} of the visible points miss the depth map by more than "
                f"{FAR_FROM_DEPTH:.0%} of their distance; depth and tracks do not belong together"
            )
    lines.append(line)
    if not real.any():
        problems.append(f"camera {camera.name}: no point is visible in this episode")


def draw(episode: Episode, moments: int):
    """Contact sheet: a column per moment; per camera its image with tracks, and its depth.

    Returns:
        `matplotlib.figure.Figure`: To be saved.
    """
    figure_type, canvas_type = import_matplotlib()
    chosen = sorted({round(i) for i in np.linspace(0, episode.length - 1, moments)})
    shapes = [picture_size(episode.rows.features[camera.image_key]) for camera in episode.cameras]
    sizes = []  # height of every row by its width
    for camera, (height, width) in zip(episode.cameras, shapes, strict=True):
        sizes += [height / width] * (1 + (camera.depth_key is not None))
    side, above, below, left, right = 1.9, 0.5, 0.35, 0.45, 0.95  # inches
    width, height = side * len(chosen) + left + right, side * sum(sizes) + above + below
    figure = figure_type(figsize=(width, height))
    canvas_type(figure)
    axes = figure.subplots(len(sizes), len(chosen), squeeze=False, gridspec_kw={"height_ratios": sizes})
    figure.subplots_adjust(
        left / width, below / height, 1 - right / width, 1 - above / height, wspace=0.03, hspace=0.03
    )
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    for axis, t in zip(axes[0], chosen, strict=True):
        axis.set_title(f"frame {t}", fontsize=9)
    rows = iter(axes)
    for camera in episode.cameras:
        image_row = next(rows)
        depth_row = next(rows) if camera.depth_key else None
        colours = _draw_camera(episode, camera, chosen, image_row, depth_row)
        if colours is not None:
            upper = image_row[-1].get_position()
            lower = upper if depth_row is None else depth_row[-1].get_position()
            place = (upper.x1 + 0.12 / width, lower.y0, 0.12 / width, upper.y1 - lower.y0)
            add_depth_scale(figure, colours, place)
    title = f"{Path(episode.rows.name).name}, episode {episode.number}: “{episode.task}”"
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    caption = ""
    if any(camera.depth_key for camera in episode.cameras):
        caption = "Depth: grey is unknown."
    if any(camera.points is not None for camera in episode.cameras):
        caption += f" Tracks: still points grey, moving ones with their last {TRAIL_STEPS - 1} steps."
    figure.text(left / width, 0.1 / height, caption.strip(), fontsize=7.5)
    return figure


def _draw_camera(episode: Episode, camera: Camera, chosen: list[int], image_row, depth_row):
    """One camera's rows; returns the colours that mean metres, if there are any."""
    depths = []
    if camera.depth_key:
        depths = [episode.read(camera.depth_key, t)[0] for t in chosen]
    limits = depth_range(np.concatenate([depth.ravel() for depth in depths]) if depths else np.zeros(0))
    if camera.points is not None and not depths:
        limits = depth_range(camera.points[..., 2][camera.visible])
    image_row[0].set_ylabel(camera.name, fontsize=9)
    colours = None
    for i, t in enumerate(chosen):
        image = episode.read(camera.image_key, t)[0] / 255
        if camera.points is None:
            image_row[i].imshow(image)
        else:
            colours = draw_flow(image_row[i], image, _trails(camera, t), limits) or colours
        if depths:
            colours = draw_depth(depth_row[i], np.where(depths[i] > 0, depths[i], np.nan), limits)
    if depths:
        depth_row[0].set_ylabel("depth", fontsize=9)
    return colours


def _trails(camera: Camera, t: int) -> Flow:
    """Where the points are now and whence they came."""
    past = range(t, max(t - TRAIL_STEPS, -1), -1)
    shown = camera.visible[past].copy()
    shown[:, ~shown[0]] = False  # hidden now
    return Flow(camera.points[past], shown, camera.moving)


def inspect(args: argparse.Namespace) -> list[str]:
    """Does what the command line asks for; returns the problems.

    Raises:
        ValueError: If the dataset or the episode cannot be read.
        RuntimeError: If matplotlib or Rerun is missing.
    """
    if args.moments < 1:
        raise ValueError(f"--moments is {args.moments}; it must be at least 1")
    episode = Episode(args.dataset, args.episode)
    lines, problems = describe(episode)
    print("\n".join(lines))
    if args.picture:
        save_png(args.picture, draw(episode, args.moments))
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
    parser.add_argument("--dataset", required=True, help="LeRobot dataset: folder or Hub id")
    parser.add_argument("--episode", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw some moments with their labels"
    )
    parser.add_argument("--moments", type=int, default=5, help="of the picture (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.rrd", help="write a recording for Rerun's viewer"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
