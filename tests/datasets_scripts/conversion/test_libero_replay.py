"""Exact depth and tracks of LIBERO's files: what the simulator showed when they were recorded."""

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.columns import unpack_points
from datasets_scripts.conversion import libero_replay
from datasets_scripts.conversion.libero_replay import localize_model
from datasets_scripts.convert_libero import main
from datasets_scripts.simulation.libero import LiberoSim
from datasets_scripts.simulation.libero_files import resolve_libero_tasks
from datasets_scripts.storage.provenance import read_provenance
from tests.simulators import record_libero_file

h5py = pytest.importorskip("h5py")
SIDE = 64
MODEL = """<mujoco><asset>
<mesh file="/home/a/robosuite/models/assets/arm/link.stl"/><texture builtin="flat"/>
<texture file="/home/a/chiliocosm/assets/scenes/../textures/wall.png"/>
</asset></mujoco>"""


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """Folders of LIBERO's and robosuite's files, with what `MODEL` needs."""
    libero, robosuite = (tmp_path / name for name in ("libero", "robosuite"))
    for path in (
        libero / "textures" / "wall.png",
        libero / "scenes" / "floor",
        robosuite / "arm" / "link.stl",
    ):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(libero_replay, "asset_folders", lambda: (libero, robosuite))
    return libero, robosuite


def test_paths_of_another_machine_become_those_of_this_one(assets):
    libero, robosuite = assets
    model = localize_model(MODEL, "here")
    assert str(robosuite / "arm" / "link.stl") in model and str(libero / "textures" / "wall.png") in model
    assert "/home/a" not in model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("<mujoco", "file: demo_3: its model_file is not XML"),
        (MODEL.replace("wall.png", "sky.png"), "file: demo_3: .* needs scenes/../textures/sky.png, which"),
        (MODEL.replace("chiliocosm/assets", "x"), "names /home/a/x/.*, which is in no folder of assets"),
    ],
)
def test_what_a_model_lacks_is_named(assets, model, message):
    with pytest.raises(ValueError, match=message):
        localize_model(model, "file: demo_3")


@pytest.fixture(scope="module")
def recorded(libero_simulator, tmp_path_factory):
    """A file in which the arm moves and the hand closes, and exact depth by view after every action."""
    (task,) = resolve_libero_tasks("libero_object", [3])
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.uniform(-1, 1, (9, 6)), np.ones((9, 1))], axis=1)
    actions[:4, 6] = -1
    path = tmp_path_factory.mktemp("replay") / "pick_up_the_thing_demo.hdf5"
    record_libero_file(task, actions, path, SIDE)
    depth = {"main": [], "wrist": []}
    with LiberoSim(task, image_size=SIDE) as sim:
        sim.reset(0)
        for action in actions:
            sim.step(np.append(action[:6], action[6] < 0))
            for view, frames in depth.items():
                frames.append(sim.render_depth(view))
    return path, {view: np.stack(frames) for view, frames in depth.items()}


@pytest.mark.slow
def test_replayed_labels_are_those_of_the_recorded_frames(recorded, tmp_path):
    path, depth = recorded
    output = tmp_path / "dataset"
    command = ["--source", str(path), "--output", str(output), "--workers", "1"]
    assert main([*command, "--replay", "--n-points", "300"]) == 0
    stored = LeRobotDataset("local/replayed", root=output, depth_output_unit="m")
    frames = [stored[number] for number in range(len(stored))]
    assert len(frames) == len(depth["main"]) - 1  # no state follows the last one
    points = unpack_points(np.stack([frame["observation.points.main"] for frame in frames]))
    visible = np.stack([frame["observation.points_visible.main"] for frame in frames])
    for view, recorded_depth in depth.items():
        for number, frame in enumerate(frames):
            error = np.abs(frame[f"observation.depth.{view}"][0].numpy() - recorded_depth)
            wrong = np.mean(error > 2e-3, axis=(1, 2))  # at every moment
            assert wrong[number] < 0.002
            assert wrong[number] == wrong.min() and np.sort(wrong)[1] > 10 * wrong[number]
    for number, frame_visible in enumerate(visible):
        column, row = (points[number, frame_visible, :2] * SIDE).astype(int).T
        error = np.abs(depth["main"][number, row, column] - points[number, frame_visible, 2])
        assert np.mean(error < 0.01) > 0.9  # edges make up the rest
    facts = read_provenance(output)
    assert facts["cameras"]["main"]["depth"]["source"] == "mujoco depth buffer, exact"
    assert facts["cameras"]["main"]["tracks"]["n_points"] == 300
    assert facts["episodes"]["0"]["main"]["n_moving"] > 0
    assert facts["conversion"]["parameters"]["labels"]["depth_max_m"] == 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda demo: demo.__delitem__("states"), "demo_0 lacks states or model_file, which --replay needs"),
        (
            lambda demo: demo["obs/agentview_rgb"].write_direct(
                demo["obs/agentview_rgb"][()][:, ::-1].copy()
            ),
            "does not show",
        ),
    ],
)
def test_a_file_that_cannot_be_replayed_is_named(recorded, tmp_path, capsys, damage, message):
    path = tmp_path / "pick_up_the_thing_demo.hdf5"
    path.write_bytes(recorded[0].read_bytes())
    with h5py.File(path, "r+") as file:
        damage(file["data/demo_0"])
    output = tmp_path / "dataset"
    assert main(["--source", str(path), "--output", str(output), "--workers", "1", "--replay"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(path) in error and message in error
    assert not output.exists()
