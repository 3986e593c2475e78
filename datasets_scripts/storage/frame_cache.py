"""Read frames of a dataset by row number: decoded on demand, or once into memory-mapped files.

Both readers share one decoder and give the numbers of the stock `LeRobotDataset`. The cache holds what the
decoder gives at the camera's own resolution: uint8 RGB, and for depth the stored 12-bit codes (uint16), half
the size of float32 meters. Files are named after a fingerprint of the videos' sizes and times, so a changed
dataset is decoded again. Episodes for which there is no room are decoded on demand (`cache/frame_files.py`).
"""

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import DepthEncoderConfig
from lerobot.datasets.depth_utils import MM_PER_METRE, dequantize_depth
from lerobot.datasets.video_utils import (
    VideoDecoderCache,
    decode_video_frames,
    decode_video_frames_torchcodec,
    get_safe_default_video_backend,
)
from PIL import Image

from datasets_scripts.columns import (
    UINT16_SENTINELS_M,
    check_meters,
    clean_depth,
    depth_limit_m,
    erase_sentinels,
    is_depth_feature,
)
from datasets_scripts.storage.cache.cache_folder import cache_base, make_room, open_cache_folder
from datasets_scripts.storage.cache.frame_files import FrameFiles, cache_order
from datasets_scripts.storage.cache.packed_frames import pack_frame
from datasets_scripts.storage.dataset_folder import INFO_PATH, check_inside, data_files
from datasets_scripts.storage.dataset_rows import RESTORE, BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.videos.depth_reading import DepthVideos
from datasets_scripts.storage.videos.diagnosis import explain_rows, explain_video
from datasets_scripts.storage.videos.freed_memory import return_freed_memory
from datasets_scripts.storage.videos.writing import MAX_DEPTH_CODE

__all__ = ["CachedFrames", "FrameDecoder", "OnDemandFrames", "depth_code_table", "open_frames"]

logger = logging.getLogger(__name__)

MAX_OPEN_DECODERS = 16  # per process; LeRobot's default of 100 holds a few MB each
DEPTH_MODES = {"L", "I", "I;16", "I;16L", "I;16B", "F"}  # Pillow's, one number per pixel
SAMPLED_FRAMES = 8  # whose packed size is taken for that of all
READS_PER_RETURN = 64  # of windows, after which the memory of closed decoders goes back to the system
GROWTH = 1.1  # factor by which a partial cache must be able to grow before it does


def depth_code_table(encoder: DepthEncoderConfig) -> np.ndarray:
    """Meters by a depth video's 12-bit code, float32 `(4096,)`: LeRobot's own inverse."""
    codes = torch.arange(MAX_DEPTH_CODE + 1).reshape(1, 1, -1)
    options = {name: getattr(encoder, name) for name in ("depth_min", "depth_max", "shift", "use_log")}
    return dequantize_depth(codes, output_unit="m", **options).numpy()[0, 0]


class FrameDecoder:
    """Decodes one image or depth feature of a dataset, whether stored as video or as pictures.

    Args:
        rows (`DatasetRows`): The dataset.
        key (`str`): The feature.
        size (`tuple[int, int]`, *optional*): Height and width that all frames must have; if omitted, those of
            the first frame that is decoded.

    Attributes:
        is_depth (`bool`): Whether frames are depth maps.
        limit_m (`float`): Far limit of the depth storage in meters; `inf` if none.

    Raises:
        BrokenEpisodeError: If a video file is missing.
    """

    def __init__(self, rows: DatasetRows, key: str, size: tuple[int, int] | None = None):
        feature = rows.features[key]
        self.rows, self.key, self.is_depth = rows, key, is_depth_feature(feature)
        self.is_video = feature["dtype"] == "video"
        self.limit_m = depth_limit_m(feature) if self.is_depth else np.inf
        info = feature.get("info") or {}
        self._depth_unit = info.get("depth_unit")
        # A tenth of a frame: LeRobot's fixed 1e-4 s is finer than float32 in long files.
        self._tolerance_s = max(1e-4, 0.1 / rows.fps)
        self._segments = rows.video_segments(key) if self.is_video else None
        if self.is_depth and self.is_video:
            self._table_m = depth_code_table(DepthEncoderConfig.from_video_info(info))
            self._clean_table_m = clean_depth(self._table_m, self.limit_m)
            if self._depth_unit == "mm":  # recorded as uint16, whose largest value is "no measurement"
                code = np.searchsorted(self._table_m, UINT16_SENTINELS_M[0])
                self._clean_table_m[code - 1 : code + 1] = 0
        self._backend = get_safe_default_video_backend()
        self._decoders: tuple[int, VideoDecoderCache] | None = None
        self._depth_videos = DepthVideos(MAX_OPEN_DECODERS)
        self._size = size and (tuple(size), INFO_PATH.as_posix())

    def file_of(self, episode: int) -> Path:
        """The video file that holds an episode, downloaded or not."""
        return self._segments.paths[self._segments.file_of_episode[episode]]

    def decode(self, rows: range) -> np.ndarray:
        """Frames of ascending rows of one episode, as stored.

        Returns:
            `numpy.ndarray`: RGB `(n, 3, H, W)` uint8; depth `(n, H, W)`, uint16 codes of a video or float32
            meters of pictures.

        Raises:
            BrokenEpisodeError: If a file is missing or damaged, or a frame has another size than the others;
                names it.
        """
        frames = self._decode_video(rows) if self.is_video else self._decode_pictures(rows)
        self._check_size(frames.shape[-2:], rows)
        return frames

    def _check_size(self, size: tuple[int, int], rows: range) -> None:
        """Refuse frames of another size than the first: batches and the frame cache have one per column."""
        episode = self.rows.episode_of(rows[0])
        self._size = self._size or (size, f"episode {episode}")
        if size != self._size[0]:
            (height, width), (first_height, first_width) = size, self._size[0]
            raise BrokenEpisodeError(
                f"dataset {self.rows.name}: '{self.key}' has pictures of {width}x{height} px in episode "
                f"{episode}, but {first_width}x{first_height} px in {self._size[1]}: resize them to one "
                "size, or leave episodes out (in training with `episodes` and frame_cache 'off')"
            )

    def meters(self, stored: np.ndarray, clean: bool = True) -> np.ndarray:
        """Depth `(n, H, W)` as stored -> float32 meters; invalid pixels are 0 unless `clean` is false."""
        if not self.is_video:
            return clean_depth(stored, self.limit_m) if clean else stored
        # `mode="clip"` skips a bounds check; codes have 12 bits.
        return np.take(self._clean_table_m if clean else self._table_m, stored, mode="clip")

    def _decode_video(self, rows: range) -> np.ndarray:
        episode = self.rows.episode_of(rows[0])
        path = self.rows.local(self.file_of(episode))
        start_s = float(self._segments.start_s[episode])
        times_s = [start_s + float(t) for t in self.rows.column("timestamp").read(rows)]
        span = self.rows.rows_of(episode)
        video_s = float(self._segments.stop_s[episode]) - start_s
        where = f"video file {path} of '{self.key}', episode {episode}"
        all_times_s = self.rows.column("timestamp").read(span).astype(np.float64)
        if reason := explain_rows(all_times_s, video_s, self.rows.fps):
            raise BrokenEpisodeError(f"{where}: {reason}", path)
        try:
            if self.is_depth:
                return self._depth_videos.read(path, times_s, self._tolerance_s)
            if self._backend == "torchcodec":
                frames = decode_video_frames_torchcodec(
                    path, times_s, self._tolerance_s, decoder_cache=self._decoder_cache(), return_uint8=True
                )
            else:
                frames = decode_video_frames(
                    path, times_s, self._tolerance_s, backend=self._backend, return_uint8=True
                )
        except Exception as error:  # av, torchcodec and LeRobot each have their own
            reason = explain_video(path, start_s + all_times_s, self.rows.fps, self.is_depth) or (
                f"it cannot be decoded at {times_s[0]:.3f} s ({error}); it is damaged or truncated: {RESTORE}"
            )
            raise BrokenEpisodeError(f"{where}: {reason}", path) from error
        return frames.numpy()

    def _decoder_cache(self) -> VideoDecoderCache:
        """Open decoders of this process; one inherited through fork would crash in the child."""
        if self._decoders is None or self._decoders[0] != os.getpid():
            self._decoders = (os.getpid(), VideoDecoderCache(max_size=MAX_OPEN_DECODERS))
        return self._decoders[1]

    def check_files(self, episodes: Sequence[int]) -> None:
        """Decode the last used frame of every video file, so that a truncated one is found early."""
        if self.is_video:
            last_episodes = {int(self._segments.file_of_episode[episode]): episode for episode in episodes}
            for stop in self.rows.episode_stops[list(last_episodes.values())].tolist():
                self.decode(range(stop - 1, stop))
                self.close_files()  # a decoder takes 2 MB, and other processes will open most files

    def close_files(self) -> None:
        """Closes the open video files; they are opened again when they are needed."""
        if self._decoders is not None and self._decoders[0] == os.getpid():
            self._decoders[1].clear()
        self._decoders = None
        self._depth_videos.close()

    def _decode_pictures(self, rows: range) -> np.ndarray:
        stored = self.rows.column(self.key).read(rows)
        try:
            frames = [self._decode_picture(picture) for picture in stored]
        except Exception as error:  # Pillow raises many kinds
            raise BrokenEpisodeError(
                f"dataset {self.rows.name}: a picture of '{self.key}' among frames {rows[0]} to {rows[-1]} "
                f"cannot be decoded ({error}); {RESTORE}"
            ) from error
        for frame in frames:
            self._check_size(frame.shape[-2:], rows)
            try:
                if self.is_depth:
                    check_meters(frame[::4, ::4], self.key)  # every fourth pixel tells the unit
            except ValueError as error:
                where = f"dataset {self.rows.name}, episode {self.rows.episode_of(rows[0])}"
                raise BrokenEpisodeError(f"{where}: {error}") from error
        return np.stack(frames)

    def _decode_picture(self, picture: dict | None) -> np.ndarray:
        source, place = (picture or {}).get("bytes"), (picture or {}).get("path")
        if source is None and not place:
            raise ValueError("it is missing: its row is null")
        if source is None:
            check_inside(self.rows.root, self.rows.root / place)
        image = Image.open(self.rows.root / place if source is None else io.BytesIO(source))
        if not self.is_depth:
            if image.mode in DEPTH_MODES - {"L"}:
                raise ValueError(f"its pixels are {image.mode}, not colors of 8 bits")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        if image.mode not in DEPTH_MODES:
            raise ValueError(f"a depth map has one number per pixel, this picture is {image.mode}")
        depth = np.asarray(image)
        unit = self._depth_unit or ("m" if np.issubdtype(depth.dtype, np.floating) else "mm")
        depth = erase_sentinels(depth).astype(np.float32)
        return depth / np.float32(MM_PER_METRE) if unit == "mm" else depth

    def fingerprint(self) -> str:
        """Hash of all that decides what `decode` returns: files by size and time, episode bounds, feature."""
        segments = self._segments
        paths = segments.paths if segments else data_files(self.rows.root)
        files = []
        for path in paths:
            status = path.stat()
            name = path.relative_to(self.rows.root).as_posix()
            files.append((name, status.st_size, status.st_mtime_ns))
        content = [4, self.describe_reading(), len(self.rows), files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def describe_reading(self) -> str:
        """Hash of what `decode` takes from the metadata: feature, episode bounds, times of rows, videos."""
        segments, content = self._segments, [self.key, self.rows.features[self.key]]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        timestamps = self.rows.column("timestamp").read(range(len(self.rows)))
        for array in (self.rows.episode_starts, timestamps, *((segments.start_s,) if segments else ())):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decoders": None}


class OnDemandFrames:
    """Decodes the frames of each window when it is read: slow, without disk space."""

    def __init__(self, rows: DatasetRows, keys: list[str]):
        self.decoders = {key: FrameDecoder(rows, key) for key in keys}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._n_reads = 0

    def read(self, key: str, rows: range) -> np.ndarray:
        """Frames of one episode: uint8 `(n, 3, H, W)`, or depth `(n, H, W)` in meters."""
        decoder = self.decoders[key]
        stored = self.read_stored(key, rows)
        return decoder.meters(stored) if decoder.is_depth else stored

    def read_stored(self, key: str, rows: range) -> np.ndarray:
        """Frames of one episode as `FrameDecoder.decode` gives them."""
        return self.decoders[key].decode(rows)

    def read_many_stored(self, requests: dict[str, range]) -> dict[str, np.ndarray]:
        """`read_stored` of several features, in threads: decoding releases the GIL."""
        self._n_reads += 1
        if self._n_reads % READS_PER_RETURN == 0:
            return_freed_memory()
        if len(requests) < 2:
            return {key: self.read_stored(key, rows) for key, rows in requests.items()}
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = (os.getpid(), ThreadPoolExecutor(max_workers=len(self.decoders)))
        frames = self._pool[1].map(self.read_stored, requests, requests.values())
        return dict(zip(requests, frames, strict=True))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pool": None}


class CachedFrames(OnDemandFrames):
    """Reads frames from memory-mapped files in `folder`; missing files are made when this is created.

    Args:
        rows (`DatasetRows`): The dataset.
        keys (`list[str]`): Image and depth features to read.
        folder (`Path`): Where the files are.
        room (`Callable[[int], int]`, *optional*): Given the bytes that are missing, how many may be written;
            all if omitted.

    Attributes:
        files (`dict[str, FrameFiles]`): Cache by key.
        n_cached (`int`): Episodes that all files hold.
        nbytes (`int`): Size of these files.
    """

    def __init__(
        self, rows: DatasetRows, keys: list[str], folder: Path, room: Callable[[int], int] | None = None
    ):
        super().__init__(rows, keys)
        self.rows = rows
        bounds = rows.episode_starts, rows.episode_stops
        self.files = {
            key: FrameFiles(folder, key, decoder.fingerprint(), bounds, decoder.decode)
            for key, decoder in self.decoders.items()
        }
        self.n_cached = self._count_cached()
        if self.n_cached < rows.n_episodes:
            self._fill(room)
            self.n_cached = self._count_cached()
        self.nbytes = sum(files.nbytes for files in self.files.values())

    def _count_cached(self) -> int:
        return min(files.n_episodes for files in self.files.values())

    def _fill(self, room: Callable[[int], int] | None) -> None:
        """Write raw frames of all episodes; if they have no room, packed ones of as many as fit."""
        rows, packed, wanted = self.rows, False, self.rows.n_episodes
        sizes = {key: decoder.decode(range(1)).nbytes for key, decoder in self.decoders.items()}
        if room is not None and self._count_fitting(sum(sizes.values()), room, packed) < wanted:
            packed = True
            firsts = rows.episode_starts[cache_order(rows.n_episodes)[:SAMPLED_FRAMES]].tolist()
            for key, decoder in self.decoders.items():
                seen = [decoder.decode(range(row, row + 1))[0] for row in firsts]
                sizes[key] = np.mean([len(pack_frame(frame)) for frame in seen])
            wanted = self._count_fitting(sum(sizes.values()), room, packed)
            # The free space changes all the time: a few more episodes are not worth a file.
            if wanted < min(GROWTH * self.n_cached, rows.n_episodes):
                return
        for key, files in self.files.items():
            files.fill(wanted, sizes[key], packed)

    def _count_fitting(self, frame_bytes: float, room: Callable[[int], int], packed: bool) -> int:
        """How many episodes, in the cache's order, have room beside those that are cached."""
        lengths = self.rows.episode_stops - self.rows.episode_starts
        sizes = np.cumsum(lengths[cache_order(len(lengths))]) * frame_bytes
        stored = sum(files.count_bytes(packed) for files in self.files.values())
        room_bytes = stored + room(int(sizes[-1]) - stored)
        return int(np.searchsorted(sizes, room_bytes, side="right"))

    def read_stored(self, key: str, rows: range) -> np.ndarray:
        """Frames as `FrameDecoder.decode` gives them, a read-only view if they are cached."""
        episode = self.rows.episode_of(rows.start)
        files = self.files[key]
        return files.read(episode, rows) if files.holds(episode) else super().read_stored(key, rows)

    def read_many_stored(self, requests: dict[str, range]) -> dict[str, np.ndarray]:
        """`read_stored` of several features; threads help only where frames are decoded."""
        first = next(iter(requests.values()))
        if len(first) and all(self.files[key].holds(self.rows.episode_of(first.start)) for key in requests):
            return {key: self.read_stored(key, rows) for key, rows in requests.items()}
        return super().read_many_stored(requests)


def open_frames(
    rows: DatasetRows, keys: list[str], frame_cache: str = "auto", episodes: Sequence[int] | None = None
) -> OnDemandFrames:
    """Choose and open the frame reader of a dataset.

    Args:
        rows (`DatasetRows`): The dataset; frames of a `stream` are not cached.
        keys (`list[str]`): Image and depth features to read.
        frame_cache (`str`): `"off"` decodes on demand; a folder holds the cache; `"auto"` caches under
            `$FORESIGHT_CACHE` or `~/.cache/foresight`, where all datasets together may take 32 GiB and half
            of the free space, after those that nobody uses are deleted. If raw frames do not fit, they are
            packed without loss, and what does not fit then is decoded on demand.
        episodes (`Sequence[int]`, *optional*): Those that will be read (default: all).

    Raises:
        ValueError: If a file of the dataset is damaged, or the cache cannot be written; names it.
    """
    chosen = range(rows.n_episodes) if episodes is None else episodes
    if frame_cache in ("off", "False") or rows.stream or not keys:  # YAML takes a bare `off` for false
        on_demand = OnDemandFrames(rows, keys)
        for decoder in on_demand.decoders.values() if not rows.stream else ():
            decoder.check_files(chosen)
        return on_demand
    base = cache_base() if frame_cache == "auto" else Path(frame_cache).expanduser()
    folder = open_cache_folder(base, "frames", rows.root)
    room = functools.partial(make_room, base) if frame_cache == "auto" else None
    cached = CachedFrames(rows, keys, folder, room)
    if cached.n_cached < rows.n_episodes:
        logger.warning(
            "dataset %s: 'auto' has room for the decoded frames of %d of %d episodes in %s (%.1f GB); the "
            "others are decoded on demand. Set frame_cache to a folder to cache all.",
            *(rows.name, cached.n_cached, rows.n_episodes, folder, cached.nbytes / 1e9),
        )
        for key, decoder in cached.decoders.items():
            if others := [episode for episode in chosen if not cached.files[key].holds(episode)]:
                decoder.check_files(others)
    return cached
