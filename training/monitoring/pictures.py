"""Pictures of what a model in training predicts, in the run folder and in the tracker."""

import dataclasses
from pathlib import Path

from accelerate import Accelerator

from datasets_scripts.inspection.drawing import save_png
from modeling_foresight import ForesightProcessor
from training.evaluation.figures import draw_episode, to_pixels
from training.windows import ForesightWindows

__all__ = ["draw_predictions"]


def draw_predictions(
    accelerator: Accelerator, model, processor: ForesightProcessor, windows: ForesightWindows, path: Path
) -> None:
    """Draws the first episode of validation `windows` into `path` and the trackers; all processes call it.

    The step is the number in the name of `path`.
    """
    own = dataclasses.replace(
        windows.config, episodes=windows.episodes[:1], lookahead=model.config.has("future"), p_moving=1.0
    )
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        episode = ForesightWindows(windows.rows, own)
        figure, *_ = draw_episode(model, processor, episode, own.views[0], 3, "validation episode")
    model.train(was_training)
    if not accelerator.is_main_process:
        return
    path.parent.mkdir(exist_ok=True)
    save_png(path, figure)
    pixels, step = to_pixels(figure)[None], int(path.stem.rpartition("-")[2])
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":  # Accelerate's has no pictures
            import trackio

            tracker.log({"predictions": trackio.Image(pixels[0])}, step=step)
        elif hasattr(tracker, "log_images"):
            formats = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"predictions": pixels}, step=step, **formats)
