"""Depth models as sources: a metric one alone, or a relative one that a metric one brings to meters."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from datasets_scripts.depth.alignment import (
    Alignment,
    choose_key_frames,
    fit_alignment,
    invert_depth,
    steady_ratio,
)
from datasets_scripts.depth.source import DepthClip

FIT_PIXELS = 8_000_000  # of all key frames together; more do not sharpen a line and would fill memory
SPOOL_FRAMES = 32  # read back from disk at once


class Estimator(Protocol):
    """A depth model. Opening one loads its weights."""

    is_metric: bool  # meters along the optical axis, or inverse depth up to scale and shift

    def describe(self) -> dict[str, Any]:
        """JSON-able: model, revision, license, package, precision."""
        ...

    def predict(self, frames: Sequence[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        """Depth of successive frames, `(k, H, W)` float32 at the frames' resolution; memory is bounded.

        Another thread reads each frame once, in order, until the iterator is exhausted or closed.
        """
        ...


class MetricDepth:
    """Depth of a metric model; pixels without a finite, positive depth are invalid."""

    def __init__(self, estimator: Estimator):
        self.estimator = estimator

    def describe(self) -> dict[str, Any]:
        """The model, see [`Estimator.describe`]."""
        return {"models": [self.estimator.describe()]}

    def estimate(self, frames: Sequence[np.ndarray], fps: float) -> DepthClip:
        """See [`DepthSource.estimate`]."""
        return DepthClip(_add_validity(run) for run in self.estimator.predict(frames, fps))


class AlignedDepth:
    """Depth of a relative model in meters, aligned with a metric model on key frames.

    Relative depth waits on disk (4 bytes a pixel, in the folder for temporary files, TMPDIR) until the last
    key frame is read. Where the two models disagree, a clip gets the metric model's depth of every frame,
    with medians smoothed in time.
    """

    def __init__(self, relative: Estimator, metric: Estimator):
        self.relative, self.metric = relative, metric

    def describe(self) -> dict[str, Any]:
        """The two models, the metric one last."""
        return {"models": [self.relative.describe(), self.metric.describe()]}

    def estimate(self, frames: Sequence[np.ndarray], fps: float) -> DepthClip:
        """See [`DepthSource.estimate`].

        Facts are `scale` (1/m per unit of the relative depth), `shift` (1/m) and `error` of the
        [`Alignment`] (`None` if not finite), `fallback` (whether the models disagree), `key_frames` (their
        number), and `flicker_ratio` (with a fallback: largest correction of a frame).
        """
        facts: dict[str, Any] = {}
        return DepthClip(self._runs(frames, fps, facts), facts)

    def _runs(
        self, frames: Sequence[np.ndarray], fps: float, facts: dict[str, Any]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        keeper = _KeyFrames(frames)
        with _Spool() as relative:
            for run in self.relative.predict(keeper, fps):
                relative.append(run)
            found = self._align(relative, keeper.kept, fps)
            numbers = {"scale": found.scale, "shift": found.shift, "error": found.error}
            facts |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
            facts |= {"fallback": not found.is_good, "key_frames": len(keeper.kept)}
            if found.is_good:
                for run in relative.runs():
                    yield _add_validity(invert_depth(run, found.scale, found.shift))
                return
        with _Spool() as metric:
            for run in self.metric.predict(frames, fps):
                metric.append(np.where(_add_validity(run)[1], run, 0))
            ratio = steady_ratio(frame for run in metric.runs() for frame in run).astype(np.float32)
            facts["flicker_ratio"] = float(np.exp(np.abs(np.log(ratio)).max()))
            start = 0
            for run in metric.runs():
                yield _add_validity(run * ratio[start : start + len(run), None, None])
                start += len(run)

    def _align(self, relative: "_Spool", pictures: dict[int, np.ndarray], fps: float) -> Alignment:
        """Scale and shift from the key frames `pictures`, by frame number."""
        step = math.ceil(math.sqrt(len(pictures) * math.prod(relative.shape) / FIT_PIXELS))
        runs = self.metric.predict(list(pictures.values()), fps)
        metric = np.concatenate([run[:, ::step, ::step].copy() for run in runs])
        metric = np.where(_add_validity(metric)[1], metric, 0)
        inverse = np.concatenate([relative.read(i, 1)[:, ::step, ::step].copy() for i in pictures])
        return fit_alignment(inverse, metric, np.random.default_rng(0))


def _add_validity(depth_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth, and where it is finite and positive."""
    return depth_m, np.isfinite(depth_m) & (depth_m > 0)


class _KeyFrames:
    """Frames that copy the key frames when they are read, so that none is decoded twice."""

    def __init__(self, frames: Sequence[np.ndarray]):
        self.frames, self.kept = frames, {}
        self.wanted = set(choose_key_frames(len(frames)).tolist())

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
        """Add `(k, H, W)` float32."""
        self.file.write(np.ascontiguousarray(run, np.float32))
        self.shape = run.shape[1:]
        self.n_frames += len(run)

    def read(self, start: int, count: int) -> np.ndarray:
        """At most `count` frames from `start` on: `(<=count, H, W)` float32."""
        frame_bytes = 4 * math.prod(self.shape)
        self.file.seek(start * frame_bytes)
        return np.frombuffer(self.file.read(count * frame_bytes), np.float32).reshape(-1, *self.shape)

    def runs(self) -> Iterator[np.ndarray]:
        """All frames, a few at once."""
        return (self.read(start, SPOOL_FRAMES) for start in range(0, self.n_frames, SPOOL_FRAMES))
