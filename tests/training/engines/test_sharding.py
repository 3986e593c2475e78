# ruff: noqa: F401, F811  (fixtures of another file)
"""One process, two processes, accumulation and FSDP2 are the same training."""

import itertools
import json
import os
import signal

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests.ranks import FSDP2, ZERO2, ZERO3, run_ranks
from tests.training.test_loop import Ranks
from tests.training.test_train import (
    TINY,
    config_file,
    dataset,
    finished,
    log_lines,
    run,
    weights,
)
from training.engines.sharding import batches_in_step

# Dropout alone draws per process. The goal, the style and the supervised images draw per sample.
FLAGS = ["--model.embd_pdrop", "0", "--model.attention_dropout", "0", "--model.resid_pdrop", "0"]
FLAGS += ["--model.goal_image", "true", "--model.goal_dropout", "0.5", "--train.warmup_steps", "0"]
FLAGS += ["--train.steps", "4", "--train.checkpoint_every", "2"]
PARTS = ["--train.gradient_accumulation_steps", "2"]


def run_process(rank, config_file, dataset, output, flags, resume=False):
    assert run(config_file, dataset, output, *flags, resume=resume) == 0


def run_until(rank, config_file, dataset, output, step, victim, number):
    """A run of which the process `victim` gets the signal `number` in a step."""
    backward, calls = Accelerator.backward, itertools.count(1)

    def disturbed(self, loss):
        backward(self, loss)
        if next(calls) == step and rank == victim:
            os.kill(os.getpid(), number)

    Accelerator.backward = disturbed
    assert run(config_file, dataset, output, *FLAGS) == 128 + number


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert run(folder / "tiny.yaml", dataset, folder / "run", *FLAGS) == 0
    return folder / "run"


def assert_same_training(output, other):
    """Losses, gradient norms, validation and weights agree to 1e-5; the final errors too.

    Prints the largest differences, which `-rP` shows: the table of docs/training_at_scale.md.
    """
    names = ("loss", "grad_norm", "depth", "flow", "action", "kl", "future", "progress")
    largest = dict.fromkeys(("losses", "gradient norm"), 0.0)
    for one, two in zip(log_lines(output), log_lines(other), strict=True):
        assert one.keys() == two.keys()
        measured = {name for name in one if name in names or name.startswith("val_")}
        for name in measured:
            kind = "gradient norm" if name == "grad_norm" else "losses"
            largest[kind] = max(largest[kind], abs(two[name] / one[name] - 1) if one[name] else 0.0)
        assert {n: two[n] for n in measured} == pytest.approx(
            {n: one[n] for n in measured}, rel=1e-5, abs=1e-6
        )
    ours, theirs = weights(output), weights(other)
    assert ours.keys() == theirs.keys()
    apart = {name: (theirs[name] - value).abs() for name, value in ours.items()}
    for name, errors in apart.items():
        # The bias of attention's keys has no gradient but rounding noise, which AdamW scales to full steps.
        if name.endswith("qkv.bias"):
            errors.chunk(3)[1].zero_()
    apart = {name: errors.max().item() for name, errors in apart.items()}
    largest["weights"] = max(apart.values())
    print("largest difference:", ", ".join(f"{name} {error:.1e}" for name, error in largest.items()))
    assert {name for name, error in apart.items() if error > 1e-5} == set()
    one, two = (json.loads((place / "summary.json").read_text()) for place in (output, other))
    assert two["validation"]["windows"] == one["validation"]["windows"]
    assert two["validation"]["losses"] == pytest.approx(one["validation"]["losses"], rel=1e-4)
    assert (two["parameters"], two["trained_parameters"]) == (one["parameters"], one["trained_parameters"])


@pytest.mark.slow
def test_accumulation_is_the_same_training(alone, config_file, dataset, tmp_path):
    assert run(config_file, dataset, tmp_path / "run", *FLAGS, *PARTS) == 0
    assert_same_training(alone, tmp_path / "run")


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("parts", [[], PARTS], ids=["whole", "accumulated"])
@pytest.mark.parametrize("engine", [pytest.param(None, id="ddp"), FSDP2, ZERO2, ZERO3])
def test_two_processes_are_the_same_training(alone, config_file, dataset, tmp_path, engine, parts):
    flags = [*FLAGS, *parts]
    run_ranks(run_process, config_file, dataset, tmp_path / "run", flags, engine=engine)
    assert_same_training(alone, tmp_path / "run")


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("engine", [FSDP2, ZERO2, ZERO3])
def test_a_stopped_run_resumes_exactly(alone, config_file, dataset, tmp_path, engine):
    output, any_rank = tmp_path / "run", 1
    run_ranks(run_until, config_file, dataset, output, 2, any_rank, signal.SIGTERM, engine=engine)
    run_ranks(run_process, config_file, dataset, output, FLAGS, True, engine=engine)
    assert_same_training(alone, output)


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("engine", [pytest.param(None, id="ddp"), FSDP2])
def test_a_run_of_which_a_process_was_killed_resumes_exactly(
    alone, config_file, dataset, tmp_path, engine, victim
):
    output = tmp_path / "run"
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):  # the other one may end first
        run_ranks(run_until, config_file, dataset, output, 3, victim, signal.SIGKILL, engine=engine)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000002"]
    run_ranks(run_process, config_file, dataset, output, FLAGS, True, engine=engine)
    assert_same_training(alone, output)


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("engine", [FSDP2, ZERO3])
def test_an_adapter_in_shards_is_that_of_one_process(finished, dataset, tmp_path, engine):
    flags = ["--init_from", str(finished / "model"), "--lora.r", "2", "--train.steps", "4"]
    flags += ["--train.checkpoint_every", "2", "--train.warmup_steps", "0", *FLAGS[:6]]
    flags += ["--lora.merge", "true"]
    config = tmp_path / "lora.yaml"
    config.write_text(yaml.safe_dump({name: TINY[name] for name in ("data", "train")}))
    assert run(config, dataset, tmp_path / "one", *flags) == 0
    run_ranks(run_process, config, dataset, tmp_path / "two", flags, engine=engine)
    for file in ("model/adapter_model.safetensors", "model-merged/model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


def test_a_process_without_batches_goes_along_with_the_others(monkeypatch):
    ranks, shares = Ranks(3), [[{"task": "a"}, {"task": "b"}], [{"task": "c"}], []]
    monkeypatch.setattr("training.engines.sharding.distributed", ranks)
    taken = ranks.run(lambda rank: list(batches_in_step(shares[rank])))
    own = [[batch["task"] for batch, counts in steps if counts] for steps in taken]
    assert own == [["a", "b"], ["c"], []]
    assert [len(steps) for steps in taken] == [2, 2, 2]
