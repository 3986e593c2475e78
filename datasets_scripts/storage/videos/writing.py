"""Write the video files of a dataset as LeRobot's recorder would: H.264 for RGB, lossless HEVC for depth.

The settings, the depth code and the statistics are LeRobot's. They are repeated here because importing its
datasets package costs every worker process more than ten seconds of CPU time; tests compare the two.
"""

import io
import itertools
import math
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.videos.depth_reading import DEPTH_BITS

# A key frame every other frame, for random access; fast to encode and decode on a CPU.
RGB_OPTIONS = {"g": "2", "crf": "18", "preset": "veryfast", "threads": "1"}
# One thread per encoder: episodes run in parallel, and the bytes do not depend on the machine.
# Blocks of 16 px: in pictures that fit into one block, x265's lossless mode wrote wrong pixels in a third of
# our trials; with several blocks it never did, and the files grow by 1.5 %.
# No B frames and only closed groups: otherwise readers that seek, LeRobot's too, lose frames where episodes
# were joined.
DEPTH_OPTIONS = {
    **{"g": "2", "crf": "30", "threads": "1"},
    "x265-params": "lossless=1:ctu=16:bframes=0:open-gop=0:log-level=none",
}
MIN_DEPTH_SIDE_PX = 32

# LeRobot's 12-bit logarithmic depth code: fine steps near, coarse steps far.
MAX_DEPTH_CODE = 2**DEPTH_BITS - 1
DEPTH_MIN_M, DEPTH_SHIFT_M = 0.01, 3.5
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)


def lerobot_rgb_encoder() -> Any:
    """LeRobot's description of our RGB videos."""
    from lerobot.configs.video import RGBEncoderConfig

    options = {"g": int(RGB_OPTIONS["g"]), "crf": int(RGB_OPTIONS["crf"]), "preset": RGB_OPTIONS["preset"]}
    return RGBEncoderConfig(vcodec="h264", **options)


def lerobot_depth_encoder(depth_max_m: float) -> Any:
    """LeRobot's description of our depth videos: its defaults with a nearer limit."""
    from lerobot.configs.video import DepthEncoderConfig

    options = {"x265-params": DEPTH_OPTIONS["x265-params"]}
    return DepthEncoderConfig(depth_max=depth_max_m, extra_options=options)


def encode_rgb(frames: Iterable[np.ndarray], fps: int, options: dict[str, str] = RGB_OPTIONS) -> bytes:
    """An mp4 of `(H, W, 3)` uint8 RGB frames, all of one size with even sides.

    Raises:
        ValueError: If there is no frame.
    """
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
    """Encode `(F, H, W)` float32 depth in meters into an mp4; errors are those of `DepthVideo`."""
    file = io.BytesIO()
    with DepthVideo(file, fps, depth_max_m) as video:
        video.add(frames_m)
    return file.getvalue()


class DepthVideo:
    """Writes a depth video run by run; leaving the `with` block decodes it and compares every pixel.

    Args:
        file (`BinaryIO`): Output, readable and seekable.
        fps (`float`): Frames per second.
        depth_max_m (`float`): Farthest depth kept, meters.

    Raises:
        ValueError: If the pictures are smaller than 32 px (see `DEPTH_OPTIONS`).
        OSError: If the disk is full.
        RuntimeError: If the encoder did not keep every pixel, which its lossless mode promises.
    """

    def __init__(self, file: BinaryIO, fps: float, depth_max_m: float):
        self._file, self._fps, self._depth_max_m = file, fps, depth_max_m
        self._container = av.open(file, "w", format="mp4")
        self._stream: Any = None
        self._checksums: list[int] = []

    def add(self, frames_m: np.ndarray) -> None:
        """Append `(k, H, W)` float32 meters, 0 where invalid."""
        if self._stream is None:
            if min(frames_m.shape[1:]) < MIN_DEPTH_SIDE_PX:
                raise ValueError(f"depth frames of {frames_m.shape[1:]} px are too small; use 32 px or more")
            rate = Fraction(self._fps).limit_denominator(1001)
            self._stream = self._container.add_stream("hevc", rate, options=DEPTH_OPTIONS)
            self._stream.pix_fmt = "gray12le"
            self._stream.height, self._stream.width = frames_m.shape[1:]
        for codes in depth_codes(frames_m, self._depth_max_m):
            self._checksums.append(zlib.crc32(codes.tobytes()))
            frame = av.VideoFrame.from_ndarray(codes, format="gray12le")
            self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> "DepthVideo":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if kind is None and self._read_checksums() != self._checksums:
            raise RuntimeError(
                "the HEVC encoder changed depth pixels in its lossless mode; update PyAV (pip install -U av)"
            )

    def _read_checksums(self) -> list[int]:
        self._file.seek(0)
        with av.open(self._file) as container:
            frames = (frame.to_ndarray(format="gray12le") for frame in container.decode(video=0))
            return [zlib.crc32(codes.tobytes()) for codes in frames]


def depth_codes(depth_m: np.ndarray, depth_max_m: float) -> np.ndarray:
    """LeRobot's depth code: meters, any shape -> uint16 in 0..4095, clipped to [0.01 m, depth_max_m]."""
    low, high = np.log(DEPTH_MIN_M + DEPTH_SHIFT_M), np.log(depth_max_m + DEPTH_SHIFT_M)
    depth_m = np.fmax(depth_m, np.float32(0))  # NaN and negative: nothing was measured
    fraction = (np.log(depth_m.astype(np.float32) + np.float32(DEPTH_SHIFT_M)) - low) / (high - low)
    return np.rint(fraction * MAX_DEPTH_CODE).clip(0, MAX_DEPTH_CODE).astype(np.uint16)


def video_stats(frames: np.ndarray) -> dict[str, list]:
    """Statistics of a video column in LeRobot's form.

    Args:
        frames (`np.ndarray`): `(F, H, W, 3)` uint8 RGB, or `(F, H, W)` float32 depth in meters.

    Returns:
        `dict[str, list]`: `min`, `max`, `mean`, `std` and quantiles of shape (channels, 1, 1), RGB scaled to
        [0, 1], depth in meters; `count` is the number of frames.
    """
    scale = 255.0 if frames.dtype == np.uint8 else 1.0
    pixels = frames.reshape(-1, 3 if frames.ndim == 4 else 1).astype(np.float64) / scale
    stats = {name: getattr(pixels, name)(axis=0) for name in ("min", "max", "mean", "std")}
    for quantile, values in zip(QUANTILES, np.quantile(pixels, QUANTILES, axis=0), strict=True):
        stats[f"q{int(quantile * 100):02d}"] = values
    shaped = {name: value.reshape(-1, 1, 1).tolist() for name, value in stats.items()}
    return {**shaped, "count": [len(frames)]}


def join_videos(
    meta: Any, key: str, paths: Sequence[Path], lengths: Sequence[int], depth_max_m: float | None = None
) -> list[dict[str, int | float]]:
    """Concatenate the episodes of one video column into the files of a LeRobot dataset.

    Args:
        meta (`LeRobotDatasetMetadata`): Metadata of the dataset being written; gets the encoder's settings.
        key (`str`): Video column.
        paths (`Sequence[Path]`): One mp4 per episode, all with the same settings.
        lengths (`Sequence[int]`): Frames of each episode.
        depth_max_m (`float`, *optional*): Farthest depth kept of a depth column, meters.

    Returns:
        `list[dict]`: Where each episode went, as LeRobot's episode metadata names it.

    Raises:
        OSError: If a file does not hold the frames it should.
    """
    av.logging.set_libav_level(av.logging.ERROR)  # a note per file would break the progress bars
    places: list[dict[str, int | float]] = []
    sizes = [path.stat().st_size for path in paths]
    for chunk, file, start, stop in group_files(sizes, meta.video_files_size_in_mb * 1e6, meta.chunks_size):
        target = meta.root / meta.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        concatenate_videos(paths[start:stop], target)
        expected = sum(lengths[start:stop])
        with av.open(str(target)) as container:
            found = sum(packet.size > 0 for packet in container.demux(video=0))  # without decoding
        if found != expected:
            raise OSError(f"{target} holds {found} frames instead of {expected}; is the disk full?")
        seconds = (np.cumsum([0, *lengths[start:stop]]) / meta.fps).tolist()
        for first, last in itertools.pairwise(seconds):
            place = {"chunk_index": chunk, "file_index": file, "from_timestamp": first, "to_timestamp": last}
            places.append({f"videos/{key}/{name}": value for name, value in place.items()})
    if depth_max_m is None:
        meta.update_video_info(key, lerobot_rgb_encoder())
    else:
        meta.features[key]["info"]["depth_unit"] = "m"
        meta.update_video_info(key, lerobot_depth_encoder(depth_max_m))
    return places


def concatenate_videos(paths: Sequence[Path], target: Path) -> None:
    """Joins videos without encoding them again; the bytes are those of LeRobot's `concatenate_video_files`.

    That one takes no apostrophe in a path, and works in the system's temporary folder, where it leaves its
    files if the disk is full.
    """
    with (
        write_whole_file(target) as temporary,
        tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".", suffix=".ffconcat") as listing,
    ):
        names = (str(path.resolve()).replace("'", r"'\''") for path in paths)
        listing.write("ffconcat version 1.0\n" + "".join(f"file '{name}'\n" for name in names))
        listing.flush()
        with (
            av.open(listing.name, format="concat", options={"safe": "0"}) as episodes,
            av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as joined,
        ):
            stream = episodes.streams.video[0]
            copied = joined.add_stream_from_template(stream, opaque=True)
            copied.time_base = stream.time_base
            for packet in episodes.demux(stream):
                if packet.dts is not None:  # the last one only ends the stream
                    packet.stream = copied
                    joined.mux(packet)


def group_files(
    sizes: Sequence[float], limit: float, chunks_size: int
) -> Iterator[tuple[int, int, int, int]]:
    """Group episodes of some sizes into files up to a limit: yields `(chunk, file, start, stop)`."""
    start, total, n_files = 0, 0.0, 0
    for index, size in enumerate([*sizes, math.inf]):
        if index > start and total + size > limit:
            yield *divmod(n_files, chunks_size), start, index
            start, total, n_files = index, 0.0, n_files + 1
        total += size
