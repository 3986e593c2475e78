"""Depth and track columns of a LeRobot v3 dataset: names, dtypes, units, checks.

The contract between what makes labels (`simulate.py`, `annotate.py`) and what reads them (training, cards).

| key | dtype, shape per frame | meaning |
| --- | --- | --- |
| `observation.images.<camera>` | LeRobot video `(H, W, 3)` | RGB as recorded |
| `observation.depth.<camera>` | LeRobot depth video `(H, W, 1)` | meters along the optical axis |
| `observation.points.<camera>` | float16 `(n*3,)` | n tracked points: x, y as image fractions, z in meters |
| `observation.points_visible.<camera>` | bool `(n,)` | false when occluded, outside the image, or padding |

x and y are `(column + 0.5) / width` and `(row + 0.5) / height`; they may leave [0, 1]. Point j is the same
physical point through the whole episode. The label keys start with `observation.` because LeRobot drops every
other column on its way to a policy; a policy must remove them from its inputs (`is_label_key`), since LeRobot
would show a depth map as a camera and points as robot state.

Points are flat 1-D columns because LeRobot's split and merge tools fail on 2-D ones. They are appended
(`append_columns` in `storage/dataset_folder.py`) because LeRobot computes ten statistics per element of a
recorded column.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IMAGE_PREFIX = "observation.images."
DEPTH_PREFIX = "observation.depth."
POINTS_PREFIX = "observation.points."
POINTS_VISIBLE_PREFIX = "observation.points_visible."

# LeRobot's depth video maps zero, NaN and everything nearer than 1 cm to its lowest code, 0.01 m.
DEPTH_FLOOR_M = 0.011
# Values this close to the declared maximum are saturated: "at least this far".
DEPTH_LIMIT_MARGIN_M = 0.01
# No robot camera sees half of its pixels farther than this; millimeters of any real scene do.
IMPLAUSIBLE_MEDIAN_M = 100.0
METERS_REMEDY = (
    "record uint16 frames as millimeters or float32 frames as meters, or set the right 'depth_unit' in the "
    "feature's info in meta/info.json"
)
# "No measurement" in floats: the largest uint16, in meters or not, and what is farther than millimeters are.
UINT16_SENTINELS_M = (np.float32(65.535), np.float32(65535))
NO_DEPTH_M = 1e5

# Points outside the image are clipped to these fractions of it, to stay small numbers in float16.
POINT_LIMITS = (-2.0, 3.0)

# Image distances are given for a shorter side of this length, whatever the resolution.
REFERENCE_PX = 224.0


def image_key(camera: str) -> str:
    """Key of a camera's RGB stream."""
    return IMAGE_PREFIX + camera


def find_image_key(features: Mapping[str, Mapping[str, Any]], camera: str) -> str | None:
    """Key of a camera's RGB stream, if any: `observation.images.<camera>`, or the bare name."""
    for key in (image_key(camera), camera):
        if key in features and features[key]["dtype"] in ("image", "video"):
            return key if not is_depth_feature(features[key]) else None
    return None


def list_cameras(features: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """RGB cameras of a dataset by name, in its order; columns without the prefix are cameras of that name."""
    names = dict.fromkeys(key.removeprefix(IMAGE_PREFIX) for key in features)
    return [name for name in names if find_image_key(features, name) and not is_label_key(name)]


def depth_key(camera: str) -> str:
    """Key of a camera's depth as this project writes it."""
    return DEPTH_PREFIX + camera


def points_key(camera: str) -> str:
    """Key of the tracked points seen by a camera."""
    return POINTS_PREFIX + camera


def points_visible_key(camera: str) -> str:
    """Key of the visibility of a camera's tracked points."""
    return POINTS_VISIBLE_PREFIX + camera


def depth_feature(height: int, width: int) -> dict:
    """Feature of a depth video, sizes in pixels; `LeRobotDataset.create` adds unit and limits."""
    return {
        "dtype": "video",
        "shape": (height, width, 1),
        "names": ["height", "width", "channels"],
        "info": {"is_depth_map": True},
    }


def recorded_features(
    sizes: Mapping[str, tuple[int, int]], with_depth: bool, state: Sequence[str], action: Sequence[str]
) -> dict[str, dict]:
    """LeRobot features of cameras `(height, width)`, and of state and action by the names of their entries.

    Raises:
        ValueError: If a size is odd: H.264 stores even ones only.
    """
    features = {}
    for camera, (height, width) in sizes.items():
        if height % 2 or width % 2:
            raise ValueError(f"images are {width}x{height} px; video needs an even width and height")
        names = ["height", "width", "channels"]
        features[image_key(camera)] = {"dtype": "video", "shape": (height, width, 3), "names": names}
    if with_depth:
        features |= {depth_key(camera): depth_feature(*size) for camera, size in sizes.items()}
    for key, names in (("observation.state", state), ("action", action)):
        features[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
    return features


def check_n_points(n_points: int, name: str) -> None:
    """Refuse a track column of fewer than 2 points, as LeRobot stores one-element columns as scalars.

    Args:
        n_points (`int`): Points per episode.
        name (`str`): Option or argument that gives the number, for the message.

    Raises:
        ValueError: Names the option and the number.
    """
    if n_points < 2:
        raise ValueError(f"{name} is {n_points}; a track column needs at least 2 points")


def points_features(camera: str, n_points: int, height: int, width: int) -> dict[str, dict]:
    """Features of a camera's tracked points and their visibility by key, for `append_columns`.

    Args:
        camera (`str`): Camera that sees the points.
        n_points (`int`): Points per episode, at least 2.
        height, width (`int`): Size of the tracked image in pixels; the values do not depend on it.
    """
    check_n_points(n_points, "n_points")
    facts = {"camera": camera, "resolution": [height, width]}
    return {
        points_key(camera): {
            "dtype": "float16",
            "shape": (3 * n_points,),
            "names": None,
            "info": {"layout": "n,3", "units": "x/width,y/height,m", **facts},
        },
        points_visible_key(camera): {
            "dtype": "bool",
            "shape": (n_points,),
            "names": None,
            "info": {"layout": "n", "units": "true=visible", **facts},
        },
    }


def picture_size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a camera's images; some older datasets name the channels first."""
    shape = tuple(feature["shape"])
    return shape[1:] if shape[0] in (1, 3) else shape[:2]


def is_depth_feature(feature: Mapping[str, Any]) -> bool:
    """Whether LeRobot marks this feature as a depth map (its current and its older spelling)."""
    info = (feature.get("info") or {}) | (feature.get("video_info") or {})
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def is_label_key(key: str, feature: Mapping[str, Any] | None = None) -> bool:
    """Whether a column is a label (depth, points, visibility) and so never an input of a policy."""
    if key.startswith((DEPTH_PREFIX, POINTS_PREFIX, POINTS_VISIBLE_PREFIX)):
        return True
    return feature is not None and is_depth_feature(feature)


def find_depth_key(features: Mapping[str, Mapping[str, Any]], camera: str) -> str | None:
    """Key of the depth stream of an RGB camera, if any.

    LeRobot's `is_depth_map` mark decides: `observation.images.<camera>_depth` as recorded by LeRobot's depth
    cameras is found, an RGB picture of depth under the same name is not.
    """
    names = (depth_key(camera), f"{IMAGE_PREFIX}{camera}_depth", f"{IMAGE_PREFIX}{camera}.depth")
    return next((name for name in names if name in features and is_depth_feature(features[name])), None)


def depth_limit_m(feature: Mapping[str, Any]) -> float:
    """Declared far limit of a depth feature in meters (`inf` when the storage does not saturate)."""
    info = feature.get("info") or {}
    limit = info.get("video.depth_max", info.get("depth_max"))
    return math.inf if limit is None else float(limit)


def erase_sentinels(depth: np.ndarray) -> np.ndarray:
    """Depth as a camera stores it, in any unit, with 0 where a value stands for "no measurement".

    Those are negative integers and the largest one of 8, 15, 16 or 31 bits; a camera that sees so far exactly
    there loses these pixels. The type does not say which: Pillow widens 16 bits to 32, and PNG has no signed
    integers.
    """
    if np.issubdtype(depth.dtype, np.floating):
        return depth
    largest = [2**bits - 1 for bits in ((8,) if depth.dtype.itemsize == 1 else (15, 16, 31, 32))]
    return np.where((depth < 0) | np.isin(depth, largest), depth.dtype.type(0), depth)


def clean_depth(depth_m: Any, limit_m: float = math.inf) -> Any:
    """Set invalid depth to zero.

    Args:
        depth_m (`np.ndarray` or `torch.Tensor`): Meters, any shape, as read from a dataset.
        limit_m (`float`): Far limit of the storage (`depth_limit_m`); values within 1 cm of it are saturated.

    Returns:
        Same type and shape, float32: meters, 0 where the value was at most 1.1 cm (negative ones included),
        saturated, not finite, or `NO_DEPTH_M` and more.
    """
    is_array = isinstance(depth_m, np.ndarray)
    depth_m = depth_m.astype(np.float32, copy=False) if is_array else depth_m.float()
    valid = (depth_m > DEPTH_FLOOR_M) & (depth_m < min(limit_m - DEPTH_LIMIT_MARGIN_M, NO_DEPTH_M))
    for sentinel in UINT16_SENTINELS_M:
        valid &= depth_m != float(sentinel)
    return np.where(valid, depth_m, np.float32(0)) if is_array else depth_m.where(valid, 0)


def check_depth_range(depth_m: Any, key: str, limit_m: float = math.inf) -> None:
    """Refuse depth that cannot be in meters.

    Millimeters stored as meters appear as values in the hundreds, or, where LeRobot's depth video clipped
    them at its far limit, as saturated frames.

    Args:
        depth_m (`np.ndarray` or `torch.Tensor`): Depth of one or more frames as read, before `clean_depth`.
        key (`str`): Column of the depth, for the message.
        limit_m (`float`): Far limit of the storage (`depth_limit_m`).

    Raises:
        ValueError: If the values are implausible as meters; names the column, the range seen and the remedy.
    """
    values = np.asarray(depth_m, dtype=np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError(f"depth column '{key}' holds no finite value; remove it or annotate it again")
    check_meters(values, key)
    saturated = float(np.mean(finite >= limit_m - DEPTH_LIMIT_MARGIN_M))
    if saturated > 0.99:
        raise ValueError(
            f"depth column '{key}' is at its far limit of {limit_m:g} m in {saturated:.1%} of the pixels; "
            f"this looks like millimeters stored as meters: {METERS_REMEDY}, then record the depth again"
        )


def check_meters(depth_m: np.ndarray, key: str) -> None:
    """The part of `check_depth_range` that holds for every single frame."""
    measured = depth_m[(np.abs(depth_m) < NO_DEPTH_M) & ~np.isin(depth_m, UINT16_SENTINELS_M)]
    negative, positive = measured[measured < 0], measured[measured > DEPTH_FLOOR_M]
    # One value, such as -1 or -999, stands for "no measurement".
    if negative.size and negative.min() < negative.max():
        raise ValueError(
            f"depth column '{key}' has values from {measured.min():.3g} to {measured.max():.3g}; depth in "
            "meters cannot be negative: write 0 or NaN where nothing was measured"
        )
    if positive.size and np.median(positive) > IMPLAUSIBLE_MEDIAN_M:
        raise ValueError(
            f"depth column '{key}' has values from {measured.min():.3g} to {measured.max():.3g}, median "
            f"{np.median(positive):.4g}; this looks like millimeters read as meters: {METERS_REMEDY}"
        )


def pack_points(points: np.ndarray) -> np.ndarray:
    """Flatten tracks for storage: `(F, n, 3)` float (x, y image fractions, z meters) -> `(F, n*3)` float16.

    Raises:
        ValueError: If a value is not finite in float16 (larger than 65504).
    """
    with np.errstate(over="ignore"):  # infinite values are refused below
        packed = points.astype(np.float16).reshape(len(points), -1)
    if not np.isfinite(packed).all():
        raise ValueError("points hold values that are not finite in float16; clip or drop those tracks first")
    return packed


def unpack_points(packed: np.ndarray) -> np.ndarray:
    """Undo `pack_points`: `(F, n*3)` float16 -> `(F, n, 3)` float32."""
    return np.asarray(packed).astype(np.float32).reshape(len(packed), -1, 3)


def validate_columns(
    features: Mapping[str, Mapping[str, Any]],
    cameras: Sequence[str],
    need_depth: bool = False,
    need_tracks: bool = False,
    name: str = "DATASET",
) -> None:
    """Check that a dataset has what a run needs: depth of all cameras, tracks of the first one.

    Raises:
        ValueError: Names the first missing column and the command that adds it.
    """
    for camera in cameras:
        if find_image_key(features, camera) is None:
            raise ValueError(
                f"the dataset has no camera '{camera}' (no column '{image_key(camera)}'); its cameras are "
                f"{', '.join(list_cameras(features)) or 'none'}: name one of them in the configuration"
            )
    missing = [depth_key(camera) for camera in cameras if need_depth and not find_depth_key(features, camera)]
    if need_tracks:
        wanted = (points_key(cameras[0]), points_visible_key(cameras[0]))
        missing += [key for key in wanted if key not in features]
    tracks = [features.get(key) for key in (points_key(cameras[0]), points_visible_key(cameras[0]))]
    if all(tracks) and math.prod(tracks[0]["shape"]) != 3 * math.prod(tracks[1]["shape"]):
        raise ValueError(
            f"the dataset {name} has '{points_key(cameras[0])}' of shape {tracks[0]['shape']} and its "
            f"visibility of shape {tracks[1]['shape']}; points need 3 values each: annotate it again"
        )
    if missing:
        raise ValueError(
            f"the dataset {name} lacks the column '{missing[0]}'; `python datasets_scripts/annotate.py` adds "
            "points to a dataset with depth, `simulate.py` makes MetaWorld datasets that have both. To train "
            "on this one, leave out what needs it: the objectives depth and future (depth) or flow (points) "
            "(--model.objectives '[action, progress]')"
        )
