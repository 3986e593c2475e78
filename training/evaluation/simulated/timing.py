"""How long an evaluation takes, over all of its sessions: the `timing` of its results."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import read_json, write_json

__all__ = ["WallClock", "describe_timing"]


class WallClock:
    """Seconds that an evaluation has run: those of earlier sessions, and those since this was made.

    What a session did after the last call of [`save`] is not counted: its unfinished episodes run again.

    Args:
        folder (`Path`): Where finished episodes are kept; the seconds lie beside them.

    Raises:
        ValueError: If the seconds of the earlier sessions cannot be read; names the file.
    """

    def __init__(self, folder: Path):
        self._path = folder / "wall_clock.json"
        known = read_json(self._path, "delete it to count this session alone") if self._path.exists() else {}
        self._earlier_s, self._begun = known.get("wall_s", 0.0), time.perf_counter()

    def read_s(self) -> float:
        """Seconds so far."""
        return self._earlier_s + time.perf_counter() - self._begun

    def save(self) -> None:
        """Keeps the seconds so far for a session that resumes this one."""
        write_json(self._path, {"wall_s": self.read_s()})


def describe_timing(timing, wall_s: float, environments: int, resumed: int) -> dict:
    """The `timing` of the results.

    Args:
        timing (`closed_loop.Timing`): Durations of this session's control steps.
        wall_s (`float`): Seconds of all sessions.
        environments (`int`): Simulators side by side.
        resumed (`int`): Episodes that earlier sessions finished.

    Returns:
        `dict`: `wall_s`, `parallel_environments`, `resumed_after` if not zero, and median and 90th percentile
        as `policy_ms`, `control_step_ms`, and `goal_ms` if goal images were waited for.
    """
    return {
        "wall_s": round(wall_s, 2),
        "parallel_environments": environments,
        **({"resumed_after": resumed} if resumed else {}),
        "policy_ms": _percentiles_ms(timing.policy),
        "control_step_ms": _percentiles_ms(timing.step),
        **({"goal_ms": _percentiles_ms(timing.goal)} if timing.goal else {}),
    }


def _percentiles_ms(durations_s: Sequence[float]) -> dict:
    """Median and 90th percentile of durations, in milliseconds; without durations only their count."""
    if not durations_s:
        return {"count": 0}
    median, p90 = np.percentile(np.asarray(durations_s) * 1000, [50, 90])
    return {"median": round(float(median), 3), "p90": round(float(p90), 3), "count": len(durations_s)}
