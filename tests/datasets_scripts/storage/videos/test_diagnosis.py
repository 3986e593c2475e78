"""A video that does not fit its rows is described: which camera, its true rate, what to do."""

import io
import shutil
from fractions import Fraction

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.episode_job import EpisodeJob
from datasets_scripts.storage.frame_cache import open_frames
from datasets_scripts.storage.videos.writing import encode_depth
from tests.synthetic import make_dataset

FPS, FRAMES = 20, 40
MAIN, DEPTH = "observation.images.main", "observation.depth.main"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("rates") / "ds"
    make_dataset(
        root,
        frames=[FRAMES] * 2,
        cameras=("main",),
        size=(32, 40),
        tracks=False,
        file_per_episode=True,
        fps=FPS,
    )
    return root


@pytest.fixture
def root(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "ds")


def write_video(path, times_s, size=(32, 40), pixels="yuv420p"):
    """A video whose frames are shown at some times."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", FPS, options={"bf": "0"})
        stream.pix_fmt, (stream.height, stream.width) = pixels, size
        stream.codec_context.time_base = stream.time_base = Fraction(1, 10_000)
        for time_s in times_s:
            frame = av.VideoFrame.from_ndarray(
                np.full((*size, 3), int(50 * time_s), np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = round(10_000 * time_s), Fraction(1, 10_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(file.getvalue())


def refusal(root, cache, key=MAIN) -> str:
    with pytest.raises(ValueError) as caught:
        open_frames(DatasetRows(root), [key], cache)
    return str(caught.value)


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        (np.arange(FRAMES // 2) / (FPS / 2), "the camera gave 10 frames per second and the dataset has 20"),
        (np.arange(FRAMES) / 19.6, "the camera gave 19.6 frames per second and the dataset has 20"),
        (np.arange(FRAMES) / 20.4, "the camera gave 20.4 frames per second and the dataset has 20"),
        (np.delete(np.arange(FRAMES), [7, 39]) / FPS, "2 of its 40 frames are missing, the first at 0.350 s"),
        (np.arange(FRAMES // 2) / FPS, "20 of its 40 frames are missing, the first at 1.000 s"),
        (np.arange(FRAMES) / FPS + 0.02, "its frames are +0.0200 s away from the times of the rows"),
    ],
    ids=["half", "slow", "fast", "dropped", "short", "late"],
)
def test_a_camera_that_does_not_keep_the_rate_is_named_with_its_true_rate(root, tmp_path, times, reason):
    path = sorted(root.glob(f"videos/{MAIN}/*/*.mp4"))[1]
    write_video(path, times)
    message = refusal(root, "off" if "0.350" in reason else str(tmp_path / "cache"))
    assert (
        reason in message
        and f"'{MAIN}', episode 1" in message
        and "ffmpeg" in message
        and "damaged" not in message
    )


def test_a_video_with_half_the_frames_of_its_rows_does_not_give_those_of_the_next_episode(tmp_path):
    root = tmp_path / "ds"
    make_dataset(root, frames=[12, 12], cameras=("main",), size=(32, 40), depth=False, tracks=False, fps=FPS)
    (path,) = root.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    for name, times in (("from", [0.0, 0.3]), ("to", [0.3, 0.6])):
        position = table.schema.get_field_index(f"videos/{MAIN}/{name}_timestamp")
        table = table.set_column(position, table.field(position), [times])
    pq.write_table(table, path)
    message = refusal(root, str(tmp_path / "cache"))
    assert "'observation.images.main', episode 0: it has about 6 frames for 12 rows" in message
    assert "the camera gave 10 frames per second and the dataset has 20" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda times: 0 * times,
        lambda times: np.where(times == times[5], np.nan, times),
        lambda times: times[::-1],
        lambda times: times + times[-1],
        lambda times: 1000 * times,
    ],
    ids=["constant", "nan", "backwards", "of the next episode", "milliseconds"],
)
def test_timestamps_that_would_give_frames_of_other_rows_are_refused(root, change):
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        position, times = table.schema.get_field_index("timestamp"), np.array(table["timestamp"])
        changed = change(times).astype(np.float32)
        pq.write_table(table.set_column(position, table.field(position), [changed]), path)
    with pytest.raises(ValueError, match=r"'observation.images.main', episode 0: the timestamps of its rows"):
        open_frames(DatasetRows(root), [MAIN], "off", [0])


def test_pictures_of_two_sizes_in_one_file_and_a_depth_video_of_8_bits_are_named(root, tmp_path):
    path = sorted(root.glob(f"videos/{MAIN}/*/*.mp4"))[1]
    write_video(path, np.arange(FRAMES) / FPS, size=(40, 32))
    assert "px in episode 1, but" in refusal(root, str(tmp_path / "cache"))
    path = sorted(root.glob(f"videos/{DEPTH}/*/*.mp4"))[1]
    write_video(path, np.arange(FRAMES) / FPS)
    assert f"'{DEPTH}', episode 1: its pixels have 8 bits" in refusal(root, "off", DEPTH)
    path.write_bytes(encode_depth(np.ones((FRAMES, 32, 40), np.float32), FPS, 4.0)[:-200])
    assert "damaged or truncated" in refusal(root, "off", DEPTH)


@pytest.mark.parametrize("name", ["a[b]c", "run*", "ds?"])
def test_a_path_that_lerobot_takes_for_a_pattern_is_refused_before_work(recorded, tmp_path, name):
    root = shutil.copytree(recorded, tmp_path / name)
    with pytest.raises(ValueError, match=r"a\[b\]c|run\*|ds\?.* takes for a pattern: rename"):
        DatasetRows(root)
    with pytest.raises(ValueError, match="takes for a pattern: rename"):
        EpisodeJob(root / "out", "annotation", {}).open()
