"""CALVIN's files become a dataset: columns, resuming, bad archives."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.columns import clean_depth
from datasets_scripts.conversion import job as job_file
from datasets_scripts.conversion.calvin import CalvinArchive
from datasets_scripts.conversion.job import convert
from datasets_scripts.convert_calvin import main
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import read_provenance
from training.windows import ForesightWindows, WindowConfig

SEGMENTS = [(103, 109), (106, 112), (120, 125)]  # the first two overlap, as in CALVIN
WORDS = ["open the drawer", "push the red block to the left", "open the drawer"]
TASKS = ["open_drawer", "push_red_block_left", "open_drawer"]
STATIC, GRIPPER = (48, 48), (40, 40)


def frame(number: int) -> dict[str, np.ndarray]:
    """What a frame's file holds: a bright block that wanders, a table at 4 m, roll that jumps at pi."""
    images = {}
    for name, (height, width) in (("static", STATIC), ("gripper", GRIPPER)):
        image = np.full((height, width, 3), (60, 90, 120), np.uint8)
        image[8:16, number % 24 : number % 24 + 8] = (220, 40, 40)
        images[f"rgb_{name}"] = image
    rows = np.linspace(0, 1, STATIC[0], dtype=np.float32)[:, None]
    depth = np.broadcast_to(3.8 + 0.8 * (1 - rows) + 0.001 * (number % 10), STATIC).astype(np.float32)
    near = np.full(GRIPPER, 0.3 + 0.01 * (number % 7), np.float32)
    near[:4] = 2.0  # the far plane: nothing is seen there
    roll = (np.pi + 0.1 * np.sin(number) + np.pi) % (2 * np.pi) - np.pi
    pose = [0.1 + 0.001 * number, -0.2, 0.5, roll, 0.05, 1.2]
    gripper = 1.0 if number % 4 else -1.0
    return {
        **images,
        "depth_static": depth,
        "depth_gripper": near,
        "robot_obs": np.array([*pose, 0.08, *np.arange(7) * 0.1, gripper]),
        "rel_actions": np.array([*(np.sin(number + np.arange(6)) * 0.5), gripper]),
        "actions": np.zeros(7),
        "scene_obs": np.zeros(24),
    }


def make_archive(root, change=None):
    """A split in CALVIN's layout; `change(number, arrays)` may spoil a frame."""
    split = root / "task_D_D" / "training"
    (split / "lang_annotations").mkdir(parents=True)
    for number in {number for first, last in SEGMENTS for number in range(first, last + 1)}:
        arrays = frame(number)
        if change:
            change(number, arrays)
        np.savez_compressed(split / f"episode_{number:07d}.npz", **arrays)
    write_annotations(split)
    return split


def write_annotations(split, **changes):
    language = {"ann": WORDS, "task": TASKS, "emb": np.zeros((3, 1, 4), np.float32)}
    content = {"language": language, "info": {"episodes": [], "indx": SEGMENTS}} | changes
    np.save(split / "lang_annotations" / "auto_lang_ann.npy", content)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("calvin"))


@pytest.fixture(scope="module")
def dataset(archive, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "calvin_d"
    assert main(command(archive, output)) == 0
    return output


def command(archive, output, *more: str) -> list[str]:
    return [f"--source={archive}", f"--output={output}", "--workers=1", *more]


def test_every_segment_is_an_episode_with_both_ends(dataset):
    stored = LeRobotDataset("local/calvin", root=dataset, depth_output_unit="m")
    assert stored.fps == 30 and [row["length"] for row in stored.meta.episodes] == [7, 7, 6]
    numbers = [number for first, last in SEGMENTS for number in range(first, last + 1)]
    for item, number in zip(stored, numbers, strict=True):
        truth = frame(number)
        for camera, name in (("main", "static"), ("wrist", "gripper")):
            image = item[f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
            assert np.abs(image - truth[f"rgb_{name}"]).mean() < 4
        depth = item["observation.depth.main"][0].numpy()
        assert np.abs(clean_depth(depth, 10.0) - truth["depth_static"]).max() < 0.003
        near = clean_depth(item["observation.depth.wrist"][0].numpy(), 2.0)
        assert np.abs(near[4:] - truth["depth_gripper"][4:]).max() < 0.001 and not near[:4].any()
        robot = truth["robot_obs"][[0, 1, 2, 3, 4, 5, 14]].astype(np.float32)
        assert (item["observation.state"].numpy() == robot).all()
        assert (item["action"].numpy() == truth["rel_actions"].astype(np.float32)).all()
        assert item["task"] == WORDS[int(item["episode_index"])]


def test_the_provenance_says_where_an_episode_came_from_and_how_the_cameras_see(dataset):
    facts = read_provenance(dataset)
    assert facts["episodes"]["1"] == {"task": "push_red_block_left", "frames": [106, 112]}
    main_camera = facts["cameras"]["main"]
    assert math.isclose(main_camera["intrinsics"]["fx"] * 200 / STATIC[0], 1143, rel_tol=1e-3)
    assert (main_camera["depth"]["depth_max_m"], facts["cameras"]["wrist"]["depth"]["depth_max_m"]) == (10, 2)
    assert facts["conversion"]["conventions"]["source"] == "task_D_D/training"


def test_windows_hold_depth_and_actions_made_from_the_poses(dataset):
    config = WindowConfig(
        views=["main", "wrist"],
        objectives=["action", "depth", "future", "progress"],
        action_codec="local_delta",
        history_length=3,
        chunk_size=2,
        goal_image=True,
    )
    windows = ForesightWindows(dataset, config)
    sample = windows[0]
    assert windows.action_dim == 7 and windows.state_dim == 7
    assert sample["actions"].abs()[..., :6].max() < 6  # a roll that jumps by 2 pi would be 125
    assert set(sample["actions"][..., 6].unique().tolist()) <= {0.0, 1.0}
    assert abs(float(sample["depth"]["main"].median()) - 4.2) < 0.3


def test_an_interrupted_run_continues_to_the_same_dataset(archive, dataset, tmp_path, monkeypatch):
    output, work, done = tmp_path / "calvin_d", job_file._convert_one, []

    def dies_after_one(*job):
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return work(*job)

    monkeypatch.setattr(job_file, "_convert_one", dies_after_one)
    assert main(command(archive, output)) == 130 and not output.exists()
    again = []
    monkeypatch.setattr(job_file, "_convert_one", lambda *job: again.append(job[0]) or work(*job))
    assert main(command(archive, output)) == 0
    assert again == [1, 2] and not output.with_name("calvin_d.partial").exists()
    assert_same(output, dataset)


def test_workers_do_not_change_the_result(archive, dataset, tmp_path):
    convert(CalvinArchive(archive), tmp_path / "calvin_d", workers=2)
    assert_same(tmp_path / "calvin_d", dataset)


def assert_same(one, other):
    """Equal rows and depth; RGB videos of equal length, as x264 does not always repeat its bytes."""
    files = [{path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        if "observation.images" not in str(name) and name.name != "foresight.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    facts = [read_provenance(root) for root in (one, other)]
    for known in facts:
        del known["conversion"]["video_bytes"]
    assert facts[0] == facts[1]


def test_a_finished_dataset_stays_unchanged_and_another_one_is_refused(archive, dataset, capsys):
    before = {path: os.stat(path).st_mtime_ns for path in dataset.rglob("*")}
    assert main(command(archive, dataset)) == 0
    assert {path: os.stat(path).st_mtime_ns for path in dataset.rglob("*")} == before
    assert "3 episodes, 20 frames, 2 instructions" in capsys.readouterr().out
    assert main(command(archive, dataset, "--limit=2")) == 1
    assert "episodes: 3 there, 2 here" in capsys.readouterr().err


def test_a_limit_keeps_the_first_segments(archive, tmp_path):
    assert main(command(archive, tmp_path / "few", "--limit=2")) == 0
    assert DatasetRows(tmp_path / "few").n_episodes == 2


def test_depth_of_older_recordings_is_detected_and_doubled(tmp_path, capsys):
    def halve(_, arrays):
        arrays["depth_static"], arrays["depth_gripper"] = (
            arrays["depth_static"] / 2,
            arrays["depth_gripper"] / 2,
        )

    archive = make_archive(tmp_path, halve)
    assert main(command(archive, tmp_path / "out")) == 1
    assert "sees the table at 2.1 m" in (message := capsys.readouterr().err) and "--depth-scale 2" in message
    assert not (tmp_path / "out.partial").exists()
    assert main(command(archive, tmp_path / "out", "--depth-scale=2", "--limit=1")) == 0
    stored = LeRobotDataset("local/calvin", root=tmp_path / "out", depth_output_unit="m")
    assert np.abs(stored[0]["observation.depth.main"][0].numpy() - frame(103)["depth_static"]).max() < 0.003


def test_annotations_that_would_run_code_are_refused(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it_ran"),)

    archive = make_archive(tmp_path)
    write_annotations(archive, info={"indx": Payload()})
    assert main(command(archive, tmp_path / "out")) == 1
    assert "does not hold CALVIN's annotations" in capsys.readouterr().err
    assert not (tmp_path / "it_ran").exists()


def without(name):
    return lambda number, arrays: arrays.pop(name) if number == 108 else None


def spoiled(name, value):
    def change(number, arrays):
        if number == 108:
            arrays[name] = value(arrays[name])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("depth_gripper"), r"frame .*0000108.npz lacks depth_gripper"),
        (
            spoiled("robot_obs", lambda v: v[:8]),
            r"0000108.npz: robot_obs is float64 \(8,\), expected \(15,\)",
        ),
        (spoiled("rgb_static", lambda v: v[:40]), r"0000108.npz: rgb_static is uint8 \(40, 48, 3\)"),
        (spoiled("rel_actions", lambda v: v * np.nan), r"0000108.npz: rel_actions holds .* not finite"),
        (spoiled("robot_obs", lambda v: v * 0 + 0.5), r"0000108.npz: entry 14 of robot_obs is 0.5"),
    ],
)
def test_a_bad_frame_is_named(change, message, tmp_path, capsys):
    assert main(command(make_archive(tmp_path, change), tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_truncated_frame_is_named_and_finished_episodes_stay(archive, dataset, tmp_path, capsys):
    split = shutil.copytree(archive, tmp_path / "task_D_D" / "training")
    path = split / "episode_0000122.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert main(command(split, tmp_path / "out")) == 1
    assert "episode_0000122.npz is damaged or truncated" in capsys.readouterr().err
    assert len(list((tmp_path / "out.partial" / "episodes").glob("0*"))) == 2
    path.write_bytes(whole)
    assert main(command(split, tmp_path / "out")) == 0
    assert_same(tmp_path / "out", dataset)


def test_a_folder_that_is_not_a_split_of_calvin_is_refused(archive, tmp_path, capsys):
    def refused(source, *more):
        assert main(command(source, tmp_path / "out", *more)) == 1
        assert not (tmp_path / "out.partial").exists()
        return capsys.readouterr().err

    assert "there is no folder" in refused(tmp_path / "nothing")
    assert f"name one of its splits: --source {archive}" in refused(archive.parent)
    assert "--limit is 0" in refused(archive, "--limit=0")
    assert "--depth-scale is -1" in refused(archive, "--depth-scale=-1")
    split = shutil.copytree(archive, tmp_path / "task" / "training")
    (split / "episode_0000121.npz").unlink()
    assert re.search(r"episode_0000121.npz of the segment 120 to 125 is missing", refused(split))
    write_annotations(split, language={"ann": WORDS[:2], "task": TASKS})
    assert "3 segments, 2 instructions and 3 tasks" in refused(split)
    write_annotations(split, language={"ann": ["", *WORDS[1:]], "task": TASKS})
    assert "annotation 0 is '' for the frames 103 to 109" in refused(split)
    path = split / "lang_annotations" / "auto_lang_ann.npy"
    path.write_bytes(path.read_bytes().replace(b"'descr'", b"'desc\0'"))  # not what numpy's own checks see
    assert "does not hold CALVIN's annotations" in refused(split)
    np.save(path, np.zeros(3))
    assert "does not hold CALVIN's annotations" in refused(split)
    shutil.rmtree(split / "lang_annotations")
    assert "has no language" in refused(split)


def test_a_full_disk_is_named_and_the_run_resumes_later(archive, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(job_file, "assemble_dataset", full)
        assert main(command(archive, tmp_path / "out")) == 1
    assert "free some space and run the same command again" in capsys.readouterr().err
    assert main(command(archive, tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "meta" / "info.json").read_text())["total_episodes"] == 3
