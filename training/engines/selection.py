"""Which engine trains: Accelerate's choice, refused where it is not what was asked for."""

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env

__all__ = ["check_engine", "choose_units"]

# Modules whose weights are gathered together, if the model has them; the rest of the model is one more unit.
# Not the whole text tower: Accelerate makes a unit of its token embeddings.
UNITS = ("ForesightBlock", "VisionEncoder", "CLIPEncoderLayer", "PatchDecoder", "FlowDecoder")


def check_engine(accelerator: Accelerator, shards: bool = True) -> None:
    """Refuses engines that were asked for and are not used: Accelerate leaves them out without a word.

    Args:
        accelerator (`Accelerator`): What trains.
        shards (`bool`): Whether the training can do with weights in shards.

    Raises:
        ValueError: Names the engine and the reason.
    """
    engines = {"FSDP": DistributedType.FSDP, "DeepSpeed": DistributedType.DEEPSPEED}
    for name, kind in engines.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}") and accelerator.distributed_type != kind:
            raise ValueError(
                f"{name} was asked for, but Accelerate trains with {accelerator.distributed_type.value} on "
                f"{accelerator.num_processes} x {accelerator.device.type} and ignores it: leave it out, or "
                "launch on GPUs"
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("training with DeepSpeed is not supported: FSDP2 shards as ZeRO-3 does (fsdp2.yaml)")
    if accelerator.distributed_type == DistributedType.FSDP and not shards:
        raise ValueError("this training keeps whole weights on every GPU: launch it without FSDP (ddp.yaml)")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is not supported: set fsdp_version to 2 (--fsdp_version 2)")


def choose_units(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Tells FSDP which modules of a model to shard as units, unless the user has said so."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and not plugin.transformer_cls_names_to_wrap:
        names = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = [name for name in UNITS if name in names]
