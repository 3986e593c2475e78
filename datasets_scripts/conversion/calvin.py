"""CALVIN's files as episodes: one per language annotation, with the simulator's depth.

A split of the archive (`task_D_D/training`) holds one npz file per frame, at 30 Hz, and
`lang_annotations/auto_lang_ann.npy`, whose segments `info.indx` name the first and the last frame, both
included. Segments overlap, and so do episodes.

| CALVIN | column |
| --- | --- |
| `rgb_static`, `rgb_gripper` | `observation.images.main`, `observation.images.wrist` |
| `depth_static`, `depth_gripper` | `observation.depth.main`, `observation.depth.wrist`: meters |
| `robot_obs` 0..5 and 14 | `observation.state`: x, y, z, roll, pitch, yaw, gripper |
| `rel_actions` | `action`: as recorded; 1 is 2 cm or 0.05 rad |

Positions are in meters, angles in radians, `R = Rz(yaw) Ry(pitch) Rx(roll)`; the gripper is 1 (open) or -1.
The model's `local_delta` actions are made from `observation.state`, not from `action`.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from datasets_scripts.columns import depth_key, image_key, recorded_features
from datasets_scripts.conversion.job import Demonstration
from datasets_scripts.storage.episode_job import check_limit
from datasets_scripts.storage.even_spread import spread_evenly
from datasets_scripts.storage.numpy_pickles import NumpyUnpickler
from datasets_scripts.storage.shards import Layout

__all__ = ["CalvinArchive"]

CALVIN_FPS = 30
# By camera: name in the files, vertical field of view in degrees, far plane of the renderer in meters
# (calvin_env, conf/cameras).
CALVIN_CAMERAS = {"main": ("static", 10.0, 10.0), "wrist": ("gripper", 75.0, 2.0)}
GRIPPER_ENTRY = 14  # of robot_obs
STATE_ENTRIES = (*range(6), GRIPPER_ENTRY)
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
CALVIN_ACTIONS = ("delta_x", "delta_y", "delta_z", "delta_roll", "delta_pitch", "delta_yaw", "gripper")
VECTORS = {"robot_obs": 15, "rel_actions": 7}
# The static camera is 4.2 m from the table and sees little else. Older recordings hold half of the meters
# (calvin_env, scripts/unnormalize_depth.py).
TABLE_M, TABLE_RANGE_M = 4.2, (3.15, 5.6)
DEPTH_CHECKS = 8  # segments of which the first frame is checked


class CalvinArchive:
    """One split of CALVIN on disk, checked when opened; see `conversion.job.Archive` for the attributes.

    Args:
        folder (`Path`): Split with frames and language annotations, such as `task_D_D/training`.
        depth_scale (`float`): Meters per stored unit of depth.
        limit (`int`, *optional*): Most segments.

    Raises:
        ValueError: If it is not such a split, lacks language, frames or arrays, or its depth is not in
            meters; names the file at fault.
    """

    def __init__(self, folder: Path, depth_scale: float = 1.0, limit: int | None = None):
        self.folder, self.depth_scale = Path(folder), depth_scale
        if not (math.isfinite(depth_scale) and depth_scale > 0):
            raise ValueError(f"--depth-scale is {depth_scale}; it must be above 0 (2 for older recordings)")
        check_limit(limit)
        self._digits, present = _frame_files(self.folder)
        segments, self._instructions, self._tasks = _read_annotations(self.folder)
        self._segments = segments[:limit]
        self._check_segments(present)
        self.lengths = [last - first + 1 for first, last in self._segments]
        self._sizes: dict[str, tuple[int, int]] = {}
        self._check_depth()
        features = recorded_features(self._sizes, True, STATE_NAMES, CALVIN_ACTIONS)
        depth_max_m = {depth_key(camera): far_m for camera, (_, _, far_m) in CALVIN_CAMERAS.items()}
        self.layout = Layout(CALVIN_FPS, "panda", features, depth_max_m)
        chosen = [self._segments, self._instructions[:limit], self._tasks[:limit]]
        self.parameters = {
            "format": "CALVIN",
            "episodes": len(self._segments),
            "annotations_sha256": hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16],
            "depth_scale": depth_scale,
        }
        self.cameras = {camera: self._camera_facts(camera, size) for camera, size in self._sizes.items()}
        self.labels = None
        self.conventions = {
            "source": "/".join(self.folder.resolve().parts[-2:]),
            "state": "robot_obs: x, y, z (m), roll, pitch, yaw (rad), gripper command, 1 open, -1 closed",
            "action": "rel_actions: 1 is 2 cm or 0.05 rad in the world's frame; gripper 1 open, -1 closed",
        }

    def read(self, episode: int) -> Demonstration:
        """Read all frames of a segment."""
        first, last = self._segments[episode]
        frames = [self._read_frame(number) for number in range(first, last + 1)]
        arrays = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
        videos, scale = {}, np.float32(self.depth_scale)
        for camera, (name, _, _) in CALVIN_CAMERAS.items():
            videos[image_key(camera)] = arrays[f"rgb_{name}"]
            videos[depth_key(camera)] = arrays[f"depth_{name}"].astype(np.float32) * scale
        columns = {
            "observation.state": arrays["robot_obs"][:, STATE_ENTRIES].astype(np.float32),
            "action": arrays["rel_actions"].astype(np.float32),
        }
        facts = {"task": self._tasks[episode], "frames": [first, last]}
        return Demonstration(self._instructions[episode], videos, columns, facts)

    def _path(self, number: int) -> Path:
        return self.folder / f"episode_{number:0{self._digits}d}.npz"

    def _read_frame(self, number: int) -> dict[str, np.ndarray]:
        """The wanted arrays of a frame, checked."""
        path = self._path(number)
        wanted = [f"{kind}_{name}" for name, _, _ in CALVIN_CAMERAS.values() for kind in ("rgb", "depth")]
        wanted += VECTORS
        try:
            with np.load(path) as stored:
                missing = [name for name in wanted if name not in stored]
                frame = {name: stored[name] for name in wanted if name in stored}
        except Exception as error:  # a damaged file makes numpy and zipfile raise nearly anything
            raise ValueError(
                f"frame {path} is damaged or truncated ({error!r}); unpack or download the archive again"
            ) from error
        if missing:
            raise ValueError(
                f"frame {path} lacks {', '.join(missing)}; CALVIN's frames with two RGB-D cameras are needed"
            )
        self._check_frame(path, frame)
        return frame

    def _check_frame(self, path: Path, frame: dict[str, np.ndarray]) -> None:
        """Raise a `ValueError` unless shapes and values suit the columns."""
        expected = {name: (size,) for name, size in VECTORS.items()}
        for camera, (name, _, _) in CALVIN_CAMERAS.items():
            size = self._sizes.setdefault(camera, frame[f"rgb_{name}"].shape[:2])
            expected |= {f"rgb_{name}": (*size, 3), f"depth_{name}": size}
        for name, shape in expected.items():
            values = frame[name]
            if values.shape != shape or (name.startswith("rgb") and values.dtype != np.uint8):
                raise ValueError(
                    f"frame {path}: {name} is {values.dtype} {values.shape}, expected "
                    f"{'uint8 ' if name.startswith('rgb') else ''}{shape}"
                )
            if not name.startswith("rgb") and not np.isfinite(values).all():
                raise ValueError(f"frame {path}: {name} holds values that are not finite")
        if (gripper := frame["robot_obs"][GRIPPER_ENTRY]) not in (-1, 1):
            raise ValueError(
                f"frame {path}: entry {GRIPPER_ENTRY} of robot_obs is {gripper:.4g}; it must be the gripper "
                "command, -1 or 1"
            )

    def _check_segments(self, present: set[int]) -> None:
        """Raise a `ValueError` if a frame of a segment is missing."""
        for first, last in self._segments:
            missing = [number for number in range(first, last + 1) if number not in present]
            if missing:
                raise ValueError(
                    f"frame {self._path(missing[0])} of the segment {first} to {last} is missing, and "
                    f"{len(missing) - 1} more of it; unpack or download the archive again"
                )

    def _check_depth(self) -> None:
        """Raise a `ValueError` unless the static camera sees the table at its distance."""
        picks = spread_evenly(len(self._segments), DEPTH_CHECKS)
        frames = [self._read_frame(self._segments[pick][0]) for pick in picks]
        seen = float(np.median(np.stack([frame["depth_static"] for frame in frames]))) * self.depth_scale
        low, high = TABLE_RANGE_M
        if not low <= seen <= high:
            remedy = "give meters per stored unit as --depth-scale"
            if low <= 2 * seen <= high:
                remedy = f"this is one of the older recordings: add --depth-scale {2 * self.depth_scale:g}"
            raise ValueError(
                f"the static camera of {self.folder} sees the table at {seen:.3g} m, and it stands "
                f"{TABLE_M} m from it; {remedy}"
            )

    def _camera_facts(self, camera: str, size: tuple[int, int]) -> dict:
        """Depth and intrinsics of a camera for the provenance."""
        _, field_of_view, far_m = CALVIN_CAMERAS[camera]
        height, width = size
        focal = 0.5 * height / math.tan(math.radians(field_of_view) / 2)
        intrinsics = {"fx": focal, "fy": focal, "cx": 0.5 * width, "cy": 0.5 * height}
        intrinsics |= {"height": height, "width": width}
        return {"depth": {"source": "simulator", "depth_max_m": far_m}, "intrinsics": intrinsics}


def _frame_files(folder: Path) -> tuple[int, set[int]]:
    """Digits in the names of frame files, and the numbers of those that are there."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; --source is a split of CALVIN such as task_D_D/training"
        )
    found = [match for path in folder.iterdir() if (match := re.fullmatch(r"episode_(\d+)\.npz", path.name))]
    if not found:
        splits = [name for name in ("training", "validation") if (folder / name).is_dir()]
        raise ValueError(
            f"{folder} holds no frames of CALVIN (episode_0000000.npz)"
            + (f"; name one of its splits: --source {folder / splits[0]}" if splits else "")
        )
    return len(found[0].group(1)), {int(match.group(1)) for match in found}


def _read_annotations(folder: Path) -> tuple[list[tuple[int, int]], list[str], list[str]]:
    """Segments (both ends included), instructions and tasks of a split."""
    places = [folder / "lang_annotations" / "auto_lang_ann.npy", folder / "auto_lang_ann.npy"]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise ValueError(
            f"{folder} has no language: lang_annotations/auto_lang_ann.npy is missing; unpack or download "
            "the archive again"
        )
    try:
        annotations = _load_pickled(path)
        segments = [(int(first), int(last)) for first, last in annotations["info"]["indx"]]
        instructions = [str(text).strip() for text in annotations["language"]["ann"]]
        tasks = [str(task) for task in annotations["language"]["task"]]
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{path} does not hold CALVIN's annotations ({error!r}); download the archive again"
        ) from error
    if not segments or not len(segments) == len(instructions) == len(tasks):
        raise ValueError(
            f"{path} has {len(segments)} segments, {len(instructions)} instructions and {len(tasks)} tasks; "
            "it needs equally many of each, and at least one"
        )
    for number, ((first, last), text) in enumerate(zip(segments, instructions, strict=True)):
        if not 0 <= first < last or not text:
            raise ValueError(
                f"{path}: annotation {number} is {text!r} for the frames {first} to {last}; it needs words "
                "and at least two frames"
            )
    return segments, instructions, tasks


def _load_pickled(path: Path) -> dict:
    """The dict in a npy file that `np.save` made."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # 2.0 is for long headers only
        if shape != () or not dtype.hasobject:
            raise ValueError(f"it is an array of {dtype} {shape}")
        return NumpyUnpickler(file).load().item()
