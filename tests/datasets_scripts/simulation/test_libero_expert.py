"""LIBERO's expert: how it turns its hand, and what it can do in the real simulator."""

import numpy as np
import pytest

from datasets_scripts.simulation.libero import LiberoSim
from datasets_scripts.simulation.libero_expert import _turn
from datasets_scripts.simulation.libero_files import resolve_libero_names
from datasets_scripts.simulation.recording import plan_episode
from datasets_scripts.simulation.simulators import LiberoRecording


def test_the_hand_takes_the_shorter_turn_whichever_finger_is_where():
    fingers = np.array([0.0, -0.08, 0.0])
    for degrees, turn in ((90, 0), (-90, 0), (100, 10), (-70, 20), (20, -70), (190, -80)):
        axis = np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), 0])
        assert np.rad2deg(_turn(fingers, axis)) == pytest.approx(turn)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["libero_object/1", "libero_spatial/4"])  # flat on the floor, in a drawer
def test_the_expert_solves_its_tasks_under_noise(libero_simulator, name):
    (task,) = resolve_libero_names(name)
    recording = LiberoRecording((task,), noise=0.1)
    with LiberoSim(task, image_size=16, first_seed=None) as sim:
        plans = [plan_episode(sim, recording, seed, np.random.default_rng(seed)) for seed in range(3)]
        solved = [plan for plan in plans if plan is not None]
        assert len(solved) >= 2
        labels, executed = solved[0]
        sim.reset(plans.index(solved[0]))
        for label, action in zip(labels, executed, strict=True):
            np.testing.assert_array_equal(label, sim.expert_action())
            success = sim.step(action)
    assert success, "the same start and actions"


@pytest.mark.slow
def test_other_goals_are_refused(libero_simulator):
    (task,) = resolve_libero_names("libero_goal/0")
    with LiberoSim(task, image_size=16) as sim:
        sim.reset(0)
        with pytest.raises(ValueError, match="there is no expert for the goal .*open"):
            sim.expert_action()
