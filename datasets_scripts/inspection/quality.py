"""Quality of an episode's labels: figures that are gathered frame by frame, and the flags they raise.

`annotate.py` gathers them while it makes labels, `inspect_dataset.py` from what lies on disk. They are kept
in `meta/foresight_episodes.jsonl`, per camera:

| key | meaning |
| --- | --- |
| `n_points`, `n_moving` | points seen at least once; those among them that are labeled moving |
| `visible_share` | share of frames in which such a point is visible, mean over points |
| `motion_px` | median over moving points of the diagonal of the box their way fills, px at 224 px |
| `off_depth_share` | share of visible points that miss the depth map by more than 5 % of their distance |
| `depth.valid_share` | share of pixels that have a depth |
| `depth.near_m`, `depth.median_m`, `depth.far_m` | 1st, 50th and 99th percentile of it, meters |
| `depth.flicker` | where the image stays: how far depth is from the mean of the frames around, relative |
| `depth.error`, `depth.fallback` | of the joined depth models, by their source (`depth/estimated_depth.py`) |
| `problem` | why the camera's files could not be read |

A figure that is unknown is `None`, such as `n_moving` where it is not recorded which points move. The
thresholds of the flags are our choice, not the paper's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from datasets_scripts.columns import REFERENCE_PX

# Log-spaced, so that a percentile is right to half a percent from 1 cm to 1 km however long the episode is.
DEPTH_EDGES_M = np.geomspace(0.01, 1000.0, 2305)
GRID = 64  # pixels per side that are sampled for percentiles and flicker
STILL_LEVELS = 6  # of 255: a smaller change of every color of a pixel may be noise and compression
MIN_STILL_SHARE = 0.01  # of the pixels, for a frame to say something about flicker
FAR_FROM_DEPTH = 0.05  # share of a point's distance by which it misses the depth map

MIN_DEPTH_SHARE = 0.3
PLAUSIBLE_M = (0.05, 10.0)  # median distance of what a manipulator's camera sees
MAX_FLICKER = 0.05
MIN_POINTS = 32
MIN_VISIBLE_SHARE = 0.4  # every single track is visible for 0.3 or more
MAX_OFF_DEPTH_SHARE = 0.3
MAX_MOVING_SHARE = 0.9  # a quarter is wanted

# Every flag, in the order in which episodes are worth a look.
FLAGS = {
    "unreadable": "a file of the camera is damaged, or its depth is not in meters",
    "depth-fallback": "the two depth models did not fit together; depth of the image model alone was taken",
    "off-depth": f"more than {MAX_OFF_DEPTH_SHARE:.0%} of the visible points miss the depth map by more than "
    f"{FAR_FROM_DEPTH:.0%} of their distance: depth and tracks do not belong together",
    "depth-implausible": f"the median depth is not within {PLAUSIBLE_M[0]:g} to {PLAUSIBLE_M[1]:g} m",
    "depth-sparse": f"less than {MIN_DEPTH_SHARE:.0%} of the pixels have a depth",
    "depth-flickers": f"depth jumps by more than {MAX_FLICKER:.0%} where the image does not change",
    "few-tracks": f"fewer than {MIN_POINTS} points could be tracked",
    "tracks-hidden": f"points are visible in less than {MIN_VISIBLE_SHARE:.0%} of the frames",
    "no-motion": "no point moves",
    "all-moves": f"more than {MAX_MOVING_SHARE:.0%} of the points move, as where a camera moves too "
    "fast for the tracker: name one that stands still first, with --cameras",
}

# What a person compares between episodes: key -> wording, format, whether large is bad (None: neither).
MEASURES = {
    "depth.valid_share": ("pixels with a depth", "{:.1%}", False),
    "depth.median_m": ("median depth", "{:.2f} m", None),
    "depth.flicker": ("flicker of depth, per frame", "{:.2%}", True),
    "depth.error": ("error of the alignment of two depth models", "{:.1%}", True),
    "n_points": ("tracked points", "{:.0f}", False),
    "moving_share": ("points that move", "{:.1%}", False),
    "motion_px": ("range of motion of moving points (px at 224 px)", "{:.1f}", None),
    "visible_share": ("frames in which a point is visible", "{:.1%}", False),
    "off_depth_share": ("visible points that miss the depth map", "{:.1%}", True),
}


class DepthMeter:
    """Figures of one camera's depth in one episode, however long; independent of how frames are grouped.

    Attributes:
        counts (`np.ndarray`): `(2304,)` int64, sampled valid pixels between successive `DEPTH_EDGES_M`.
    """

    def __init__(self):
        self.counts = np.zeros(len(DEPTH_EDGES_M) - 1, np.int64)
        self._valid = self._total = 0
        self._flicker_sum, self._flicker_frames = 0.0, 0
        self._last: list[tuple[np.ndarray, np.ndarray]] = []  # images and depths on the grid

    def add(self, depth_m: np.ndarray, images: np.ndarray | None = None) -> None:
        """Add successive frames.

        Args:
            depth_m (`np.ndarray`): `(k, H, W)` float meters, 0 where invalid.
            images (`np.ndarray`, *optional*): `(k, h, w, 3)` uint8 of the same moments, of any size; needed
                for `flicker`, so give them always or never.
        """
        if images is not None and len(images) != len(depth_m):
            raise ValueError(f"{len(depth_m)} depth maps came with {len(images)} images")
        self._valid += int(np.count_nonzero(depth_m))
        self._total += depth_m.size
        depth = _sample_grid(depth_m)
        # Outermost bins hold what is beyond them.
        self.counts += np.histogram(depth[depth > 0].clip(*DEPTH_EDGES_M[[0, -1]]), DEPTH_EDGES_M)[0]
        if images is not None:
            for image, one in zip(_sample_grid(images).astype(np.int16), depth, strict=True):
                self._add_flicker(image, one)

    def start_clip(self) -> None:
        """Starts a new clip: its first frame is not compared with the one before."""
        self._last = []

    def _add_flicker(self, image: np.ndarray, depth: np.ndarray) -> None:
        """How far the middle one of the last three frames is from the mean of its neighbors.

        A change at a steady rate drops out of this, such as what a moving camera sees of a plain wall.
        """
        self._last = [*self._last[-2:], (image, depth)]
        if len(self._last) < 3:
            return
        (image_0, depth_0), (image_1, depth_1), (image_2, depth_2) = self._last
        change = np.maximum(np.abs(image_1 - image_0), np.abs(image_2 - image_1)).max(-1)
        still = (change <= STILL_LEVELS) & (depth_0 > 0) & (depth_1 > 0) & (depth_2 > 0)
        if still.mean() >= MIN_STILL_SHARE:
            # The median, since an edge of the same color as its background may pass over a few pixels.
            step = np.median(np.abs(depth_1 - (depth_0 + depth_2) / 2)[still] / depth_1[still])
            self._flicker_sum += float(step)
            self._flicker_frames += 1

    def figures(self) -> dict[str, Any]:
        """The figures of depth that the top of this file lists; JSON-able."""
        near, median, far = find_depth_quantiles(self.counts, (0.01, 0.5, 0.99))
        return {
            "valid_share": round(self._valid / self._total, 4) if self._total else None,
            "near_m": near,
            "median_m": median,
            "far_m": far,
            "flicker": round(self._flicker_sum / frames, 5) if (frames := self._flicker_frames) else None,
        }


class TrackMeter:
    """Figures of one camera's tracks in one episode.

    Args:
        points (`np.ndarray`): `(F, n, 3)` x, y as image fractions, z in meters; padding is never visible.
        visible (`np.ndarray`): `(F, n)` bool.
        moving (`np.ndarray`, *optional*): `(n,)` bool, points labeled moving; `None` if that is unknown.

    Attributes:
        real (`np.ndarray`): `(n,)` bool, points that are seen at least once.
        moving (`np.ndarray`, *optional*): `(n,)` bool, those among them that are labeled moving.
        motion_px (`np.ndarray`): `(n,)` diagonal of the box their visible positions fill, px at 224 px.
        shares (`np.ndarray`): `(n,)` share of frames in which a point is visible.
    """

    def __init__(self, points: np.ndarray, visible: np.ndarray, moving: np.ndarray | None):
        self._points, self._visible = points, visible
        self.real = visible.any(0)
        self.moving = None if moving is None else moving & self.real
        self.shares = visible.mean(0) if len(visible) else np.zeros(visible.shape[1])
        xy, mask = points[..., :2], (visible | ~self.real)[..., None]
        sides = xy.max(0, initial=-np.inf, where=mask) - xy.min(0, initial=np.inf, where=mask)  # (n, 2)
        self.motion_px = np.where(self.real, REFERENCE_PX * np.hypot(*sides.T), 0)
        self._misses = self._compared = 0

    def add(self, first: int, depth_m: np.ndarray) -> None:
        """Compare with the depth of frames `first` and on: `(k, H, W)` meters, 0 where invalid."""
        frames = slice(first, first + len(depth_m))
        errors = measure_depth_misses(depth_m, self._points[frames], self._visible[frames])
        self._misses += int(np.count_nonzero(errors > FAR_FROM_DEPTH))
        self._compared += errors.size

    def figures(self) -> dict[str, Any]:
        """The figures of tracks that the top of this file lists; JSON-able."""
        moving = np.zeros(0) if self.moving is None else self.motion_px[self.moving]
        return {
            "n_points": int(self.real.sum()),
            "n_moving": None if self.moving is None else int(self.moving.sum()),
            "visible_share": round(float(self.shares[self.real].mean()), 4) if self.real.any() else 0.0,
            "motion_px": round(float(np.median(moving)), 2) if moving.size else None,
            "off_depth_share": round(self._misses / self._compared, 4) if self._compared else None,
        }


def merge_facts(earlier: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of an episode with newer ones of its cameras; what the source of depth said of it is kept."""
    facts = dict(earlier)
    for camera, known in measured.items():
        old = {key: value for key, value in facts.get(camera, {}).items() if key != "problem"}
        depth = {"depth": old.get("depth", {}) | known["depth"]} if "depth" in known else {}
        if new := {**old, **known, **depth}:
            facts[camera] = new
    return facts


def find_flags(facts: Mapping[str, Any]) -> list[str]:
    """What is wrong with an episode.

    Args:
        facts (`Mapping`): Facts of the episode in the dataset's provenance. Anything may be missing; keys
            that are not cameras are ignored.

    Returns:
        `list[str]`: `<camera>/<word>`, the words those of `FLAGS`; empty for a good episode.
    """
    cameras = {camera: known for camera, known in facts.items() if isinstance(known, Mapping)}
    raised = {camera: _find_words(known) for camera, known in cameras.items()}
    return [f"{camera}/{word}" for camera in cameras for word in FLAGS if word in raised[camera]]


def _find_words(known: Mapping[str, Any]) -> set[str]:
    depth, n_points, off_depth = (known.get(key) for key in ("depth", "n_points", "off_depth_share"))
    median, valid, flicker, fallback = (
        (depth or {}).get(key) for key in ("median_m", "valid_share", "flicker", "fallback")
    )
    tests = {
        "unreadable": known.get("problem"),
        "depth-fallback": fallback,
        "depth-implausible": median is not None and not PLAUSIBLE_M[0] <= median <= PLAUSIBLE_M[1],
        "depth-sparse": valid is not None and valid < MIN_DEPTH_SHARE,
        "depth-flickers": flicker is not None and flicker > MAX_FLICKER,
    }
    if n_points is not None:
        tests |= {
            "off-depth": off_depth is not None and off_depth > MAX_OFF_DEPTH_SHARE,
            "few-tracks": n_points < MIN_POINTS,
            "tracks-hidden": n_points > 0 and known.get("visible_share", 1.0) < MIN_VISIBLE_SHARE,
            "no-motion": known.get("n_moving") == 0,
            "all-moves": (known.get("n_moving") or 0) > MAX_MOVING_SHARE * n_points,
        }
    return {word for word, raised in tests.items() if raised}


def collect_figures(episodes: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """Figures of all episodes by camera and key of `MEASURES`, then by episode; unknown ones are left out.

    Args:
        episodes (`Mapping`): `episodes` of the dataset's provenance.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for episode, facts in episodes.items():
        for camera, known in facts.items():
            if not isinstance(known, Mapping):
                continue
            values = {**known, **{f"depth.{key}": value for key, value in (known.get("depth") or {}).items()}}
            if known.get("n_points") and known.get("n_moving") is not None:
                values["moving_share"] = known["n_moving"] / known["n_points"]
            for key in MEASURES:
                if isinstance(values.get(key), int | float):
                    found.setdefault((camera, key), {})[int(episode)] = values[key]
    return found


def summarize_figures(episodes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table of the measures over episodes.

    Args:
        episodes (`Mapping`): `episodes` of the dataset's provenance.

    Returns:
        `list[dict]`: `camera`, `measure` in words, formatted `median`, `min` and `max`, and under `worst` the
        episode in which it is worst (`None` where neither direction is bad, or all are alike).
    """
    found, rows = collect_figures(episodes), []
    for camera in dict.fromkeys(camera for camera, _ in found):
        for key, (wording, form, large_is_bad) in MEASURES.items():
            if not (by_episode := found.get((camera, key))):
                continue
            values, worst = list(by_episode.values()), None
            if large_is_bad is not None and len(set(values)) > 1:
                worst = (max if large_is_bad else min)(by_episode, key=by_episode.get)
            numbers = {"median": np.median(values), "min": min(values), "max": max(values)}
            texts = {name: form.format(number) for name, number in numbers.items()}
            rows.append({"camera": camera, "measure": wording, **texts, "worst": worst})
    return rows


def measure_depth_misses(depth_m: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Share of its distance by which each visible point misses the depth map, where that is valid.

    Against the nearest of 3 x 3 pixels: at an edge a point may belong to either side.

    Args:
        depth_m (`np.ndarray`): `(k, H, W)` meters, 0 where invalid.
        points (`np.ndarray`): `(k, n, 3)` x, y as image fractions, z in meters.
        visible (`np.ndarray`): `(k, n)` bool.

    Returns:
        `np.ndarray`: `(m,)` float, one for each visible point beside a valid pixel.
    """
    _, height, width = depth_m.shape
    t, p = np.nonzero(visible)
    x = np.clip((points[t, p, 0] * width).astype(int), 0, width - 1)
    y = np.clip((points[t, p, 1] * height).astype(int), 0, height - 1)
    padded = np.pad(depth_m, ((0, 0), (1, 1), (1, 1)))
    around = np.stack([padded[t, y + dy, x + dx] for dy in range(3) for dx in range(3)])
    z = points[t, p, 2]
    error = np.where(around > 0, np.abs(around - z), np.inf).min(0)
    return (error / np.maximum(z, 1e-6))[np.isfinite(error)]


def find_depth_quantiles(counts: np.ndarray, quantiles: tuple[float, ...]) -> list[float | None]:
    """Meters below which the given shares of `DepthMeter.counts` lie; `None` without a valid pixel."""
    if not counts.any():
        return [None] * len(quantiles)
    middle = np.sqrt(DEPTH_EDGES_M[:-1] * DEPTH_EDGES_M[1:])
    found = np.quantile(middle, quantiles, weights=counts, method="inverted_cdf")
    return [round(float(value), 4) for value in found]


def _sample_grid(frames: np.ndarray) -> np.ndarray:
    """At most 64 x 64 pixels of `(k, H, W, ...)`, evenly spread; of images of any size the same places."""
    rows, columns = (((np.arange(GRID) + 0.5) * side / GRID).astype(int) for side in frames.shape[1:3])
    return frames[:, rows[:, None], columns]
