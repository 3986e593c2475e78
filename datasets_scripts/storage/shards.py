"""One finished episode on disk, until all are there: a folder that appears only when it is whole.

A shard holds one mp4 per video column, `arrays.npz` with the other columns by name, and `facts.json`;
`assemble.py` joins shards into a LeRobot dataset.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets_scripts.storage.video_writing import encode_depth, encode_rgb, video_stats

__all__ = ["ARRAYS", "read_facts", "write_shard"]

ARRAYS, FACTS = "arrays.npz", "facts.json"


def write_shard(
    shard: Path,
    videos: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    facts: Mapping,
    fps: int,
    depth_max_m: Mapping[str, float],
) -> dict:
    """Encode an episode and write it.

    Args:
        shard (`Path`): Folder to create.
        videos (`Mapping[str, np.ndarray]`): By column `(F, H, W, 3)` uint8 RGB, or `(F, H, W)` float32
            metres.
        arrays (`Mapping[str, np.ndarray]`): Other columns by name, `(F, size)`; more is kept as it is.
        facts (`Mapping`): What is known of the episode, as JSON: `instruction`, and what the caller wants.
        fps (`int`): Frames per second.
        depth_max_m (`Mapping[str, float]`): Farthest depth kept, by depth column.

    Returns:
        `dict`: The facts, with `n_frames`, `stats` of the videos and sizes of the files.

    Raises:
        OSError: If the disk is full or not writable; nothing is left under the shard's name.
    """
    shard.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="tmp-", dir=shard.parent))
    try:
        stats = {}
        for key, frames in videos.items():
            if frames.dtype == np.uint8:
                encoded = encode_rgb(frames, fps)
            else:
                encoded = encode_depth(frames, fps, depth_max_m[key])
            (unfinished / f"{key}.mp4").write_bytes(encoded)
            stats[key] = video_stats(frames)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        (unfinished / ARRAYS).write_bytes(buffer.getvalue())
        sizes = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        n_frames = len(next(iter(videos.values())))
        facts = {**facts, "n_frames": n_frames, "stats": stats, "bytes": sizes}
        (unfinished / FACTS).write_text(json.dumps(facts))
        os.replace(unfinished, shard)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def read_facts(shard: Path) -> dict | None:
    """Facts of a shard, or `None` if a file is missing or has not the size it was written with."""
    try:
        facts = json.loads((shard / FACTS).read_text())
        whole = all((shard / name).stat().st_size == size for name, size in facts["bytes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None
