"""Depth models as sources: a metric one alone, or a relative one that a metric one brings to metres.

One scale and one shift per clip, a quality gate, and a fallback for clips on which the two models do not
agree.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from datasets_scripts.depth.alignment import Alignment, fit_alignment, invert, key_frames, steady_ratio
from datasets_scripts.depth.source import DepthClip

FIT_PIXELS = 8_000_000  # of all key frames together; more do not sharpen a line and would fill memory
RUN_FRAMES = 32  # read back from disk at once


class Estimator(Protocol):
    """A depth model. Opening one loads its weights."""

    is_metric: bool  # metres along the optical axis, or inverse depth up to scale and shift

    def describe(self) -> dict[str, Any]:
        """JSON-able: model, revision, licence, package, precision."""
        ...

    def predict(self, frames: Sequence[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        """Depth of successive frames, `(k, H, W)` float32 at the frames' resolution; memory is bounded.

        Frames are asked for once each, in order, from another thread, until the iterator ends or is closed.
        """
        ...


class MetricDepth:
    """Depth of a metric model, as it is.

    Args:
        estimator (`Estimator`): The model.
    """

    def __init__(self, estimator: Estimator):
        self.estimator = estimator

    def describe(self) -> dict[str, Any]:
        """The model."""
        return {"models": [self.estimator.describe()]}

    def estimate(self, frames: Sequence[np.ndarray], fps: float) -> DepthClip:
        """As [`DepthSource.estimate`]; pixels without a finite, positive depth are invalid."""
        return DepthClip(_with_validity(run) for run in self.estimator.predict(frames, fps))


class AlignedDepth:
    """Depth of a relative model in metres, joined with a metric model on key frames.

    Relative depth waits on disk (4 bytes a pixel, in the folder for temporary files, TMPDIR) until the last
    key frame is seen. A clip on which the models do not agree gets the metric model's depth of every frame,
    its medians smoothed in time, and `fallback` among its facts.

    Args:
        relative (`Estimator`): Inverse depth up to scale and shift.
        metric (`Estimator`): Metres.
    """

    def __init__(self, relative: Estimator, metric: Estimator):
        self.relative, self.metric = relative, metric

    def describe(self) -> dict[str, Any]:
        """The two models, the metric one last."""
        return {"models": [self.relative.describe(), self.metric.describe()]}

    def estimate(self, frames: Sequence[np.ndarray], fps: float) -> DepthClip:
        """As [`DepthSource.estimate`].

        Facts are `scale` (1/m per unit of the relative depth) and `shift` (1/m) of the alignment, `error`
        (median of |D - m| / m on the key frames; `None` if nothing could be compared), `fallback`,
        `key_frames` (their number), and `flicker_ratio` (with a fallback: largest correction of a frame).
        """
        facts: dict[str, Any] = {}
        return DepthClip(self._runs(frames, fps, facts), facts)

    def _runs(
        self, frames: Sequence[np.ndarray], fps: float, facts: dict[str, Any]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        seen = _KeyFrames(frames)
        with _Spool() as relative:
            for run in self.relative.predict(seen, fps):
                relative.append(run)
            found = self._align(relative, seen.kept, fps)
            numbers = {"scale": found.scale, "shift": found.shift, "error": found.error}
            facts |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
            facts |= {"fallback": not found.good, "key_frames": len(seen.kept)}
            if found.good:
                for run in relative.runs():
                    yield _with_validity(invert(run, found.scale, found.shift))
                return
        with _Spool() as metric:
            for run in self.metric.predict(frames, fps):
                metric.append(np.where(_with_validity(run)[1], run, 0))
            ratio = steady_ratio(frame for run in metric.runs() for frame in run).astype(np.float32)
            facts["flicker_ratio"] = float(np.exp(np.abs(np.log(ratio)).max()))
            start = 0
            for run in metric.runs():
                yield _with_validity(run * ratio[start : start + len(run), None, None])
                start += len(run)

    def _align(self, spool: "_Spool", pictures: dict[int, np.ndarray], fps: float) -> Alignment:
        """Scale and shift from the key frames, by number, whose relative depth waits in `spool`."""
        step = math.ceil(math.sqrt(len(pictures) * math.prod(spool.shape) / FIT_PIXELS))
        runs = self.metric.predict(list(pictures.values()), fps)
        metric = np.concatenate([run[:, ::step, ::step].copy() for run in runs])
        metric = np.where(_with_validity(metric)[1], metric, 0)
        relative = np.concatenate([spool.read(i, i + 1)[:, ::step, ::step].copy() for i in pictures])
        return fit_alignment(relative, metric, np.random.default_rng(0))


def _with_validity(metres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth and where it is finite and positive."""
    return metres, np.isfinite(metres) & (metres > 0)


class _KeyFrames:
    """Frames that keep copies of the key frames as they pass by, which are not decoded twice then."""

    def __init__(self, frames: Sequence[np.ndarray]):
        self.frames, self.kept = frames, {}
        self.wanted = set(key_frames(len(frames)).tolist())

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, frame: int) -> np.ndarray:
        picture = self.frames[frame]
        if frame in self.wanted:
            self.kept[frame] = picture.copy()
        return picture


class _Spool:
    """Depth on disk: appended run by run, read back by frame. Its file vanishes with the process."""

    def __enter__(self) -> "_Spool":
        # Read and written, not mapped: mapped pages count as memory, and a full disk would kill the process.
        self.file, self.n_frames, self.shape = tempfile.TemporaryFile(), 0, None
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def append(self, run: np.ndarray) -> None:
        """Adds `(k, H, W)` float32."""
        self.file.write(np.ascontiguousarray(run, np.float32))
        self.shape = run.shape[1:]
        self.n_frames += len(run)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames from `start` to before `stop`: `(stop - start, H, W)` float32."""
        pixels = math.prod(self.shape)
        self.file.seek(4 * start * pixels)
        count = (stop - start) * pixels
        return np.frombuffer(self.file.read(4 * count), np.float32).reshape(-1, *self.shape)

    def runs(self) -> Iterator[np.ndarray]:
        """All of it, a few frames at once."""
        for start in range(0, self.n_frames, RUN_FRAMES):
            yield self.read(start, min(start + RUN_FRAMES, self.n_frames))
