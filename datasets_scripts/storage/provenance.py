"""Read and write the provenance: how depth and tracks were made, and facts of each episode.

`meta/foresight.json` holds what all episodes share, `meta/foresight_episodes.jsonl` one line per episode:
`{"episode": 3, "task": ..., "main": {...}}`. Lines are parsed when they are asked for, so a million episodes
take 8 MB in memory. Version 1 had them in the first file; it is still read.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.columns import (
    depth_key,
    find_depth_key,
    find_image_key,
    list_cameras,
    picture_size,
    points_key,
)
from datasets_scripts.storage.atomic import read_json, write_json, write_whole_file

PROVENANCE_PATH = Path("meta/foresight.json")
EPISODE_FACTS_PATH = Path("meta/foresight_episodes.jsonl")
PROVENANCE_VERSION = 2
ANNOTATE_AGAIN = "annotate the dataset again, or delete the file"
LENS_FORMS = (
    "fx, fy and cx, cy (or ppx, ppy), or a matrix (3, 3) by itself or as K or camera_matrix, with "
    "height and width if those are not the image's"
)
# Of the packages that a recording names; LIBERO names robosuite too.
SIMULATORS = {"metaworld": "MetaWorld", "hf-libero": "LIBERO", "robosuite": "robosuite"}


class EpisodeFacts(Mapping[str, dict]):
    """Facts by episode number (as text), read from the lines of a file; a changed result is not kept.

    The file stays open, so that one which takes its place, as `inspect_dataset.py --write-flags` writes it,
    disturbs nobody. A copy in another process opens it again.

    Args:
        path (`Path`): The file.

    Raises:
        ValueError: If a line is damaged; names it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        numbers, offsets = [], [0]
        for line in self._file:
            found = re.match(rb'{"episode": (\d+)', line)
            numbers.append(int(found[1]) if found else self._parse(line, len(numbers))["episode"])
            offsets.append(offsets[-1] + len(line))
        order = np.argsort(numbers, kind="stable")
        self._numbers, self._lines = np.asarray(numbers, np.int64)[order], order
        self._offsets = np.asarray(offsets)

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            facts = json.loads(line)
            if isinstance(facts, dict) and isinstance(facts.get("episode"), int):
                return facts
            raise ValueError("it has no episode")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is damaged in line {number + 1} ({error}): {ANNOTATE_AGAIN}"
            ) from None

    def __getitem__(self, episode: str) -> dict:
        number = int(episode)
        slot = int(np.searchsorted(self._numbers, number))
        if slot == len(self._numbers) or self._numbers[slot] != number:
            raise KeyError(episode)
        line = int(self._lines[slot])
        start, stop = self._offsets[line : line + 2].tolist()
        # At once: after a fork, processes share a position in the file.
        facts = self._parse(os.pread(self._file.fileno(), stop - start, start), line)
        return {name: value for name, value in facts.items() if name != "episode"}

    def __iter__(self) -> Iterator[str]:
        return map(str, self._numbers.tolist())

    def __len__(self) -> int:
        return len(self._numbers)

    def __reduce__(self) -> tuple:
        return EpisodeFacts, (self.path,)


def read_provenance(root: str | Path) -> dict:
    """Contents of the provenance, `episodes` by number; empty without it (LeRobot's tools do not copy it).

    Raises:
        ValueError: If a file is damaged, missing or of a newer version.
    """
    path, listed = Path(root) / PROVENANCE_PATH, Path(root) / EPISODE_FACTS_PATH
    if not path.exists():
        return {}
    provenance = read_json(path, ANNOTATE_AGAIN)
    if provenance.get("version", 0) > PROVENANCE_VERSION:
        raise ValueError(
            f"{path} has version {provenance['version']}, this code knows {PROVENANCE_VERSION}; "
            "update lerobot_policy_foresight"
        )
    if isinstance(count := provenance.get("episodes"), int):
        provenance["episodes"] = known = EpisodeFacts(listed) if listed.exists() else {}
        if len(known) != count:
            raise ValueError(
                f"{path} promises facts of {count} episodes, {listed} has {len(known)}: copy both files "
                "again, or annotate the dataset again"
            )
    return provenance


def write_provenance(root: str | Path, provenance: Mapping[str, Any]) -> None:
    """Write the provenance with the version of its layout, each file in one step."""
    content = {"version": PROVENANCE_VERSION, **provenance} | {"version": PROVENANCE_VERSION}
    if "episodes" in content:
        with write_whole_file(Path(root) / EPISODE_FACTS_PATH) as temporary, temporary.open("w") as file:
            for episode, facts in content["episodes"].items():
                line = json.dumps({"episode": int(episode), **facts}, ensure_ascii=False)
                file.write(line + "\n")
        content["episodes"] = len(content["episodes"])
    write_json(Path(root) / PROVENANCE_PATH, content)


def scripted_in(provenance: Mapping[str, Any]) -> str | None:
    """The simulator in which scripted experts recorded a dataset; `None` for data of other origin."""
    simulation = provenance.get("simulation", {})
    packages = {} if "policy" in simulation else simulation.get("versions", {})
    return next((name for package, name in SIMULATORS.items() if package in packages), None)


def encode_flags(flags: np.ndarray) -> str:
    """Boolean flags `(n,)` as the hexadecimal text kept in the provenance."""
    return np.packbits(np.asarray(flags, dtype=bool)).tobytes().hex()


def moving_flags(provenance: Mapping[str, Any], episode_index: int, camera: str, n_points: int) -> np.ndarray:
    """Which tracked points of an episode move: `(n_points,)` bool, all false when nothing is recorded."""
    facts = provenance.get("episodes", {}).get(str(episode_index), {}).get(camera, {})
    # Without any byte, NumPy would return uninitialized memory.
    packed = np.frombuffer(bytes.fromhex(facts.get("moving", "00")), dtype=np.uint8)
    return np.unpackbits(packed, count=n_points).astype(bool)


def flagged_episodes(
    provenance: Mapping[str, Any], cameras: Sequence[str] | None = None
) -> dict[int, list[str]]:
    """Flags (`<camera>/<word>`, see `quality.py`) of the episodes with doubtful labels, by episode.

    Args:
        provenance (`Mapping`): What `read_provenance` gave.
        cameras (`Sequence[str]`, *optional*): Only the flags of these cameras.
    """
    found = {}
    for episode, facts in provenance.get("episodes", {}).items():
        flags = facts.get("flags", [])
        flags = [flag for flag in flags if cameras is None or flag.rpartition("/")[0] in cameras]
        if flags:
            found[int(episode)] = flags
    return found


def is_made_depth(provenance: Mapping[str, Any], camera: str) -> bool:
    """Whether our scripts made a camera's depth: in meters, and at its far limit wherever it sees farther."""
    source = provenance.get("cameras", {}).get(camera, {}).get("depth", {}).get("source")
    return source not in (None, "sensor")


def find_unrecorded(provenance: Mapping[str, Any], features: Mapping[str, Mapping]) -> list[str]:
    """Columns of our labels whose source is not recorded, as after LeRobot's own tools, which drop it.

    Depth under another name is a sensor's, as far as anybody knows.
    """
    found = []
    for camera in list_cameras(features):
        facts = provenance.get("cameras", {}).get(camera, {})
        for kind, key in (("depth", depth_key(camera)), ("tracks", points_key(camera))):
            if key in features and not facts.get(kind, {}).get("source"):
                found.append(key)
    return found


def find_intrinsics(
    provenance: Mapping[str, Any], features: Mapping[str, Mapping[str, Any]], camera: str
) -> dict[str, float] | None:
    """The lens of a camera: fx, fy, cx, cy in pixels from the image's outer edge, height, width.

    Ours is in `meta/foresight.json`. LeRobot's is `intrinsics` in the `info` of the camera's image feature,
    or of its depth, counted from the center of the first pixel, which is half a pixel from the edge. Its form
    is not settled there yet (huggingface/lerobot #4417, #4696); `LENS_FORMS` are those that we read. Another
    form is left out with a warning: nothing depends on the lens, and its owner cannot always change it.

    Returns:
        `dict`, *optional*: `None` if nothing is recorded that we can read.
    """
    ours = provenance.get("cameras", {}).get(camera, {}).get("intrinsics")
    places = [(f"of camera '{camera}' in {PROVENANCE_PATH}", ours, find_image_key(features, camera), 0.0)]
    for key in filter(None, (find_image_key(features, camera), find_depth_key(features, camera))):
        stated = (features[key].get("info") or {}).get("intrinsics")
        places.append((f"in the info of {key}", stated, key, 0.5))
    for place, stated, key, edge_px in places:
        if stated is None:
            continue
        try:
            return _read_lens(stated, picture_size(features[key]), edge_px)
        except (AttributeError, KeyError, TypeError, ValueError):
            warnings.warn(
                f"the intrinsics {place} are not used, as they are {str(stated)[:200]}: known are "
                f"{LENS_FORMS}; fx and fy must be above 0",
                stacklevel=1,  # from whichever place it is asked for first, and then no more
            )
    return None


def _read_lens(stated: Any, size: tuple[int, int], edge_px: float) -> dict[str, float]:
    """A lens in one of the `LENS_FORMS`; raises if it is in none of them."""
    if not isinstance(stated, Mapping):
        stated = {"K": stated}
    matrix = stated.get("K", stated.get("camera_matrix"))
    if matrix is not None:
        (fx, _, cx), (_, fy, cy), last = np.asarray(matrix, float).reshape(3, 3).tolist()
        if last != [0, 0, 1]:
            raise ValueError("transposed, or of another scale")
    else:
        fx, fy = stated["fx"], stated["fy"]
        cx, cy = stated.get("cx", stated.get("ppx")), stated.get("cy", stated.get("ppy"))
    lens = {"fx": float(fx), "fy": float(fy), "cx": float(cx) + edge_px, "cy": float(cy) + edge_px}
    sides = {"height": stated.get("height", size[0]), "width": stated.get("width", size[1])}
    lens |= sides
    if not np.isfinite(list(lens.values())).all() or min(lens["fx"], lens["fy"], *sides.values()) <= 0:
        raise ValueError("not the numbers of a lens")
    return lens
