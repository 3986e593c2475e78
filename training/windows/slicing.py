"""Which frames, goals and actions make up a window: the arithmetic of GR-MG's loader as plain functions.

A *segment* is one annotated stretch of frames, `first..last` inclusive; in a LeRobot dataset it is an
episode. T is the history, K the action chunk, `stride` the recorded frames per step of the window.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["action_chunks", "combine_commands", "goal_rows", "progress", "window_starts"]

GOAL_WITHIN_FRAMES = 25  # as in GR-MG


def window_starts(first: int, last: int, history_length: int, chunk_size: int, stride: int = 1) -> range:
    """First frames of all windows of a segment; empty if it is too short.

        start = first .. last - 1 - (T - 1) stride;   none if  last - (T + K - 2) stride <= first

    At stride 1 these are GR-MG's `first..last - T` and `last - T - K + 2 <= first`. The last frame is never a
    current one, so that every frame has a next one. K is the number of actions that the newest frame of the
    first window must have.

    `ForesightWindows` deviates from GR-MG on purpose: it asks with K = 1, and so takes segments that are too
    short for one whole chunk. What a chunk lacks there is masked as it is at the end of every other segment,
    and datasets of short clips keep their data.
    """
    if last - (history_length + chunk_size - 2) * stride <= first:
        return range(0)
    return range(first, last - (history_length - 1) * stride)


def goal_rows(newest: int, last: int, stride: int = 1) -> np.ndarray:
    """Frames of which one is drawn uniformly as the goal: int64 `newest + 1 .. min(newest + 25, last)`.

    With a stride they are that many frames apart; a last step that the segment cuts short ends at its last
    frame. `newest`, the newest frame of the window, lies before `last`.
    """
    steps = min(GOAL_WITHIN_FRAMES, -(-(last - newest) // stride))
    return np.minimum(newest + stride * np.arange(1, steps + 1), last)


def progress(rows: np.ndarray, first: int, last: int) -> np.ndarray:
    """Completed share of the instruction at frames s: `(s - first) / (last - first)`, float32 in [0, 1]."""
    return ((np.asarray(rows) - first) / (last - first)).astype(np.float32)


def combine_commands(
    commands: np.ndarray, stride: int, how: str, binary: Sequence[int] = (), every: int | None = None
) -> np.ndarray:
    """Recorded commands `(R, A)`, one per frame -> actions `(n, A)` of steps that span `stride` frames.

        sum:   action[j] = commands[j * every] + ... + commands[j * every + stride - 1]
        last:  action[j] = commands[j * every + stride - 1]

    A motion per frame adds up to the motion of a step. A target, and the state of a gripper (the entries in
    `binary`), is the one that holds when the step ends. Steps that the end of the rows cuts short are left
    out. `every` is the number of rows from one step to the next, `stride` if omitted.
    """
    if stride == 1:
        return commands
    starts = np.arange(0, len(commands) - stride + 1, every or stride)
    last = commands[starts + stride - 1]
    if how == "last":
        return last
    total = sum(commands[starts + frame] for frame in range(stride))
    total[:, list(binary)] = last[:, list(binary)]
    return total


def action_chunks(actions: np.ndarray, history_length: int, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The next K actions of each frame: `chunk[t, k] = actions[t + k]`; past the end zeros with mask 0.

    Args:
        actions (`numpy.ndarray`): `(R, A)`, row 0 is that of the window's oldest frame. Recorded actions end
            with the segment's last whole step; `local_delta` actions (`encode_local_delta`) one frame
            earlier, because they need the next frame's pose.
        history_length, chunk_size (`int`): T and K.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: float32 `(T, K, A)` and bool `(T, K)`.
    """
    steps = np.arange(history_length)[:, None] + np.arange(chunk_size)  # (T, K)
    padded = np.concatenate([actions, np.zeros((1, actions.shape[1]), actions.dtype)])
    chunks = padded[np.minimum(steps, len(actions))]
    return chunks.astype(np.float32), steps < len(actions)
