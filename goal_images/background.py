"""A goal source in a process of its own, so that drawing does not stall the control loop.

A thread would share the interpreter with the control loop, which waits for it at each of the thousands of
small operations of denoising, and on a CPU the cores too (benchmarks/goal_refresh.py measures both). The
process has a low priority, so that on a CPU the control step comes first.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence

import numpy as np

from goal_images.source import GoalRequest, GoalSource

__all__ = ["GoalWorker"]

LOW_PRIORITY = 10  # a tenth of the control loop's share of a core that both want (Linux)


class GoalWorker:
    """Draws goals in another process; a context manager whose end ends the process.

    Args:
        make_source (`Callable`): Gives the `GoalSource` in the process that calls it, such as
            `functools.partial(GoalGenerator, "outputs/goal_generator")`; must be picklable.

    Attributes:
        busy (`bool`): Whether goals are being drawn; then [`send`] must wait.
        needs_progress (`bool`): See `GoalSource`.

    Raises:
        RuntimeError: If the source cannot be made; says why.
    """

    def __init__(self, make_source: Callable[[], GoalSource]):
        # Spawned, because a forked copy of a process with threads or CUDA is not safe.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_source), daemon=True)
        self._process.start()
        theirs.close()
        self.busy = True
        try:
            self.needs_progress = self.receive()
        except BaseException:
            self.close()
            raise

    def send(self, requests: Sequence[GoalRequest]) -> None:
        """Asks for goals; then [`receive`] them before the next call."""
        self.busy = True
        try:
            self._connection.send(list(requests))
        except OSError:
            raise self._describe_death() from None

    def is_ready(self) -> bool:
        """Whether [`receive`] would not wait."""
        return self.busy and self._connection.poll()

    def receive(self) -> np.ndarray:
        """The goals of the last [`send`], as `GoalSource.draw` gives them.

        Raises:
            RuntimeError: If drawing failed, or the process died; says why.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._describe_death() from None
        self.busy = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _describe_death(self) -> RuntimeError:
        self._process.join(timeout=5)
        return RuntimeError(
            f"the process that draws goal images ended (exit code {self._process.exitcode}); memory may have "
            "run out"
        )

    def close(self) -> None:
        """Ends the process, in the middle of drawing too."""
        self._connection.close()
        self._process.terminate()
        self._process.join(timeout=5)
        self._process.kill()  # where a long operation has kept it from ending
        self._process.join()

    def __enter__(self) -> "GoalWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection, make_source: Callable[[], GoalSource]) -> None:
    """Answers requests until the other end closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # frees the semaphores that libraries made
    try:
        source = answer_or_error(make_source)
        if isinstance(source, Exception):
            connection.send(source)
            return
        if hasattr(os, "nice"):  # not on Windows
            os.nice(LOW_PRIORITY)
        connection.send(source.needs_progress)
        while True:
            requests = connection.recv()
            connection.send(answer_or_error(lambda: source.draw(requests)))  # noqa: B023 - called at once
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def answer_or_error(call: Callable[[], object]) -> object:
    """Result of a call, or a `RuntimeError` that says what failed: not every error can be pickled."""
    try:
        return call()
    except Exception as error:  # whatever diffusers or torch raise must reach the robot's process
        return RuntimeError(f"goal images cannot be drawn: {str(error) or type(error).__name__}")
