"""LIBERO's files as episodes: one per demonstration, images upright.

A suite is a folder with one HDF5 file per task (`..._demo.hdf5`), each with `data/demo_0`, `data/demo_1` and
so on, at 20 Hz. The instruction is the file's name in words, or that of the attributes of `data` if the name
is not of a task.

| LIBERO | column |
| --- | --- |
| `obs/agentview_rgb`, `obs/eye_in_hand_rgb` | `observation.images.main`, `.wrist`: flipped vertically |
| `obs/ee_states`, `obs/gripper_states` | `observation.state`: x, y, z, roll, pitch, yaw, gripper |
| `actions` | `action`: the recorded command |

The files hold images upside down, angles as axis times angle, and the gripper command as -1 open, 1 closed.
In the dataset images are upright, positions in meters, angles in radians (`R = Rz(yaw) Ry(pitch) Rx(roll)`),
and the gripper is 1 open, 0 closed: in actions the command, in states whether the fingers are more than 4 cm
apart.

The first six entries of an action are robosuite's, in [-1, 1], full scale 0.05 m and 0.5 rad in the robot's
base frame. For its gripper the simulator takes `1 - 2 g` of the column's g.

LIBERO's script performs a command and then records the frame, so a frame shows the effect of its command.
LIBERO's loader keeps this pairing, and so does this one; `next_action` gives every frame the command that
follows it and drops the last frame.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.columns import depth_key, image_key, recorded_features
from datasets_scripts.conversion.job import Demonstration, LabelOptions
from datasets_scripts.conversion.libero_replay import ReplayedScene, localize_model
from datasets_scripts.extras import install_advice
from datasets_scripts.simulation.libero import (
    CONVERTED_ACTION,
    CONVERTED_STATE,
    LIBERO_HZ,
    converted_state,
)
from datasets_scripts.simulation.libero_files import libero_instruction
from datasets_scripts.storage.episode_job import check_limit
from datasets_scripts.storage.shards import Layout

__all__ = ["LiberoArchive"]

LIBERO_CAMERAS = {"main": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
WIDTHS = {"ee_states": 6, "gripper_states": 2}
REMEDY = "download the file again"


class LiberoArchive:
    """Demonstration files of LIBERO, checked when opened; see `conversion.job.Archive` for the attributes.

    Args:
        source (`Path`): An HDF5 file, or a folder with some, at any depth.
        next_action (`bool`): Give every frame the command that follows it.
        limit (`int`, *optional*): Most demonstrations.
        labels (`LabelOptions`, *optional*): Make depth and tracks in LIBERO's simulator, see
            `libero_replay.py`. The last frame of each demonstration is dropped, as its state is not stored.

    Raises:
        ValueError: If h5py is missing, there is no such file, or one is damaged or lacks language,
            demonstrations or arrays; names it.
    """

    def __init__(
        self,
        source: Path,
        next_action: bool = False,
        limit: int | None = None,
        labels: LabelOptions | None = None,
    ):
        source = Path(source)
        check_limit(limit)
        self.next_action, self.labels = next_action, labels
        self._root = source.parent if source.is_file() else source
        self._demos: list[tuple[str, str]] = []
        self._instructions: dict[str, str] = {}
        self._upright: dict[str, bool] = {}
        self.lengths: list[int] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        sources = []
        for path in _demo_files(source):
            name = path.relative_to(self._root).as_posix()
            before = len(self._demos)
            self._open(path, name)
            sources.append([name, path.stat().st_size, len(self._demos) - before])
        self._demos, self.lengths = self._demos[:limit], self.lengths[:limit]
        features = recorded_features(self._sizes, labels is not None, CONVERTED_STATE, CONVERTED_ACTION)
        depth_max_m = {depth_key(view): labels.depth_max_m for view in LIBERO_CAMERAS} if labels else {}
        self.layout = Layout(LIBERO_HZ, "panda", features, depth_max_m)
        self.parameters = {
            "format": "LIBERO",
            "episodes": len(self._demos),
            "files": sources,
            "next_action": next_action,
        }
        if labels is not None:
            self.parameters["labels"] = dataclasses.asdict(labels)
        self.cameras = {}
        self.conventions = {
            "images": "upright: what the simulator draws, flipped vertically",
            "state": "x, y, z (m), roll, pitch, yaw (rad), gripper 1 if more than 4 cm open, else 0",
            "action": "robosuite's OSC_POSE; gripper 1 open, 0 closed (the simulator takes 1 - 2 g)",
            "action_of_frame": "the command after it" if next_action else "as stored: the command before it",
        }

    def _open(self, path: Path, name: str) -> None:
        """Add the demonstrations of a file, checking everything but the values."""
        with _open_file(path) as file:
            data = file.get("data")
            names = [] if data is None else [name for name in data if re.fullmatch(r"demo_\d+", name)]
            demos = sorted(names, key=lambda name: int(name.removeprefix("demo_")))
            if not demos:
                raise ValueError(f"{path} is not a demonstration file of LIBERO: it has no group data/demo_0")
            self._instructions[name] = _instruction_of_name(path) or _read_instruction(path, data.attrs)
            # robosuite's image convention; "opengl" starts with the lowest row.
            convention = data.attrs.get("macros_image_convention", "opengl")
            self._upright[name] = _decode_text(convention) == "opencv"
            for demo in demos:
                n_frames = self._check_demo(path, data[demo], demo)
                self._demos.append((name, demo))
                self.lengths.append(n_frames - (self.next_action or self.labels is not None))
            if self.labels is not None:
                localize_model(_decode_text(data[demos[0]].attrs["model_file"]), f"{path}: {demos[0]}")

    def _check_demo(self, path: Path, group: Any, demo: str) -> int:
        """Check arrays, their shapes and lengths; gives the number of stored frames."""
        wanted = {f"obs/{name}": (size,) for name, size in WIDTHS.items()} | {"actions": (7,)}
        n_frames = None
        for key in [*(f"obs/{name}" for name in LIBERO_CAMERAS.values()), *wanted]:
            if key not in group:
                raise ValueError(f"{path}: {demo} lacks {key}; {REMEDY}")
            if group[key].external or group[key].is_virtual or Path(group[key].file.filename) != path:
                raise ValueError(f"{path}: {key} of {demo} lies in another file; {REMEDY}")
            shape = group[key].shape
            n_frames = shape[0] if n_frames is None else n_frames
            tail = wanted.get(key, (*shape[1:3], 3))
            if shape != (n_frames, *tail):
                raise ValueError(f"{path}: {key} of {demo} is {shape}, expected {(n_frames, *tail)}")
        for camera, key in LIBERO_CAMERAS.items():
            if (dtype := group[f"obs/{key}"].dtype) != np.uint8:
                raise ValueError(f"{path}: {key} of {demo} is {dtype}, expected uint8")
            size = group[f"obs/{key}"].shape[1:3]
            if self._sizes.setdefault(camera, size) != size:
                raise ValueError(
                    f"{path}: {key} of {demo} is {size} px, earlier ones are {self._sizes[camera]}; convert "
                    "files of different sizes separately"
                )
        if self.labels is not None:
            if "states" not in group or "model_file" not in group.attrs:
                raise ValueError(f"{path}: {demo} lacks states or model_file, which --replay needs; {REMEDY}")
            if group["states"].shape[0] != n_frames:
                raise ValueError(
                    f"{path}: {demo} has {group['states'].shape[0]} states and {n_frames} frames"
                )
            height, width = self._sizes["main"]
            if self._sizes != dict.fromkeys(LIBERO_CAMERAS, (height, height)):
                raise ValueError(f"{path}: --replay needs square images of one size, not {self._sizes}")
        if n_frames < 2:
            raise ValueError(f"{path}: {demo} has {n_frames} frames; at least two are needed")
        return n_frames

    def read(self, episode: int) -> Demonstration:
        """Read a demonstration."""
        from scipy.spatial.transform import Rotation

        name, demo = self._demos[episode]
        path = self._root / name
        with _open_file(path) as file:
            group = file["data"][demo]
            images = {camera: group[f"obs/{key}"][()] for camera, key in LIBERO_CAMERAS.items()}
            pose, fingers = group["obs/ee_states"][()], group["obs/gripper_states"][()]
            actions = group["actions"][()]
            model, states = (group.attrs["model_file"], group["states"][1:]) if self.labels else ("", None)
        for key, values in (("ee_states", pose), ("gripper_states", fingers), ("actions", actions)):
            if not np.isfinite(values).all():
                raise ValueError(f"{path}: {key} of {demo} holds values that are not finite")
        if not np.isin(actions[:, 6], (-1, 1)).all():
            raise ValueError(
                f"{path}: the gripper command of {demo} is not -1 (open) or 1 (closed) throughout"
            )
        actions = np.concatenate([actions[:, :6], (actions[:, 6:] < 0)], axis=1)
        state = converted_state(pose[:, :3], Rotation.from_rotvec(pose[:, 3:]), fingers)  # (F, 7)
        if self.next_action:
            actions, state = actions[1:], state[:-1]
        n_frames = self.lengths[episode]
        actions, state = actions[:n_frames], state[:n_frames]
        up = 1 if self._upright[name] else -1
        videos = {
            image_key(camera): np.ascontiguousarray(frames[:n_frames, ::up])
            for camera, frames in images.items()
        }
        columns = {"observation.state": state.astype(np.float32), "action": actions.astype(np.float32)}
        tracks = None
        if self.labels is not None:
            pictures = {view: videos[image_key(view)] for view in LIBERO_CAMERAS}
            scene = ReplayedScene(
                localize_model(_decode_text(model), f"{path}: {demo}"),
                self._sizes["main"][0],
                f"{path}: {demo}",
            )
            with scene:
                labels = scene.label(states, pictures, self.labels.depth_max_m)
                generator = np.random.default_rng((self.labels.seed, episode))
                tracks = labels.make_tracks(self.labels.n_points, generator)
            videos |= labels.depth_videos()
        facts = {"file": name, "demo": demo}
        return Demonstration(self._instructions[name], videos, columns, facts, tracks)


def _demo_files(source: Path) -> list[Path]:
    """HDF5 files in a folder, or the given one."""
    if source.is_file():
        return [source]
    paths = sorted(source.rglob("*.hdf5")) if source.is_dir() else []
    if not paths:
        raise ValueError(
            f"{source} holds no demonstration files of LIBERO (*_demo.hdf5); --source is a suite's folder "
            "such as libero_spatial"
        )
    return paths


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Any]:
    """An HDF5 file, open for reading; errors name it."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"LIBERO needs h5py: {install_advice('convert')}") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except ValueError:
        raise
    except Exception as error:  # a damaged file makes HDF5 raise nearly anything
        raise ValueError(f"{path} is not an HDF5 file, or it is damaged ({error!r}); {REMEDY}") from error


def _decode_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _instruction_of_name(path: Path) -> str | None:
    """Instruction in the words of the file's name, if they look like a task.

    LIBERO's and LeRobot's evaluations word instructions so. The BDDL files, from which the files' attributes
    come, word many of them differently: "pick the milk" instead of "pick up the milk".
    """
    words = libero_instruction(path.stem.removesuffix("_demo"))
    return words if path.stem.endswith("_demo") and words.count(" ") >= 2 else None


def _read_instruction(path: Path, attributes: Any) -> str:
    """Instruction from the file's attributes."""
    try:
        words = json.loads(_decode_text(attributes["problem_info"]))["language_instruction"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has no language: its attribute problem_info names no language_instruction ({error!r}); "
            f"{REMEDY}"
        ) from error
    text = "".join(words).strip().strip('"').strip()  # some files hold a list of letters, some put quotes
    if not text:
        raise ValueError(f"{path} has no language: its language_instruction is empty; {REMEDY}")
    return text
