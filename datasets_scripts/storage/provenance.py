"""Read and write the provenance: how depth and tracks were made, and facts of each episode.

`meta/foresight.json` holds what all episodes share, `meta/foresight_episodes.jsonl` one line per episode:
`{"episode": 3, "task": ..., "main": {...}}`. Lines are parsed when they are asked for, so a million episodes
take 8 MB in memory. Version 1 had them in the first file; it is still read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.columns import find_depth_key, find_image_key, picture_size
from datasets_scripts.storage.atomic import read_json, write_json, write_whole_file

PROVENANCE_PATH = Path("meta/foresight.json")
EPISODE_FACTS_PATH = Path("meta/foresight_episodes.jsonl")
PROVENANCE_VERSION = 2
ANNOTATE_AGAIN = "annotate the dataset again, or delete the file"
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


def find_intrinsics(
    provenance: Mapping[str, Any], features: Mapping[str, Mapping[str, Any]], camera: str
) -> dict[str, float] | None:
    """The lens of a camera: fx, fy, cx, cy in pixels from the image's outer edge, height, width.

    Ours is in `meta/foresight.json`. LeRobot's is `intrinsics` in the `info` of the camera's image feature,
    or of its depth, as its cameras give it: fx, fy, and cx, cy (or RealSense's ppx, ppy), or a matrix
    `(3, 3)`, counted from the center of the first pixel, which is half a pixel from the edge. It is not
    settled there yet (huggingface/lerobot #4417, #4696).

    Returns:
        `dict`, *optional*: `None` if nothing is recorded.

    Raises:
        ValueError: If what LeRobot's key holds is in neither form; names the feature.
    """
    if (ours := provenance.get("cameras", {}).get(camera, {}).get("intrinsics")) is not None:
        return ours
    for key in (find_image_key(features, camera), find_depth_key(features, camera)):
        found = ((features[key].get("info") if key else None) or {}).get("intrinsics")
        if found is None:
            continue
        height, width = picture_size(features[key])
        try:
            if not isinstance(found, Mapping):
                (fx, _, cx), (_, fy, cy), _ = np.asarray(found, float).reshape(3, 3).tolist()
                found = {"fx": fx, "fy": fy, "cx": cx, "cy": cy}
            center = found.get("cx", found.get("ppx")), found.get("cy", found.get("ppy"))
            lens = {"fx": found["fx"], "fy": found["fy"], "cx": center[0] + 0.5, "cy": center[1] + 0.5}
            size = {"height": found.get("height", height), "width": found.get("width", width)}
            return {name: float(value) for name, value in lens.items()} | size
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"intrinsics in the info of {key} are {found}: expected fx, fy, cx, cy, or a 3 x 3 matrix"
            ) from error
    return None
