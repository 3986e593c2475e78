"""Video files of a dataset as LeRobot's recorder would write them: H.264 for RGB, lossless HEVC for depth.

The settings, the depth code and the statistics are LeRobot's, repeated here in a few lines because importing
its datasets package costs every worker process more than ten seconds of CPU time; tests hold the two against
each other. Files are encoded in memory and written in one go, so that a full disk shows as an error of a
plain write.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A key frame every other frame, for random access; quick to encode and decode on a CPU.
RGB_OPTIONS = {"g": "2", "crf": "18", "preset": "veryfast", "threads": "1"}
# One thread per encoder: episodes run side by side, and the bytes do not depend on the machine.
# Coding blocks of 16 px: in pictures that fit into one block, x265's lossless mode wrote wrong pixels in a
# third of our trials, differently at every run; with several blocks it never did, and the files grow by 1.5
# %.
DEPTH_OPTIONS = {"g": "2", "crf": "30", "threads": "1", "x265-params": "lossless=1:ctu=16:log-level=none"}
MIN_DEPTH_SIDE_PX = 32

# LeRobot's 12-bit logarithmic depth code: fine steps near, coarse steps far.
DEPTH_CODES = 4095
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


def encode_rgb(frames: np.ndarray, fps: int) -> bytes:
    """Encode `(F, H, W, 3)` uint8 RGB frames into an mp4."""
    import av

    def to_frame(image: np.ndarray) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(image, format="rgb24")

    return _encode(frames, fps, "h264", "yuv420p", RGB_OPTIONS, to_frame)


def encode_depth(frames_m: np.ndarray, fps: int, depth_max_m: float) -> bytes:
    """Encode `(F, H, W)` float32 depth in metres into an mp4 that LeRobot reads as a depth video.

    Raises:
        ValueError: If the pictures are smaller than 32 px (see `DEPTH_OPTIONS`).
        RuntimeError: If the encoder did not keep every pixel, which its lossless mode promises.
    """
    import av

    if min(frames_m.shape[1:]) < MIN_DEPTH_SIDE_PX:
        raise ValueError(f"depth frames of {frames_m.shape[1:]} px are too small; use 32 px or more")

    def to_frame(codes: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame(codes.shape[1], codes.shape[0], "gray12le")
        plane = frame.planes[0]  # its rows are longer than the picture's
        rows = np.frombuffer(plane, dtype=np.uint16).reshape(codes.shape[0], plane.line_size // 2)
        rows[:, : codes.shape[1]] = codes
        return frame

    codes = depth_codes(frames_m, depth_max_m)
    data = _encode(codes, fps, "hevc", "gray12le", DEPTH_OPTIONS, to_frame)
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="gray12le") for frame in container.decode(video=0)]
    if not np.array_equal(decoded, codes):
        raise RuntimeError(
            "the HEVC encoder changed depth pixels in its lossless mode; update PyAV (pip install -U av)"
        )
    return data


def depth_codes(depth_m: np.ndarray, depth_max_m: float) -> np.ndarray:
    """LeRobot's depth code: metres, any shape -> uint16 in 0..4095, clipped to [0.01 m, depth_max_m]."""
    low, high = np.log(DEPTH_MIN_M + DEPTH_SHIFT_M), np.log(depth_max_m + DEPTH_SHIFT_M)
    fraction = (np.log(depth_m.astype(np.float32) + np.float32(DEPTH_SHIFT_M)) - low) / (high - low)
    return np.rint(fraction * DEPTH_CODES).clip(0, DEPTH_CODES).astype(np.uint16)


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


def _encode(
    frames: np.ndarray,
    fps: int,
    codec: str,
    pixel_format: str,
    options: dict[str, str],
    to_frame: Callable[[np.ndarray], Any],
) -> bytes:
    """Encode frames with PyAV into an mp4 held in memory."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, fps, options=options)
        stream.pix_fmt = pixel_format
        stream.height, stream.width = frames.shape[1:3]
        for image in frames:
            container.mux(stream.encode(to_frame(image)))
        container.mux(stream.encode(None))
    return file.getvalue()


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
