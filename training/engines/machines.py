"""Several machines in one run: whether they share the run folder, who writes, and where they continue.

Without a shared folder each machine keeps whole checkpoints of its own.
"""

import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object

__all__ = ["agree_on_checkpoint", "agree_on_run", "find_writers", "is_writer"]


def find_writers(accelerator: Accelerator, folder: Path) -> None:
    """Finds out whether all processes see the same run folder, for [`is_writer`]; all call it together.

    Raises:
        ValueError: If they do not and the weights are sharded.
    """
    if accelerator.num_processes == 1:
        return
    (name,) = broadcast_object_list([f".{uuid.uuid4().hex}.tmp"])
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        (folder / name).touch()
    accelerator.wait_for_everyone()
    os.listdir(folder)  # network file systems may remember that a file was missing
    seen = gather_object([(folder / name).exists()])
    accelerator.wait_for_everyone()
    (folder / name).unlink(missing_ok=True)
    if all(seen):
        return
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{folder} is not the same folder for all processes (not for process {seen.index(False)}), and "
            "each would keep shards of its own: give an --output that all share, or train without shards "
            "(ddp.yaml)"
        )
    accelerator.print(f"{folder} is not shared: every machine keeps its own checkpoints there")
    accelerator.project_configuration.save_on_each_node = True


def is_writer(accelerator: Accelerator) -> bool:
    """Whether this process writes the run folder that it sees: one of all, or one per machine."""
    apart = accelerator.project_configuration.save_on_each_node
    return accelerator.is_local_main_process if apart else accelerator.is_main_process


def agree_on_run(settings: Path) -> bool:
    """Whether the run folder holds a run, with its `settings`, on every machine.

    Raises:
        ValueError: In every process, if only some machines have it.
    """
    found = gather_object([settings.exists()])
    if all(found) or not any(found):
        return found[0]
    raise ValueError(
        f"process {found.index(False)} finds no run in {settings.parent}, but process {found.index(True)} "
        "does: copy the run folder to all machines, or choose another --output"
    )


def agree_on_checkpoint(find: Callable[[float], tuple[Path, int] | None]) -> tuple[Path, int] | None:
    """The newest checkpoint of which every process has a whole copy, and its step; `None` if nobody has any.

    Args:
        find (`Callable`): The newest whole one of this process, up to a step.

    Raises:
        ValueError: In every process, if they have no step in common.
    """
    at_most = math.inf
    while True:
        found = find(at_most)
        steps = gather_object([found and found[1]])
        if len(set(steps)) == 1:
            return found
        if None in steps:
            listed = ", ".join(f"process {rank}: step {step}" for rank, step in enumerate(steps))
            raise ValueError(
                f"the machines have no whole checkpoint of the same step ({listed}): copy the run folder of "
                "one of them to all, or choose another --output"
            )
        at_most = min(steps)
