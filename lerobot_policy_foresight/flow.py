# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Flow targets of LeRobot's batches."""

import numpy as np
import torch
from torch import Tensor

from modeling_foresight import ForesightConfig as ModelConfig
from modeling_foresight.targets import build_flow_targets

__all__ = ["frames_after", "read_flow"]


def frames_after(model: ModelConfig) -> int:
    """Frames after the newest one that flow targets need."""
    return model.flow_length - 1 if model.has("flow") else 0


def read_flow(
    model: ModelConfig, points: Tensor, visible: Tensor, real: Tensor, moving: list[np.ndarray]
) -> dict[str, Tensor]:
    """Targets of the flow head for a batch of windows.

    The draw among candidates follows torch's generator, whose state LeRobot saves.

    Args:
        model (`modeling_foresight.ForesightConfig`): Window, flow length and grid.
        points (`torch.Tensor`): `(B, T + L - 1, 3 n)` as stored: x, y image fractions and metres.
        visible (`torch.Tensor`): bool `(B, T + L - 1, n)`.
        real (`torch.Tensor`): bool `(B, T + L - 1)`, false past the episode's end.
        moving (`list[numpy.ndarray]`): bool `(n,)` per sample.

    Returns:
        `dict`: `track_start`, `track` and `track_weight` of the raw schema.
    """
    frames, steps = model.history_length, model.flow_length
    points, visible, real = (x.cpu().numpy() for x in (points.float(), visible.bool(), real))
    points = points.reshape(*visible.shape, 3)
    known = real[:, np.arange(frames)[:, None] + np.arange(steps)]  # (B, T, L)
    targets: dict[str, list[np.ndarray]] = {"track_start": [], "track": [], "track_weight": []}
    for sample, flags in enumerate(moving):
        made = build_flow_targets(
            points[sample],
            visible[sample] & real[sample, :, None],
            flags,
            frames,
            steps,
            tuple(model.flow_grid),
            np.random.default_rng(int(torch.randint(2**62, ()))),
        )
        made["track_weight"] = made["track_weight"] * known[sample, ..., None]
        for name, values in targets.items():
            values.append(made[name])
    return {name: torch.from_numpy(np.stack(values)) for name, values in targets.items()}
