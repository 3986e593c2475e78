"""The sessions of an evaluation: how long they took together, and what each ran with."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import read_json, write_json

__all__ = ["Sessions", "describe_timing"]

SESSIONS_FILE = "sessions.json"


class Sessions:
    """Seconds that an evaluation has run, and the facts of its runs: earlier sessions, and this one.

    What a session did after the last call of [`save`] is not counted: its unfinished episodes run again.

    Args:
        folder (`Path`): Where finished episodes are kept; the sessions lie beside them.
        run (`Mapping`): What `describe_run` gives.

    Attributes:
        earlier (`list[dict]`): Facts of the earlier sessions that ran with another command, commit, library
            or machine than this one.
        finished_timing (`dict`, *optional*): `timing` of the finished results that this evaluation adds to.

    Raises:
        ValueError: If the earlier sessions cannot be read; names the file.
    """

    def __init__(self, folder: Path, run: Mapping):
        self._path, self._begun = folder / SESSIONS_FILE, time.perf_counter()
        known = read_json(self._path, "delete it to count this session alone") if self._path.exists() else {}
        self._earlier_s, self._run = known.get("wall_s", 0.0), dict(run)
        self.finished_timing: dict | None = known.get("timing")
        self.earlier: list[dict] = []
        for one in known.get("runs", []):
            if not any(_same_run(one, other) for other in (*self.earlier, run)):
                self.earlier.append(one)

    @classmethod
    def reopen(cls, folder: Path, results: Mapping) -> None:
        """Writes the sessions of finished results, if there are none in the folder yet."""
        if (folder / SESSIONS_FILE).exists():
            return
        runs = [*results.get("earlier_sessions", []), {name: results.get(name) for name in RUN_FACTS}]
        known = {"wall_s": results["timing"]["wall_s"], "runs": runs, "timing": results["timing"]}
        write_json(folder / SESSIONS_FILE, known)

    def read_s(self) -> float:
        """Seconds so far."""
        return self._earlier_s + time.perf_counter() - self._begun

    def save(self) -> None:
        """Keeps seconds and facts so far for a session that resumes this one."""
        known = {"wall_s": self.read_s(), "runs": [*self.earlier, self._run], "timing": self.finished_timing}
        write_json(self._path, known)

    def describe(self) -> dict:
        """`earlier_sessions` for the results, if there were other ones."""
        return {"earlier_sessions": self.earlier} if self.earlier else {}


RUN_FACTS = ("command", "date", "commit", "versions", "hardware")  # of `describe_run`


def _same_run(one: Mapping, other: Mapping) -> bool:
    """Whether two sessions differ in nothing but their date."""
    return all(one.get(name) == other.get(name) for name in RUN_FACTS if name != "date")


def describe_timing(timing, sessions: Sessions, environments: int, resumed: int) -> dict:
    """The `timing` of the results.

    Args:
        timing (`closed_loop.Timing`): Durations of this session's control steps; without any, those of the
            finished results that it adds to stay.
        sessions (`Sessions`): All of them.
        environments (`int`): Simulators side by side.
        resumed (`int`): Episodes that earlier sessions finished.

    Returns:
        `dict`: `wall_s`, `parallel_environments`, `resumed_after` if not zero, and median and 90th percentile
        as `policy_ms`, `control_step_ms`, and `goal_ms` if goal images were waited for.
    """
    wall_s = round(sessions.read_s(), 2)
    if not timing.policy and sessions.finished_timing:
        return sessions.finished_timing | {"wall_s": wall_s}
    return {
        "wall_s": wall_s,
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
