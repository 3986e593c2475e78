"""Frames in a file, compressed one by one without loss, to hold a dataset for which raw frames are too large.

Each row of pixels is stored as its difference from the row above (integers wrap around), and zstd takes what
is left. Of rendered pictures of 224 px, RGB became 4 times smaller and depth 6 to 28 times; without the
differences 2, and 4 to 28.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

__all__ = ["PackedFrames", "pack_frame", "write_packed"]


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=1)  # levels above take longer and gain a tenth


def pack_frame(frame: np.ndarray) -> bytes:
    """One frame `(..., H, W)` of any dtype, compressed."""
    bits = np.ascontiguousarray(frame).view(f"u{frame.dtype.itemsize}")
    rows = bits.copy()
    rows[..., 1:, :] -= bits[..., :-1, :]
    return _codec().compress(rows.tobytes(), asbytes=True)


def write_packed(file: BinaryIO, parts: Iterable[np.ndarray]) -> None:
    """Write arrays `(n, ..., H, W)` of frames, then where each frame begins, and the form of all."""
    ends, form = [], {}
    for frames in parts:
        form = {"shape": frames.shape[1:], "dtype": frames.dtype.str}
        for frame in frames:
            file.write(pack_frame(frame))
            ends.append(file.tell())
    file.write(np.array(ends, "<i8").tobytes())
    footer = json.dumps(form | {"frames": len(ends)}).encode()
    file.write(footer + np.array([len(footer)], "<i8").tobytes())


class PackedFrames:
    """A file that `write_packed` wrote, memory-mapped; slices of it are arrays.

    Args:
        path (`Path`): The file.
    """

    def __init__(self, path: Path):
        self._bytes = np.asarray(np.memmap(path, np.uint8, "r"))
        size = int(self._bytes[-8:].view("<i8")[0])
        form = json.loads(self._bytes[-8 - size : -8].tobytes())
        stop = len(self._bytes) - 8 - size
        ends = self._bytes[stop - 8 * form["frames"] : stop].tobytes()
        self._bounds = np.concatenate([[0], np.frombuffer(ends, "<i8")])
        self._shape, self._dtype = tuple(form["shape"]), np.dtype(form["dtype"])

    def __getitem__(self, chosen: slice) -> np.ndarray:
        places = range(len(self._bounds) - 1)[chosen]
        frames = np.empty((len(places), *self._shape), f"u{self._dtype.itemsize}")
        codec, size = _codec(), frames[:1].nbytes
        for frame, place in zip(frames, places, strict=True):
            start, stop = self._bounds[place : place + 2].tolist()
            rows = np.frombuffer(codec.decompress(self._bytes[start:stop], size), frames.dtype)
            np.add.accumulate(rows.reshape(self._shape), axis=-2, dtype=frames.dtype, out=frame)
        return frames.view(self._dtype)
