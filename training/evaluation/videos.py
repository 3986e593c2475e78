"""Small videos, and rollouts side by side with their outcome."""

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.videos.writing import encode_rgb

__all__ = ["rollout_grid", "write_video"]

GREEN, RED, GRAY = (40, 160, 70), (200, 50, 45), (90, 90, 90)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes frames `(H, W, 3)` uint8 of one size as an .mp4 that browsers play; odd sizes lose a pixel.

    Raises:
        ValueError: If there is no frame.
        OSError: If the file cannot be written; it appears only when it is whole.
    """
    even = (np.ascontiguousarray(f[: len(f) // 2 * 2, : f.shape[1] // 2 * 2]) for f in frames)
    with write_whole_file(path) as temporary:
        temporary.write_bytes(encode_rgb(even, round(fps), {"crf": "20"}))


def rollout_grid(
    clips: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    failures: Sequence[int | None],
    hold: int = 10,
) -> Iterable[np.ndarray]:
    """Clips side by side as `(H', W', 3)` uint8; failures are marked when they happen, successes at the end.

    A clip is the pictures of one rollout, `(H, W, 3)` uint8 of one size. Each has a caption and, if it
    failed, the number of the picture at which it did: there it stops for `hold` frames, and is red from then
    on. A success ends green. The last state is shown for `hold` more frames.
    """
    height, width = clips[0][0].shape[:2]
    factor = max(1, math.ceil(160 / width))  # small pictures are enlarged so that captions fit
    columns = math.ceil(math.sqrt(len(clips) * 1.3))
    rows = math.ceil(len(clips) / columns)
    border, text_height = 3, 14
    tile_height, tile_width = height * factor + text_height + 2 * border, width * factor + 2 * border
    order = [_order_pictures(len(clip), at, hold) for clip, at in zip(clips, failures, strict=True)]
    for step in range(max(map(len, order)) + hold):
        picture = np.zeros((rows * tile_height, columns * tile_width, 3), np.uint8)
        for i, (clip, failed_at) in enumerate(zip(clips, failures, strict=True)):
            place = min(step, len(order[i]) - 1)
            text, color = captions[i], GRAY
            if failed_at is not None and place >= failed_at:
                text, color = f"failed at step {failed_at}: {text}", RED
            elif failed_at is None and step >= len(clip) - 1:
                text, color = f"success: {text}", GREEN
            top, left = i // columns * tile_height, i % columns * tile_width
            tile = picture[top : top + tile_height, left : left + tile_width]
            tile[:] = color
            shown = clip[order[i][place]].repeat(factor, 0).repeat(factor, 1)
            tile[border : border + shown.shape[0], border : border + shown.shape[1]] = shown
            tile[-text_height:] = _draw_label(text, color, text_height, tile_width)
        yield picture


def _order_pictures(count: int, failed_at: int | None, hold: int) -> list[int]:
    """Which picture of a clip is shown at each frame; the one of a failure `hold` frames longer."""
    order = list(range(count))
    return order if failed_at is None else sorted(order + [failed_at] * hold)


@functools.lru_cache(maxsize=128)
def _draw_label(text: str, color: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), color)
    ImageDraw.Draw(image).text((4, 1), text, fill=(255, 255, 255))
    return np.asarray(image)
