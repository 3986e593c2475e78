"""End-point errors of 3D flow (x, y in the image, metric depth), as an `evaluate` metric."""

import inspect

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "End-point errors of 3D flow in pixels and in centimeters, for points that move and that do not."
)
_KWARGS_DESCRIPTION = """
An example is the future of one point: L steps of x, y, z, where x and y are fractions of the image's width
and height and z is the depth in meters. Steps with a NaN in the truth are unknown and not compared. A point
moves if its known steps lie farther than `moving_above_px` from the first known one.

Means over all known steps of all points:

- `epe_px`: sqrt(((x - x') width)^2 + ((y - y') height)^2), pixels
- `z_cm`: |z - z'|, centimeters
- `epe_cm`, with intrinsics only: distance in space of ((x width - cx) z / fx, (y height - cy) z / fy, z),
  centimeters in the camera's frame (x right, y down, z forward; pixel centers at i + 0.5)
- each of them with `_moving` and `_still`, as far as there are such points
- `points`, `points_moving`: numbers of points with a known step

Args:
    predictions: trajectories `(L, 3)`, or `(L, 2)` without z; float.
    references: true trajectories of the same shapes.
    width, height (`float`): The image's size in pixels.
    fx, fy, cx, cy (`float`, *optional*): Intrinsics of the camera in pixels of that image.
    moving_above_px (`float`): 1 by default.

Raises:
    ValueError: If shapes differ, a size or focal length is not above 0, some but not all intrinsics are
        given, a prediction is not finite where the truth is known, or nothing is known.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("training/evaluation/hub_metrics/flow_3d")
    >>> figures = metric.compute(predictions=[[[0.5, 0.5, 1.0], [0.75, 0.5, 1.0]]],
    ...                          references=[[[0.5, 0.5, 1.0], [0.50, 0.5, 1.5]]], width=64, height=48)
    >>> figures["epe_px"], figures["z_cm"], figures["points_moving"]  # 0 and 16 px, 0 and 50 cm; it stands
    (8.0, 25.0, 0)
"""
_CITATION = "Vedula, Baker, Rander, Collins, Kanade: Three-Dimensional Scene Flow, ICCV 1999"
_OPTIONS = ("width", "height", "fx", "fy", "cx", "cy", "moving_above_px")


def end_point_errors(
    predictions, references, width=None, height=None, moving_above_px=1.0, **intrinsics
) -> dict:
    """The figures from plain arrays; see `inputs_description`."""
    if not width or not height:
        raise ValueError("flow_3d needs width and height, the image's size in pixels")
    if unknown := intrinsics.keys() - set(_OPTIONS):
        raise TypeError(f"flow_3d has no option {', '.join(sorted(unknown))}: {', '.join(_OPTIONS)}")
    fx, fy, cx, cy = (intrinsics.get(name) for name in ("fx", "fy", "cx", "cy"))
    missing = [name for name in ("fx", "fy", "cx", "cy") if intrinsics.get(name) is None]
    if 0 < len(missing) < 4:
        raise ValueError(f"of the intrinsics {', '.join(missing)} are missing: give all four, or none")
    for name, value in {"width": width, "height": height, "fx": fx, "fy": fy}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be above 0, in pixels")
    if not len(references):
        raise ValueError("no point was given: nothing to compare")
    p, t = (np.asarray(tracks, dtype=np.float64) for tracks in (predictions, references))  # (M, L, 2 or 3)
    if p.shape != t.shape or p.ndim != 3 or p.shape[-1] not in (2, 3):
        raise ValueError(
            f"predictions have shape {p.shape} and references {t.shape}; both must be (points, steps, "
            "3), or (points, steps, 2) without z"
        )
    known = np.isfinite(t).all(-1)  # (M, L)
    if not known.any():
        raise ValueError("no step of any point is known: nothing to compare")
    if not np.isfinite(p[known]).all():
        raise ValueError("predictions are not finite where the truth is known")
    size = np.array([width, height], dtype=np.float64)
    kept = known.any(1)
    start = t[np.arange(len(t)), known.argmax(1)][:, None, :2]
    away = np.linalg.norm((t[..., :2] - start) * size, axis=-1)
    moving = np.where(known, away, 0).max(1) > moving_above_px
    errors = {"epe_px": np.linalg.norm((p - t)[..., :2] * size, axis=-1)}
    if p.shape[-1] == 3:
        errors["z_cm"] = 100 * np.abs(p - t)[..., 2]
        if not missing:
            focal, center = np.array([fx, fy]), np.array([cx, cy])
            ours, theirs = (
                np.concatenate([(q[..., :2] * size - center) / focal * q[..., 2:], q[..., 2:]], -1)
                for q in (p, t)
            )
            errors["epe_cm"] = 100 * np.linalg.norm(ours - theirs, axis=-1)
    groups = {"": known, "_moving": known & moving[:, None], "_still": known & ~moving[:, None]}
    result = {
        name + group: float(error[mask].mean())
        for name, error in errors.items()
        for group, mask in groups.items()
        if mask.any()
    }
    return {**result, "points": int(kept.sum()), "points_moving": int((moving & kept).sum())}


class Flow3D(evaluate.Metric):
    """See `inputs_description`."""

    def __init__(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        if unknown := kwargs.keys() - inspect.signature(evaluate.Metric).parameters.keys():
            # The base class would ignore it, and the figures would be of the default.
            raise TypeError(f"flow_3d has no option {', '.join(sorted(unknown))}: {', '.join(_OPTIONS)}")
        super().__init__(*args, **kwargs)

    def _info(self):
        prefix = "" if self.config_name == "default" else f"{self.config_name}_"
        trajectory = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {f"{prefix}predictions": trajectory, f"{prefix}references": trajectory}
            ),
        )

    def _compute(self, **given):
        inputs = [given.pop(name) for name in self.features]
        return end_point_errors(*inputs, **(self.options | given))
