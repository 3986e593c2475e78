"""The exponential moving average of the weights (EMA), often a better policy than the last weights."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from training.engines.machines import is_writer
from training.engines.sharding import full_value, local_part
from training.engines.wrapping import plain_model, plain_name

__all__ = ["WeightAverage"]

FILE = "average.safetensors"


class WeightAverage:
    """`average = d * average + (1 - d) * weights` after every step, of the trained parameters.

    `d` rises to `decay` as `(1 + step) / (10 + step)`, so that a short run does not keep its first weights.
    Running statistics of normalization layers are not averaged. With FSDP2 it is in shards as the weights.

    Args:
        accelerator (`Accelerator`): Its checkpoints get the average too.
        model (`torch.nn.Module`): As Accelerate prepared it.
        decay (`float`): In [0, 1).
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, decay: float):
        self.accelerator, self.decay, self.steps = accelerator, decay, 0
        # Names without wrappers: another engine or number of processes may resume.
        self.model = plain_model(accelerator, model)
        self.weights = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.values = {name: value.detach().clone() for name, value in self.weights.items()}
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._parts(self.values), self._parts(self.weights), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average as its weights inside; all processes call it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass leaves whole copies of some weights
        for value, weight in zip(self._parts(self.values), self._parts(self.weights), strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)

    @staticmethod
    def _parts(values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [local_part(value.detach()) for value in values.values()]

    def _save(self, models: list, weights: list, folder: str) -> None:
        whole = {name: full_value(value).contiguous() for name, value in self.values.items()}
        if is_writer(self.accelerator):
            save_file(whole, Path(folder) / FILE, metadata={"steps": str(self.steps)})

    @torch.no_grad()
    def _load(self, models: list, folder: str) -> None:
        with safe_open(Path(folder) / FILE, framework="pt") as file:
            self.steps = int(file.metadata()["steps"])
            stored = {plain_name(name): name for name in file.keys()}  # noqa: SIM118  not a dict
            for name, value in self.values.items():
                read = file.get_tensor(stored[name]).to(value.device)
                if isinstance(value, DTensor):
                    read = distribute_tensor(read, value.device_mesh, value.placements)
                value.copy_(read)
