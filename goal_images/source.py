"""What a source of goal images is asked, and what it gives."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["REFRESH_STEPS", "GoalRequest", "GoalSource"]

REFRESH_STEPS = 20  # control steps between two goals (GR-MG)


@dataclasses.dataclass(frozen=True)
class GoalRequest:
    """One robot that needs a goal.

    Attributes:
        picture (`numpy.ndarray`): uint8 RGB `(H, W, 3)`, what the policy's first camera sees now.
        start (`numpy.ndarray`): The same when the instruction began.
        instruction (`str`): What the robot does.
        steps (`int`): Control steps since the instruction began.
        progress (`float`, *optional*): Completed share in [0, 1] as the policy predicts it; `None` if it does
            not.
    """

    picture: np.ndarray
    start: np.ndarray
    instruction: str
    steps: int = 0
    progress: float | None = None


class GoalSource(Protocol):
    """Draws goal images.

    Attributes:
        needs_progress (`bool`): Whether requests must have `progress`.
    """

    needs_progress: bool

    def draw(self, requests: Sequence[GoalRequest]) -> np.ndarray:
        """Goal pictures `(len(requests), H, W, 3)` uint8 RGB; each depends on its own request alone."""
        ...
