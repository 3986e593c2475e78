"""The losses of each dataset of a mixture, for the log."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from modeling_foresight import ForesightConfig
from modeling_foresight.heads import heads_of
from modeling_foresight.inputs import real_frames
from modeling_foresight.losses import LossSum

__all__ = ["DatasetLosses"]


class DatasetLosses:
    """The losses of each dataset of a mixture: masked means over the samples of all processes.

    The last parts of ten steps of an interval count, because the losses are computed again for every dataset.

    Args:
        accelerator (`Accelerator`): Adds up what the processes have seen.
        config (`ForesightConfig`): The model's.
        names (`Sequence[str]`): Of the datasets, in the order of the mixture; a single one has no lines.
        log_every (`int`): Steps of an interval.
    """

    def __init__(
        self, accelerator: Accelerator, config: ForesightConfig, names: Sequence[str], log_every: int
    ):
        self.accelerator, self.config, self.every = accelerator, config, max(1, log_every // 10)
        self.names = list(names) if len(names) > 1 else []
        self.losses = [name for head in heads_of(config) for name in head.losses]
        # Total and count of each loss; a loss that is a mean per view has one of them for each.
        shape = len(self.names), len(self.losses), 2, len(config.views)
        self.sums = torch.zeros(shape, device=accelerator.device)

    @torch.no_grad()
    def add(self, step: int, outputs: Mapping, batch: Mapping, datasets: Tensor) -> None:
        """Adds the losses of a batch, whose samples are of `datasets` `(B,)`, int64 on the CPU."""
        if (step + 1) % self.every:
            return
        for number in range(len(self.names)):
            rows = datasets == number
            if not rows.any():
                continue
            here = rows.to(self.sums.device)[:, None]
            part = {**batch, "frame_mask": real_frames(batch) & here}
            predicted = dict(outputs.items())
            for name in ("style_mean", "style_log_var"):  # of which padded frames count too
                if name in predicted:
                    predicted[name] = predicted[name][here[:, 0]]
            for head in heads_of(self.config):
                for name, loss in head.loss(self.config, predicted, part).items():
                    pair = torch.stack([loss.total.view(-1), loss.count.view(-1)])
                    self.sums[number, self.losses.index(name), :, : pair.shape[1]] += pair

    def pop(self) -> dict[str, float]:
        """The means since the last call, as `loss/dataset`; all processes call it."""
        if not self.names:
            return {}
        sums = self.accelerator.reduce(self.sums, "sum").cpu()
        self.sums = torch.zeros_like(self.sums)
        return {
            f"{loss}/{dataset}": LossSum(*pair).mean().item()
            for dataset, pairs in zip(self.names, sums, strict=True)
            for loss, pair in zip(self.losses, pairs, strict=True)
            if pair[1].any()
        }
