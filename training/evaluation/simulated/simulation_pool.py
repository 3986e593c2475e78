"""Simulators in worker processes, each with its own renderer, stepped side by side.

Neither this file nor the worker processes import PyTorch: starting one takes as long as importing MuJoCo.
"""

import abc
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

__all__ = ["SimulationPool", "WorkerPool", "become_command"]


class WorkerPool(abc.ABC):
    """A fixed number of simulators, as a context manager whose end ends their processes.

    Requests are sent to any of them, and answers are read one by one.

    Args:
        size (`int`): Number of simulators.
        serve (`Callable`): What a process does: it answers the requests of a connection, and gets `settings`
            too. Its module is imported by each process.
        settings: Of the simulators.
    """

    def __init__(self, size: int, serve: Callable, settings: Any):
        # Spawned, because a forked copy of a process with threads and an OpenGL context is not safe.
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    @abc.abstractmethod
    def reset(self, worker: int, task: str, seed: int) -> None:
        """Asks for a new episode; [`receive`] gives its first observation."""

    @abc.abstractmethod
    def step(self, worker: int, action: np.ndarray, repeat: int) -> None:
        """Asks for an action, held for `repeat` simulation steps or until success; then call [`receive`].

        Args:
            worker (`int`): Which simulator.
            action (`numpy.ndarray`): `(A,)` float, in the robot's units.
            repeat (`int`): Simulation steps.

        Raises:
            RuntimeError: If the simulator's process died.
        """

    def receive(self, worker: int) -> Mapping:
        """The answer to the last request.

        It has `images` (camera -> `(H, W, 3)` uint8), `state` `(S,)` float32, `success` of this request,
        `instruction`, and `simulation_steps` since the episode's start.

        Raises:
            RuntimeError: If the simulator failed or its process died.
        """
        try:
            answer = self._connections[worker].recv()
        except (EOFError, OSError):
            answer = self._describe_death(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(self, worker: int, request: tuple) -> None:
        try:
            self._connections[worker].send(request)
        except OSError:
            raise self._describe_death(worker) from None

    def _describe_death(self, worker: int) -> RuntimeError:
        self._processes[worker].join(timeout=5)
        return RuntimeError(
            f"simulator process {worker} ended (exit code {self._processes[worker].exitcode}); if memory ran "
            "out, use fewer --num-envs"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
                process.join()


def become_command(connection, command: tuple[str, ...]) -> None:
    """Replaces this process by a command; its last argument is the connection's file descriptor.

    For simulators that need a Python of their own.
    """
    os.set_inheritable(connection.fileno(), True)
    os.execv(command[0], [*command, str(connection.fileno())])


class SimulationPool(WorkerPool):
    """Simulators in our own Python.

    Args:
        size (`int`): Number of simulators.
        make_simulator (`Callable`): Task -> simulator, such as `MetaWorldSim`, in the process that calls it.
    """

    def __init__(self, size: int, make_simulator: Callable[[str], Any]):
        super().__init__(size, _serve, make_simulator)

    def reset(self, worker: int, task: str, seed: int) -> None:
        """See `WorkerPool.reset`."""
        self._send(worker, ("reset", task, seed))

    def step(self, worker: int, action: np.ndarray, repeat: int) -> None:
        """See `WorkerPool.step`."""
        self._send(worker, ("step", np.asarray(action, dtype=np.float32), repeat))


def _serve(connection, make_simulator: Callable[[str], Any]) -> None:
    """Serves requests until the other end closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    # The processes share the cores already; the software renderer must not start threads for each of them.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    sim = None
    try:
        while True:
            request = connection.recv()
            try:
                success, (kind, subject, number) = False, request
                if kind == "step":
                    success = sim.step(subject, number, stop_on_success=True)
                else:
                    if sim is None or sim.task != subject:
                        if sim is not None:
                            sim.close()
                        sim = make_simulator(subject)
                    sim.reset(number)
                answer = {
                    **sim.observe(),
                    "success": success,
                    "instruction": sim.task_description,
                    "simulation_steps": sim.steps_taken,
                }
            except (ValueError, RuntimeError) as error:
                answer = error
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if sim is not None:
            sim.close()
