"""Masked running means of losses and errors, over batches and processes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from modeling_foresight import ForesightConfig
from modeling_foresight.heads import heads_of
from modeling_foresight.losses import LossSum

__all__ = ["Means"]


class Mean:
    """A weighted running mean; the last `kept_axes` axes are kept, all others are averaged over."""

    def __init__(self, kept_axes: int = 0):
        self.kept_axes, self.sum, self.weight = kept_axes, 0.0, 0.0

    def add(self, values: Tensor, weight: Tensor) -> None:
        """Adds `values`; `weight` (or mask) broadcasts to them. Values without weight may be anything."""
        weight = weight.to(values.dtype).expand_as(values)
        values = torch.where(weight > 0, values, torch.zeros_like(values))
        axes = tuple(range(values.ndim - self.kept_axes))
        self.add_sums((values * weight).sum(axes, dtype=torch.float64), weight.sum(axes, dtype=torch.float64))

    def add_sums(self, total: Tensor, weight: Tensor) -> None:
        """Adds weighted values that are summed up already."""
        self.sum = self.sum + total.double().cpu()
        self.weight = self.weight + weight.double().cpu()

    def __bool__(self) -> bool:
        return bool(torch.as_tensor(self.weight).sum() > 0)

    def value(self) -> Tensor:
        """The mean; where an element was never seen, the mean over all elements."""
        total = self.sum.sum() / self.weight.sum().clamp(min=1e-12)
        seen = self.weight > 0
        return torch.where(seen, self.sum / self.weight.clamp(min=1e-12), total)


class Means(dict[Any, Mean]):
    """Running means by name."""

    def add(self, name, values: Tensor, weight: Tensor, kept_axes: int = 0) -> None:
        """Adds values with their weights to one of them."""
        self.setdefault(name, Mean(kept_axes)).add(values, weight)

    def add_losses(self, config: ForesightConfig, output: Mapping, batch: Mapping) -> None:
        """Adds what a batch contributes to each loss."""
        for head in heads_of(config):
            for name, loss in head.loss(config, output, batch).items():
                self.setdefault(name, Mean()).add_sums(loss.total, loss.count)

    def merge_processes(self) -> "Means":
        """The same means over the shares of all processes; every process calls it and gets them."""
        if not distributed.is_initialized():
            return self
        shares: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, self)
        merged = Means()
        for name, mean in (pair for share in shares for pair in share.items()):
            merged.setdefault(name, Mean(mean.kept_axes)).add_sums(mean.sum, mean.weight)
        return merged

    def losses(self) -> dict[str, float]:
        """The losses that were added, each one masked mean."""
        return {name: LossSum(mean.sum, mean.weight).mean().item() for name, mean in self.items()}

    def errors(self) -> dict:
        """Plain floats by section, group, predictor and metric, without groups that never had an element.

        Metrics with `rmse` in their name are roots.
        """
        result: dict = {}
        for (section, group, predictor, metric), mean in self.items():
            if mean:
                value = mean.value().sqrt() if "rmse" in metric else mean.value()
                entry = result.setdefault(section, {}).setdefault(group, {}).setdefault(predictor, {})
                entry[metric] = value.tolist()
                if value.ndim:
                    entry[f"{metric}_mean"] = value.mean().item()
        return result
