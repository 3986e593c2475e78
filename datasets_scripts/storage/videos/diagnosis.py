"""Say why a video has no frame for every row: the camera's rate, missing frames, sizes, or damage."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from datasets_scripts.storage.videos.depth_reading import DEPTH_BITS

__all__ = ["explain_rows", "explain_video"]


def explain_rows(times_s: np.ndarray, video_s: float, fps: float) -> str | None:
    """Why rows of an episode would be given frames of another row or episode, if they would.

    Args:
        times_s (`numpy.ndarray`): Times of all rows of the episode, from its beginning.
        video_s (`float`): Seconds that its video lasts, as the metadata says.
        fps (`float`): Frames per second of the dataset.
    """
    n_rows, n_frames = len(times_s), video_s * fps
    if n_rows - n_frames > 1.5:  # some writers leave out the time of the last frame
        return (
            f"it has about {n_frames:.0f} frames for {n_rows} rows: the camera gave "
            f"{n_frames / n_rows * fps:.4g} frames per second and the dataset has {fps:g}; record it at that "
            "rate, or repeat frames so that every row has one"
        )
    outside = (times_s < -0.5 / fps) | (times_s > video_s + 1.5 / fps)
    if outside.any() or not (np.diff(times_s) > 0).all():  # false for NaN
        return (
            f"the timestamps of its rows, from {times_s[0]:.6g} to {times_s[-1]:.6g} s, do not count up from "
            f"0 to its end at {video_s:.6g} s: write timestamp = frame_index / fps"
        )
    return None


def explain_video(path: Path, times_s: Sequence[float], fps: float, is_depth: bool) -> str | None:
    """Why the frames of an episode cannot be read, with a remedy; `None` if the file is damaged.

    Args:
        path (`Path`): Video file.
        times_s (`Sequence[float]`): Times in the file of all rows of the episode, ascending.
        fps (`float`): Frames per second of the dataset.
        is_depth (`bool`): Whether it is a depth video.
    """
    times = np.asarray(times_s)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            bits, n_promised = stream.codec_context.format.components[0].bits, stream.frames
            packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
            shown = np.sort([float(packet.pts * stream.time_base) for packet in packets])
            sizes = _read_sizes(container, stream, times[0])
    except (av.FFmpegError, IndexError, AttributeError):
        return None
    if is_depth and bits < DEPTH_BITS:
        return (
            f"its pixels have {bits} bits, and depth videos have {DEPTH_BITS}: record it as a depth feature"
        )
    if len(sizes) > 1:
        found = " and ".join(f"{width}x{height}" for width, height in sizes)
        return f"it has pictures of {found} px: resize them to one size"
    if len(shown) < max(n_promised, 2):
        return None
    remedy = (
        f"resample it (`ffmpeg -i OLD.mp4 -vf fps={fps:g} NEW.mp4`), or leave out the camera or the episode"
    )
    if np.abs(times - times[0] - np.arange(len(times)) / fps).max() > 0.2 / fps:
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        return (
            f"the timestamps of the episode's rows are those of {rate:.4g} frames per second, unevenly, and "
            f"the dataset has {fps:g}: write timestamp = frame_index / fps"
        )
    inside = shown[(shown > times[0] - 0.5 / fps) & (shown < times[-1] + 0.5 / fps)]
    steps = np.diff(inside)
    if len(steps) == 0:
        return f"it has no frames from {times[0]:.3f} to {times[-1]:.3f} s: {remedy}"
    steady = steps[steps < 1.5 * np.median(steps)]
    rate = 1 / steady.mean()
    if abs(rate / fps - 1) * len(times) > 0.1 and abs(rate / fps - 1) > 1e-3:
        return f"the camera gave {rate:.4g} frames per second and the dataset has {fps:g}: {remedy}"
    if (n_missing := len(times) - len(inside)) > 0:
        nearest = np.abs(inside - times[:, None]).min(1)
        first = int(np.argmax(nearest > 0.5 / fps))
        return (
            f"{n_missing} of its {len(times)} frames are missing, the first at {times[first]:.3f} s: {remedy}"
        )
    offset = float(np.median(inside[: len(times)] - times))
    if abs(offset) > 0.05 / fps:
        return f"its frames are {offset:+.4f} s away from the times of the rows: {remedy}"
    return None


def _read_sizes(container: av.container.InputContainer, stream: av.VideoStream, time_s: float) -> list:
    """Distinct `(width, height)` of the file's first frame and of that at a time."""
    sizes = []
    for start in (0, round(time_s / stream.time_base)):
        container.seek(start, stream=stream)
        frame = next(container.decode(stream), None)
        sizes += [] if frame is None else [(frame.width, frame.height)]
    return list(dict.fromkeys(sizes))
