"""A sample beside the weights: one input window and the model's outputs, which must stay the same.

`sample.safetensors` holds a window (`images.VIEW` uint8 `(T, H, W, 3)`, `state` and `goal_image` where the
model takes them; the instruction is in the metadata) and outputs for its newest frame (`output.*` float32, as
in `ForesightOutput`; `output.commands` is the action chunk in the dataset's units). The images are noise from
a fixed seed, so no dataset's license applies.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets_scripts.storage.atomic import write_whole_file
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from training.models.model_folder import load_checkpoint, weights_digest

__all__ = ["SAMPLE_FILE", "check_sample", "write_sample"]

SAMPLE_FILE = "sample.safetensors"
METADATA_KEY = "foresight"  # a single one, because safetensors writes several in any order
INSTRUCTION = "open the drawer"
OUTPUTS = ("actions", "depth", "future_rgb", "future_depth", "flow", "progress")
# Relative to an output's largest value. Another CPU rounds differently; other weights differ by far more.
TOLERANCE = 1e-3
UNITS_DIFFER = ("output.commands", "output.flow")  # along the last axis: each entry has its own largest value
WRITE = "write it again with hub_cards/build.py FOLDER --sample"


def write_sample(folder: str | Path) -> None:
    """Write `sample.safetensors` into the folder of a model or an adapter, whose base is loaded too.

    Raises:
        ValueError: If the folder does not load; names what is wrong.
    """
    model, processor = _load_for_robot(folder)
    window = _draw_window(model, processor)
    tensors = window | _predict_outputs(model, processor, window, INSTRUCTION)
    metadata = {"instruction": INSTRUCTION, "weights_sha256": weights_digest(folder)}
    with write_whole_file(Path(folder) / SAMPLE_FILE) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(metadata)})


def check_sample(folder: str | Path) -> None:
    """Load a model or an adapter and compare its outputs for the stored window with the stored outputs.

    Raises:
        ValueError: If there is no sample, it belongs to other weights, or an output differs by more than a
            thousandth of its largest value, of commands and flow that of the entry; names it.
    """
    path = Path(folder) / SAMPLE_FILE
    if not path.is_file():
        raise ValueError(f"{SAMPLE_FILE} is missing: {WRITE}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            metadata = json.loads(file.metadata()[METADATA_KEY])
            instruction, digest = metadata["instruction"], metadata["weights_sha256"]
    except Exception as error:  # safetensors raises its own type; metadata may be None
        raise ValueError(f"{SAMPLE_FILE} cannot be read ({error}): {WRITE}") from error
    if digest != weights_digest(folder):
        raise ValueError(f"{SAMPLE_FILE} was made with other weights: if those here are right, {WRITE}")
    model, processor = _load_for_robot(folder)
    window = {name: value for name, value in stored.items() if not name.startswith("output.")}
    outputs = _predict_outputs(model, processor, window, instruction)
    if outputs.keys() != stored.keys() - window.keys():
        raise ValueError(
            f"{SAMPLE_FILE} has other outputs than the model ({', '.join(sorted(outputs))}): {WRITE}"
        )
    for name, value in outputs.items():
        before = stored[name]
        if value.shape != before.shape or not _is_close(value, before, name in UNITS_DIFFER):
            raise ValueError(
                f"the model does not give the outputs of {SAMPLE_FILE}: {name.removeprefix('output.')} "
                "differs, though the weights are the same: was the processor or the configuration changed? "
                f"If not, {WRITE}"
            )


def _is_close(value: Tensor, before: Tensor, by_entry: bool) -> bool:
    sizes = before.abs()
    largest = sizes.flatten(0, -2).amax(0) if by_entry else sizes.max()
    return bool(((value - before).abs() <= TOLERANCE * largest).all())  # false for NaN


def _load_for_robot(folder: str | Path) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """Model and processor; of several robots, for the first by name."""
    model, processor = load_checkpoint(folder)
    return model, processor.for_embodiment(min(processor.embodiments or (), default=None))


def _draw_window(model: ForesightForActionPrediction, processor: ForesightProcessor) -> dict[str, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)

    def draw_images(*frames: int) -> Tensor:
        shape = (*frames, config.image_size, config.image_size, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    window = {f"images.{view}": draw_images(config.history_length) for view in config.views}
    if config.goal_image:
        window["goal_image"] = draw_images()
    if state_dim := config.for_robot(processor.embodiment).state_dim:
        stats, shape = processor.own_statistics("state") or {}, (config.history_length, state_dim)
        mean, std, low = (
            torch.tensor(stats.get(key, default)).float().expand(shape).clone()
            for key, default in (("mean", 0.0), ("std", 0.1), ("min", 0.0))
        )
        state = mean + std * torch.randn(shape, generator=generator)
        binary = processor.own_binary_entries("state")
        state[:, binary] = low[:, binary]  # one of the two values that it may have
        window["state"] = state
    return window


@torch.no_grad()
def _predict_outputs(
    model: ForesightForActionPrediction, processor: ForesightProcessor, window: dict[str, Tensor], text: str
) -> dict[str, Tensor]:
    state, views = window.get("state"), model.config.views
    images = {view: window[f"images.{view}"] for view in views}
    inputs = processor(images, text, state, goal_image=window.get("goal_image"))
    predicted = model(**inputs)
    outputs = {name: predicted[name][0, -1] for name in OUTPUTS if predicted.get(name) is not None}
    if "actions" in outputs:
        newest = None if state is None else state[-1:]
        outputs["commands"] = processor.decode_actions(model.predict_action(**inputs), newest)[0]
    return {f"output.{name}": value.float().contiguous() for name, value in outputs.items()}
