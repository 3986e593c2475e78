"""Annotate with the processes that `accelerate launch` or `torchrun` starts: one for each GPU."""

import dataclasses
import datetime
import os

from datasets_scripts.annotation.job import AnnotationJob, make_shards, merge, prepare

__all__ = ["annotate_as_rank", "is_rank"]


def is_rank() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def annotate_as_rank(job: AnnotationJob, workers: int = 1) -> dict | None:
    """Annotate together with the other ranks, each on its own GPU if there are GPUs.

    Returns:
        `dict | None`: The summary of the merge, on rank 0.

    Raises:
        RuntimeError: If another rank fails; that rank prints why.
    """
    import torch

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if job.device in ("auto", "cuda") and torch.cuda.is_available():
        job = dataclasses.replace(job, device=f"cuda:{os.environ['LOCAL_RANK']}")
    # Ranks only wait for each other, which needs no GPU; the last one may need days longer than the first.
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=100))
    try:
        if rank == 0:
            prepare(job)
        _wait_for_ranks()
        make_shards(job, rank, world_size, workers)
        _wait_for_ranks()
    finally:
        torch.distributed.destroy_process_group()
    return merge(job) if rank == 0 else None


def _wait_for_ranks() -> None:
    import torch

    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        raise RuntimeError("another process failed; its message is above") from error
