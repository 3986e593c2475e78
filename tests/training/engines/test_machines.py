# ruff: noqa: F401, F811  (fixtures of another file)
"""Two machines: with folders of their own they continue at one step, and Slurm starts them again."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import FSDP2, ZERO3, run_ranks
from tests.training.engines.test_sharding import FLAGS, alone, assert_same_training
from tests.training.test_train import REPO, command, config_file, dataset, environment, run
from training.engines.machines import agree_on_checkpoint

pytestmark = pytest.mark.slow  # two processes


def run_machine(rank, config_file, dataset, output, resume):
    os.environ["LOCAL_RANK"] = "0"
    assert run(config_file, dataset, output / f"machine{rank}", *FLAGS, resume=resume) == 0


def test_a_machine_that_lost_its_newest_checkpoint_resumes_with_the_others(
    alone, config_file, dataset, tmp_path
):
    run_ranks(run_machine, config_file, dataset, tmp_path, False)
    assert_same_training(alone, tmp_path / "machine0")
    for folder in (tmp_path / "machine0", tmp_path / "machine1"):
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-0000002", "step-0000004"}
    assert not (tmp_path / "machine1" / "model").exists()

    shutil.rmtree(tmp_path / "machine1" / "checkpoints" / "step-0000004")
    (tmp_path / "machine0" / "summary.json").unlink()
    run_ranks(run_machine, config_file, dataset, tmp_path, True)
    assert_same_training(alone, tmp_path / "machine0")

    run_ranks(run_machine, config_file, dataset, tmp_path, True)  # it is finished
    shutil.rmtree(tmp_path / "machine1")
    with pytest.raises(ProcessRaisedException, match="process 1 finds no run in"):
        run_ranks(run_machine, config_file, dataset, tmp_path, True)


def test_machines_without_a_common_step_are_refused(config_file, dataset, tmp_path):
    run_ranks(run_machine, config_file, dataset, tmp_path, False)
    shutil.rmtree(tmp_path / "machine1" / "checkpoints")
    (tmp_path / "machine0" / "summary.json").unlink()
    with pytest.raises(ProcessRaisedException, match="process 0: step 4, process 1: step None"):
        run_ranks(run_machine, config_file, dataset, tmp_path, True)


def run_shard(rank, config_file, dataset, output):
    run(config_file, dataset, output / f"machine{rank}", *FLAGS)


@pytest.mark.parametrize("engine", [FSDP2, ZERO3])
def test_shards_need_a_shared_folder(config_file, dataset, tmp_path, engine):
    with pytest.raises(ProcessRaisedException, match="not the same folder for all processes"):
        run_ranks(run_shard, config_file, dataset, tmp_path, engine=engine)


SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> requeued
"""
SRUN = """#!/bin/bash
SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; code=$?; wait; exit $code
"""


def test_the_slurm_script_stops_at_the_jobs_end_queues_itself_again_and_finishes(
    config_file, dataset, tmp_path
):
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "training").symlink_to(REPO / "training")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "PORT": port}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job |= {"SLURM_GPUS_ON_NODE": "1", "PATH": path}
    arguments = command(config_file, dataset, tmp_path / "run")[1:]
    script = ["bash", str(REPO / "scripts" / "train.slurm"), *arguments]
    for minutes_left, finished in ((9, False), (70, True)):
        job["SLURM_JOB_END_TIME"] = str(int(time.time()) + 60 * minutes_left)
        subprocess.run(script, env=environment() | job, cwd=tmp_path, check=True, timeout=300)
        assert (tmp_path / "run" / "model").exists() == finished
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
