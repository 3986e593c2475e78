"""A depth model in another Python environment: a command that reads frames and writes depth.

For packages that cannot be installed beside this project. `workers/serving.py` has the protocol.
"""

import contextlib
import json
import math
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from datasets_scripts.depth.workers.serving import read_message_header, write_message
from datasets_scripts.licenses import name_license

DESCRIBE_S = 120  # importing a large package can take a minute
ANSWER_S = 3600.0  # the first answer waits for the model, which a worker may have to download
END_S = 5
FACTS = {"model": str, "license": str, "is_metric": bool, "package": str}
SHOWN_BYTES = 80  # of what a worker printed


class WorkerDepth:
    """A worker; it starts with the first frames, and ends with this object.

    Args:
        command (`str`): The command, as in a shell.
        device (`str`): Ignored: the command decides.
        batch_size (`int`, *optional*): Frames of a request (8).

    Raises:
        ValueError: If the command cannot be started or does not describe itself; names it.
    """

    def __init__(self, command: str, device: str = "auto", batch_size: int | None = None):
        self.command, self.batch_size = command, batch_size or 8
        self._facts = _describe(command)
        self.is_metric = self._facts["is_metric"]
        self._process: subprocess.Popen | None = None

    @staticmethod
    def check(command: str) -> bool:
        """Whether the worker gives meters, without loading its weights; raises as the class."""
        return _describe(command)["is_metric"]

    def describe(self) -> dict[str, Any]:
        """What the worker says of itself: model, license, package."""
        return dict(self._facts)

    def predict(self, frames: Sequence[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        """Depth of successive frames, `(k, H, W)` float32 at the frames' resolution.

        Raises:
            ValueError: If the worker ends, reports an error, is silent for `ANSWER_S`, or answers with
                another shape or NaN; says which frames. The worker is killed, and other clips get a new one.
        """
        process = self._process or self._start()
        # A thread writes, so that frames are decoded while the worker computes, and so that we also read from
        # a worker that writes before it reads: both would wait for the other one to empty a full pipe.
        sent: queue.SimpleQueue[tuple | Exception] = queue.SimpleQueue()
        writer = threading.Thread(target=self._send, args=(process.stdin, frames, fps, sent), daemon=True)
        writer.start()
        try:
            for start in range(0, len(frames), self.batch_size):
                shape = sent.get()
                if isinstance(shape, Exception):
                    raise shape
                yield self._read_answer(process, start, shape)
        except BaseException:  # also when closed or interrupted: answers that are under way belong to nobody
            self._process = None
            _kill(process)
            raise
        finally:
            writer.join(END_S)

    def _send(
        self, stream: IO[bytes], frames: Sequence[np.ndarray], fps: float, sent: queue.SimpleQueue
    ) -> None:
        """Write the requests of a clip; `sent` gets each one's shape before it is written, or an error."""
        try:
            for start in range(0, len(frames), self.batch_size):
                stop = min(start + self.batch_size, len(frames))
                batch = np.stack([frames[i] for i in range(start, stop)])  # (k, H, W, 3)
                sent.put(batch.shape)
                write_message(stream, {"shape": list(batch.shape), "fps": float(fps)}, batch.tobytes())
        except BrokenPipeError:  # a worker that ended may have said why, which is read first
            sent.put(ValueError(f"depth worker `{self.command}` does not read its standard input"))
        except Exception as error:
            sent.put(error)

    def _start(self) -> subprocess.Popen:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        # In a group, so that what a wrapper such as `conda run` started is killed with it.
        self._process = subprocess.Popen(split_command(self.command), **pipes, process_group=0)
        weakref.finalize(self, _end, self._process)
        return self._process

    def _read_answer(self, process: subprocess.Popen, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """Depth of the frames from `start` on, `(k, H, W)`; raises a `ValueError` that names them."""
        began = time.monotonic()
        alarm = threading.Timer(ANSWER_S, _kill, [process])
        alarm.daemon = True
        alarm.start()
        try:
            return _read_depth(process, start, list(shape[:3]))
        except EOFError:
            if time.monotonic() - began >= ANSWER_S:
                problem: Any = f"it gave no answer in {ANSWER_S / 60:g} minutes"
            else:
                problem = _describe_end(process) + self._last_line()
        except ValueError as error:
            problem = error
        finally:
            alarm.cancel()
        frames = f"frames {start} to {start + shape[0] - 1}"
        raise ValueError(f"depth worker `{self.command}`, {frames}: {problem}")

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def split_command(command: str) -> list[str]:
    """The words of a worker's command; raises a `ValueError` that names it if a shell would not take it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--depth-model {command} is not a command: {error}") from error
    if not words:
        raise ValueError(f"--depth-model '{command}' is not a command: it is empty")
    return words


def _describe(command: str) -> dict[str, Any]:
    """What a worker says of itself."""
    call = [*split_command(command), "--describe"]
    try:
        done = subprocess.run(
            call, stdin=subprocess.DEVNULL, capture_output=True, timeout=DESCRIBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"depth worker `{command}` cannot be started: {error}") from error
    try:
        facts = json.loads(done.stdout)
        wrong = [name for name, kind in FACTS.items() if not isinstance(facts.get(name), kind)]
    except (ValueError, AttributeError):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"depth worker `{command}` does not describe itself with --describe (exit code "
            f"{done.returncode}{': ' + lines[-1] if lines else ''}): expected JSON alone in its standard "
            f"output, which begins with {done.stdout[:SHOWN_BYTES]!r}; see datasets_scripts/depth/workers"
        ) from None
    if wrong:
        raise ValueError(
            f"depth worker `{command}` does not say its {', '.join(wrong)} (--describe); all of "
            f"{', '.join(FACTS)} are needed"
        )
    return facts | {"license": name_license(facts["license"])}


def _read_depth(process: subprocess.Popen, start: int, wanted: list[int]) -> np.ndarray:
    """Depth `(k, H, W)`; raises a `ValueError` that says what is wrong, an `EOFError` at the output's end."""
    try:
        facts = read_message_header(process.stdout)
        if facts is None:
            raise EOFError
        n_bytes = facts["bytes"]
    except (ValueError, KeyError, TypeError) as error:
        _kill(process)  # so that there is an end of what it printed
        rest = process.stdout.read1(SHOWN_BYTES)
        raise ValueError(
            f"its answer is not a message of the protocol ({error}, then {rest!r}); does it print to "
            "standard output? Use workers/serving.py"
        ) from error
    if "error" in facts:
        raise ValueError(facts["error"])
    if facts.get("shape") != wanted or n_bytes != 4 * math.prod(wanted):
        raise ValueError(
            f"its depth has shape {facts.get('shape')} in {n_bytes} bytes; expected {wanted} float32"
        )
    content = process.stdout.read(n_bytes)
    if len(content) < n_bytes:
        raise EOFError
    depth = np.frombuffer(content, "<f4").reshape(wanted)
    if (broken := np.isnan(depth).any((1, 2))).any():
        raise ValueError(
            f"its depth of frame {start + int(broken.argmax())} has NaN; write 0 where it is unknown"
        )
    return depth


def _describe_end(process: subprocess.Popen) -> str:
    """What became of a worker whose output ended."""
    try:
        return f"it ended with exit code {process.wait(END_S)}"
    except subprocess.TimeoutExpired:
        return "it closed its standard output"


def _end(process: subprocess.Popen) -> None:
    """Lets a worker end, which it does when its input does."""
    if process.returncode is not None:
        return
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Ends a worker that does not listen, and what it started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
