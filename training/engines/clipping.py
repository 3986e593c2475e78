"""Clipping of gradients, the same with every engine."""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from training.engines.sharding import full_value

__all__ = ["clip_gradients"]


def clip_gradients(
    accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter], max_norm: float
) -> torch.Tensor:
    """Clips gradients to a norm and returns the norm that they had, `()`; all processes call it together.

    `max_norm` 0 leaves them unchanged, as in transformers' `Trainer` and in LeRobot.
    """
    # DeepSpeed clips by its own configuration, in its step, which is done by now; 0 is no clipping there too.
    norm = accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
    return full_value(torch.as_tensor(norm, device=accelerator.device))
