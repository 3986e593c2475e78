"""Video files of a dataset as LeRobot's recorder would write them: H.264 for RGB, lossless HEVC for depth.

The settings, the depth code and the statistics are LeRobot's, repeated here in a few lines because importing
its datasets package costs every worker process more than ten seconds of CPU time; tests hold the two against
each other. Files are encoded in memory and written in one go, so that a full disk shows as an error of a
plain write.
"""

import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# A key frame every other frame, for random access; quick to encode and decode on a CPU.
RGB_OPTIONS = {"g": "2", "crf": "18", "preset": "veryfast", "threads": "1"}
# One thread per encoder: episodes run side by side, and the bytes do not depend on the machine.
# Coding blocks of 16 px: in pictures that fit into one block, x265's lossless mode wrote wrong pixels in a
# third of our trials, differently at every run; with several blocks it never did, and the files grow by 1.5
# %.
# No frames that need a later one, and key frames that need nothing before them: else readers that seek lose
# frames where episodes were joined, LeRobot's among them.
DEPTH_OPTIONS = {
    **{"g": "2", "crf": "30", "threads": "1"},
    "x265-params": "lossless=1:ctu=16:bframes=0:open-gop=0:log-level=none",
}
MIN_DEPTH_SIDE_PX = 32

# LeRobot's 12-bit logarithmic depth code: fine steps near, coarse steps far.
MAX_DEPTH_CODE = 4095
DEPTH_MIN_M, DEPTH_SHIFT_M = 0.01, 3.5
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)


def lerobot_rgb_encoder() -> Any:
    """LeRobot's description of our RGB videos, for a dataset's metadata."""
    from lerobot.configs.video import RGBEncoderConfig

    return RGBEncoderConfig(
        vcodec="h264", g=int(RGB_OPTIONS["g"]), crf=int(RGB_OPTIONS["crf"]), preset=RGB_OPTIONS["preset"]
    )


def lerobot_depth_encoder(depth_max_m: float) -> Any:
    """LeRobot's description of our depth videos: its defaults with a nearer limit, and silent."""
    from lerobot.configs.video import DepthEncoderConfig

    return DepthEncoderConfig(
        depth_max=depth_max_m, extra_options={"x265-params": DEPTH_OPTIONS["x265-params"]}
    )


def encode_rgb(frames: Iterable[np.ndarray], fps: int, options: dict[str, str] = RGB_OPTIONS) -> bytes:
    """An mp4 of `(H, W, 3)` uint8 RGB frames, all of one size with even sides.

    Raises:
        ValueError: If there is no frame.
    """
    import av

    file, stream = io.BytesIO(), None
    with av.open(file, "w", format="mp4") as container:
        for image in frames:
            if stream is None:
                stream = container.add_stream("h264", fps, options=options)
                stream.pix_fmt = "yuv420p"
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if stream is None:
            raise ValueError("there are no frames to encode")
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_depth(frames_m: np.ndarray, fps: int, depth_max_m: float) -> bytes:
    """Encode `(F, H, W)` float32 depth in metres into an mp4 that LeRobot reads as a depth video.

    Raises:
        ValueError: If the pictures are smaller than 32 px (see `DEPTH_OPTIONS`).
        RuntimeError: If the encoder did not keep every pixel, which its lossless mode promises.
    """
    file = io.BytesIO()
    with DepthVideo(file, fps, depth_max_m) as video:
        video.add(frames_m)
    return file.getvalue()


class DepthVideo:
    """Writes a depth video run by run, and on leaving the `with` block decodes it and compares every pixel.

    Args:
        file (`BinaryIO`): Where to; readable and seekable.
        fps (`float`): Frames per second.
        depth_max_m (`float`): Farthest depth kept, metres.
    """

    def __init__(self, file: BinaryIO, fps: float, depth_max_m: float):
        import av

        self._file, self._fps, self._depth_max_m = file, fps, depth_max_m
        self._container = av.open(file, "w", format="mp4")
        self._stream: Any = None
        self._checksums: list[int] = []

    def add(self, frames_m: np.ndarray) -> None:
        """Append `(k, H, W)` float32 metres, 0 where invalid.

        Raises:
            ValueError: If the pictures are smaller than 32 px (see `DEPTH_OPTIONS`).
            OSError: If the disk is full.
        """
        import av

        if self._stream is None:
            if min(frames_m.shape[1:]) < MIN_DEPTH_SIDE_PX:
                raise ValueError(f"depth frames of {frames_m.shape[1:]} px are too small; use 32 px or more")
            rate = Fraction(self._fps).limit_denominator(1001)
            self._stream = self._container.add_stream("hevc", rate, options=DEPTH_OPTIONS)
            self._stream.pix_fmt = "gray12le"
            self._stream.height, self._stream.width = frames_m.shape[1:]
        for codes in depth_codes(frames_m, self._depth_max_m):
            frame = av.VideoFrame(codes.shape[1], codes.shape[0], "gray12le")
            plane = frame.planes[0]  # its rows are longer than the picture's
            rows = np.frombuffer(plane, dtype=np.uint16).reshape(codes.shape[0], plane.line_size // 2)
            rows[:, : codes.shape[1]] = codes
            self._checksums.append(zlib.crc32(codes.tobytes()))
            self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> "DepthVideo":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        import av

        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if kind is not None:
            return
        self._file.seek(0)
        with av.open(self._file) as container:
            found = [
                zlib.crc32(frame.to_ndarray(format="gray12le").tobytes())
                for frame in container.decode(video=0)
            ]
        if found != self._checksums:
            raise RuntimeError(
                "the HEVC encoder changed depth pixels in its lossless mode; update PyAV (pip install -U av)"
            )


def depth_codes(depth_m: np.ndarray, depth_max_m: float) -> np.ndarray:
    """LeRobot's depth code: metres, any shape -> uint16 in 0..4095, clipped to [0.01 m, depth_max_m]."""
    low, high = np.log(DEPTH_MIN_M + DEPTH_SHIFT_M), np.log(depth_max_m + DEPTH_SHIFT_M)
    fraction = (np.log(depth_m.astype(np.float32) + np.float32(DEPTH_SHIFT_M)) - low) / (high - low)
    return np.rint(fraction * MAX_DEPTH_CODE).clip(0, MAX_DEPTH_CODE).astype(np.uint16)


def video_stats(frames: np.ndarray) -> dict[str, list]:
    """Statistics of a video column in LeRobot's form.

    Args:
        frames (`np.ndarray`): `(F, H, W, 3)` uint8 RGB, or `(F, H, W)` float32 depth in metres.

    Returns:
        `dict[str, list]`: `min`, `max`, `mean`, `std` and quantiles with shape (channels, 1, 1), RGB scaled
        to [0, 1], depth in metres; `count` is the number of frames.
    """
    scale = 255.0 if frames.dtype == np.uint8 else 1.0
    pixels = frames.reshape(-1, 3 if frames.ndim == 4 else 1).astype(np.float64) / scale
    stats = {
        "min": pixels.min(axis=0),
        "max": pixels.max(axis=0),
        "mean": pixels.mean(axis=0),
        "std": pixels.std(axis=0),
    }
    for name, values in zip(QUANTILES, np.quantile(pixels, QUANTILES, axis=0), strict=True):
        stats[f"q{int(name * 100):02d}"] = values
    shaped = {name: value.reshape(-1, 1, 1).tolist() for name, value in stats.items()}
    return {**shaped, "count": [len(frames)]}


def join_videos(
    meta: Any, key: str, paths: Sequence[Path], lengths: Sequence[int]
) -> list[dict[str, int | float]]:
    """Concatenate the episodes of one video column into the files of a LeRobot dataset.

    Args:
        meta (`LeRobotDatasetMetadata`): Metadata of the dataset being written.
        key (`str`): Video column.
        paths (`Sequence[Path]`): One mp4 per episode, all with the same settings.
        lengths (`Sequence[int]`): Frames of each episode.

    Returns:
        `list[dict]`: Where each episode went, as LeRobot's episode metadata wants it.

    Raises:
        OSError: If a file does not hold the frames it should.
    """
    import av
    from lerobot.datasets.utils import update_chunk_file_indices
    from lerobot.datasets.video_utils import concatenate_video_files

    av.logging.set_libav_level(av.logging.ERROR)  # a note per file would tear the progress bars
    places: list[dict[str, int | float]] = []
    chunk, file = 0, 0
    for start, stop in _group_by_size(paths, meta.video_files_size_in_mb * 1e6):
        if start:
            chunk, file = update_chunk_file_indices(chunk, file, meta.chunks_size)
        target = meta.root / meta.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        concatenate_video_files(list(paths[start:stop]), target)
        target.chmod(0o644)  # LeRobot writes it as a private temporary file first
        expected = sum(lengths[start:stop])
        found = count_frames(target)
        if found != expected:
            raise OSError(f"{target} holds {found} frames instead of {expected}; is the disk full?")
        seconds = np.concatenate([[0], np.cumsum(lengths[start:stop])]) / meta.fps
        for first, last in zip(seconds[:-1], seconds[1:], strict=True):
            place = {
                "chunk_index": chunk,
                "file_index": file,
                "from_timestamp": float(first),
                "to_timestamp": float(last),
            }
            places.append({f"videos/{key}/{name}": value for name, value in place.items()})
    return places


def count_frames(path: Path) -> int:
    """Number of frames in a video file, without decoding."""
    import av

    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _group_by_size(paths: Sequence[Path], limit_bytes: float) -> Iterator[tuple[int, int]]:
    """Split files into runs whose sizes add up to at most the limit: `(start, stop)` each."""
    start, total = 0, 0
    for index, path in enumerate(paths):
        size = path.stat().st_size
        if index > start and total + size > limit_bytes:
            yield start, index
            start, total = index, 0
        total += size
    yield start, len(paths)
