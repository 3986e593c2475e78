"""An episode with its labels as a Rerun recording.

Every camera has its own space, `<camera>`: image, depth and points in 2D under `<camera>/lens`, and, where
the intrinsics are known, depth and tracks in 3D, in the camera's axes (x right, y down, z ahead). The poses
of the cameras are not known.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datasets_scripts.extras import install_advice
from datasets_scripts.inspection.drawing import locate_points
from datasets_scripts.inspection.labeled_episode import Camera, LabeledEpisode
from datasets_scripts.storage.atomic import write_whole_file

__all__ = ["import_rerun", "open_recording", "record_episode"]

STILL_RGB, MOVING_RGB = (110, 160, 220), (255, 120, 0)


def import_rerun():
    """The module, or a `RuntimeError` that names the extra to install."""
    try:
        import rerun
    except ImportError as error:
        raise RuntimeError(f"recordings need Rerun ({error}); run `{install_advice('viz')}`") from error
    return rerun


@contextlib.contextmanager
def open_recording(path: str | Path, name: str, blueprint) -> Iterator:
    """Yields a recording that is written to `path` (`*.rrd`); the file appears only when it is whole.

    Raises:
        RuntimeError: If Rerun is missing; says what to install.
    """
    rr = import_rerun()
    with write_whole_file(path) as temporary:
        recording = rr.RecordingStream(name)
        recording.save(temporary, default_blueprint=blueprint)
        yield recording
        recording.flush()
        recording.disconnect()


def record_episode(episode: LabeledEpisode, path: str | Path) -> None:
    """Writes an episode for Rerun's viewer; the file appears only when it is whole.

    Args:
        episode (`LabeledEpisode`): What to show; missing labels are left out.
        path (`str` or `Path`): File to write, `*.rrd`.

    Raises:
        RuntimeError: If Rerun is missing; says what to install.
    """
    rr = import_rerun()
    name = f"{Path(episode.rows.name).name}/episode_{episode.number}"
    with open_recording(path, name, _build_blueprint(episode)) as recording:
        recording.log("instruction", rr.TextDocument(episode.task), static=True)
        for camera in episode.cameras:
            _log_lens(recording, camera)
        for key, values in episode.series.items():
            size, names = values.shape[1], episode.rows.features[key].get("names")
            if not (isinstance(names, list) and len(names) == size):
                names = range(size)
            recording.log(key, rr.SeriesLines(names=list(map(str, names))), static=True)
        for first, count in episode.chunks():
            _log_frames(recording, episode, first, count)


def _log_lens(recording, camera: Camera) -> None:
    """The pinhole that turns depth into points in space."""
    import rerun as rr

    if camera.intrinsics is None:
        return
    k = camera.intrinsics
    lens = rr.Pinhole(
        focal_length=(k["fx"], k["fy"]),
        principal_point=(k["cx"], k["cy"]),
        resolution=(k["width"], k["height"]),
        image_plane_distance=0.1,
    )
    recording.log(f"{camera.name}/lens", lens, static=True)


def _log_frames(recording, episode: LabeledEpisode, first: int, count: int) -> None:
    import rerun as rr

    keys = [key for camera in episode.cameras for key in (camera.image_key, camera.depth_key) if key]
    read = {key: episode.read(key, first, count) for key in keys}
    for i in range(count):
        t = first + i
        recording.set_time("frame", sequence=t)
        recording.set_time("time", duration=t / episode.fps)
        for camera in episode.cameras:
            image, lens = read[camera.image_key][i], f"{camera.name}/lens"
            recording.log(f"{lens}/rgb", rr.Image(image).compress())
            if camera.depth_key:
                recording.log(f"{lens}/depth", rr.DepthImage(read[camera.depth_key][i], meter=1.0))
            if camera.points is not None:
                _log_points(recording, camera, t, image.shape[:2])
        for key, values in episode.series.items():
            recording.log(key, rr.Scalars(values[t]))


def _log_points(recording, camera: Camera, t: int, size: tuple[int, int]) -> None:
    """The visible points over the image, and in space."""
    import rerun as rr

    shown = camera.visible[t]
    moving = np.zeros_like(shown) if camera.moving is None else camera.moving
    points, colors = camera.points[t, shown], np.where(moving[shown, None], MOVING_RGB, STILL_RGB)
    height, width = size
    pixels = points[:, :2] * (width, height)  # Rerun counts from the image's outer edge, too
    recording.log(f"{camera.name}/lens/points", rr.Points2D(pixels, colors=colors, radii=0.8))
    if camera.intrinsics is not None:
        space = locate_points(points, camera.intrinsics)
        recording.log(f"{camera.name}/tracks", rr.Points3D(space, colors=colors, radii=0.004))


def _build_blueprint(episode: LabeledEpisode):
    """The first view: every camera flat and in space, the series, the instruction."""
    import rerun.blueprint as rrb

    views = []
    for camera in episode.cameras:
        views.append(rrb.Spatial2DView(origin=f"{camera.name}/lens", name=camera.name))
        if camera.intrinsics is not None and (camera.depth_key or camera.points is not None):
            views.append(rrb.Spatial3DView(origin=camera.name, name=f"{camera.name} in space"))
    views += [rrb.TimeSeriesView(origin=key, name=key) for key in episode.series]
    views.append(rrb.TextDocumentView(origin="instruction", name="instruction"))
    return rrb.Blueprint(rrb.Grid(*views))
