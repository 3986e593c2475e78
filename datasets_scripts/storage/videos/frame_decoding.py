"""Decode the frames of one image or depth feature, stored as video or as pictures.

The numbers are those of the stock `LeRobotDataset`.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
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
from datasets_scripts.storage.dataset_folder import INFO_PATH, check_inside, data_files
from datasets_scripts.storage.dataset_rows import RESTORE, BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.videos.depth_reading import DepthVideos
from datasets_scripts.storage.videos.diagnosis import explain_rows, explain_video
from datasets_scripts.storage.videos.writing import MAX_DEPTH_CODE

__all__ = ["FrameDecoder", "depth_code_table"]

MAX_OPEN_DECODERS = 16  # per process; LeRobot's default of 100 holds a few MB each
DEPTH_MODES = {"L", "I", "I;16", "I;16L", "I;16B", "F"}  # Pillow's, one number per pixel


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
