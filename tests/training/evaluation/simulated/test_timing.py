"""Durations of an evaluation over its sessions."""

import time

import pytest

from training.evaluation.simulated.closed_loop import Timing
from training.evaluation.simulated.timing import WallClock, describe_timing


@pytest.fixture
def wait(monkeypatch):
    """Lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_the_wall_time_is_the_sum_over_the_sessions(tmp_path, wait):
    first = WallClock(tmp_path)
    wait(7)
    first.save()
    wait(2)  # in an episode that is not finished
    second = WallClock(tmp_path)
    wait(4)
    second.save()
    assert second.read_s() == 11
    third = WallClock(tmp_path)
    wait(1)
    assert third.read_s() == 12


def test_a_damaged_file_of_seconds_is_named(tmp_path):
    (tmp_path / "wall_clock.json").write_text("{")
    with pytest.raises(ValueError, match="wall_clock.json is damaged .*: delete it"):
        WallClock(tmp_path)


def test_the_results_have_a_median_and_a_percentile_of_what_was_timed():
    timing = Timing(policy=[0.001, 0.002, 0.003], step=[])
    figures = describe_timing(timing, wall_s=1.234, environments=2, resumed=0)
    assert figures == {
        "wall_s": 1.23,
        "parallel_environments": 2,
        "policy_ms": {"median": 2.0, "p90": 2.8, "count": 3},
        "control_step_ms": {"count": 0},
    }
    more = describe_timing(Timing(goal=[0.5]), wall_s=1.0, environments=2, resumed=3)
    assert more["resumed_after"] == 3 and more["goal_ms"]["median"] == 500.0
