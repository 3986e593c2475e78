"""Random shift: the one geometric augmentation, applied alike to pictures, depth and tracks.

As in GR-MG (and DrQ-v2 before it): pad `p` pixels on every side by repeating the edge, then crop back to the
old size at an integer offset `(s_x, s_y)` drawn uniformly from `{0..2p}^2`. One draw serves all frames of a
view in a window, the goal image included; every view has a draw of its own. It happens at the camera's own
resolution, before any resize, so that depth is never interpolated across an edge.

Everything here is a plain function of numpy arrays; randomness comes in as a generator.
"""

import numpy as np

__all__ = ["draw_shift", "shift_fraction", "shift_frames", "shift_px"]


def shift_px(fraction: float, height: int, width: int) -> tuple[int, int]:
    """Padding `p` in pixels along x and y for a picture: `p = round(fraction * side)`.

    With `fraction=0.05` this gives GR-MG's 10 px at 200 and 4 px at 84.

    Args:
        fraction (`float`): Largest shift as a fraction of the side; 0 turns the augmentation off.
        height (`int`): Picture height in pixels.
        width (`int`): Picture width in pixels.

    Returns:
        `tuple[int, int]`: `(p_x, p_y)` in pixels.
    """
    return round(fraction * width), round(fraction * height)


def draw_shift(rng: np.random.Generator, padding_px: tuple[int, int]) -> tuple[int, int]:
    """Draw one displacement `d = s - p`, with `s` uniform over the integers `0..2p` of each axis.

    Args:
        rng (`numpy.random.Generator`): Source of randomness; always advanced by two draws, so that a padding
            of zero does not change what is drawn afterwards.
        padding_px (`tuple[int, int]`): `(p_x, p_y)` from `shift_px`.

    Returns:
        `tuple[int, int]`: `(d_x, d_y)` in pixels, each within `-p..p`.
    """
    p_x, p_y = padding_px
    s_x, s_y = rng.integers(0, (2 * p_x + 1, 2 * p_y + 1))
    return int(s_x) - p_x, int(s_y) - p_y


def shift_frames(frames: np.ndarray, d_x: int, d_y: int, out: np.ndarray | None = None) -> np.ndarray:
    """Move pictures: `out[..., j, i] = frames[..., clip(j + d_y), clip(i + d_x)]`.

    This equals padding by edge replication and cropping at `s = d + p`: output pixel `(i, j)` reads input
    pixel `(i + s_x - p, j + s_y - p)`.

    Args:
        frames (`numpy.ndarray`): `(..., H, W)` of any dtype: uint8 RGB, or float32 depth in metres.
        d_x (`int`): Displacement `s_x - p_x` in pixels; content moves left when positive.
        d_y (`int`): Displacement `s_y - p_y` in pixels; content moves up when positive.
        out (`numpy.ndarray`, *optional*): Array of the same shape and dtype to write into; not `frames`.

    Returns:
        `numpy.ndarray`: The moved copy, the same shape and dtype.

    Raises:
        ValueError: If a displacement is as large as the picture.
    """
    height, width = frames.shape[-2:]
    if abs(d_x) >= width or abs(d_y) >= height:
        raise ValueError(
            f"A shift of ({d_x}, {d_y}) px leaves nothing of a picture of {width} x {height} px."
        )
    out = np.empty(frames.shape, frames.dtype) if out is None else out
    # Block copy of what stays inside, then the borders: much faster than gathering by index arrays.
    left, right = max(0, -d_x), width - max(0, d_x)
    top, bottom = max(0, -d_y), height - max(0, d_y)
    out[..., top:bottom, left:right] = frames[..., top + d_y : bottom + d_y, left + d_x : right + d_x]
    if left:
        out[..., top:bottom, :left] = out[..., top:bottom, left : left + 1]
    if right < width:
        out[..., top:bottom, right:] = out[..., top:bottom, right - 1 : right]
    if top:
        out[..., :top, :] = out[..., top : top + 1, :]
    if bottom < height:
        out[..., bottom:, :] = out[..., bottom - 1 : bottom, :]
    return out


def shift_fraction(d_x: int, d_y: int, height: int, width: int) -> tuple[float, float]:
    """What a displacement takes from a point's x and y: `x_px <- x_px - s_x + p`, as fractions `x - d_x / W`.

    Args:
        d_x (`int`): Displacement `s_x - p_x` in pixels.
        d_y (`int`): Displacement `s_y - p_y` in pixels.
        height (`int`): Picture height in pixels.
        width (`int`): Picture width in pixels.

    Returns:
        `tuple[float, float]`: Fractions of the width and of the height.
    """
    return d_x / width, d_y / height
