"""LIBERO's simulator: the two forms of data, starts, and recorded actions that lead to recorded states."""

import numpy as np
import pytest

from datasets_scripts.conversion.libero import LiberoArchive
from datasets_scripts.simulation import libero, libero_files
from datasets_scripts.simulation.libero import FORMS, LiberoSim, choose_form
from datasets_scripts.simulation.libero_files import (
    SUITES,
    resolve_libero_tasks,
)
from tests.simulators import record_libero_file

h5py = pytest.importorskip("h5py")
SIDE = 64


def test_gripper_commands_of_both_forms_reach_the_simulator_with_its_sign():
    for form, opened, closed in (("converted", 1, 0), ("lerobot", -1, 1)):
        for gripper, command in ((opened, -1), (closed, 1)):
            action = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6, gripper])
            assert FORMS[form].command(action).tolist() == [*action[:6], command]


def test_images_of_the_forms_are_mirror_images_of_each_other():
    drawn = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)  # lowest row first
    upright, turned = (FORMS[form].image_of(drawn) for form in ("converted", "lerobot"))
    assert (upright == drawn[::-1]).all() and (turned == upright[:, ::-1]).all()


@pytest.mark.parametrize("angle", [3.0, 3.3])  # beyond half a turn, w is negative
def test_states_of_both_forms_describe_one_rotation(angle):
    rotations = pytest.importorskip("scipy.spatial.transform").Rotation
    axis = np.array([0.6, -0.8, 0.0])
    quaternion = np.array([*axis * np.sin(angle / 2), np.cos(angle / 2)])
    position, fingers = np.array([0.1, 0.2, 0.9]), np.array([0.03, -0.025])
    converted = FORMS["converted"].state_of(position, quaternion, fingers)
    lerobot = FORMS["lerobot"].state_of(position, quaternion, fingers)
    assert converted[6] == 1 and np.allclose(lerobot[6:], fingers)
    assert np.allclose(lerobot[3:6], axis * angle, atol=1e-5)
    difference = rotations.from_euler("xyz", converted[3:6]).inv() * rotations.from_rotvec(lerobot[3:6])
    assert difference.magnitude() < 1e-5
    assert FORMS["converted"].state_of(position, quaternion, fingers / 2)[6] == 0


@pytest.mark.parametrize(
    ("views", "state_dim", "given", "form"),
    [
        (("main", "wrist"), 7, None, "converted"),
        (("wrist", "main"), 0, "converted", "converted"),
        (("main", "wrist"), 0, "lerobot", "lerobot"),
        (("image", "image2"), 8, None, "lerobot"),
        (("main", "wrist"), 8, "lerobot", "lerobot"),
        (("image", "image2"), 0, None, "lerobot"),
    ],
)
def test_the_form_follows_state_and_views_of_the_policy_or_is_given(views, state_dim, given, form):
    assert choose_form(views, state_dim, given) == form


@pytest.mark.parametrize(
    ("views", "state_dim", "given", "message"),
    [
        (("main", "wrist"), 4, None, "state_dim 4; LIBERO's data have 7"),
        (("main",), 7, None, "needs the wrist view"),
        (("image", "main"), 8, None, "needs the wrist view"),
        (("main", "top"), 0, None, r"cannot show \['top'\]"),
        (("image", "image2"), 7, None, r"cannot show \['image', 'image2'\]"),
        (("main", "wrist"), 0, None, "give --form converted .* or --form lerobot"),
        (
            ("main", "wrist"),
            8,
            "converted",
            "--form is converted, but a state of 8 entries",
        ),
    ],
)
def test_a_policy_that_does_not_fit_libero_is_refused(views, state_dim, given, message):
    with pytest.raises(ValueError, match=message):
        choose_form(views, state_dim, given)


def test_a_missing_simulator_and_missing_paths_are_named_with_the_remedy(tmp_path, monkeypatch):
    libero._import_libero.cache_clear()
    monkeypatch.setattr(libero, "installed_folder", lambda: tmp_path)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="config.yaml does not exist; run .*prepare_libero"):
        libero._import_libero()


SCENE = """(define (problem X) (:domain robosuite) (:language Pick the {0})
  (:regions (bin_region (:target floor) (:ranges ((0 0 1 1)))) (contain_region
      (:target basket_1)))
  (:fixtures floor - floor
  )
  (:objects
    {1} - thing
    basket_1 - basket
  )
  (:goal
    (And (In {0}_1 basket_1_contain_region) (On basket_1 floor))
  )
)"""


def test_a_partner_is_the_next_task_whose_things_are_in_the_scene(tmp_path, monkeypatch):
    scenes = {
        "milk": "milk_1 soup_1",
        "butter": "butter_1 milk_1",
        "soup": "soup_1",
        "again": "soup_1 milk_1",
    }
    monkeypatch.setattr(libero_files, "_load_tasks", lambda: {"libero_object": list(scenes)})
    monkeypatch.setattr(libero_files, "task_file", lambda task: tmp_path / task.rpartition("/")[2])
    libero_files._read_scene.cache_clear()
    for name, things in scenes.items():
        (tmp_path / name).write_text(SCENE.format("milk" if name == "again" else name.capitalize(), things))
    tasks = resolve_libero_tasks("libero_object")
    partners = libero_files.libero_partners(tasks)
    libero_files._read_scene.cache_clear()
    milk, butter, soup, again = tasks
    assert partners == {milk: soup, butter: again, again: soup}, "soup's scene has nothing else"


# ------------------------------------------------------------------ the real simulator


@pytest.mark.slow
def test_success_is_that_of_the_judged_task_in_the_same_scene(libero_simulator):
    task = resolve_libero_tasks("libero_object", [0])[0]
    named = libero_files.libero_partners([task])[task]
    with LiberoSim(task, (), SIDE, told=named, judged=named) as sim:
        assert sim.task_description == libero_files.libero_instruction(named)
        sim.reset(0)
        actions, done = [], False
        while not done and sim.steps_left:  # the expert reads the goal from the simulator
            actions.append(sim.expert_action())
            done = sim.step(actions[-1])
    assert done
    with LiberoSim(task, (), SIDE, told=named) as sim:
        sim.reset(0)
        assert not any(sim.step(action) for action in actions), "the scene's own task was not done"
    other = resolve_libero_tasks("libero_goal", [0])[0]
    with pytest.raises(ValueError, match=f"the scene of {task} has no .* as {other} needs"):
        LiberoSim(task, (), SIDE, judged=other)


@pytest.mark.slow
def test_recorded_actions_reach_the_recorded_states_and_images(libero_simulator, tmp_path):
    (task,) = resolve_libero_tasks("libero_object", [3])
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.uniform(-1, 1, (16, 6)), np.ones((16, 1))], axis=1)
    actions[:, 2] = -0.8  # down
    actions[:6, 6] = actions[12:, 6] = -1  # opens, closes and opens again
    record_libero_file(task, actions, tmp_path / "a_demo.hdf5", SIDE)
    stored = LiberoArchive(tmp_path).read(0)
    fingers = []
    with LiberoSim(task, ("wrist", "main"), SIDE) as sim:
        sim.reset(0)
        start = sim.state()
        for frame, action in enumerate(stored.columns["action"]):
            sim.step(action)
            seen = sim.observe()
            assert np.abs(seen["state"] - stored.columns["observation.state"][frame]).max() < 1e-4
            for view, image in seen["images"].items():
                recorded = stored.videos[f"observation.images.{view}"][frame]
                assert np.abs(image.astype(int) - recorded).mean() < 0.2
            fingers.append(seen["state"][6])
    assert start[2] - seen["state"][2] > 0.05, "the gripper went down"
    assert fingers[0] == 1 and 0 in fingers, "the gripper was open and closed"


@pytest.mark.slow
def test_a_start_repeats_and_depends_on_its_number_alone(libero_simulator):
    (task,) = resolve_libero_tasks("libero_goal", [2])  # with a cabinet, whose place the seed draws
    starts = []
    with LiberoSim(task, image_size=SIDE, first_seed=5) as sim:
        for seed in (5, 6, 5):
            sim.reset(seed)
            starts.append(sim.observe())
            sim.step(np.array([1, 0, 0, 0, 0, 0, 0.0]))
            assert sim.steps_taken == 1 and sim.max_steps == SUITES["libero_goal"].max_steps
    first, other, again = (start["images"]["main"] for start in starts)
    assert (first == again).all() and (first != other).any()
    assert (starts[0]["state"] == starts[2]["state"]).all()
    assert first.mean(axis=(0, 1)).min() > 20, "not black"
