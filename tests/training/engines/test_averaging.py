# ruff: noqa: F401, F811  (fixtures of another file)
"""The moving average of the weights: its values, what is exported, and resuming."""

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.ranks import FSDP2, ZERO2, run_ranks
from tests.training.engines.test_sharding import run_process
from tests.training.test_train import config_file, dataset, fresh_accelerate, log_lines, run, weights
from training.engines.averaging import WeightAverage
from training.models.model_folder import read_summary

EMA = ["--train.ema_decay", "0.5", "--train.checkpoint_every", "2", "--train.keep_checkpoints", "9"]
NO_DROPOUT = ["--model.embd_pdrop", "0", "--model.attention_dropout", "0", "--model.resid_pdrop", "0"]


def test_the_average_follows_the_weights_and_swaps_with_them():
    layer = torch.nn.Linear(1, 1)
    average = WeightAverage(Accelerator(cpu=True), layer, decay=0.25)
    expected = layer.weight.item()
    for step, value in enumerate((3.0, 5.0), start=1):
        torch.nn.init.constant_(layer.weight, value)
        average.update()
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.in_place():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 5.0


def test_the_average_is_exported_or_by_choice_the_last_weights(config_file, dataset, tmp_path):
    output = tmp_path / "run"
    assert run(config_file, dataset, tmp_path / "plain") == 0
    assert run(config_file, dataset, output, *EMA) == 0
    averaged, plain = weights(output), weights(tmp_path / "plain")
    kept = load_file(output / "checkpoints" / "step-0000006" / "average.safetensors")
    assert kept.keys() <= averaged.keys()
    for name, value in kept.items():
        torch.testing.assert_close(averaged[name], value, rtol=0, atol=0)
    assert any(not torch.equal(averaged[name], plain[name]) for name in kept)
    summary = (output / "summary.json").read_text()
    assert json.loads(summary)["ema_decay"] == 0.5
    # The training itself is the same, and its weights can still be had.
    places = {"model": output / "model", "last": output / "last"}
    last = ["--train.export_ema", "false", "--export", str(places["last"])]
    assert run(config_file, dataset, output, *EMA, *last, resume=True) == 0
    exported = load_file(places["last"] / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in plain.items())
    assert (output / "summary.json").read_text() == summary, "it is of OUTPUT/model, which is still there"
    figures = {name: read_summary(place) for name, place in places.items()}
    assert (figures["model"]["exported_ema"], figures["last"]["exported_ema"]) == (True, False)
    losses = [one["validation"]["losses"]["total"] for one in figures.values()]
    assert losses[0] != losses[1]
    before = (places["last"] / "model.safetensors").stat().st_mtime_ns
    assert run(config_file, dataset, output, *EMA, *last, resume=True) == 0
    assert (places["last"] / "model.safetensors").stat().st_mtime_ns == before, "it is finished"


def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(config_file, dataset, tmp_path, monkeypatch):
    backward, calls = Accelerator.backward, iter(range(1, 20))

    def interrupt_the_third(self, loss):
        backward(self, loss)
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(config_file, dataset, tmp_path / "whole", *EMA) == 0
    monkeypatch.setattr(Accelerator, "backward", interrupt_the_third)
    assert run(config_file, dataset, tmp_path / "cut", *EMA) == 128 + signal.SIGTERM
    monkeypatch.setattr(Accelerator, "backward", backward)
    assert run(config_file, dataset, tmp_path / "cut", *EMA, resume=True) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    val = [
        [line["val_total"] for line in log_lines(tmp_path / n) if "val_total" in line]
        for n in ("whole", "cut")
    ]
    assert val[0] == val[1]


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "one process": lambda layer: layer,
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "compiled DDP": lambda layer: torch.compile(
        torch.nn.parallel.DistributedDataParallel(layer), backend="eager"
    ),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("reader", WRAPPERS)
@pytest.mark.parametrize("writer", WRAPPERS)
def test_an_average_is_resumed_whatever_is_around_the_model(tmp_path, writer, reader):
    written, read = (
        WeightAverage(Accelerator(cpu=True), WRAPPERS[name](torch.nn.Linear(2, 3)), decay=0.9)
        for name in (writer, reader)
    )
    written.update()
    written.accelerator.save_state(str(tmp_path))
    assert load_file(tmp_path / "average.safetensors").keys() == {"weight", "bias"}
    read.accelerator.load_state(str(tmp_path))
    assert read.steps == 1
    assert all(torch.equal(read.values[name], value) for name, value in written.values.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_an_average_of_an_earlier_version_had_the_names_of_wrappers(tmp_path, prefix):
    before = {f"{prefix}weight": torch.ones(3, 2), f"{prefix}bias": torch.zeros(3)}
    save_file(before, tmp_path / "average.safetensors", metadata={"steps": "7"})
    accelerator = Accelerator(cpu=True)
    accelerator.save_state(str(tmp_path))
    average = WeightAverage(accelerator, torch.nn.Linear(2, 3), decay=0.9)
    accelerator.load_state(str(tmp_path))
    assert average.steps == 7 and torch.equal(average.values["weight"], torch.ones(3, 2))


@pytest.mark.slow  # two processes
def test_an_average_goes_on_with_another_number_of_processes(config_file, dataset, tmp_path):
    flags = [*EMA, *NO_DROPOUT]
    assert run(config_file, dataset, tmp_path / "one", *flags) == 0
    assert run(config_file, dataset, tmp_path / "two", *flags, "--train.max_hours", "0") == 0
    run_ranks(run_process, config_file, dataset, tmp_path / "two", flags, True)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("engine", [FSDP2, ZERO2])
def test_the_average_of_an_engine_is_that_of_one_process(config_file, dataset, tmp_path, engine):
    flags = [*EMA, *NO_DROPOUT]
    assert run(config_file, dataset, tmp_path / "one", *flags) == 0
    for hours, resume in (("0", False), ("1", True)):
        own = [*flags, "--train.max_hours", hours]
        run_ranks(run_process, config_file, dataset, tmp_path / "two", own, resume, engine=engine)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # of attention's keys: rounding noise, which AdamW scales
            torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5)
