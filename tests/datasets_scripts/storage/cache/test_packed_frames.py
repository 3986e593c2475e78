"""Packed frames are the same frames."""

import io

import numpy as np
import pytest

from datasets_scripts.storage.cache.packed_frames import PackedFrames, write_packed

N, HEIGHT, WIDTH = 5, 7, 6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("planes", [(), (3,)])
def test_every_slice_is_what_was_packed(tmp_path, dtype, planes):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (N, *planes, HEIGHT, WIDTH, np.dtype(dtype).itemsize), dtype=np.uint8)
    frames = bits.view(dtype)[..., 0]
    file = io.BytesIO()
    write_packed(file, [frames[:2], frames[2:]])
    (tmp_path / "frames.zst").write_bytes(file.getvalue())
    packed = PackedFrames(tmp_path / "frames.zst")
    for chosen in (slice(0, N), slice(1, 4), slice(0, N, 2), slice(3, 3)):
        assert packed[chosen].tobytes() == frames[chosen].tobytes()
        assert (packed[chosen].dtype, packed[chosen].shape) == (frames.dtype, frames[chosen].shape)


def test_a_smooth_picture_becomes_much_smaller(tmp_path):
    y, x = np.mgrid[:96, :96]
    file = io.BytesIO()
    write_packed(file, [(1000 + 5 * y + 3 * x).astype(np.uint16)[None]])
    assert len(file.getvalue()) < 96 * 96 * 2 / 20
