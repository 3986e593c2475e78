"""A depth model in another Python environment: a command that reads frames and writes depth.

For packages that cannot be installed beside this project. `workers/serving.py` has the protocol.
"""

import contextlib
import json
import shlex
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datasets_scripts.depth.gpu import prefetch
from datasets_scripts.depth.workers.serving import read_message, write_message

DESCRIBE_S = 120  # importing a large package can take a minute
FACTS = {"model": str, "licence": str, "is_metric": bool, "package": str}


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
            ValueError: If the worker ends, reports an error, or answers with another shape or NaN; says
                which frames.
        """
        numbers = range(len(frames))
        starts = range(0, len(frames), self.batch_size)
        batches = (np.stack([frames[i] for i in numbers[s : s + self.batch_size]]) for s in starts)
        return prefetch(self._ask(start, batch, fps) for start, batch in zip(starts, batches, strict=True))

    def _ask(self, start: int, batch: np.ndarray, fps: float) -> np.ndarray:
        """Depth of the frames from `start` on."""
        process = self._process or self._start()
        try:
            with contextlib.suppress(BrokenPipeError):  # a worker that ended may have said why
                write_message(process.stdin, {"shape": list(batch.shape), "fps": float(fps)}, batch.tobytes())
            return self._read_answer(process, start, batch)
        except ValueError as error:
            _end(process)
            self._process = None  # other clips get a new one
            frames = f"frames {start} to {start + len(batch) - 1}"
            raise ValueError(f"depth worker `{self.command}`, {frames}: {error}") from error

    def _start(self) -> subprocess.Popen:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(shlex.split(self.command), **pipes)
        weakref.finalize(self, _end, self._process)
        return self._process

    def _read_answer(self, process: subprocess.Popen, start: int, batch: np.ndarray) -> np.ndarray:
        """Depth of a request, `(k, H, W)`; raises a `ValueError` that says what is wrong with the answer."""
        try:
            message = read_message(process.stdout)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"its answer is no message of the protocol ({error}); does it print to standard output? Use "
                "workers/serving.py"
            ) from error
        if message is None:
            raise ValueError(f"it ended with exit code {process.wait()}{self._last_line()}")
        facts, content = message
        if "error" in facts:
            raise ValueError(facts["error"])
        wanted = list(batch.shape[:3])
        if facts.get("shape") != wanted or len(content) != 4 * batch[..., 0].size:
            raise ValueError(
                f"its depth has shape {facts.get('shape')} in {len(content)} bytes; expected {wanted} float32"
            )
        depth = np.frombuffer(content, "<f4").reshape(wanted)
        if (broken := np.isnan(depth).any((1, 2))).any():
            raise ValueError(
                f"its depth of frame {start + int(broken.argmax())} has NaN; write 0 where it is unknown"
            )
        return depth

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def _describe(command: str) -> dict[str, Any]:
    """What a worker says of itself."""
    call = [*shlex.split(command), "--describe"]
    try:
        done = subprocess.run(call, capture_output=True, timeout=DESCRIBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"depth worker `{command}` cannot be started: {error}") from error
    try:
        facts = json.loads(done.stdout)
        wrong = [name for name, kind in FACTS.items() if not isinstance(facts.get(name), kind)]
    except (ValueError, AttributeError):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"depth worker `{command}` does not describe itself with --describe (exit code "
            f"{done.returncode}{': ' + lines[-1] if lines else ''}); see datasets_scripts/depth/workers"
        ) from None
    if wrong:
        raise ValueError(
            f"depth worker `{command}` does not say its {', '.join(wrong)} (--describe); all of "
            f"{', '.join(FACTS)} are needed"
        )
    return facts


def _end(process: subprocess.Popen) -> None:
    """Lets a worker end, which it does when its input does."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
