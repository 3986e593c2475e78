"""Initial values that depend on data: image tokens of a fresh model tell images apart from the first step."""

from collections.abc import Sequence

import torch

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from training.run_data import RunData
from training.windows import WindowSampler, collate_windows

__all__ = ["standardise_tokens"]


@torch.no_grad()
def standardise_tokens(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    data: RunData,
    mixture: str | Sequence[float] = "natural",
    windows: int = 256,
) -> None:
    """Scales and shifts each view's projections: their outputs have mean 0 and deviation 1 over images.

    In a scene that hardly changes, what all images share is four to fifty times as large as what differs,
    and the LayerNorm after the projections keeps it so: a tower that starts fresh then needs hundreds to
    thousands of steps until actions depend on what it sees. LSUV (Mishkin & Matas 2016) is the same idea for
    every layer.

    Args:
        model (`ForesightForActionPrediction`): Changed in place.
        processor (`ForesightProcessor`): Its processor.
        data (`RunData`): Where the images come from.
        mixture (`str` or `Sequence[float]`): Shares of the datasets, as in training; see
            [`WindowSampler`].
        windows (`int`): How many windows to look at, or all if there are fewer; the same in every process.
    """
    count = min(windows, len(data.train))
    chosen = next(iter(WindowSampler(data.train.sizes, count, mixture=mixture, steps=1)))
    raw = collate_windows([data.train[i] for i in sorted(chosen)])
    batch = processor.prepare_batch(raw, history_length=model.config.history_length)
    policy = model.model
    cls, patches = policy.encode_images(batch["pixel_values"])
    latents = policy._resample(patches)
    for view, projection in enumerate(policy.embed_views):
        shown = batch["view_mask"][..., view]
        present = batch["frame_mask"] & (shown if shown.ndim == 2 else shown[:, None])
        if not present.any():
            continue
        for linear, features in ((projection.latents, latents), (projection.cls, cls)):
            tokens = linear(features[:, :, view][present]).flatten(0, -2)
            std, mean = torch.std_mean(tokens, dim=0)
            std = std.clamp_min(1e-3 * tokens.square().mean().sqrt())
            linear.weight /= std[:, None]
            linear.bias.copy_((linear.bias - mean) / std)
