"""How far depth and tracks are from the truth, gathered while they are made.

| figure | is |
|---|---|
| `abs_rel` | mean of abs(d - t) / t over pixels that have both |
| `rmse_m` | root of the mean of (d - t)^2, metres |
| `delta_125` | share of those pixels with max(d / t, t / d) < 1.25 |
| `covered` | share of the pixels with truth that have depth |
| `flicker` | mean change of d / t from frame to frame at a pixel; 0 for any steady error |
| `epe_px` | distance in the image at 224 px of points that are visible and seen as visible; all frames |
| `epe_px_last` | the same in the last frame, which is the hardest |
| `epe_cm` | distance in space of the same points as `epe_px` |
| `visibility_accuracy` | share of points whose visibility is right |
| `found` | share of the visible points that are seen as visible |
"""

from typing import Any

import numpy as np

from datasets_scripts.columns import REFERENCE_PX

DELTA = 1.25


class DepthErrors:
    """Errors of depth against exact depth, over any number of clips."""

    def __init__(self):
        self._n = self._n_true = self._n_close = self._n_steps = 0
        self._relative = self._squared = self._change = 0.0
        self._ratio: np.ndarray | None = None  # of the clip's last frame, nan where unknown

    def start_clip(self) -> None:
        """What follows is no continuation of what came before."""
        self._ratio = None

    def add(self, depth_m: np.ndarray, true_m: np.ndarray) -> None:
        """Take in successive frames of a clip.

        Args:
            depth_m (`np.ndarray`): `(k, H, W)` metres, 0 where invalid.
            true_m (`np.ndarray`): `(k, H, W)` exact metres, 0 where unknown.

        Raises:
            ValueError: If the shapes differ.
        """
        if depth_m.shape != true_m.shape:
            raise ValueError(f"depth has shape {depth_m.shape}, the truth {true_m.shape}")
        for depth, true in zip(depth_m.astype(np.float64), true_m.astype(np.float64), strict=True):
            both = (depth > 0) & (true > 0)
            d, t = depth[both], true[both]
            ratio = np.full(true.shape, np.nan)
            ratio[both] = d / t
            self._n += d.size
            self._n_true += int(np.count_nonzero(true > 0))
            self._relative += float((np.abs(d - t) / t).sum())
            self._squared += float(((d - t) ** 2).sum())
            self._n_close += int(np.count_nonzero(np.maximum(d / t, t / d) < DELTA))
            if self._ratio is not None:
                change = np.abs(ratio - self._ratio)
                self._change += float(np.nansum(change))
                self._n_steps += int(np.count_nonzero(~np.isnan(change)))
            self._ratio = ratio

    def report(self) -> dict[str, float | None]:
        """The figures of depth that the top of this file lists; `None` without any pixel to compare."""
        n = self._n
        return {
            "abs_rel": _rounded(self._relative / n) if n else None,
            "rmse_m": _rounded((self._squared / n) ** 0.5) if n else None,
            "delta_125": _rounded(self._n_close / n) if n else None,
            "covered": _rounded(n / self._n_true) if self._n_true else None,
            "flicker": _rounded(self._change / self._n_steps) if self._n_steps else None,
        }


class TrackErrors:
    """Errors of tracks against exact tracks, moving and still points apart, over any number of clips.

    Args:
        height (`int`): Rows of the image.
        width (`int`): Columns of the image.
        intrinsics (`dict`, *optional*): fx, fy, cx, cy in pixels counted from the image's outer edge; without
            them there is no distance in space.
    """

    def __init__(self, height: int, width: int, intrinsics: dict[str, float] | None = None):
        self._scale_px = REFERENCE_PX / min(height, width)
        self._size, self._intrinsics = np.array([width, height, 1]), intrinsics
        self._kinds = {"moving": _Kind(), "still": _Kind()}

    def add(
        self,
        points: np.ndarray,
        visible: np.ndarray,
        true_points: np.ndarray,
        true_visible: np.ndarray,
        moving: np.ndarray,
    ) -> None:
        """Take in successive frames of some tracks; leave out those in which the truth was given.

        Args:
            points (`np.ndarray`): `(F, n, 3)` x, y as image fractions, z in metres.
            visible (`np.ndarray`): `(F, n)` bool.
            true_points (`np.ndarray`): `(F, n, 3)`, exact.
            true_visible (`np.ndarray`): `(F, n)` bool, exact.
            moving (`np.ndarray`): `(n,)` bool, which points move.

        Raises:
            ValueError: If the shapes differ.
        """
        if points.shape != true_points.shape:
            raise ValueError(f"tracks have shape {points.shape}, the truth {true_points.shape}")
        found, true = points * self._size, true_points * self._size
        epe_px = self._scale_px * np.linalg.norm((found - true)[..., :2], axis=-1)
        epe_cm = None
        if self._intrinsics is not None:
            epe_cm = 100 * np.linalg.norm(self._in_space(found) - self._in_space(true), axis=-1)
        for name, kind in self._kinds.items():
            columns = np.flatnonzero(moving == (name == "moving"))
            seen, truly = visible[:, columns], true_visible[:, columns]
            kind.n += seen.size
            kind.n_right += int(np.count_nonzero(seen == truly))
            kind.n_visible += int(np.count_nonzero(truly))
            kind.px.append(epe_px[:, columns][seen & truly].astype(np.float32))
            kind.px_last.append(epe_px[-1, columns][seen[-1] & truly[-1]].astype(np.float32))
            if epe_cm is not None:
                kind.cm.append(epe_cm[:, columns][seen & truly].astype(np.float32))

    def _in_space(self, points: np.ndarray) -> np.ndarray:
        """Positions in px and metres -> metres in the camera's frame, same shape."""
        k = self._intrinsics
        centre, focal = np.array([k["cx"], k["cy"]]), np.array([k["fx"], k["fy"]])
        z = points[..., 2:]
        return np.concatenate([(points[..., :2] - centre) / focal * z, z], axis=-1)

    def report(self) -> dict[str, dict[str, Any]]:
        """The figures of tracks that the top of this file lists, for moving and still points.

        Distances have `median`, `mean` and `p90`; a figure is `None` without any point to compare.
        """
        return {name: kind.report() for name, kind in self._kinds.items()}


class _Kind:
    """Sums of the moving points, or of the still ones."""

    def __init__(self):
        self.n = self.n_right = self.n_visible = 0
        self.px: list[np.ndarray] = []
        self.px_last: list[np.ndarray] = []
        self.cm: list[np.ndarray] = []

    def report(self) -> dict[str, Any]:
        px, last, cm = (
            np.concatenate([np.zeros(0, np.float32), *errors]) for errors in (self.px, self.px_last, self.cm)
        )
        return {
            "positions": self.n_visible,
            "epe_px": _spread(px),
            "epe_px_last": _spread(last),
            "epe_cm": _spread(cm),
            "visibility_accuracy": _rounded(self.n_right / self.n) if self.n else None,
            "found": _rounded(len(px) / self.n_visible) if self.n_visible else None,
        }


def _spread(errors: np.ndarray) -> dict[str, float] | None:
    if not len(errors):
        return None
    median, p90 = np.percentile(errors, [50, 90])
    return {"median": _rounded(median), "mean": _rounded(errors.mean()), "p90": _rounded(p90)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
