"""One input and what the model made of it, beside the weights: downloaded, they must still give the same.

`sample.safetensors` holds a window (`images.VIEW` uint8 `(T, H, W, 3)`, `state` and `goal_image` where the
model takes them; the instruction is metadata) and outputs for its newest frame (`output.*` float32, as
`ForesightOutput` has them; `output.commands` is the action chunk in the dataset's units). The pictures are
noise from a fixed seed: they come from no dataset, so no licence follows them. publish.py writes it for a
folder that has none.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets_scripts.storage.atomic import write_whole_file
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from training.checkpoint_folder import load_checkpoint, weights_digest

__all__ = ["SAMPLE", "check_sample", "main", "write_sample"]

SAMPLE = "sample.safetensors"
KEY = "foresight"  # of the metadata: one, for safetensors writes several in any order
INSTRUCTION = "open the drawer"
OUTPUTS = ("actions", "depth", "future_rgb", "future_depth", "flow", "progress")
# Of the largest value of an output. Another processor rounds otherwise; other weights differ by far more.
TOLERANCE = 1e-3
AGAIN = "if they are as they should be, write it anew with hub_cards/sample.py"


def write_sample(folder: str | Path) -> None:
    """Writes `sample.safetensors` of a model or an adapter into its folder.

    Args:
        folder (`str` or `Path`): What `train.py` exports. An adapter's base is loaded too.

    Raises:
        ValueError: If the folder does not load; names what is wrong.
    """
    model, processor = load_checkpoint(folder)
    inputs = _draw_window(model, processor)
    tensors = inputs | _outputs(model, processor, inputs, INSTRUCTION)
    facts = {"instruction": INSTRUCTION, "weights_sha256": weights_digest(folder)}
    with write_whole_file(Path(folder) / SAMPLE) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(facts)})


def check_sample(folder: str | Path) -> None:
    """Loads a model or an adapter and compares what it gives for the stored window with what it gave then.

    Args:
        folder (`str` or `Path`): Folder with `sample.safetensors`.

    Raises:
        ValueError: If there is no sample, it belongs to other weights, or an output differs by more than a
            thousandth of its largest value; names it.
    """
    path = Path(folder) / SAMPLE
    if not path.is_file():
        raise ValueError(f"{SAMPLE} is missing: write it with hub_cards/sample.py")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
            facts = json.loads(file.metadata()[KEY])
            instruction, digest = facts["instruction"], facts["weights_sha256"]
    except Exception as error:  # safetensors raises a type of its own; metadata may be None
        raise ValueError(
            f"{SAMPLE} cannot be read ({error}): write it anew with hub_cards/sample.py"
        ) from error
    if digest != weights_digest(folder):
        raise ValueError(f"{SAMPLE} was made with other weights than those beside it: {AGAIN}")
    model, processor = load_checkpoint(folder)
    inputs = {name: value for name, value in stored.items() if not name.startswith("output.")}
    now = _outputs(model, processor, inputs, instruction)
    if now.keys() != stored.keys() - inputs.keys():
        raise ValueError(f"{SAMPLE} has other outputs than the model: {sorted(now)}: {AGAIN}")
    for name, value in now.items():
        before = stored[name]
        allowed = TOLERANCE * before.abs().max().item()
        if value.shape != before.shape or not torch.allclose(value, before, rtol=0, atol=allowed):
            raise ValueError(
                f"the model does not give the outputs of {SAMPLE}: {name.removeprefix('output.')} differs, "
                "though the weights are the same: is the processor or the configuration another? Otherwise, "
                f"{AGAIN}"
            )


def _draw_window(model: ForesightForActionPrediction, processor: ForesightProcessor) -> dict[str, Tensor]:
    config, draw = model.config, torch.Generator().manual_seed(0)
    picture = (config.image_size, config.image_size, 3)

    def pictures(*frames: int) -> Tensor:
        return torch.randint(0, 256, (*frames, *picture), dtype=torch.uint8, generator=draw)

    window = {f"images.{view}": pictures(config.history_length) for view in config.views}
    if config.goal_image:
        window["goal_image"] = pictures()
    if config.state_dim:
        stats, shape = processor.state_stats or {}, (config.history_length, config.state_dim)
        mean, std, low = (
            torch.tensor(stats.get(key, default)).float().expand(shape).clone()
            for key, default in (("mean", 0.0), ("std", 0.1), ("min", 0.0))
        )
        state = mean + std * torch.randn(shape, generator=draw)
        binary = list(processor.binary_state_indices)
        state[:, binary] = low[:, binary]  # one of the two values that it may have
        window["state"] = state
    return window


@torch.no_grad()
def _outputs(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    window: dict[str, Tensor],
    instruction: str,
) -> dict[str, Tensor]:
    state = window.get("state")
    inputs = processor(
        images={
            name.removeprefix("images."): value
            for name, value in window.items()
            if name.startswith("images.")
        },
        text=instruction,
        state=state,
        goal_image=window.get("goal_image"),
    )
    predicted = model(**inputs)
    outputs = {name: predicted[name][0, -1] for name in OUTPUTS if predicted.get(name) is not None}
    if "actions" in outputs:
        newest = None if state is None else state[-1:]
        outputs["commands"] = processor.decode_actions(model.predict_action(**inputs), newest)[0]
    return {f"output.{name}": value.float().contiguous() for name, value in outputs.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python hub_cards/sample.py outputs/quickstart/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="model or adapter")
    args = parser.parse_args(arguments)
    try:
        write_sample(args.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.folder / SAMPLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
