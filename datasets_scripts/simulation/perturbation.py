"""Scenes that differ from those of the demonstrations, to learn what a policy relies on."""

import dataclasses
import json

import numpy as np

__all__ = ["Perturbation", "displace_object", "displaced_starts"]

MAX_SHIFT_M = 0.3


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """How a MetaWorld scene differs from the one that was demonstrated; by default it does not.

    What is drawn depends on the start's seed alone, so all policies meet the same scenes.

    Attributes:
        camera_shift_m (`float`): How far the main camera moves, in meters, without turning. For the seeds 0
            to 5, 6 to 11 and so on, it moves right, left, down, up, forward and backward, as seen in its
            image: a badly mounted camera may err in any direction.
        object_shift_m (`float`): How far beyond the range of MetaWorld's random starts the object begins, in
            meters, along the horizontal part of the main camera's optical axis: farther from the camera if
            positive, nearer to it if negative. Each object moves along this axis from where it would begin to
            this distance behind the edge of the range. The goal stays, unless it is a part of the object (as
            of drawers and doors).
        table_color (`tuple[float, float, float] | None`): RGB in [0, 1] that multiplies the color
            of the table's wood; its grain stays.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    camera_shift_m: float = 0.0
    object_shift_m: float = 0.0
    table_color: tuple[float, float, float] | None = None

    def __post_init__(self):
        for name in ("camera_shift_m", "object_shift_m"):
            value = getattr(self, name)
            if not abs(value) <= MAX_SHIFT_M:
                raise ValueError(f"{name} is {value}; give at most {MAX_SHIFT_M} meters")
        color = self.table_color
        if color is not None and (len(color) != 3 or not all(0 <= part <= 1 for part in color)):
            raise ValueError(f"table_color is {list(color)}; give red, green and blue in [0, 1]")

    def changes(self) -> dict:
        """The fields that change the scene, ready for JSON; empty if none does."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value}
        return json.loads(json.dumps(fields))

    def camera_shift(self, seed: int, rotation: np.ndarray) -> np.ndarray:
        """How a camera moves in the world frame: `(3,)` meters.

        Args:
            seed (`int`): Of the start.
            rotation (`np.ndarray`): `(3, 3)`; its columns are the camera's right, down and forward.
        """
        axis, is_backward = divmod(seed % 6, 2)
        return rotation[:, axis] * (-self.camera_shift_m if is_backward else self.camera_shift_m)

    def object_displacement(self, rotation: np.ndarray) -> np.ndarray:
        """How far objects move beyond the range of starts: `(2,)` meters, x and y of the world frame."""
        return self.object_shift_m * rotation[:2, 2] / np.linalg.norm(rotation[:2, 2])


def displace_object(
    start: np.ndarray, low: np.ndarray, high: np.ndarray, displacement: np.ndarray
) -> np.ndarray:
    """Move the object of a random start out of the range of starts.

    Args:
        start (`np.ndarray`): MetaWorld's random vector; it begins with the object's x and y in meters.
        low, high (`np.ndarray`): Range of the vector.
        displacement (`np.ndarray`): `(2,)` meters from the edge of the range; no component is 0.

    Returns:
        `np.ndarray`: The vector with another x and y.
    """
    edge = np.where(displacement > 0, high[:2], low[:2])
    to_edge = ((edge - start[:2]) / displacement).min()  # in multiples of the displacement
    return np.concatenate([start[:2] + (to_edge + 1) * displacement, start[2:]])


def displaced_starts(environment: type) -> type:
    """A MetaWorld environment whose objects begin outside of the range; give it a `displacement`.

    MetaWorld draws again until object and goal are far enough apart, here the displaced object.
    """

    class DisplacedStarts(environment):
        displacement: np.ndarray

        def _get_state_rand_vec(self) -> np.ndarray:
            space = self._random_reset_space
            return displace_object(super()._get_state_rand_vec(), space.low, space.high, self.displacement)

    return DisplacedStarts
