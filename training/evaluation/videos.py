"""Episodes over time: small videos, rollouts side by side with their outcome, predictions for Rerun."""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.inspection.drawing import Flow, locate_points
from datasets_scripts.inspection.rerun_recording import import_rerun, open_recording
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.videos.writing import encode_rgb
from training.evaluation.predictions import Moment, Prediction

__all__ = ["record_predictions", "rollout_grid", "write_video"]

GREEN, RED, GREY = (40, 160, 70), (200, 50, 45), (90, 90, 90)
# Recorded and predicted, in the colors of the Space's plots.
SIDES = {"recorded": (59, 130, 246), "predicted": (249, 115, 22)}
PICTURE_PAIRS = ("depth", "future_rgb", "future_depth")  # fields of `Moment` that are pairs of pictures


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes frames `(H, W, 3)` uint8 of one size as an .mp4 that browsers play; odd sizes lose a pixel.

    Raises:
        ValueError: If there is no frame.
        OSError: If the file cannot be written; it appears only when it is whole.
    """
    even = (np.ascontiguousarray(f[: len(f) // 2 * 2, : f.shape[1] // 2 * 2]) for f in frames)
    with write_whole_file(path) as temporary:
        temporary.write_bytes(encode_rgb(even, round(fps), {"crf": "20"}))


def rollout_grid(
    clips: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    failures: Sequence[int | None],
    hold: int = 10,
) -> Iterable[np.ndarray]:
    """Clips side by side as `(H', W', 3)` uint8; failures are marked when they happen, successes at the end.

    A clip is the pictures of one rollout, `(H, W, 3)` uint8 of one size. Each has a caption and, if it
    failed, the number of the picture at which it did: there it stops for `hold` frames, and is red from then
    on. A success ends green. The last state is shown for `hold` more frames.
    """
    height, width = clips[0][0].shape[:2]
    factor = max(1, math.ceil(160 / width))  # small pictures are enlarged so that captions fit
    columns = math.ceil(math.sqrt(len(clips) * 1.3))
    rows = math.ceil(len(clips) / columns)
    border, text_height = 3, 14
    tile_height, tile_width = height * factor + text_height + 2 * border, width * factor + 2 * border
    order = [_order_pictures(len(clip), at, hold) for clip, at in zip(clips, failures, strict=True)]
    for step in range(max(map(len, order)) + hold):
        picture = np.zeros((rows * tile_height, columns * tile_width, 3), np.uint8)
        for i, (clip, failed_at) in enumerate(zip(clips, failures, strict=True)):
            place = min(step, len(order[i]) - 1)
            text, color = captions[i], GREY
            if failed_at is not None and place >= failed_at:
                text, color = f"failed at step {failed_at}: {text}", RED
            elif failed_at is None and step >= len(clip) - 1:
                text, color = f"success: {text}", GREEN
            top, left = i // columns * tile_height, i % columns * tile_width
            tile = picture[top : top + tile_height, left : left + tile_width]
            tile[:] = color
            shown = clip[order[i][place]].repeat(factor, 0).repeat(factor, 1)
            tile[border : border + shown.shape[0], border : border + shown.shape[1]] = shown
            tile[-text_height:] = _draw_label(text, color, text_height, tile_width)
        yield picture


def _order_pictures(count: int, failed_at: int | None, hold: int) -> list[int]:
    """Which picture of a clip is shown at each frame; the one of a failure `hold` frames longer."""
    order = list(range(count))
    return order if failed_at is None else sorted(order + [failed_at] * hold)


@functools.lru_cache(maxsize=128)
def _draw_label(text: str, color: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), color)
    ImageDraw.Draw(image).text((4, 1), text, fill=(255, 255, 255))
    return np.asarray(image)


def record_predictions(
    path: str | Path,
    predictions: Iterable[Prediction],
    name: str,
    fps: float,
    intrinsics: Mapping[str, Mapping | None],
) -> None:
    """Writes predictions beside what happened for Rerun's viewer.

    A view's pictures are under its name: `camera` with the trails of the flow, `depth`, `future_rgb` and
    `future_depth`, each `recorded` and `predicted`; `space` has the flow in the camera's axes where its
    intrinsics are known. `action` and `progress` are series. What does not exist is left out.

    Args:
        path (`str` or `Path`): File to write, `*.rrd`; it appears only when it is whole.
        predictions (`Iterable[Prediction]`): At least one, all with the same views and objectives.
        name (`str`): Title of the recording.
        fps (`float`): Frames of the dataset per second.
        intrinsics (`Mapping`): By view: fx, fy, cx, cy in pixels, height, width; `None` if unknown.

    Raises:
        RuntimeError: If Rerun is missing; says what to install.
    """
    rr = import_rerun()
    predictions = iter(predictions)
    first = next(predictions)
    with open_recording(path, name, _arrange_predictions(first, intrinsics)) as recording:
        for prediction in itertools.chain([first], predictions):
            recording.set_time("frame", sequence=prediction.frame)
            recording.set_time("time", duration=prediction.frame / fps)
            for view, moment in prediction.views.items():
                recording.log(f"{view}/camera", _to_image(moment.camera))
                _log_pictures(recording, view, moment)
                _log_flow(recording, view, moment, intrinsics.get(view))
            for title in ("progress", "actions"):
                for side, value in zip(SIDES, getattr(prediction, title) or (), strict=False):
                    if value is not None:
                        newest = value if title == "progress" else np.nan_to_num(value[0])
                        recording.log(f"{title}/{side}", rr.Scalars(newest))


def _to_image(picture: np.ndarray):
    """`(H, W, 3)` in [0, 1] as Rerun keeps it."""
    rr = import_rerun()
    return rr.Image((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).compress()


def _log_pictures(recording, view: str, moment: Moment) -> None:
    rr = import_rerun()
    for field in PICTURE_PAIRS:
        for side, picture in zip(SIDES, getattr(moment, field) or (), strict=False):
            if picture is not None:
                is_depth = field != "future_rgb"
                shown = rr.DepthImage(np.nan_to_num(picture), meter=1.0) if is_depth else _to_image(picture)
                recording.log(f"{view}/{field}/{side}", shown)
            elif field != "depth":  # past the end: otherwise the viewer would keep showing the last one
                recording.log(f"{view}/{field}/{side}", rr.Clear(recursive=False))


def _log_flow(recording, view: str, moment: Moment, intrinsics: Mapping | None) -> None:
    """Trails of moving points over the image and, with intrinsics, in space."""
    rr = import_rerun()
    for (side, color), flow in zip(SIDES.items(), moment.flow or (), strict=False):
        if flow is None:
            continue
        height, width = moment.camera.shape[:2]
        trails = _join_trails(flow)
        flat = [trail[:, :2] * (width, height) for trail in trails]
        recording.log(f"{view}/camera/flow_{side}", rr.LineStrips2D(flat, colors=color, radii=0.4))
        if intrinsics is not None and flow.points.shape[-1] == 3:
            space = [locate_points(trail, intrinsics) for trail in trails]
            recording.log(f"{view}/space/flow_{side}", rr.LineStrips3D(space, colors=color, radii=0.002))


def _join_trails(flow: Flow) -> list[np.ndarray]:
    """The shown part of the way of each moving point, `(n, 2 or 3)`, of at least two steps."""
    trails = [flow.points[flow.shown[:, p], p] for p in np.flatnonzero(flow.moving)]
    return [trail for trail in trails if len(trail) > 1]


def _arrange_predictions(first: Prediction, intrinsics: Mapping[str, Mapping | None]):
    """The first view of a recording: a row per camera and kind of picture, recorded beside predicted."""
    import rerun.blueprint as rrb

    rows = []
    for view, moment in first.views.items():
        shown = [field for field in PICTURE_PAIRS if getattr(moment, field)]
        places = [f"{view}/camera", *(f"{view}/{field}/{side}" for field in shown for side in SIDES)]
        tiles = [rrb.Spatial2DView(origin=place, name=place) for place in places]
        if moment.flow is not None and intrinsics.get(view):
            tiles.append(rrb.Spatial3DView(origin=f"{view}/space", name=f"{view} in space"))
        rows.append(rrb.Horizontal(*tiles))
    series = [name for name in ("progress", "actions") if getattr(first, name) is not None]
    if series:
        rows.append(rrb.Horizontal(*(rrb.TimeSeriesView(origin=name, name=name) for name in series)))
    return rrb.Blueprint(rrb.Vertical(*rows))
