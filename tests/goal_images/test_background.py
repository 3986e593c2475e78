"""A goal source in another process: what it draws, and how its failures reach the caller."""

import functools
import os
import signal

import numpy as np
import pytest

from goal_images.background import LOW_PRIORITY, GoalWorker
from goal_images.source import GoalRequest


class Source:
    """Draws what the instruction says."""

    needs_progress = False

    def __init__(self, fault=None):
        if fault:
            raise OSError(fault)

    def draw(self, requests):
        if requests[0].instruction == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if requests[0].instruction == "fail":
            raise MemoryError("too many pictures")
        nice = os.nice(0)
        return np.stack([request.picture + nice for request in requests])


def ask(instruction):
    picture = np.zeros((5, 6, 3), np.uint8)
    return [GoalRequest(picture, picture, instruction), GoalRequest(picture + 1, picture, instruction)]


def test_a_worker_draws_at_a_low_priority_and_says_how_it_failed_or_ended():
    nice = min(os.nice(0) + LOW_PRIORITY, 19)
    with GoalWorker(Source) as worker:
        assert not worker.busy and not worker.is_ready() and worker.needs_progress is False
        worker.send(ask("draw"))
        assert worker.busy
        goals = worker.receive()
        assert (
            goals.shape == (2, 5, 6, 3) and goals[:, 0, 0, 0].tolist() == [nice, nice + 1] and not worker.busy
        )
        worker.send(ask("fail"))
        with pytest.raises(RuntimeError, match="goal images cannot be drawn: too many pictures"):
            worker.receive()
        worker.send(ask("die"))
        with pytest.raises(RuntimeError, match=r"ended \(exit code -9\)"):
            worker.receive()


@pytest.mark.slow  # starts a process
def test_a_source_that_cannot_be_made_is_refused_at_the_start_and_closing_ends_the_process():
    with pytest.raises(RuntimeError, match="cannot be drawn: no such pipeline"):
        GoalWorker(functools.partial(Source, "no such pipeline"))
    worker = GoalWorker(Source)
    worker.close()
    assert not worker._process.is_alive()
