"""Which engine wrote a checkpoint, told by its files, and whether the present one reads it.

The files tell it of checkpoints of every version. Whole weights (one process, DDP) are read by any number of
processes, FSDP2's shards too, DeepSpeed's by as many as wrote them.
"""

from pathlib import Path

from accelerate import Accelerator, DistributedType

from training.run_record import resume_command

__all__ = ["check_form"]

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
# What `accelerate launch` is told for each form of checkpoints.
LAUNCH = {
    "DDP or one process": [CONFIGS / "ddp.yaml"],
    "FSDP2": [CONFIGS / "fsdp2.yaml"],
    "FSDP2 with FULL_STATE_DICT": [CONFIGS / "fsdp2.yaml", "--fsdp_state_dict_type", "FULL_STATE_DICT"],
    "DeepSpeed ZeRO-2": [CONFIGS / "zero2.yaml"],
    "DeepSpeed ZeRO-3": [CONFIGS / "zero3.yaml"],
}


def check_form(accelerator: Accelerator, checkpoint: Path) -> None:
    """Refuses a checkpoint that the present engine, or number of processes, cannot load.

    Raises:
        ValueError: Says which engine and how many processes wrote it, and the command that resumes.
    """
    there, here = _form_of(checkpoint), _form_here(accelerator)
    before, now = len(list(checkpoint.glob("random_states_*.pkl"))), accelerator.num_processes
    if there == here and (before == now or "ZeRO" not in there):
        return
    processes = before if "ZeRO" in there else now
    launcher = ["accelerate", "launch", "--config_file", *LAUNCH[there], "--num_processes", processes]
    raise ValueError(
        f"checkpoint {checkpoint} was written by {there} ({before} processes), and {here} ({now} processes) "
        f"does not read it. It is whole; continue it with: {resume_command(list(map(str, launcher)))}"
    )


def _form_here(accelerator: Accelerator) -> str:
    """The form, of `LAUNCH`, in which the present engine writes checkpoints."""
    if accelerator.distributed_type == DistributedType.FSDP:
        whole = accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT"
        return "FSDP2 with FULL_STATE_DICT" if whole else "FSDP2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        return "DeepSpeed ZeRO-3" if stage == 3 else "DeepSpeed ZeRO-2"
    return "DDP or one process"


def _form_of(checkpoint: Path) -> str:
    """The form of a checkpoint; names of files are Accelerate's and DeepSpeed's."""
    if (checkpoint / "pytorch_model_fsdp_0").is_dir():
        return "FSDP2"
    if (checkpoint / "pytorch_model_fsdp.bin").is_file():
        return "FSDP2 with FULL_STATE_DICT"
    if (checkpoint / "pytorch_model").is_dir():
        shards = any((checkpoint / "pytorch_model").glob("zero_pp_rank_*_model_states.pt"))
        return "DeepSpeed ZeRO-3" if shards else "DeepSpeed ZeRO-2"
    return "DDP or one process"
