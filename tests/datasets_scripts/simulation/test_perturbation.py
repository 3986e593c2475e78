"""Changed scenes: what moves, moves by what was asked for, and nothing else changes."""

import numpy as np
import pytest

from datasets_scripts.simulation.metaworld import MetaWorldSim
from datasets_scripts.simulation.perturbation import Perturbation, displace_object

SIDE = 48
SEED = 10007
COLOR = (0.2, 0.4, 0.8)


def open_sim(task="push-v3", cameras=("main", "wrist"), **changes):
    return MetaWorldSim(task, cameras, SIDE, perturbation=Perturbation(**changes))


@pytest.fixture(scope="module")
def unchanged(simulator):
    with open_sim() as sim:
        sim.reset(SEED)
        yield sim


def test_an_object_moves_along_the_line_until_it_is_beyond_the_range():
    low, high = np.array([-1.0, 2.0, 0.0]), np.array([1.0, 4.0, 0.0])
    # From (0, 3): 2 along x and 1.5 along y to the edge in units of (0.5, 2/3): y comes first.
    moved = displace_object(np.array([0.0, 3.0, 7.0]), low, high, np.array([0.5, 2 / 3]))
    assert np.allclose(moved, [0.5 * 2.5, 3 + 2.5 * 2 / 3, 7.0])
    # At the edge already: by the displacement itself.
    assert np.allclose(displace_object(low, low, high, np.array([-0.1, -0.2])), [-1.1, 1.8, 0.0])


@pytest.mark.sim
def test_the_main_camera_moves_along_each_axis_of_its_image_and_nothing_else_does(unchanged):
    position, rotation = unchanged.camera_pose("main")
    wrist, picture = unchanged.camera_pose("wrist"), unchanged.render_rgb("main")
    found = []
    with open_sim(camera_shift_m=0.05) as sim:
        for seed in range(6):
            sim.reset(seed)
            moved, turned = sim.camera_pose("main")
            assert np.allclose(turned, rotation, atol=1e-12)
            found.append(rotation.T @ (moved - position))
        sim.reset(SEED)  # 5 modulo 6: backward
        assert all(np.allclose(a, b) for a, b in zip(sim.camera_pose("wrist"), wrist, strict=True))
        assert (sim.body_poses()[0] == unchanged.body_poses()[0]).all()
        assert (sim.render_rgb("wrist") == unchanged.render_rgb("wrist")).all()
        assert (sim.render_rgb("main") != picture).any(-1).mean() > 0.1
        center = SIDE // 2, SIDE // 2
        farther = sim.render_depth("main")[center] - unchanged.render_depth("main")[center]
        assert farther == pytest.approx(0.05, abs=1e-3)
    right, down, forward = 0.05 * np.eye(3)
    assert np.allclose(found, [right, -right, down, -down, forward, -forward], atol=1e-9)


@pytest.mark.sim
def test_an_object_begins_nearer_than_any_demonstrated_one_and_the_expert_succeeds(unchanged):
    axis = unchanged.camera_pose("main")[1][:2, 2]
    axis /= np.linalg.norm(axis)
    before, goal = unchanged._observation[4:6], unchanged._observation[-3:]
    with open_sim(cameras=["main"], object_shift_m=-0.05) as sim:
        sim.reset(SEED)
        space, after = sim._env._random_reset_space, sim._observation[4:6]
        moved = after - before
        assert moved @ axis < -0.05
        assert moved @ [-axis[1], axis[0]] == pytest.approx(0, abs=1e-3)
        # Behind one edge of the range: by 5 cm along the axis.
        beyond = np.maximum(after - space.high[:2], space.low[:2] - after)
        assert (beyond / np.abs(axis)).max() == pytest.approx(0.05, abs=2e-3)
        assert (sim._observation[-3:] == goal).all()
        success = sim.step(sim.expert_action(), 4)
        assert not success
        while not success and sim.steps_left:
            success = sim.step(sim.expert_action(), 4, stop_on_success=True)
        assert success


@pytest.mark.sim
def test_another_color_changes_the_pixels_of_the_table_and_no_others(unchanged):
    table = unchanged.render_geometry("main")[1] == unchanged._env.model.body("tablelink").id
    with open_sim(table_color=COLOR) as sim:
        sim.reset(SEED)
        before, after = unchanged.render_rgb("main"), sim.render_rgb("main")
        assert (sim.render_depth("main") == unchanged.render_depth("main")).all()
    assert ((before != after).any(-1) == table).all() and 0.2 < table.mean() < 0.8
    red, green, blue = np.median(after[table], axis=0)
    assert red < green < blue


def test_impossible_changes_are_named(simulator):
    for changes, words in (
        ({"camera_shift_m": 5}, "camera_shift_m is 5; give at most 0.3 meters"),
        ({"object_shift_m": float("nan")}, "object_shift_m is nan"),
        ({"table_color": (255, 0, 0)}, r"table_color is \[255, 0, 0\]; give red, green and blue in \[0, 1\]"),
        ({"table_color": (0.5,)}, "red, green and blue"),
    ):
        with pytest.raises(ValueError, match=words):
            Perturbation(**changes)
    with pytest.raises(ValueError, match="plate of plate-slide-v3 always starts at one place"):
        open_sim("plate-slide-v3", object_shift_m=0.05)
    assert Perturbation().changes() == {}
    assert Perturbation(table_color=COLOR).changes() == {"table_color": list(COLOR)}
