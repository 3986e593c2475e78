"""Read and write `meta/foresight.json`: how depth and tracks were made, and facts of each episode."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.storage.atomic import read_json, write_json

PROVENANCE_PATH = Path("meta/foresight.json")
PROVENANCE_VERSION = 1
# Of the packages that a recording names; LIBERO names robosuite too.
SIMULATORS = {"metaworld": "MetaWorld", "hf-libero": "LIBERO", "robosuite": "robosuite"}


def read_provenance(root: str | Path) -> dict:
    """Contents of `meta/foresight.json`; empty without it (LeRobot's tools do not copy it).

    Raises:
        ValueError: If the file is damaged or of a newer version.
    """
    path = Path(root) / PROVENANCE_PATH
    if not path.exists():
        return {}
    provenance = read_json(path, "annotate the dataset again, or delete the file")
    if provenance.get("version", 0) > PROVENANCE_VERSION:
        raise ValueError(
            f"{path} has version {provenance['version']}, this code knows {PROVENANCE_VERSION}; "
            "update lerobot_policy_foresight"
        )
    return provenance


def write_provenance(root: str | Path, provenance: Mapping[str, Any]) -> None:
    """Write `meta/foresight.json` in one step, with the version of its layout."""
    write_json(Path(root) / PROVENANCE_PATH, {"version": PROVENANCE_VERSION, **provenance})


def scripted_in(provenance: Mapping[str, Any]) -> str | None:
    """The simulator in which scripted experts recorded a dataset; `None` for data of other origin."""
    packages = provenance.get("simulation", {}).get("versions", {})
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
