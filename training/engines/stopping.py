"""Stopping a run between steps: at a signal of any process, or at the end of its time."""

import math
import os
import signal
import threading
import time

import torch
from accelerate import Accelerator

from training.run_record import resume_command

__all__ = ["StopRequest"]

SAME_REQUEST_S = 5  # a launcher passes a signal on at once


class StopRequest:
    """Makes SIGINT, SIGTERM and SIGHUP (a closed terminal) a request that the loop reads between steps.

    All processes stop at the same step, whichever got the signal. A SIGINT or SIGTERM that comes some seconds
    later kills at once. One that comes sooner is the same request: where a terminal, Slurm or systemd signals
    all processes, torch's launcher passes its own signal on to them too.

    Args:
        accelerator (`Accelerator`): What trains.
        hours (`float`, *optional*): Time after which to stop too.
        since (`float`, *optional*): Start of that time by `time.monotonic`; now if omitted.
    """

    def __init__(self, accelerator: Accelerator, hours: float | None = None, since: float | None = None):
        self.accelerator, self.signal, self.is_late, self.hours = accelerator, 0, False, hours
        since = time.monotonic() if since is None else since
        self.end = math.inf if hours is None else since + 3600 * hours
        self._first: float | None = None  # time of the first signal
        self._terminals = [output for output in (1, 2) if os.isatty(output)]
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():  # as in Ray's workers; Python refuses
            numbers = []
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.signal = now, number
        elif number != signal.SIGHUP and now > self._first + SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGHUP:
            # The kernel and the shell may each announce that a terminal is closed.
            signal.signal(number, signal.SIG_IGN)
            # Writing to a closed terminal is an error, which would come before the checkpoint.
            with open(os.devnull, "w") as nowhere:
                for output in self._terminals:
                    os.dup2(nowhere.fileno(), output)

    def is_agreed(self) -> bool:
        """Whether to stop after this step: a process got a signal, or the time of one is over.

        All processes call it together, or those that do wait for the others.
        """
        own = torch.tensor([[self.signal, time.monotonic() > self.end]], device=self.accelerator.device)
        agreed, is_late = self.accelerator.gather(own).amax(dim=0).tolist()
        self.is_late = bool(is_late)
        if agreed:  # otherwise a signal that came meanwhile waits for the next step
            self.signal = agreed
        return agreed != 0 or self.is_late

    def close(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect of a program ended by a signal; 0 for the end of the time."""
        return 128 + self.signal if self.signal else 0

    def describe(self, step: int) -> str:
        """What to print after stopping at `step`."""
        cause = f", at the limit of {self.hours:g} hours" if self.is_late and not self.signal else ""
        return f"stopped after step {step}{cause}; continue with: {resume_command()}"
