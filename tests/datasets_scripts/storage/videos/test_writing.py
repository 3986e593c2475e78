"""Our video files beside LeRobot's own settings, depth code, statistics and readers."""

import io
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from lerobot.configs.video import DepthEncoderConfig
from lerobot.datasets.compute_stats import get_feature_stats
from lerobot.datasets.depth_utils import dequantize_depth, quantize_depth
from lerobot.datasets.video_utils import concatenate_video_files, decode_video_frames

from datasets_scripts.storage.videos import writing as videos

FRAMES, HEIGHT, WIDTH, FPS, DEPTH_MAX = 5, 34, 50, 20, 4.0


def slopes() -> np.ndarray:
    """`(F, H, W)` float32 meters over the whole range and beyond it."""
    return np.linspace(0, 5, FRAMES * HEIGHT * WIDTH, dtype=np.float32).reshape(FRAMES, HEIGHT, WIDTH)


def gradients() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [4 * x, 3 * y, 60 + x + y]
    return np.stack([np.stack(planes, axis=-1) + 3 * t for t in range(FRAMES)]).astype(np.uint8)


def decode(data: bytes, pixel_format: str) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format=pixel_format) for frame in container.decode(video=0)])


def test_depth_code_is_lerobots():
    theirs = [
        quantize_depth(frame, depth_max=DEPTH_MAX, video_backend=None, input_unit="m") for frame in slopes()
    ]
    difference = np.abs(videos.depth_codes(slopes(), DEPTH_MAX).astype(int) - np.stack(theirs))
    assert difference.max() <= 1  # the last bit may round the other way
    assert (difference > 0).mean() < 0.01


def test_encoder_options_are_what_lerobot_would_pass():
    assert videos.lerobot_rgb_encoder().get_codec_options(1, as_strings=True) == videos.RGB_OPTIONS
    depth = videos.lerobot_depth_encoder(DEPTH_MAX)
    assert depth.get_codec_options(1, as_strings=True) == videos.DEPTH_OPTIONS
    defaults = DepthEncoderConfig()
    assert (depth.vcodec, depth.pix_fmt) == ("hevc", "gray12le")
    assert (defaults.depth_min, defaults.shift) == (videos.DEPTH_MIN_M, videos.DEPTH_SHIFT_M)
    assert defaults.use_log


def test_depth_survives_its_video_to_less_than_a_millimetre():
    codes = decode(videos.encode_depth(slopes(), FPS, DEPTH_MAX), "gray12le")
    assert (codes == videos.depth_codes(slopes(), DEPTH_MAX)).all()  # lossless
    decoded = [
        dequantize_depth(c, depth_max=DEPTH_MAX, output_unit="m", output_tensor=False)[0] for c in codes
    ]
    meters = np.stack(decoded)
    inside = (slopes() > 0.011) & (slopes() < DEPTH_MAX)
    assert np.abs(meters - slopes())[inside].max() < 1e-3


def test_depth_of_the_smallest_pictures_survives_too():
    """x265 with its usual blocks spoils these at random."""
    side, generator = videos.MIN_DEPTH_SIDE_PX, np.random.default_rng(0)
    for _ in range(5):
        coarse = generator.uniform(0.3, 4, size=(14, 8, 8)).astype(np.float32)
        frames = coarse.repeat(side // 8, axis=1).repeat(side // 8, axis=2)
        codes = decode(videos.encode_depth(frames, FPS, DEPTH_MAX), "gray12le")
        assert (codes == videos.depth_codes(frames, DEPTH_MAX)).all()
    with pytest.raises(ValueError, match="too small"):
        videos.encode_depth(frames[:, :16], FPS, DEPTH_MAX)


def test_an_encoder_that_loses_pixels_is_caught(monkeypatch):
    lossy = {**videos.DEPTH_OPTIONS, "x265-params": "log-level=none"}
    monkeypatch.setattr(videos, "DEPTH_OPTIONS", lossy)
    noise = np.random.default_rng(0).uniform(0.3, 4, size=(3, 32, 32)).astype(np.float32)
    with pytest.raises(RuntimeError, match="changed depth pixels"):
        videos.encode_depth(noise, FPS, DEPTH_MAX)


def test_rgb_video_shows_the_frames():
    shown = decode(videos.encode_rgb(gradients(), FPS), "rgb24")
    assert shown.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(shown.astype(int) - gradients()).mean() < 6


@pytest.mark.parametrize("kind", ["rgb", "depth"])
def test_statistics_are_lerobots(kind):
    frames, scale = (gradients(), 255.0) if kind == "rgb" else (slopes(), 1.0)
    channels_first = frames.transpose(0, 3, 1, 2) if kind == "rgb" else frames[:, None]
    theirs = get_feature_stats(channels_first, axis=(0, 2, 3), keepdims=True)
    ours = videos.video_stats(frames)
    assert set(ours) == set(theirs)
    assert ours["count"] == [FRAMES]
    for name, value in ours.items():
        if name != "count":
            expected = theirs[name][0] / scale
            assert np.shape(value) == expected.shape
            # Their quantiles are interpolated within a histogram; gradients of few grey levels differ a
            # little.
            tolerance = 8e-3 if name.startswith("q") else 2e-4
            assert np.allclose(value, expected, atol=tolerance)


def test_files_are_grouped_up_to_the_size_limit():
    sizes = (4, 5, 3, 9, 1)
    groups = [(0, 0, 0, 2), (0, 1, 2, 3), (1, 0, 3, 4), (1, 1, 4, 5)]
    assert list(videos.group_files(sizes, 9, chunks_size=2)) == groups
    assert list(videos.group_files(sizes, 100, chunks_size=2)) == [(0, 0, 0, 5)]


@pytest.mark.parametrize("lengths", [(3, 5), (1, 2, 6), (4, 3, 5)])
def test_lerobot_finds_every_frame_of_joined_episodes(lengths, tmp_path):
    depth = np.random.default_rng(0).uniform(0.2, 3, (sum(lengths), 40, 48)).astype(np.float32)
    paths, folder = [], tmp_path / "bob's"
    folder.mkdir()
    for episode, first in enumerate(np.cumsum([0, *lengths[:-1]])):
        paths.append(folder / f"o'top {episode}.mp4")
        clip = depth[first : first + lengths[episode]]
        paths[-1].write_bytes(videos.encode_depth(clip, FPS, DEPTH_MAX))
    joined = folder / "joined.mp4"
    videos.concatenate_videos(paths, joined)
    assert {path.name for path in folder.iterdir()} == {path.name for path in [*paths, joined]}
    plain = [Path(shutil.copy(path, tmp_path / f"{i}.mp4")) for i, path in enumerate(paths)]
    concatenate_video_files(plain, tmp_path / "lerobots.mp4")
    assert joined.read_bytes() == (tmp_path / "lerobots.mp4").read_bytes()
    for t, codes in enumerate(videos.depth_codes(depth, DEPTH_MAX)):
        (read,) = decode_video_frames(joined, [t / FPS], 1e-4, backend="pyav", is_depth=True).numpy()
        np.testing.assert_array_equal(read[0], codes)
