"""Two processes of one training, as `accelerate launch` makes them, without importing everything again."""

import os
import socket
import time

import torch
from accelerate.state import AcceleratorState


def run_ranks(function, *args) -> None:
    """`function(rank, *args)` in two forks of this process, in the environment of two ranks on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = torch.multiprocessing.start_processes
    ranks = start(_run_rank, (port, function, args), nprocs=2, join=False, start_method="fork")
    end = time.monotonic() + 300
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in ranks.processes:
            process.kill()


def _run_rank(rank: int, port: int, function, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    function(rank, *args)
