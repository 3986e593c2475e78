"""Which engine trains: Accelerate's choice, refused where it is not what was asked for."""

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modeling_foresight.bfloat16_support import has_bfloat16
from training.config import TrainConfig

__all__ = ["check_average", "check_engine", "configure_engine"]

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
    if accelerator.distributed_type in engines.values() and not shards:
        name = next(name for name, kind in engines.items() if kind == accelerator.distributed_type)
        raise ValueError(f"this training keeps all weights on every GPU: launch it without {name} (ddp.yaml)")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is not supported: set fsdp_version to 2 (--fsdp_version 2)")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()  # with it, transformers leaves the weights of a ZeRO-3 model to others


def check_average(accelerator: Accelerator) -> None:
    """Refuses an average of weights (EMA) where DeepSpeed keeps none of them whole.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.deepspeed_config["zero_optimization"]["stage"] == 3:
        raise ValueError("train.ema_decay does not work with ZeRO-3: use FSDP2 (fsdp2.yaml) or ZeRO-2")


def configure_engine(accelerator: Accelerator, model: torch.nn.Module, options: TrainConfig) -> None:
    """Tells FSDP which modules to shard as units, unless the user has said so; DeepSpeed, the run's settings.

    `model` is not yet prepared by Accelerate.

    Raises:
        ValueError: If DeepSpeed's own configuration says otherwise; names the setting.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and not plugin.transformer_cls_names_to_wrap:
        names = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = [name for name in UNITS if name in names]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(accelerator, options)


def configure_deepspeed(accelerator: Accelerator, options: TrainConfig) -> None:
    """See [`configure_engine`]. Weights stay in float32: bf16 is autocast, as without DeepSpeed."""
    theirs, parts = accelerator.state.deepspeed_plugin.deepspeed_config, options.gradient_accumulation_steps
    ours = {
        "train_micro_batch_size_per_gpu": options.batch_size // parts // accelerator.num_processes,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": options.max_grad_norm,
    }
    for name, value in ours.items():
        if theirs.setdefault(name, "auto") not in ("auto", value):
            raise ValueError(
                f"DeepSpeed's {name} is {theirs[name]}, and the run's is {value}: leave it out there; "
                "train.batch_size, gradient_accumulation_steps and max_grad_norm count"
            )
    low = options.mixed_precision == "bf16" and has_bfloat16(accelerator.device)
    theirs |= ours | {"torch_autocast": {"enabled": low, "dtype": "bfloat16"}}
    # For the export: in float32, as the weights are.
    theirs["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
