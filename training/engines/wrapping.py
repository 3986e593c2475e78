"""What Accelerate puts around a model: DDP, DeepSpeed's engine, `torch.compile`; and the model without it."""

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

__all__ = ["plain_model", "plain_name", "whole_state"]


def plain_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A prepared model without wrappers. Weights in shards and autocast, which lie in it, stay."""
    # Accelerate's default, which keeps the compiled wrapper, takes DDP out of it for good.
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers of a prepared model, gathered from shards; all processes call it together.

    With FSDP2 the main process alone gets them.
    """
    # DeepSpeed gathers with its wrapper only.
    inner = (
        model
        if accelerator.distributed_type == DistributedType.DEEPSPEED
        else plain_model(accelerator, model)
    )
    return accelerator.get_state_dict(inner)


def plain_name(name: str) -> str:
    """The name of a weight without the prefixes of wrappers."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
