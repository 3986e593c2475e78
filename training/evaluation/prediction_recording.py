"""Predictions beside what happened, over the frames of an episode, for Rerun's viewer."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from datasets_scripts.inspection.drawing import Flow, locate_points
from datasets_scripts.inspection.rerun_recording import import_rerun, open_recording
from training.evaluation.predictions import Moment, Prediction

__all__ = ["record_predictions"]

# Recorded and predicted, in the colors of the Space's plots.
SIDES = {"recorded": (59, 130, 246), "predicted": (249, 115, 22)}
PICTURE_PAIRS = ("depth", "future_rgb", "future_depth")  # fields of `Moment` that are pairs of pictures


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
