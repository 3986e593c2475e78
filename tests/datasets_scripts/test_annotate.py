"""Datasets with a depth camera get tracks: from the command to what the trainer reads."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.annotate import main
from datasets_scripts.annotation import job as command
from datasets_scripts.annotation.episode import LabelMaker
from datasets_scripts.annotation.job import AnnotationJob, annotate, check
from datasets_scripts.annotation.push import push_dataset
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import unpack_points
from datasets_scripts.conversion import column_renaming
from datasets_scripts.inspection.labeled_episode import LabeledDataset, LabeledEpisode
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import moving_flags, read_provenance
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from tests.synthetic import make_dataset
from training.windows import ForesightWindows, WindowConfig

WANTED = Annotation(("main", "wrist"), n_points=80)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Videos of two cameras with depth, no tracks; a dot moves over a still background."""
    root = tmp_path_factory.mktemp("recorded") / "data"
    return make_dataset(root, frames=[7, 5, 6], tracks=False, size=(64, 80))


@pytest.fixture(scope="module")
def annotated(recorded, tmp_path_factory):
    output = tmp_path_factory.mktemp("annotated") / "data"
    assert main(command_line(recorded, output)) == 0
    return output


def command_line(recorded, output, *more: str) -> list[str]:
    return [
        *(f"--dataset={recorded.root}", f"--output={output}", "--n-points=80", "--workers=1"),
        *more,
    ]


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_tracks_lie_on_the_depth_and_some_follow_what_moves(recorded, annotated):
    rows, provenance = DatasetRows(annotated), read_provenance(annotated)
    for episode in range(rows.n_episodes):
        span = rows.rows_of(episode)
        points = unpack_points(rows.column("observation.points.main").read(span)) * [80, 64, 1]
        visible = rows.column("observation.points_visible.main").read(span)
        moving = moving_flags(provenance, episode, "main", 80)
        facts = provenance["episodes"][str(episode)]["main"]
        assert facts["n_moving"] == moving.sum() > 0 and facts["has_motion"]
        for t in range(len(span)):
            depth, (x, y, z) = recorded.depth(episode, t, "main"), points[t][visible[t]].T
            around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            near = [
                depth[(y + i).astype(int).clip(0, 63), (x + j).astype(int).clip(0, 79)] for i, j in around
            ]
            assert np.abs(np.stack(near) - z).min(0).max() < 0.01
        dots = np.array([recorded.dot_px(episode, t, "main") for t in range(len(span))]) + 2.0
        away = np.linalg.norm(points[..., :2] - dots[:, None], axis=-1)
        assert (away.max(0) < 3)[moving].any()


def test_the_stock_reader_and_the_trainer_read_the_result(recorded, annotated):
    old, new = (LeRobotDataset("local/x", root=root) for root in (recorded.root, annotated))
    for key in ("observation.images.main", "observation.depth.wrist", "action"):
        assert (old[5][key] == new[5][key]).all()
    assert new[5]["observation.points.main"].shape == (240,)
    config = WindowConfig(views=("main", "wrist"), objectives=("action", "flow"), history_length=2)
    window = ForesightWindows(annotated, config)[3]
    assert (window["track_weight"] > 0).any()


def test_videos_are_shared_and_the_old_dataset_stays(recorded, annotated):
    videos = sorted(recorded.root.glob("videos/**/*.mp4"))
    assert videos and all(v.samefile(annotated / v.relative_to(recorded.root)) for v in videos)
    assert (
        "observation.points.main"
        not in json.loads((recorded.root / "meta/info.json").read_text())["features"]
    )
    assert not (recorded.root / "meta/foresight.json").exists()


def test_videos_on_another_disk_come_along_if_their_folder_is_named(recorded, annotated, tmp_path):
    shutil.copytree(recorded.root, tmp_path / "recorded")
    (tmp_path / "recorded" / "videos").rename(tmp_path / "disk")
    (tmp_path / "recorded" / "videos").symlink_to(tmp_path / "disk")
    (tmp_path / "recorded" / "again").symlink_to(".")
    job = AnnotationJob(str(tmp_path / "recorded"), tmp_path / "data", WANTED)
    with pytest.raises(ValueError, match="recorded/videos leads out .* see --linked-videos"):
        check(job)
    annotate(dataclasses.replace(job, linked_videos=tmp_path))
    ours, theirs = contents(tmp_path / "data"), contents(annotated)
    assert set(ours) == set(theirs)
    named = ("meta/foresight.json", "README.md")  # these name the old dataset
    assert all(ours[name] == theirs[name] for name in ours if name not in named)


def test_linked_content_is_not_pushed(annotated, tmp_path):
    shutil.copytree(annotated, tmp_path / "data")
    (tmp_path / "data" / "notes.txt").symlink_to(__file__)
    with pytest.raises(ValueError, match="notes.txt leads out of its folder"):
        push_dataset(tmp_path / "data", "me/data")


def test_a_finished_dataset_without_a_video_is_named(recorded, annotated, tmp_path, capsys):
    shutil.copytree(annotated, tmp_path / "data")
    next((tmp_path / "data" / "videos").glob("*/*/*.mp4")).unlink()
    assert main(command_line(recorded, tmp_path / "data")) == 1
    assert re.search(r"video file .*mp4 has no bytes", capsys.readouterr().err)


def test_depth_of_another_size_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    sizes = {"main": (48, 64), "side": (32, 40)}
    facts = make_dataset(tmp_path / "data", frames=[3], cameras=sizes, depth=("side",), tracks=False)
    monkeypatch.setattr(column_renaming, "_add_labels", lambda features, names: names)
    column_renaming.rename_columns(
        facts.root, tmp_path / "other", {"observation.depth.side": "observation.depth.main"}
    )
    facts = dataclasses.replace(facts, root=tmp_path / "other")
    assert main(command_line(facts, tmp_path / "output")) == 1
    assert "is 40x32 px and its camera's images are 64x48" in capsys.readouterr().err
    assert not (tmp_path / "output.partial").exists()


def test_an_episode_of_one_frame_gets_tracks(tmp_path):
    facts = make_dataset(tmp_path / "data", frames=[1, 4], tracks=False, size=(48, 48), use_videos=False)
    summary = annotate(AnnotationJob(str(facts.root), tmp_path / "output", WANTED))
    assert summary["frames"] == 5 and 0 in summary["still_episodes"]
    visible = DatasetRows(tmp_path / "output").column("observation.points_visible.main").read(range(1))
    assert visible.any()


def test_an_interrupted_run_continues_to_the_same_dataset(recorded, annotated, tmp_path, monkeypatch):
    work, done = command.annotate_shard, []

    def dies_after_one(*args):
        if done:
            raise KeyboardInterrupt
        done.append(work(*args))
        return done[-1]

    output = tmp_path / "data"
    monkeypatch.setattr(command, "annotate_shard", dies_after_one)
    assert main(command_line(recorded, output)) == 130 and not output.exists()
    redone = []
    monkeypatch.setattr(command, "annotate_shard", lambda *args: redone.append(args[1]) or work(*args))
    assert main(command_line(recorded, output)) == 0
    assert redone == [1, 2]
    assert contents(output) == contents(annotated)
    assert not output.with_name("data.partial").exists()


def test_the_workers_of_a_killed_run_end_too():
    """They would wait for work for ever, each with a model on the GPU; their output stays open until then."""
    code = (
        "import os, time, functools; from datasets_scripts.storage.episode_job import work_on_all; "
        "list(work_on_all(time.sleep, [(600,), (600,)], 2, functools.partial(os.write, 1, b'at work ')))"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code], **options) as run:
        try:
            assert os.read(run.stdout.fileno(), 1)
            os.kill(run.pid, signal.SIGKILL)
            run.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended
                os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.slow  # the second one imports LeRobot again
def test_two_runs_do_not_work_on_one_dataset(recorded, annotated, tmp_path, monkeypatch, capsys):
    output, work, codes = tmp_path / "data", command.annotate_shard, []

    def disturbed(*args):
        if not codes:
            code = "import sys; from datasets_scripts.annotate import main; sys.exit(main(sys.argv[1:]))"
            second = [sys.executable, "-c", code, *command_line(recorded, output)]
            codes.append(subprocess.run(second, capture_output=True, text=True))
        return work(*args)

    monkeypatch.setattr(command, "annotate_shard", disturbed)
    assert main(command_line(recorded, output)) == 0
    assert codes[0].returncode == 1 and "another run is at work in" in codes[0].stderr
    assert contents(output) == contents(annotated)


def test_a_run_does_not_begin_where_shares_are_being_made(recorded, annotated, tmp_path, monkeypatch, capsys):
    """It would take what they are writing for what a killed run left."""
    output, work, codes = tmp_path / "data", command.annotate_shard, []

    def disturbed(*args):
        if not codes:
            codes.append(main(command_line(recorded, output)))
        return work(*args)

    monkeypatch.setattr(command, "annotate_shard", disturbed)
    command.make_shards(AnnotationJob(str(recorded.root), output, WANTED))
    assert codes == [1] and "a share of this work is being made in" in capsys.readouterr().err
    assert main(command_line(recorded, output)) == 0
    assert contents(output) == contents(annotated)


@pytest.mark.slow  # each worker imports LeRobot again
def test_workers_do_not_change_the_result(recorded, annotated, tmp_path):
    annotate(AnnotationJob(str(recorded.root), tmp_path / "data", WANTED), workers=2)
    assert contents(tmp_path / "data") == contents(annotated)


def test_frames_are_freed_with_their_episode(recorded, tmp_path, monkeypatch):
    """Without the garbage collector, which runs too late for hundreds of megabytes."""
    decoded, decode = [], FrameDecoder.decode

    def noted(self, rows):
        frames = decode(self, rows)
        decoded.append(weakref.ref(frames))
        return frames

    monkeypatch.setattr(FrameDecoder, "decode", noted)
    maker = LabelMaker(DatasetRows(recorded.root), Annotation(("main",), n_points=8))
    gc.disable()
    try:
        maker.label(range(7), 0, tmp_path)
        assert decoded and not any(frames() is not None for frames in decoded)
    finally:
        gc.enable()


def test_a_finished_dataset_is_left_alone(recorded, annotated, capsys):
    before = {path: os.stat(path).st_mtime_ns for path in annotated.rglob("*")}
    assert main(command_line(recorded, annotated)) == 0
    assert {path: os.stat(path).st_mtime_ns for path in annotated.rglob("*")} == before
    assert "3 episodes" in capsys.readouterr().out
    assert main(command_line(recorded, annotated, "--seed=1")) == 1
    assert "other parameters (seed" in capsys.readouterr().err
    assert main(command_line(recorded, annotated, "--dry-run")) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(command_line(recorded, annotated, "--dry-run", "--seed=1")) == 1


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ({"depth": False}, [], "no camera of .* has depth"),
        ({"depth": ("main",)}, ["--cameras=main,wrist"], "'wrist' .* has no depth column"),
        ({"depth_factor": 1000.0}, [], "looks like millimeters"),
        ("recorded", ["--cameras=top"], "no camera 'top'; it has main, wrist"),
        ("annotated", [], "has tracks of camera 'main' already"),
        ("recorded", ["--n-points=1"], "at least 2"),
    ],
)
def test_what_cannot_be_annotated_is_refused(
    dataset, options, message, recorded, annotated, tmp_path, capsys
):
    if isinstance(dataset, dict):
        facts = make_dataset(tmp_path / "data", frames=[3], size=(48, 48), tracks=False, **dataset)
    else:
        facts = recorded if dataset == "recorded" else dataclasses.replace(recorded, root=annotated)
    assert main(command_line(facts, tmp_path / "output", *options)) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "output").exists() and not (tmp_path / "output.partial").exists()


@pytest.mark.parametrize(
    ("intrinsics", "kept"),
    [
        ({"K": [[60, 0, 31.5], [0, 60, 31.5], [0, 0, 1]], "distortion": [0] * 5}, True),
        ({"focal_px": 60}, False),
    ],
)
def test_intrinsics_in_an_unknown_form_are_named_before_any_work_and_left_out(tmp_path, intrinsics, kept):
    root = make_dataset(tmp_path / "data", episodes=1, frames=[3], size=(64, 64), tracks=False).root
    info = json.loads((root / "meta/info.json").read_text())
    feature = info["features"]["observation.images.main"]
    feature["info"] = (feature.get("info") or {}) | {"intrinsics": intrinsics}
    (root / "meta/info.json").write_text(json.dumps(info))
    options = [f"--dataset={root}", f"--output={tmp_path / 'out'}", "--n-points=20", "--workers=1"]
    for more in (["--dry-run"], []):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            assert main([*options, *more]) == 0
        named = [str(each.message) for each in caught if "observation.images.main" in str(each.message)]
        assert len(named) == (not kept)
    known = read_provenance(tmp_path / "out")["cameras"]["main"]
    lens = {"fx": 60, "fy": 60, "cx": 32, "cy": 32, "height": 64, "width": 64}
    assert known.get("intrinsics") == (lens if kept else None)
    assert LabeledEpisode(LabeledDataset(str(tmp_path / "out")), 0).cameras[0].intrinsics == (
        lens if kept else None
    )


def test_no_repository_is_made_for_what_cannot_be_annotated(recorded, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("datasets_scripts.annotate.check_push", lambda *args: asked.append(args))
    options = ["--push-to-hub=me/data", "--cameras=main,top"]
    assert main(command_line(recorded, tmp_path / "output", *options)) == 1
    assert "no camera 'top'" in capsys.readouterr().err and not asked


def test_a_damaged_shard_is_made_again(recorded, annotated, tmp_path, monkeypatch):
    output = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(command, "assemble", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
        assert main(command_line(recorded, output)) == 1
    shard = output.with_name("data.partial") / "episodes" / "000001" / "arrays.npz"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(command_line(recorded, output)) == 0
    assert contents(output) == contents(annotated)


def test_a_long_row_group_layout_is_kept_per_episode(annotated):
    (file,) = annotated.glob("data/*/*.parquet")
    assert pq.ParquetFile(file).num_row_groups == 3
