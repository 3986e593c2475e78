"""Looking at a dataset's labels: the report, the picture, the recording, and LeRobot's own viewer."""

import json
import logging
import re
import shutil
import sys

import numpy as np
import pytest
from lerobot.datasets.dataset_tools import delete_episodes
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from datasets_scripts import inspect_dataset
from datasets_scripts.inspect_dataset import main
from datasets_scripts.inspection import report
from datasets_scripts.inspection.drawing import locate_points
from datasets_scripts.inspection.label_pictures import _recent_flow
from datasets_scripts.inspection.labeled_episode import LabeledDataset, LabeledEpisode
from datasets_scripts.storage.provenance import read_provenance
from tests.synthetic import SyntheticDataset, make_dataset

FRAMES = 7


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Two cameras of another shape, the first with tracks that have nothing to do with its depth."""
    root = tmp_path_factory.mktemp("inspect") / "data"
    return make_dataset(
        root, episodes=2, frames=FRAMES, cameras={"main": (32, 48), "wrist": (40, 36)}, use_videos=False
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A dataset without any label."""
    root = tmp_path_factory.mktemp("plain") / "data"
    return make_dataset(root, episodes=1, frames=FRAMES, depth=False, tracks=False, use_videos=False)


def recorded(path) -> dict[str, list]:
    """Entity -> its chunks, as Arrow batches, of a recording."""
    rerun = pytest.importorskip("rerun", reason="extra viz")
    chunks: dict[str, list] = {}
    for chunk in rerun.recording.load_recording(path).chunks():
        chunks.setdefault(chunk.entity_path, []).append(chunk.to_record_batch())
    return chunks


def test_the_report_counts_what_the_dataset_holds(facts, capsys):
    assert main([str(facts.root), "--episode", "1"]) == 1  # for the tracks miss the depth
    said = capsys.readouterr()
    real = [facts.visible(1, t)[: facts.n_points - facts.n_padding] for t in range(FRAMES)]
    assert f"episode 1 of 2: “{facts.task(1)}”" in said.out
    assert f"{FRAMES} frames at 20 fps; action (4), observation.state (3)" in said.out
    assert f"observation.depth.main: {1 - 9 / (32 * 48):.1%} valid" in said.out
    assert f"56 points (4 never visible), {facts.moving(1).sum()} moving" in said.out
    assert f"visible in {np.mean(real):.1%} of the frames" in said.out
    assert "camera wrist: 36 x 40" in said.out and "tracks  none" in said.out
    assert "depth and tracks do not belong together" in said.err


def test_after_lerobots_tools_it_is_unknown_which_points_move_and_not_none(
    facts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "MOMENTS", 1)
    dataset = LeRobotDataset("local/synthetic", root=facts.root)
    delete_episodes(dataset, [0], output_dir=tmp_path / "shorter", repo_id="local/shorter")
    options = ["--report", str(tmp_path / "a.html"), "--output", str(tmp_path / "a.rrd"), "--write-flags"]
    main([str(tmp_path / "shorter"), *options])
    said = capsys.readouterr().out
    assert "56 points (4 never visible), unknown how many moving" in said
    facts = read_provenance(tmp_path / "shorter")["episodes"]["0"]
    assert facts["main"]["n_moving"] is None and facts["flags"] == ["main/off-depth"]
    assert "range of motion of moving points" not in (tmp_path / "a.html").read_text()
    assert "/main/lens/points" in recorded(tmp_path / "a.rrd")


@pytest.mark.sim
def test_simulated_labels_belong_together(simulated_dataset, tmp_path, capsys):
    path = tmp_path / "labels.rrd"
    assert main([str(simulated_dataset.root), "--output", str(path)]) == 0
    said = capsys.readouterr().out
    assert "intrinsics known" in said and "100.0% lie on the depth map" in said
    chunks = recorded(path)
    assert {"/main/lens", "/main/lens/rgb", "/main/lens/depth", "/main/tracks", "/wrist/lens/depth"} <= set(
        chunks
    )


def test_the_picture_has_a_row_for_every_camera_and_its_depth(facts, tmp_path):
    path = tmp_path / "pictures" / "labels.png"
    main([str(facts.root), "--picture", str(path), "--moments", "3"])
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    expected = (2 * 32 / 48 + 2 * 40 / 36) * 1.9 + 0.85, 3 * 1.9 + 1.4  # inches
    np.testing.assert_allclose((height, width), np.array(expected) * 150, atol=2)
    colorful = np.ptp(picture, axis=2) > 100  # the depth maps, not the pale images
    assert colorful.mean() > 0.3


def test_trails_lead_to_where_visible_points_are_now(facts):
    camera = LabeledEpisode(LabeledDataset(str(facts.root)), 0).cameras[0]
    trails = _recent_flow(camera, 4)
    np.testing.assert_allclose(trails.points[0], facts.points(0, 4), atol=2e-3)
    np.testing.assert_allclose(trails.points[3], facts.points(0, 1), atol=2e-3)
    assert (trails.shown[0] == facts.visible(0, 4)).all()
    assert not trails.shown[:, ~facts.visible(0, 4)].any()


def test_a_recording_shows_points_where_they_are(facts, tmp_path):
    intrinsics = {"fx": 40.0, "fy": 30.0, "cx": 24.0, "cy": 16.0, "height": 32, "width": 48}
    path = facts.root / "meta" / "foresight.json"
    before = path.read_text()
    content = json.loads(before)
    content["cameras"]["main"]["intrinsics"] = intrinsics
    path.write_text(json.dumps(content))
    try:
        main([str(facts.root), "--output", str(tmp_path / "labels.rrd")])
    finally:
        path.write_text(before)
    chunks = recorded(tmp_path / "labels.rrd")
    assert {"/main/lens/rgb", "/wrist/lens/rgb", "/wrist/lens/depth", "/action", "/instruction"} <= set(
        chunks
    )
    assert "/wrist/lens/points" not in chunks and "/wrist/lens" not in chunks
    seen = facts.visible(0, 0)
    flat = np.array(chunks["/main/lens/points"][0].column("Points2D:positions")[0].as_py())
    np.testing.assert_allclose(flat, facts.points(0, 0)[seen, :2] * (48, 32), atol=0.05)
    space = np.array(chunks["/main/tracks"][0].column("Points3D:positions")[0].as_py())
    x, y, z = (facts.points(0, 0)[seen] * (48, 32, 1)).T
    expected = np.stack([(x - 24) / 40 * z, (y - 16) / 30 * z, z], axis=-1)
    np.testing.assert_allclose(space, expected, atol=5e-3)
    np.testing.assert_allclose(locate_points(np.array([0.5, 0.5, 2.0]), intrinsics), [0, 0, 2])


def test_a_dataset_without_labels_shows_what_it_has(plain, tmp_path, capsys):
    options = ["--picture", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.rrd")]
    assert main([str(plain.root), *options]) == 0
    said = capsys.readouterr().out
    assert said.count("depth   none") == 2 and said.count("tracks  none") == 2
    chunks = recorded(tmp_path / "a.rrd")
    assert sum(batch.num_rows for batch in chunks["/main/lens/rgb"]) == FRAMES


def test_older_datasets_list_the_channels_first(plain, tmp_path, capsys):
    root = tmp_path / "older"
    shutil.copytree(plain.root, root)
    info = json.loads((root / "meta/info.json").read_text())
    for camera in ("main", "wrist"):
        feature = info["features"][f"observation.images.{camera}"]
        height, width, channels = feature["shape"]
        feature |= {"shape": [channels, height, width], "names": ["channels", "height", "width"]}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert main([str(root), "--picture", str(tmp_path / "a.png")]) == 0
    assert "camera wrist: 64 x 48" in capsys.readouterr().out


def test_an_episode_in_which_no_point_is_visible_is_a_problem(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SyntheticDataset, "visible", lambda self, e, t: np.zeros(self.n_points, bool))
    facts = make_dataset(tmp_path / "data", episodes=1, frames=3, use_videos=False)
    options = ["--picture", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.rrd")]
    assert main([str(facts.root), *options]) == 1
    said = capsys.readouterr()
    assert "0 points (60 never visible)" in said.out and "no point is visible" in said.err
    assert (tmp_path / "a.png").is_file() and (tmp_path / "a.rrd").is_file()


def test_depth_in_another_unit_is_a_problem(tmp_path, capsys):
    root = tmp_path / "millimeters"
    make_dataset(root, episodes=1, frames=3, use_videos=False, tracks=False, depth_factor=1000)
    assert main([str(root)]) == 1
    assert "looks like millimeters read as meters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        (["--episode", "2"], None, "has the episodes 0 to 1, not 2"),
        (["--moments", "0"], None, "--moments is 0"),
        (["--episodes", "0:2"], None, "--episodes says which episodes --report reads"),
        (["--report", "x.html", "--episodes", "0,7"], None, "'7' names none of the episodes 0 to 1"),
        (["--report", "."], None, "which is a folder: give the name of a file"),
        (["--report", "x.html"], "matplotlib.figure", r"pictures need matplotlib .*\[viz\]"),
        (["--output", "x.rrd"], "rerun", r"recordings need Rerun .*\[viz\]"),
        (["--picture", "x.png"], "matplotlib.figure", r"pictures need matplotlib .*\[viz\]"),
    ],
)
def test_what_is_missing_is_named(facts, tmp_path, monkeypatch, capsys, options, missing, message):
    monkeypatch.chdir(tmp_path)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    assert main([str(facts.root), *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_lerobots_viewer_shows_depth_beside_the_images_and_no_points(facts, tmp_path, monkeypatch):
    pytest.importorskip("rerun", reason="extra viz")
    from lerobot.scripts import lerobot_dataset_viz

    for name in ("handlers", "level"):  # which LeRobot changes
        monkeypatch.setattr(logging.root, name, getattr(logging.root, name))
    dataset = ["--repo-id", "local/synthetic", "--root", str(facts.root), "--episode-index", "1"]
    save = ["--save", "1", "--output-dir", str(tmp_path), "--num-workers", "0"]
    monkeypatch.setattr(sys, "argv", ["lerobot-dataset-viz", *dataset, *save])
    lerobot_dataset_viz.main()
    chunks = recorded(tmp_path / "local_synthetic_episode_1.rrd")
    assert {"/observation.images.main", "/observation.depth.main", "/state", "/action"} <= set(chunks)
    assert not any("points" in entity for entity in chunks)


def test_every_problem_of_the_labels_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(inspect_dataset, "inspect", lambda args: ["depth is\nmissing", "tracks are missing"])
    assert main(["somewhere"]) == 1
    assert capsys.readouterr().err == "error: depth is missing\nerror: tracks are missing\n"
