"""The CALVIN codec against an independent implementation: there and back, near roll = pi, at gimbal lock."""

import math

import numpy as np
import pytest
import torch

from modeling_foresight.action_codec import (
    decode_local_delta,
    encode_local_delta,
    euler_to_matrix,
    gripper_is_open,
    matrix_to_euler,
    relative_state,
    to_simulator_action,
    wrap_angle,
)

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

EPISODES, FRAMES, STATE_SIZE, CHUNK = 3, 12, 9, 5


def rotations(rpy) -> Rotation:
    """Fixed axes x, y, z in turn: R = Rz(yaw) Ry(pitch) Rx(roll)."""
    return Rotation.from_euler("xyz", np.asarray(rpy, dtype=np.float64))


def walk(seed=0, roll=0.0, closed=-1.0) -> torch.Tensor:
    """Smooth poses `(E, R, 9)` float64 around a roll, with a gripper that opens and closes, then two more."""
    rng = np.random.default_rng(seed)
    states = np.zeros((EPISODES, FRAMES, STATE_SIZE))
    states[..., :3] = rng.normal(size=(EPISODES, 1, 3)) + 0.02 * rng.normal(
        size=(EPISODES, FRAMES, 3)
    ).cumsum(1)
    steps = Rotation.from_rotvec(0.08 * rng.normal(size=(EPISODES * FRAMES, 3)))
    turn = rotations([[roll, 0.3, -1.0], [roll, -0.2, 3.1], [roll, 0.05, 0.4]])
    for t in range(FRAMES):
        states[:, t, 3:6] = turn.as_euler("xyz")
        turn = turn * steps[t * EPISODES : (t + 1) * EPISODES]
    states[..., 6] = np.where(rng.random((EPISODES, FRAMES)) > 0.5, 1.0, closed)
    states[..., 7:] = rng.normal(size=(EPISODES, FRAMES, 2))
    return torch.from_numpy(states)


def angle_between(one: torch.Tensor, other: Rotation) -> float:
    """Largest angle in radians between matrices and scipy's rotations."""
    return float(
        (Rotation.from_matrix(one.double().reshape(-1, 3, 3).numpy()).inv() * other).magnitude().max()
    )


def test_matrices_and_angles_agree_with_scipy():
    rpy = np.random.default_rng(1).uniform([-3.1, -1.5, -3.1], [3.1, 1.5, 3.1], size=(200, 3))
    matrices = euler_to_matrix(torch.from_numpy(rpy))
    np.testing.assert_allclose(matrices.numpy(), rotations(rpy).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(matrix_to_euler(matrices).numpy(), rpy, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pitch", [math.pi / 2, -math.pi / 2, math.pi / 2 - 1e-4, 1e-6 - math.pi / 2])
def test_at_gimbal_lock_angles_are_finite_and_give_the_same_rotation(pitch, dtype):
    draws = np.random.default_rng(2).uniform(-math.pi, math.pi, size=(50, 2))
    rpy = torch.tensor([[roll, pitch, yaw] for roll, yaw in draws], dtype=dtype)
    other = euler_to_matrix(rpy.flip(-1))
    matrices = other.mT @ (other @ euler_to_matrix(rpy))  # with the rounding of a product, as in real use
    angles = matrix_to_euler(matrices)
    assert angles.isfinite().all()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(euler_to_matrix(angles), matrices, atol=tolerance, rtol=0)


def test_angles_wrap_into_the_half_open_interval():
    angles = torch.tensor([0.0, 3.0, 4.0, -4.0, 7.0, math.pi, -math.pi, 3 * math.pi], dtype=torch.float64)
    expected = [0.0, 3.0, 4.0 - 2 * math.pi, 2 * math.pi - 4.0, 7.0 - 2 * math.pi, *[math.pi] * 3]
    np.testing.assert_allclose(wrap_angle(angles).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("roll", [0.4, math.pi])
def test_a_relative_state_is_the_pose_seen_from_the_first_frame(roll):
    states = walk(roll=roll)
    result = relative_state(states)
    assert result.shape == states.shape and (result[:, 0, :6] == 0).all()
    assert torch.equal(result[..., 6:], states[..., 6:])
    for e in range(EPISODES):
        first = rotations(states[e, 0, 3:6])
        expected = first.inv().apply(states[e, :, :3].numpy() - states[e, 0, :3].numpy())
        np.testing.assert_allclose(result[e, :, :3].numpy(), expected, atol=1e-12)
        turned = first.inv() * rotations(states[e, :, 3:6])
        assert angle_between(euler_to_matrix(result[e, :, 3:6]), turned) < 1e-7
        # Seen from the first frame, poses of one window are never near the jump at pi.
        assert result[e, :, 3:6].abs().max() < 1.5


@pytest.mark.parametrize("closed", [-1.0, 0.0])
def test_an_action_leads_from_the_measured_pose_to_the_next_one(closed):
    states = walk(closed=closed)
    actions = encode_local_delta(states)
    assert actions.shape == (EPISODES, FRAMES - 1, 7)
    for e in range(EPISODES):
        for s in range(FRAMES - 1):
            now, later = rotations(states[e, s, 3:6]), rotations(states[e, s + 1, 3:6])
            moved = now.inv().apply((states[e, s + 1, :3] - states[e, s, :3]).numpy())
            np.testing.assert_allclose(actions[e, s, :3].numpy(), 50 * moved, atol=1e-9)
            turned = (now.inv() * later).as_euler("xyz")
            np.testing.assert_allclose(actions[e, s, 3:6].numpy(), 20 * turned, atol=1e-7)
            assert actions[e, s, 6] == float(states[e, s + 1, 6] == 1)  # that of the next frame


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("roll", [0.0, math.pi, -math.pi])
def test_a_chunk_undone_step_by_step_goes_through_the_measured_poses(roll, dtype):
    states = walk(seed=3, roll=roll).to(dtype)
    chunk = encode_local_delta(states)[:, 4 : 4 + CHUNK]
    positions, matrices = decode_local_delta(chunk, states[:, 4])
    assert positions.shape == (EPISODES, CHUNK + 1, 3) and matrices.dtype == dtype
    torch.testing.assert_close(positions, states[:, 4 : 5 + CHUNK, :3], atol=1e-5, rtol=0)
    truth = rotations(states[:, 4 : 5 + CHUNK, 3:6].reshape(-1, 3))
    assert angle_between(matrices, truth) < (1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_simulators_relative_actions_add_up_to_the_measured_poses_near_roll_pi(dtype):
    states = walk(seed=5, roll=math.pi).to(dtype)
    assert (states[..., 3].max() > 3) and (states[..., 3].min() < -3)  # the walk does cross the jump
    chunk = encode_local_delta(states)[:, :CHUNK]
    result = to_simulator_action(chunk, states[:, 0])
    assert result.shape == (EPISODES, CHUNK, 7) and result.dtype == dtype
    # As CALVIN does: the scaled differences are added to position and angles.
    reached = states[:, 0].clone()
    for k in range(CHUNK):
        reached[:, :3] += result[:, k, :3] / 50
        reached[:, 3:6] += result[:, k, 3:6] / 20
        torch.testing.assert_close(reached[:, :3], states[:, k + 1, :3], atol=1e-5, rtol=0)
        assert angle_between(euler_to_matrix(reached[:, 3:6]), rotations(states[:, k + 1, 3:6])) < 1e-5
    assert (result[..., 3:6] / 20).abs().max() < 0.5  # no jump of 2 pi, so clipping harms no angle
    assert torch.equal(result[..., 6], states[:, 1 : 1 + CHUNK, 6])


def test_probabilities_of_an_open_gripper_become_plus_or_minus_one():
    actions = torch.zeros(2, 3, 7)
    actions[..., 6] = torch.tensor([[0.0, 0.49, 0.51], [1.0, 0.5, 0.9]])
    result = to_simulator_action(actions, torch.zeros(2, 7))
    assert result[..., 6].tolist() == [[-1, -1, 1], [1, -1, 1]]
    assert (result[..., :6] == 0).all()


def test_both_ways_to_store_a_gripper_are_read():
    assert gripper_is_open(torch.tensor([-1.0, 1.0, 0.0, 1.0])).tolist() == [False, True, False, True]


def test_shapes_that_do_not_fit_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"shape \(4, 5\); the relative form needs .*yaw"):
        relative_state(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"shape \(7,\); local_delta actions are made from"):
        encode_local_delta(torch.zeros(7))
    with pytest.raises(ValueError, match=r"actions have shape \(2, 3, 7\) and state \(3, 7\)"):
        to_simulator_action(torch.zeros(2, 3, 7), torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"actions have shape \(2, 3, 6\)"):
        to_simulator_action(torch.zeros(2, 3, 6), torch.zeros(2, 7))


def test_autocast_costs_no_digits():
    states = walk(roll=math.pi).float()
    actions, relative = encode_local_delta(states), relative_state(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_local_delta(states), actions)
        assert torch.equal(relative_state(states), relative)
        positions, _ = decode_local_delta(actions[:, :CHUNK], states[:, 0])
    torch.testing.assert_close(positions, states[:, : CHUNK + 1, :3], atol=1e-5, rtol=0)
