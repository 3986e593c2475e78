# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Gripper poses to the model's states and actions and back: the CALVIN form of GR-MG and 3D Foresight.

A *pose* is `(x, y, z, roll, pitch, yaw)`, meters and radians, with `R = Rz(yaw) Ry(pitch) Rx(roll)`. A
*state* holds the pose in entries 0..5 and the gripper in entry 6; other entries are unchanged.

    relative state    xyz = R_0^T (p_s - p_0)            rpy = euler(R_0^T R_s)
    action at s       xyz = 50 R_s^T (p_{s+1} - p_s)     rpy = 20 euler(R_s^T R_{s+1})    gripper of s+1
    undone            p' = p + R (a_xyz / 50)            R' = R R(a_rpy / 20)
    simulator         50 (p' - p)                        20 wrap(euler(R') - euler(R))    gripper 1 or -1

Actions come from measured poses, not from recorded commands, and lie in the gripper's own frame. All
functions are plain tensor maths over any leading axes and keep float32 or float64; products are written as
sums, because `@` would lose digits under autocast and with TF32.
"""

import math

import torch
from torch import Tensor

POSE_SIZE = 6
GRIPPER = 6  # entry of the gripper in states and actions
ACTION_SIZE = 7
POSITION_SCALE = 50.0  # 1 in an action is 2 cm
ROTATION_SCALE = 20.0  # 1 in an action is 0.05 rad


def euler_to_matrix(rpy_rad: Tensor) -> Tensor:
    """Roll, pitch, yaw `(..., 3)` in radians -> `R = Rz(yaw) Ry(pitch) Rx(roll)`, `(..., 3, 3)`."""
    (sa, sb, sc), (ca, cb, cc) = rpy_rad.sin().unbind(-1), rpy_rad.cos().unbind(-1)
    rows = [
        [cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa],
        [sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa],
        [-sb, cb * sa, cb * ca],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matrix_to_euler(rotation: Tensor) -> Tensor:
    """Rotation matrices `(..., 3, 3)` -> roll, pitch, yaw `(..., 3)` in radians, always finite.

        yaw = atan2(R10, R00)   pitch = atan2(-R20, |(R00, R10)|)   in [-pi, pi] and [-pi/2, pi/2]
        roll = atan2(sin(yaw) R02 - cos(yaw) R12, cos(yaw) R11 - sin(yaw) R01)

    Roll is read from `Rz(-yaw) R = Ry(pitch) Rx(roll)`. Thus the three angles agree at gimbal lock too (pitch
    at +-pi/2), where R00 and R10 vanish and any yaw is right; the textbook `atan2(R21, R22)` reads rounding
    errors there.
    """
    r = rotation
    yaw = torch.atan2(r[..., 1, 0], r[..., 0, 0])
    # Not torch.hypot, which ONNX lacks; entries of a rotation are too small to overflow.
    pitch = torch.atan2(-r[..., 2, 0], (r[..., 0, 0] ** 2 + r[..., 1, 0] ** 2).sqrt())
    s, c = yaw.sin(), yaw.cos()
    roll = torch.atan2(s * r[..., 0, 2] - c * r[..., 1, 2], c * r[..., 1, 1] - s * r[..., 0, 1])
    return torch.stack([roll, pitch, yaw], dim=-1)


def wrap_angle(angle_rad: Tensor) -> Tensor:
    """The same angle in (-pi, pi]: `a - 2 pi ceil((a - pi) / 2 pi)`.

    The difference of two Euler angles jumps by 2 pi near roll = pi, where CALVIN's gripper always is.
    """
    return angle_rad - 2 * math.pi * torch.ceil((angle_rad - math.pi) / (2 * math.pi))


def gripper_is_open(gripper: Tensor) -> Tensor:
    """Whether a gripper is open: boolean, the same shape. Right for -1 and 1 (CALVIN) and for 0 and 1."""
    return gripper > 0.5


def relative_state(states: Tensor) -> Tensor:
    """States relative to the first frame of their window: `R_0^T (p_s - p_0)`, `euler(R_0^T R_s)`.

    Takes windows `(..., T, >= 6)`, oldest first, in meters and radians. Entries from 6 on (gripper) are
    unchanged; the pose of frame 0 is exactly 0.
    """
    if states.ndim < 2 or states.shape[-1] < POSE_SIZE:
        raise ValueError(
            f"state has shape {tuple(states.shape)}; the relative form needs (..., time, size) with x, y, z, "
            "roll, pitch, yaw in the first 6 entries."
        )
    position, rotation = states[..., :3], euler_to_matrix(states[..., 3:POSE_SIZE])
    back = rotation[..., :1, :, :].mT  # (..., 1, 3, 3)
    moved = _rotate(back, position - position[..., :1, :])
    pose = torch.cat([moved, matrix_to_euler(_compose(back, rotation))], dim=-1)
    pose = torch.cat([torch.zeros_like(pose[..., :1, :]), pose[..., 1:, :]], dim=-2)  # not 1e-8 by rounding
    return torch.cat([pose, states[..., POSE_SIZE:]], dim=-1)


def encode_local_delta(states: Tensor) -> Tensor:
    """The action from every frame to the next one, from measured poses.

        xyz = 50 R_s^T (p_{s+1} - p_s)     rpy = 20 euler(R_s^T R_{s+1})     gripper: 1 if open at s+1, else 0

    Consecutive states `(..., R, >= 7)`, meters and radians, the gripper (-1 or 1, or 0 or 1) in entry 6, ->
    `(..., R - 1, 7)`; row s is the action from frame s to s + 1. 1 stands for 2 cm and for 0.05 rad.
    """
    if states.ndim < 2 or states.shape[-1] < ACTION_SIZE:
        raise ValueError(
            f"state has shape {tuple(states.shape)}; local_delta actions are made from (..., time, size) "
            "with x, y, z, roll, pitch, yaw and the gripper in the first 7 entries."
        )
    position, rotation = states[..., :3], euler_to_matrix(states[..., 3:POSE_SIZE])
    back = rotation[..., :-1, :, :].mT  # (..., R - 1, 3, 3)
    moved = _rotate(back, position.diff(dim=-2))
    turned = matrix_to_euler(_compose(back, rotation[..., 1:, :, :]))
    gripper = gripper_is_open(states[..., 1:, GRIPPER : GRIPPER + 1]).to(states.dtype)
    return torch.cat([POSITION_SCALE * moved, ROTATION_SCALE * turned, gripper], dim=-1)


def decode_local_delta(actions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The poses that a chunk of actions leads through: `p' = p + R (a_xyz / 50)`, `R' = R R(a_rpy / 20)`.

    Scaled local deltas `(..., K, >= 6)`, each from the pose that the one before leads to, and the first pose
    `(..., >= 6)` in meters and radians -> positions `(..., K + 1, 3)` in meters and rotations
    `(..., K + 1, 3, 3)`; entry 0 is the first pose.
    """
    moved = actions[..., :3] / POSITION_SCALE  # (..., K, 3)
    turned = euler_to_matrix(actions[..., 3:POSE_SIZE] / ROTATION_SCALE)  # (..., K, 3, 3)
    positions, rotations = [state[..., :3]], [euler_to_matrix(state[..., 3:POSE_SIZE])]
    for k in range(actions.shape[-2]):
        positions.append(positions[k] + _rotate(rotations[k], moved[..., k, :]))
        rotations.append(_compose(rotations[k], turned[..., k, :, :]))
    return torch.stack(positions, dim=-2), torch.stack(rotations, dim=-3)


def to_simulator_action(actions: Tensor, state: Tensor) -> Tensor:
    """A chunk as CALVIN's relative actions: `(50 (p' - p), 20 wrap(euler(R') - euler(R)), gripper)`.

    Differences are between one step and the next, in the world's frame. The wrap into (-pi, pi] is needed
    where the simulator clips actions.

    Args:
        actions (`torch.Tensor`): `(..., K, 7)` scaled local deltas; entry 6 is above 0.5 for an open gripper.
        state (`torch.Tensor`): `(..., >= 6)` current pose, meters and radians.

    Returns:
        `torch.Tensor`: `(..., K, 7)`; 1 stands for 2 cm and for 0.05 rad, the gripper is 1 (open) or -1.
    """
    sizes_fit = actions.shape[-1] == ACTION_SIZE and state.shape[-1] >= POSE_SIZE
    if not sizes_fit or actions.shape[:-2] != state.shape[:-1]:
        raise ValueError(
            f"actions have shape {tuple(actions.shape)} and state {tuple(state.shape)}; local_delta actions "
            "are decoded from (..., chunk, 7) with the current state (..., size >= 6), leading axes alike."
        )
    positions, rotations = decode_local_delta(actions, state)
    angles = matrix_to_euler(rotations)  # (..., K + 1, 3)
    moved = POSITION_SCALE * positions.diff(dim=-2)
    turned = ROTATION_SCALE * wrap_angle(angles.diff(dim=-2))
    gripper = torch.where(gripper_is_open(actions[..., GRIPPER:]), 1.0, -1.0).to(moved.dtype)
    return torch.cat([moved, turned, gripper], dim=-1)


def _rotate(rotation: Tensor, vector: Tensor) -> Tensor:
    """`R v`: `(..., 3, 3)` and `(..., 3)` -> `(..., 3)`."""
    return (rotation * vector[..., None, :]).sum(-1)


def _compose(one: Tensor, other: Tensor) -> Tensor:
    """`A B`: `(..., 3, 3)` each."""
    return (one[..., :, :, None] * other[..., None, :, :]).sum(-2)
