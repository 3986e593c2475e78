"""Weights that processes hold in shards, and computing with them.

With FSDP2 and DeepSpeed's ZeRO-3 every process holds a part of each weight, and a forward pass needs all
processes: what one of them computes, all compute at the same time.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

__all__ = ["batches_in_step", "full_value", "is_sharded", "local_part"]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold parts of the model's weights."""
    # DeepSpeed leaves empty tensors, with their parts beside them.
    return any(isinstance(value, DTensor) or hasattr(value, "ds_tensor") for value in model.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or buffer."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def full_value(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batches_in_step(batches: Iterable[Mapping]) -> Iterator[tuple[Mapping, bool]]:
    """The batches of this process, each with whether it counts, as many in every process.

    A process that has come to the end of its share continues with a batch that does not count, because the
    others cannot compute without it.
    """
    batches, spare = iter(batches), None
    while True:
        raw = next(batches, None)
        spare = spare if raw is None else raw
        mine = _gather(raw is not None)
        if not any(mine):
            return
        if not all(_gather(spare is not None)):  # more processes than batches
            first = mine.index(True) == distributed.get_rank()
            sent = _gather(raw if first else None)
            spare = spare or next(batch for batch in sent if batch is not None)
        yield spare, raw is not None


def _gather(own: object) -> list:
    """What every process gives, by rank."""
    given: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(given, own)
    return given
