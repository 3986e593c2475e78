"""Durations of an evaluation over its sessions."""

import time

import pytest

from training.evaluation.simulated.closed_loop import Timing
from training.evaluation.simulated.timing import Sessions, describe_timing

RUN = {"command": "python evaluate.py", "date": "today", "commit": "1a", "versions": {}, "hardware": {}}


@pytest.fixture
def wait(monkeypatch):
    """Lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_the_wall_time_is_the_sum_over_the_sessions(tmp_path, wait):
    first = Sessions(tmp_path, RUN)
    wait(7)
    first.save()
    wait(2)  # in an episode that is not finished
    second = Sessions(tmp_path, RUN)
    wait(4)
    second.save()
    assert second.read_s() == 11
    third = Sessions(tmp_path, RUN)
    wait(1)
    assert third.read_s() == 12


def test_sessions_that_ran_with_something_else_are_in_the_results(tmp_path):
    for commit in ("1a", "1a", "2b", "1a", "3c"):
        sessions = Sessions(tmp_path, {**RUN, "commit": commit})
        sessions.save()
    assert [run["commit"] for run in sessions.describe()["earlier_sessions"]] == ["2b", "1a"]
    results = {**RUN, "commit": "3c", "timing": {"wall_s": 5.0}, **sessions.describe()}
    Sessions.reopen(tmp_path / "grown", results)
    grown = Sessions(tmp_path / "grown", {**RUN, "date": "tomorrow", "commit": "3c"})
    assert grown.read_s() >= 5 and grown.describe() == sessions.describe()
    assert Sessions(tmp_path / "new", RUN).describe() == {}


def test_a_damaged_file_of_sessions_is_named(tmp_path):
    (tmp_path / "sessions.json").write_text("{")
    with pytest.raises(ValueError, match="sessions.json is damaged .*: delete it"):
        Sessions(tmp_path, RUN)


def test_the_results_have_a_median_and_a_percentile_of_what_was_timed(tmp_path, wait):
    timing = Timing(policy=[0.001, 0.002, 0.003], step=[])
    sessions = Sessions(tmp_path, RUN)
    wait(1.234)
    figures = describe_timing(timing, sessions, environments=2, resumed=0)
    assert figures == {
        "wall_s": 1.23,
        "parallel_environments": 2,
        "policy_ms": {"median": 2.0, "p90": 2.8, "count": 3},
        "control_step_ms": {"count": 0},
    }
    more = describe_timing(Timing(goal=[0.5]), sessions, environments=2, resumed=3)
    assert more["resumed_after"] == 3 and more["goal_ms"]["median"] == 500.0
    Sessions.reopen(tmp_path / "again", {**RUN, "timing": figures})
    same = describe_timing(Timing(), Sessions(tmp_path / "again", RUN), environments=0, resumed=3)
    assert same == figures, "a session without a step leaves what was measured"
