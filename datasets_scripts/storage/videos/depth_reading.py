"""Read depth videos by time from files that stay open: LeRobot's decoder opens one for every window."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

__all__ = ["DEPTH_BITS", "DepthVideos"]

DEPTH_BITS = 12


class DepthVideos:
    """Reads LeRobot's 12-bit depth videos; keeps the last `max_open` files open.

    The frames are those of LeRobot's own decoder.
    """

    def __init__(self, max_open: int):
        self.max_open = max_open
        self._open: OrderedDict[Path, av.container.InputContainer] = OrderedDict()
        self._process = os.getpid()

    def read(self, path: Path, times_s: Sequence[float], tolerance_s: float) -> np.ndarray:
        """Frames nearest to ascending times, at most `tolerance_s` away.

        Returns:
            `numpy.ndarray`: `(n, H, W)` uint16, codes of 12 bits.

        Raises:
            ValueError: If there is no frame within the tolerance.
            av.FFmpegError: If the file is damaged.
        """
        container = self._container(path)
        stream = container.streams.video[0]
        first = round(times_s[0] / stream.time_base)
        # A frame shown before a key frame may need the key frame before that. Where episodes were joined,
        # decoding from one into the next loses the first frame of the next, which is a key frame.
        for start in (first - 1, first + round(tolerance_s / stream.time_base), 0):
            try:
                frames = _decode(container, start, times_s[-1])
            except Exception:
                self._open.pop(path).close()
                raise
            decoded_s = np.array([frame.time for frame in frames])
            distance_s = np.abs(decoded_s - np.asarray(times_s)[:, None])  # (wanted, decoded)
            if frames and (distance_s.min(1) <= tolerance_s).all():
                return np.stack([frames[i].to_ndarray(format="gray12le") for i in distance_s.argmin(1)])
        raise ValueError(f"it has no frame within {tolerance_s:.4f} s of every requested time")

    def close(self) -> None:
        """Closes all files; they are opened again when they are read."""
        if self._process == os.getpid():
            for container in self._open.values():
                container.close()
        self._open.clear()

    def _container(self, path: Path) -> av.container.InputContainer:
        if self._process != os.getpid():  # a forked process shares the file positions of its parent
            self._open, self._process = OrderedDict(), os.getpid()
        if path not in self._open:
            if len(self._open) >= self.max_open:
                self._open.popitem(last=False)[1].close()
            self._open[path] = av.open(str(path))
            bits = self._open[path].streams.video[0].codec_context.format.components[0].bits
            if bits < DEPTH_BITS:  # it would be stretched to 12
                self._open.pop(path).close()
                raise ValueError(f"its pixels have {bits} bits instead of {DEPTH_BITS}")
            # Threads would have to be filled again after every seek.
            self._open[path].streams.video[0].codec_context.thread_count = 1
        self._open.move_to_end(path)
        return self._open[path]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}


def _decode(container: av.container.InputContainer, start: int, last_s: float) -> list[av.VideoFrame]:
    """Frames from the key frame at or before `start`, in ticks, to the first one at or after `last_s`."""
    container.seek(start, stream=container.streams.video[0])
    frames = []
    for frame in container.decode(video=0):
        frames.append(frame)
        if frame.time >= last_s:
            break
    return frames
