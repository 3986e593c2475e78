"""The frame cache holds what fits, and grows."""

import numpy as np
import pytest

from datasets_scripts.storage.cache import frame_files
from datasets_scripts.storage.cache.frame_files import FrameFiles

LENGTHS = np.array([3, 1, 4, 2, 5])
STOPS = np.cumsum(LENGTHS)
BOUNDS = STOPS - LENGTHS, STOPS
FRAME_BYTES, STATE = 2 * 3, "0123456789abcdef"


def open_files(folder, decoded: list) -> FrameFiles:
    def decode(rows: range) -> np.ndarray:
        decoded.append(rows)
        return np.stack([np.full((2, 3), row, np.uint8) for row in rows])

    return FrameFiles(folder, "main", STATE, BOUNDS, decode)


def check(files: FrameFiles) -> None:
    for episode, (start, stop) in enumerate(zip(*BOUNDS, strict=True)):
        if files.holds(episode):
            frames = files.read(episode, range(start, stop))
            assert (frames[:, 0, 0] == np.arange(start, stop)).all() and frames.shape[1:] == (2, 3)
            assert len(files.read(episode, range(start, stop, 2))) == -(-(stop - start) // 2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("file_bytes", [1, 6 * FRAME_BYTES, 10**9])
def test_a_cache_of_some_episodes_grows_without_decoding_them_again(
    tmp_path, monkeypatch, file_bytes, packed
):
    monkeypatch.setattr(frame_files, "FILE_BYTES", file_bytes)
    decoded = []
    files = open_files(tmp_path, decoded)
    assert files.n_episodes == 0
    files.fill(2, FRAME_BYTES, packed)
    assert files.n_episodes == 2 and sum(map(files.holds, range(5))) == 2
    check(files)
    files.fill(5, FRAME_BYTES, packed)
    check(files)
    assert sorted(row for rows in decoded for row in rows) == list(range(STOPS[-1]))
    again = open_files(tmp_path, decoded)
    assert again.n_episodes == 5 and again.nbytes > STOPS[-1] and again.packed == packed
    check(again)


def test_a_cache_of_an_earlier_release_is_one_file_of_all_rows(tmp_path):
    np.save(
        tmp_path / f"main-{STATE}.npy", np.arange(STOPS[-1], dtype=np.uint8)[:, None, None] + np.zeros((2, 3))
    )
    files = open_files(tmp_path, [])
    assert files.n_episodes == 5
    check(files)


def test_files_of_another_state_are_deleted_when_one_is_written(tmp_path):
    others = [tmp_path / f"main-{'f' * 16}{part}.npy" for part in ("", ".0-2")]
    kept = [tmp_path / f"main_depth-{'f' * 16}.npy", tmp_path / "notes.npy"]
    for path in (*others, *kept):
        path.touch()
    open_files(tmp_path, []).fill(5, FRAME_BYTES)
    assert not any(path.exists() for path in others) and all(path.exists() for path in kept)
