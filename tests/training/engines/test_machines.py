# ruff: noqa: F401, F811  (fixtures of another file)
"""Two machines with folders of their own: each keeps whole checkpoints, and they continue at one step."""

import json
import os
import shutil

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import FSDP2, run_ranks
from tests.training.engines.test_sharding import FLAGS, alone, assert_same_training
from tests.training.test_train import config_file, dataset, run
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


def test_shards_need_a_shared_folder(config_file, dataset, tmp_path):
    with pytest.raises(ProcessRaisedException, match="not the same folder for all processes"):
        run_ranks(run_shard, config_file, dataset, tmp_path, engine=FSDP2)
