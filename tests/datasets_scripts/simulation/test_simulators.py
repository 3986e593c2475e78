"""What is recorded in which simulator: tasks, robot and rate; a demonstration in LIBERO's own simulator."""

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.columns import clean_depth
from datasets_scripts.simulate import main
from datasets_scripts.simulation import libero_files
from datasets_scripts.simulation.libero import LiberoSim
from datasets_scripts.simulation.libero_files import load_initial_states
from datasets_scripts.simulation.simulators import LiberoRecording, MetaWorldRecording
from datasets_scripts.storage.provenance import read_provenance

SIDE = 48


@pytest.fixture
def suites(monkeypatch):
    names = {name: [f"pick_{number}" for number in range(10)] for name in ("libero_object", "libero_goal")}
    monkeypatch.setattr(libero_files, "_load_tasks", lambda: names)


def test_tasks_of_libero_are_named_by_suite_number_or_name(suites):
    assert len(LiberoRecording.resolve_tasks("libero_object")) == 10
    found = LiberoRecording.resolve_tasks("libero_object/3, libero_object/pick_0,libero_object/3")
    assert found == ["libero_object/pick_3", "libero_object/pick_0"]


def test_each_simulator_has_its_own_robot_rate_and_limit():
    sawyer, panda = MetaWorldRecording(("reach-v3",)), LiberoRecording(("libero_object/pick_0",))
    assert (sawyer.robot_type, sawyer.fps, sawyer.max_steps) == ("sawyer", 20, 500)
    assert (panda.robot_type, panda.fps, panda.max_steps) == ("panda", 20, 280)
    shapes = [recording.layout().features["action"]["shape"] for recording in (sawyer, panda)]
    assert shapes == [(4,), (7,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tasks", "libero_goal"],
            "libero_goal has no scripted expert; there is one for libero_object and",
        ),
        (["--tasks", "libero_object/11"], "11 is not one of them"),
        (["--tasks", "libero_object/pick"], "libero_object has no task 'pick'; give its number"),
        (["--tasks", "libero_objects"], "did you mean libero_object"),
        (["--tasks", "libero_object", "--quality", "fast"], "--quality is of metaworld"),
        (["--tasks", "libero_object", "--max-steps", "281"], "--max-steps is 281"),
        (["--tasks", "libero_object", "--stride", "3"], "gives 20/3 frames per second"),
        (
            ["--tasks", "libero_object", "--cameras", "main,image"],
            "unknown camera 'image'; the simulator has main",
        ),
    ],
)
def test_what_cannot_be_recorded_in_libero_is_one_clear_message(suites, tmp_path, capsys, options, message):
    assert main(["--simulator", "libero", "--output", str(tmp_path / "dataset"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_demonstration_in_libero_is_what_an_evaluation_would_show(libero_simulator, tmp_path):
    output = tmp_path / "dataset"
    options = "--simulator libero --tasks libero_object/9 --episodes 1 --noise 0.1 --n-points 100"
    assert main(f"{options} --image-size {SIDE} --workers 1 --output {output}".split()) == 0
    stored = LeRobotDataset("local/libero", root=output, depth_output_unit="m")
    facts = read_provenance(output)
    episode = facts["episodes"]["0"]
    assert (stored.fps, stored.meta.robot_type) == (20, "panda")
    assert stored[0]["task"] == "pick up the orange juice and place it in the basket"
    assert facts["simulation"]["versions"].keys() >= {"hf-libero", "robosuite"}
    actions = np.stack([stored[number]["action"] for number in range(len(stored))])
    assert np.abs(actions[:, :6]).max() <= 1 and set(actions[:, 6]) == {0, 1}, "1 open, 0 closed"
    with LiberoSim(episode["task"], image_size=SIDE, first_seed=None) as sim:
        sim.reset(episode["seed"])
        seen = sim.observe()
        depth, bodies = sim.render_geometry("main")
        (position, rotation), lens = sim.camera_pose("main"), sim.intrinsics("main")
        floor, joints = sim._model.body("floor").id, sim._model.nq
        sim._env.seed(episode["seed"])
        sim._draw_start()
        start = sim._live.qpos.copy()
    known = load_initial_states(episode["task"])[:, 1 : 1 + joints]
    assert np.abs(known - start).max(axis=1).min() > 0.005, "no start of an evaluation"
    assert (stored[0]["observation.state"].numpy() == seen["state"]).all()
    for view, image in seen["images"].items():
        shown = stored[0][f"observation.images.{view}"].permute(1, 2, 0).numpy() * 255
        assert np.abs(shown - image).mean() < 8  # what the encoder loses
    assert np.abs(clean_depth(stored[0]["observation.depth.main"][0].numpy(), 4.0) - depth).max() < 2e-3
    row, column = np.nonzero(bodies == floor)
    rays = np.stack(
        [(column + 0.5 - lens["cx"]) / lens["fx"], (row + 0.5 - lens["cy"]) / lens["fy"], row * 0 + 1.0],
        axis=-1,
    )
    heights = (rays * depth[row, column, None]) @ rotation[2] + position[2]
    assert len(row) > 1000 and np.abs(heights).max() < 1e-5, "the floor is flat"
