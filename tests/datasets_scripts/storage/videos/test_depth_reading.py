import itertools

import numpy as np
import pytest
from lerobot.datasets.video_utils import decode_video_frames

from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.videos.depth_reading import DepthVideos
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from datasets_scripts.storage.videos.writing import encode_depth
from tests.synthetic import make_dataset

FPS = 20


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two depth videos of different content and length."""
    folder = tmp_path_factory.mktemp("depth")
    rng = np.random.default_rng(0)
    for name, length in (("a", 9), ("b", 6)):
        depth = rng.uniform(0.2, 3, (length, 32, 40)).astype(np.float32)
        (folder / f"{name}.mp4").write_bytes(encode_depth(depth, FPS, 4.0))
    return folder


def test_frames_are_those_of_lerobots_decoder_in_any_order_of_reading(videos):
    reader = DepthVideos(max_open=1)
    for name, frames in [("a", [4, 5, 8]), ("b", [5]), ("a", [0]), ("a", [0, 3]), ("b", [0, 1, 2, 3, 4, 5])]:
        times_s = [frame / FPS for frame in frames]
        ours = reader.read(videos / f"{name}.mp4", times_s, 1e-3)
        theirs = decode_video_frames(videos / f"{name}.mp4", times_s, 1e-3, backend="pyav", is_depth=True)
        np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


def test_a_time_without_a_frame_is_refused_and_the_file_stays_readable(videos):
    reader = DepthVideos(max_open=2)
    for times_s in ([0.3, 0.6], [0.02], [7.0]):
        with pytest.raises(ValueError, match=r"no frame within 0\.0010 s"):
            reader.read(videos / "a.mp4", times_s, 1e-3)
    assert reader.read(videos / "a.mp4", [0.2], 1e-3).shape == (1, 32, 40)


def test_closed_files_are_opened_again_when_they_are_read(videos):
    reader = DepthVideos(max_open=2)
    before = reader.read(videos / "a.mp4", [0.2], 1e-3)
    (container,) = reader._open.values()
    reader.close()
    with pytest.raises(AssertionError, match="not open"):
        container.seek(0)
    np.testing.assert_array_equal(reader.read(videos / "a.mp4", [0.2], 1e-3), before)


def test_every_run_of_frames_can_be_read_where_episodes_were_joined(tmp_path):
    facts = make_dataset(tmp_path / "data", frames=[3, 5, 7, 4], cameras=("main",), tracks=False)
    rows = DatasetRows(facts.root)
    decoder = FrameDecoder(rows, "observation.depth.main")
    for episode, length in enumerate(facts.lengths):
        start = int(rows.episode_starts[episode])
        for first, last in itertools.combinations(range(length + 1), 2):
            depth = decoder.meters(decoder.decode(range(start + first, start + last)))
            true = np.stack([facts.depth(episode, t, "main") for t in range(first, last)])
            assert np.abs(depth - true)[true > 0].max() < 0.003
