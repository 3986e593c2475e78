"""Pictures of what a model in training predicts, in the run folder and in the tracker."""

import dataclasses
import itertools
from pathlib import Path

from accelerate import Accelerator

from datasets_scripts.inspection.drawing import import_matplotlib, save_png
from modeling_foresight import ForesightProcessor
from training.config import RunConfig
from training.evaluation.figures import draw_episode, to_pixels
from training.windows import ConcatWindows, ForesightWindows

__all__ = ["check_pictures", "draw_predictions"]


def check_pictures(config: RunConfig) -> None:
    """Refuses pictures that cannot be drawn here.

    Raises:
        ValueError: If matplotlib is missing; says what to install.
    """
    try:
        if config.train.picture_every:
            import_matplotlib()
    except RuntimeError as error:
        raise ValueError(f"train.picture_every: {error}, or set it to 0") from None


def draw_predictions(
    accelerator: Accelerator, model, processor: ForesightProcessor, validation: ConcatWindows, path: Path
) -> None:
    """Draws a validation episode into `path` and the trackers; all processes call it.

    It is the first one of the first dataset that has the first view, to which flow belongs, or otherwise
    another view. The step is the number in the name of `path`.
    """
    pairs = itertools.product(validation.config.views, validation.datasets)
    view, windows = next((view, windows) for view, windows in pairs if view in windows.cameras)
    own = dataclasses.replace(
        windows.config, episodes=windows.episodes[:1], lookahead=model.config.has("future"), p_moving=1.0
    )
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        episode = ForesightWindows(windows.rows, own)
        figure, *_ = draw_episode(model, processor, episode, view, 3, "validation episode")
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
