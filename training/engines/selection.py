"""Which engine trains: Accelerate's choice, refused where it is not what was asked for."""

import datetime
import os
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import DynamoBackend, parse_flag_from_env
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modeling_foresight.bfloat16_support import has_bfloat16
from training.config import TrainConfig

__all__ = ["check_average", "check_engine", "configure_engine", "join_processes"]

# One process of a machine may download and decode for hours while the others wait for it. By default they
# would give up after 10 minutes (NCCL) or 30 (gloo).
PATIENCE = datetime.timedelta(days=1)

# Modules whose weights are gathered together, if the model has them; the rest of the model is one more unit.
# Not the whole text tower: Accelerate makes a unit of its token embeddings.
UNITS = ("ForesightBlock", "VisionEncoder", "CLIPEncoderLayer", "PatchDecoder", "FlowDecoder")


class Options(Protocol):
    """Settings of a training that a launcher has too."""

    mixed_precision: str
    gradient_accumulation_steps: int


def join_processes() -> PartialState:
    """This process among those of the training; call it before an `Accelerator` is built."""
    # Without `cpu`, several processes on CPUs would not find each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def check_engine(accelerator: Accelerator, options: Options, shards: bool = True) -> None:
    """Refuses what the launcher was asked for and the run does not do: Accelerate says nothing about it.

    Args:
        accelerator (`Accelerator`): What trains.
        options (`Options`): What the run says.
        shards (`bool`): Whether the training can do with weights in shards.

    Raises:
        ValueError: Names the engine or the setting, and the remedy.
    """
    check_launcher(accelerator, options)
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


def check_launcher(accelerator: Accelerator, options: Options) -> None:
    """See [`check_engine`]. A launcher's precision `no` is its default, and leaves the choice to the run."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", options.mixed_precision):
        raise ValueError(
            f"the launcher was told --mixed_precision {precision}, and the run's mixed_precision is "
            f"{options.mixed_precision}: set the run's, which counts, and launch with --mixed_precision no"
        )
    parts = accelerator.gradient_accumulation_steps
    if parts != options.gradient_accumulation_steps:
        raise ValueError(
            f"the launcher was told --gradient_accumulation_steps {parts}, and the run's are "
            f"{options.gradient_accumulation_steps}: set the run's, and leave the launcher's out"
        )
    if accelerator.parallelism_config is not None:
        raise ValueError(
            "the launcher was told a parallelism_config, and this training has no tensor, context or "
            "sequence parallelism: leave it out (fsdp2.yaml shards without it)"
        )
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    if compiles and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "weights in shards are not trained with torch.compile: leave out --dynamo_backend, or launch "
            "with ddp.yaml"
        )


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
