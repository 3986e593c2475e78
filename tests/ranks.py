"""Two processes of one training, as `accelerate launch` makes them, without importing everything again."""

import multiprocessing
import os
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

# The processes are forks of a server that has imported these and computed nothing. Forks of the tests' own
# process fail in their backward pass, or wait for ever: its threads and their locks do not survive a fork.
multiprocessing.set_forkserver_preload(["lerobot.scripts.lerobot_train", "tests.training.test_train"])
CONFIGS = Path(__file__).parents[1] / "training" / "configs" / "accelerate"


def engine_environment(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file training/configs/accelerate/NAME.yaml` tells the processes."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        given = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        given = prepare_multi_gpu_env(arguments)
    return {
        name: value
        for name, value in given.items()
        if name.startswith(("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_"))
    }


no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="run by `make test-deepspeed`")
FSDP2 = pytest.param(engine_environment("fsdp2"), id="fsdp2")
ZERO2 = pytest.param(engine_environment("zero2"), id="zero2", marks=no_deepspeed)
ZERO3 = pytest.param(engine_environment("zero3"), id="zero3", marks=no_deepspeed)


def run_ranks(function, *args, engine: dict[str, str] | None = None) -> None:
    """`function(rank, *args)` in two processes, in the environment of two ranks on the CPU.

    `function` is found by its module and name, so nothing that a test has patched reaches it. `engine` is of
    [`engine_environment`]. Accelerate ignores engines on CPUs; here it takes the processes for two GPUs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start, settings = torch.multiprocessing.start_processes, (os.getpid(), dict(os.environ), port, engine)
    ranks = start(_run_rank, (settings, function, args), nprocs=2, join=False, start_method="forkserver")
    end = time.monotonic() + 300
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in ranks.processes:
            process.kill()


def _run_rank(rank: int, settings: tuple, function, args: tuple) -> None:
    parent, environment, port, engine = settings
    for output in (1, 2):  # the server's belong to the test that started it
        os.dup2(os.open(f"/proc/{parent}/fd/{output}", os.O_WRONLY | os.O_APPEND), output)
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    if engine:
        os.environ |= engine
        _take_for_gpus()
    function(rank, *args)


def _take_for_gpus() -> None:
    start = PartialState.__init__

    def start_as_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpus
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed.comm  # noqa: F401

        # it is left out where the CPU was asked for
        os.environ["ACCELERATE_USE_CPU"] = "false"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles for a minute
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
