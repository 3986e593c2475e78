"""Small videos for people: encoding, and rollouts side by side with their outcome."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import write_whole_file

__all__ = ["rollout_grid", "write_video"]

GREEN, RED, GREY = (40, 160, 70), (200, 50, 45), (90, 90, 90)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes H.264 in a form that browsers and the Hub play; the file appears only when it is whole.

    Args:
        path (`str` or `Path`): `.mp4` file.
        frames (`Iterable[np.ndarray]`): `(H, W, 3)` uint8 RGB, all of one size; odd sizes lose a pixel.
        fps (`float`): Frames per second.

    Raises:
        ValueError: If there is no frame.
        OSError: If the file cannot be written.
    """
    import av

    file, stream = io.BytesIO(), None
    with av.open(file, "w", format="mp4") as container:
        for pixels in frames:
            pixels = pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2]
            if stream is None:
                stream = container.add_stream("libx264", round(fps), options={"crf": "20"})
                stream.pix_fmt = "yuv420p"
                stream.height, stream.width = pixels.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture))
        if stream is None:
            raise ValueError(f"no frames for {path}")
        container.mux(stream.encode(None))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole_file(path) as temporary:
        temporary.write_bytes(file.getvalue())


def rollout_grid(
    clips: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    successes: Sequence[bool],
    hold: int = 10,
) -> Iterable[np.ndarray]:
    """Clips side by side; each stops at its end, in a frame that tells success (green) from failure (red).

    Args:
        clips (`Sequence`): Per rollout its pictures, `(H, W, 3)` uint8 of one size.
        captions (`Sequence[str]`): Short text under each.
        successes (`Sequence[bool]`): Outcome of each.
        hold (`int`): Frames to show the last state.

    Yields:
        `np.ndarray`: `(H', W', 3)` uint8.
    """
    height, width = clips[0][0].shape[:2]
    factor = max(1, math.ceil(160 / width))  # small pictures are enlarged so that captions fit
    columns = math.ceil(math.sqrt(len(clips) * 1.3))
    rows = math.ceil(len(clips) / columns)
    border, text_height = 3, 14
    tile_height, tile_width = height * factor + text_height + 2 * border, width * factor + 2 * border
    labels = {}
    for step in range(max(map(len, clips)) + hold):
        picture = np.zeros((rows * tile_height, columns * tile_width, 3), np.uint8)
        for i, clip in enumerate(clips):
            ended = step >= len(clip) - 1
            colour = (GREEN if successes[i] else RED) if ended else GREY
            text = captions[i] + ((" success" if successes[i] else " failure") if ended else "")
            if (text, colour) not in labels:
                labels[text, colour] = _label(text, colour, text_height, tile_width)
            top, left = i // columns * tile_height, i % columns * tile_width
            tile = picture[top : top + tile_height, left : left + tile_width]
            tile[:] = colour
            shown = clip[min(step, len(clip) - 1)].repeat(factor, 0).repeat(factor, 1)
            tile[border : border + shown.shape[0], border : border + shown.shape[1]] = shown
            tile[-text_height:] = labels[text, colour]
        yield picture


def _label(text: str, colour: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), colour)
    ImageDraw.Draw(image).text((4, 1), text, fill=(255, 255, 255))
    return np.asarray(image)
