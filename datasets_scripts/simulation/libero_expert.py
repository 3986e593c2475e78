"""A scripted expert for LIBERO's tasks that put one object into or onto another.

Every action follows from where hand, fingers and objects are at that moment: the expert recovers from noise,
and a policy can learn it from single frames.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

__all__ = ["PickAndPlace"]

POSITION_SCALE_M, ROTATION_SCALE_RAD = 0.05, 0.5  # of OSC_POSE's numbers
GAIN = 3.0  # OSC_POSE starts from where the hand is, and lags behind
OPEN_M, WIDEST_M = 0.07, 0.072  # between the fingers when they are open; of what they take by its middle
REACHED_M, HELD_M = 0.012, 0.03  # from the grasp: for fingers to close; to stay closed
APPROACH_M, LIFT_M = 0.10, 0.10
PALM_M = 0.025  # that an object may reach above the fingertips' middle
TIPS_M = 0.012  # that fingertips reach below their middle
REACH_M = 0.70  # from the robot's base; a stretched arm hardly moves
STILL_M_S = 0.005
BOX_CORNERS = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
DIRECTIONS = np.deg2rad(np.arange(0, 180, 5))


@dataclasses.dataclass(frozen=True)
class Grasp:
    """How the hand takes an object, in the frame of the object's body.

    Attributes:
        position (`np.ndarray`): `(3,)` meters, of the middle between the fingertips.
        axis (`np.ndarray`): `(3,)` from finger to finger.
    """

    position: np.ndarray
    axis: np.ndarray


class PickAndPlace:
    """The expert of one episode; made when the objects have come to rest.

    Args:
        environment: LIBERO's environment.
        model, data: MuJoCo's `MjModel` and `MjData`.

    Raises:
        ValueError: If the task asks for something else.
    """

    def __init__(self, environment: Any, model: Any, data: Any):
        goals = environment.parsed_problem["goal_state"]
        if len(goals) != 1 or goals[0][0] not in ("in", "on") or goals[0][1] not in environment.objects_dict:
            raise ValueError(
                f"there is no expert for the goal {goals}: it only puts one object in or on another"
            )
        self._model, self._data = model, data
        (_, moved, self._goal), bodies = goals[0], environment.obj_body_id
        self._is_inside = self._goal in environment.object_sites_dict
        holder = environment.object_sites_dict[self._goal].parent_name if self._is_inside else self._goal
        self._body, self._holder = bodies[moved], bodies[holder]
        self._shapes = _shapes_of(model, self._body)
        self._fingers = [
            _shapes_of(model, model.body(f"gripper0_{side}finger").id, whole=False)
            for side in ("left", "right")
        ]
        self._grasp = self._choose_grasp()
        self._axis = self._rotation() @ self._grasp.axis  # as the hand is to stay while it carries
        hand, bottom = self._to_world(self._grasp.position), self._corners(self._shapes)[:, 2].min()
        top = self._corners(_shapes_of(model, self._holder))[:, 2].max()
        below = hand[2] - bottom  # what hangs below the fingertips' middle
        self._carry_z = max(top + below + 0.03, hand[2] + LIFT_M)
        # An object falls into a basket: the hand is too wide for it.
        self._release_z = top + 0.01 if self._is_inside else self._place(self._holder)[2] + below + 0.02

    def act(self) -> np.ndarray:
        """The action now, `(7,)` float32: six numbers of OSC_POSE in [-1, 1], and 1 to open or 0 to close."""
        hand = self._data.site("gripper0_grip_site").xpos
        left, right = (self._data.body(f"gripper0_{side}finger").xpos for side in ("left", "right"))
        grasp, axis = self._to_world(self._grasp.position), self._rotation() @ self._grasp.axis
        is_open = np.linalg.norm(left - right) > OPEN_M
        to_goal = self._goal_xy() - self._place(self._body)[:2]
        turn = _turn(left - right, axis)
        if self._is_held():
            if np.linalg.norm(to_goal) < 0.015:
                target = [*(hand[:2] + to_goal), self._release_z]
                opens = hand[2] < self._release_z + 0.01
            else:
                is_high = hand[2] > self._carry_z - 0.03
                target = [*(hand[:2] + to_goal * is_high), self._carry_z]
                opens = False
            turn = _turn(left - right, self._axis)
        elif np.linalg.norm(to_goal) < 0.03:  # it has been let go
            target, opens, turn = hand + [0, 0, 0.05 * is_open], True, 0.0
        else:
            aside = np.linalg.norm((hand - grasp)[:2])
            target = grasp + [0, 0, np.clip(3 * (aside - 0.01) + 0.3 * (abs(turn) - 0.1), 0, APPROACH_M)]
            opens = np.linalg.norm(hand - grasp) > (REACHED_M if is_open else HELD_M)
        return self._command(target - hand, turn, opens)

    def _command(self, way: np.ndarray, turn: float, opens: bool) -> np.ndarray:
        downwards = self._data.site("gripper0_grip_site").xmat.reshape(3, 3)[:, 2]
        rotation = np.cross(downwards, (0, 0, -1)) + (0, 0, turn)
        numbers = GAIN * np.concatenate([way / POSITION_SCALE_M, rotation / ROTATION_SCALE_RAD])
        return np.append(np.clip(numbers, -1, 1), opens).astype(np.float32)

    def _is_held(self) -> bool:
        """Whether both fingers touch the object and stand still."""
        pairs = self._data.contact.geom  # (contacts, 2)
        for finger in self._fingers:
            touches = np.isin(pairs, finger).any(axis=1) & np.isin(pairs, self._shapes).any(axis=1)
            if not touches.any():
                return False
        speeds = [self._data.joint(f"gripper0_finger_joint{number}").qvel[0] for number in (1, 2)]
        return np.abs(speeds).max() < STILL_M_S

    def _goal_xy(self) -> np.ndarray:
        return (self._data.site(self._goal).xpos if self._is_inside else self._place(self._holder))[:2]

    def _place(self, body: int) -> np.ndarray:
        return self._data.xpos[body]

    def _rotation(self) -> np.ndarray:
        return self._data.xmat[self._body].reshape(3, 3)

    def _to_world(self, position: np.ndarray) -> np.ndarray:
        return self._rotation() @ position + self._place(self._body)

    def _corners(self, shapes: np.ndarray) -> np.ndarray:
        """Corners of boxes in the world: `(8 shapes, 3)` meters."""
        local = BOX_CORNERS * self._model.geom_size[shapes, None]  # (shapes, 8, 3)
        rotations = self._data.geom_xmat[shapes].reshape(-1, 3, 3)
        world = np.einsum("sij,scj->sci", rotations, local) + self._data.geom_xpos[shapes, None]
        return world.reshape(-1, 3)

    def _choose_grasp(self) -> Grasp:
        """The narrowest place that the hand need not turn far for, or the rim of what is too wide."""
        corners = self._corners(self._shapes).reshape(-1, 8, 3)  # (shapes, 8, 3)
        low, high = corners[..., 2].min(), corners[..., 2].max()
        z = max(np.clip((low + high) / 2, high - PALM_M, high - 0.01), low + TIPS_M)
        cut = corners[(corners[..., 2].min(axis=1) < z + 0.01) & (corners[..., 2].max(axis=1) > z - 0.01)]
        flat = cut.reshape(-1, 3)[:, :2]
        middle = (flat.min(axis=0) + flat.max(axis=0)) / 2
        left, right = (self._data.body(f"gripper0_{side}finger").xpos for side in ("left", "right"))
        best, least = None, np.inf
        for angle in DIRECTIONS:
            axis = np.array([np.cos(angle), np.sin(angle), 0.0])
            along = flat @ axis[:2]
            width = np.ptp(along)
            cost = width + 0.01 * abs(_turn(left - right, axis))
            if width < WIDEST_M and cost < least:
                center = middle + axis[:2] * ((along.min() + along.max()) / 2 - middle @ axis[:2])
                best, least = (np.append(center, z), axis), cost
        if best is None:
            best = self._choose_rim(corners, left - right)
        position, axis = best
        inverse = self._rotation().T
        return Grasp(inverse @ (position - self._place(self._body)), inverse @ axis)

    def _choose_rim(self, corners: np.ndarray, fingers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position and axis in the world to take a bowl by its rim, away from what stands around it."""
        high = corners[..., 2].max()
        rim = corners[corners[..., 2] > high - 0.01][:, :2]  # (points, 2)
        center = (rim.min(axis=0) + rim.max(axis=0)) / 2
        radius = np.median(np.linalg.norm(rim - center, axis=1))
        others = self._obstacles(high - 0.045)
        base = self._data.body("robot0_base").xpos[:2]
        best, least = None, np.inf
        for angle in (*DIRECTIONS, *(DIRECTIONS + np.pi)):
            axis = np.array([np.cos(angle), np.sin(angle), 0.0])
            finger = center + axis[:2] * (radius + 0.045)  # the one outside
            free = np.linalg.norm(others - finger, axis=1).min(initial=1.0)
            reach = max(
                np.linalg.norm(place + axis[:2] * radius - base) for place in (center, self._goal_xy())
            )
            cost = abs(_turn(fingers, axis)) + 100 * (max(0.0, 0.035 - free) + max(0.0, reach - REACH_M))
            if cost < least:
                best, least = (np.append(center + axis[:2] * radius, high - 0.012), axis), cost
        return best

    def _obstacles(self, above: float) -> np.ndarray:
        """Where other things stand higher than `above`: `(points, 2)` meters."""
        model = self._model
        boxes = (model.geom_group == 0) & (model.geom_type == 6) & (model.geom_bodyid > 0)
        roots = model.body_rootid[model.geom_bodyid]
        robot = model.body_rootid[model.body("gripper0_leftfinger").id]
        shapes = np.flatnonzero(boxes & (roots != model.body_rootid[self._body]) & (roots != robot))
        corners = self._corners(shapes).reshape(-1, 8, 3)
        steps = np.linspace(0, 1, 5)
        between = (
            corners[:, :, None, None] * (1 - steps[:, None]) + corners[:, None, :, None] * steps[:, None]
        )
        points = between.reshape(-1, 3)
        return points[points[:, 2] > above][:, :2]


def _shapes_of(model: Any, body: int, whole: bool = True) -> np.ndarray:
    """Geoms of a body for collisions, with those of the bodies attached to it."""
    if whole:
        on_it = model.body_rootid[model.geom_bodyid] == model.body_rootid[body]
    else:
        on_it = (model.geom_bodyid == body) | (model.body_parentid[model.geom_bodyid] == body)
    return np.flatnonzero(on_it & (model.geom_group == 0))


def _turn(fingers: np.ndarray, axis: np.ndarray) -> float:
    """The smallest turn about the vertical, in radians, that lays the fingers along an axis."""
    angle = np.arctan2(axis[1], axis[0]) - np.arctan2(fingers[1], fingers[0])
    return (angle + np.pi / 2) % np.pi - np.pi / 2
