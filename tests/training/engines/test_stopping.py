"""A run stops between steps when a process gets a signal, and at the limit of its time."""

import concurrent.futures
import contextlib
import os
import signal
import time

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from training.engines.stopping import StopRequest


@pytest.fixture(scope="module")
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_closed_terminal_is_a_request_to_stop_and_what_is_printed_after_it_no_error(accelerator):
    child = os.fork()
    if not child:  # it has a terminal, which is closed
        with contextlib.suppress(BaseException):
            master, terminal = os.openpty()
            for output in (1, 2):
                os.dup2(terminal, output)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
            stop = StopRequest(accelerator)
            os.close(master)
            for _ in range(2):  # from the kernel and from the shell
                os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b"saving")
            os._exit(stop.exit_code if stop.is_agreed() else 0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP


def test_a_signal_that_the_launcher_passes_on_is_the_same_request_and_a_later_one_kills(accelerator):
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            stop = StopRequest(accelerator)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            if stop.is_agreed() and stop.exit_code == 128 + signal.SIGTERM:
                stop._first -= 60  # as if a minute had passed
                os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT


def test_a_signal_while_the_processes_agree_counts_at_the_next_step(accelerator, monkeypatch):
    gather = accelerator.gather

    def interrupted(values):
        os.kill(os.getpid(), signal.SIGTERM)
        return gather(values)

    with contextlib.closing(StopRequest(accelerator)) as stop:
        with monkeypatch.context() as patch:
            patch.setattr(accelerator, "gather", interrupted)
            assert not stop.is_agreed(), "the others do not know of it"
        assert stop.is_agreed() and stop.exit_code == 128 + signal.SIGTERM


def test_nohup_is_respected(accelerator):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest(accelerator)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_agreed()
        stop.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_limit_counts_from_the_start_of_the_run_and_is_named_as_it_was_given(accelerator):
    started = time.monotonic() - 2 * 3600
    for hours, is_over in ((1.5, True), (2.5, False)):
        with contextlib.closing(StopRequest(accelerator, hours, started)) as stop:
            assert stop.is_agreed() == is_over
            assert ("at the limit of 1.5 hours" in stop.describe(3)) == is_over


def test_a_thread_of_another_program_may_train(accelerator):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # as in Ray's workers
        stop = pool.submit(StopRequest, accelerator, 0).result()
    assert stop.is_agreed() and stop.exit_code == 0 and "at the limit of 0 hours" in stop.describe(3)
    stop.close()
