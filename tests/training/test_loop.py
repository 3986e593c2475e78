"""The optimization loop: one mean over a step's whole batch, and no step with a loss that is not finite."""

import contextlib
import multiprocessing
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.settings_changes import flatten
from tests.synthetic import make_dataset
from tests.training.test_train import (  # noqa: F401 - fixtures
    command,
    config_file,
    dataset,
    fresh_accelerate,
    log_lines,
    run,
    run_twofold,
    spoil_step,
)
from training import loop
from training.checkpoints import latest_checkpoint
from training.config_reading import load_config
from training.evaluation.open_loop import measure_held_out
from training.loop import train
from training.models.starting_model import build_model, starting_config
from training.run_data import RunData
from training.windows import ForesightWindows

ONE_STEP = ["--train.steps", "1", "--train.warmup_steps", "0", "--data.val_fraction", "0"]
NO_DROPOUT = [
    text for name in ("embd_pdrop", "attention_dropout", "resid_pdrop") for text in (f"--model.{name}", "0.0")
]


def test_each_dataset_is_opened_once_per_run(config_file, dataset, tmp_path, monkeypatch):  # noqa: F811
    opened, open_dataset = [], DatasetRows.__init__

    def count(self, *args, **kwargs):
        opened.append(args[0])
        open_dataset(self, *args, **kwargs)

    monkeypatch.setattr(DatasetRows, "__init__", count)
    assert run(config_file, dataset, tmp_path / "run", "--train.steps", "1") == 0
    assert opened == [str(dataset)]


@pytest.fixture
def uneven_tracks(monkeypatch):
    """Of all windows, the even ones keep a single supervised point in the flow loss."""
    read = ForesightWindows.__getitem__

    def thin(self, item):
        sample = read(self, item)
        index = item[0] if isinstance(item, tuple) else item
        if index % 2 == 0:
            kept = sample["track_weight"][-1, -1, -1].clone()
            sample["track_weight"].zero_()
            sample["track_weight"][-1, -1, -1] = kept
        return sample

    monkeypatch.setattr(ForesightWindows, "__getitem__", thin)


@pytest.fixture
def fixed_dropout(monkeypatch):
    """Dropout drops the same entries of every sample, however the batch is cut."""

    def drop(input, p=0.5, training=True, inplace=False):
        if not training or not p:
            return input
        generator = torch.Generator().manual_seed(input.shape[-1])
        kept = torch.rand(input.shape[1:], generator=generator) >= p
        return input * kept.to(input) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)


def test_losses_are_one_mean_over_the_whole_batch_however_it_is_cut(
    config_file,  # noqa: F811
    dataset,  # noqa: F811
    tmp_path,
    uneven_tracks,
    fixed_dropout,
):
    flags = [*ONE_STEP, "--model.objectives", "[depth, future, flow]", "--model.resid_pdrop", "0.2"]
    for parts in (1, 2, 4):
        cut = ["--train.gradient_accumulation_steps", str(parts)]
        run(config_file, dataset, tmp_path / str(parts), *flags, *cut)
    whole, *others = ([line for line in log_lines(tmp_path / n) if "step_s" in line][0] for n in "124")
    for line in others:
        for name in ("loss", "depth", "future", "flow", "grad_norm"):
            assert line[name] == pytest.approx(whole[name], rel=1e-4), name


@pytest.mark.slow  # two processes are launched
def test_a_process_with_nothing_to_supervise_does_not_change_the_mean(
    config_file,  # noqa: F811
    tmp_path,
):
    # Episodes without tracks: one process of two may get windows that have no flow target at all.
    root = make_dataset(
        tmp_path / "data", episodes=4, frames=10, cameras=("front", "side"), size=(32, 40)
    ).root
    bare = make_dataset(
        tmp_path / "bare", episodes=4, frames=10, cameras=("front", "side"), size=(32, 40), tracks=False
    ).root
    flags = [*ONE_STEP, *NO_DROPOUT, "--model.objectives", "[flow]", "--train.batch_size", "2"]
    flags += ["--data.missing_targets", "true", "--data.mixture", "[0.5, 0.5]"]
    flags += ["--data.datasets", f"[{{path: {root}}}, {{path: {bare}}}]", "--train.steps", "8"]
    arguments = command(config_file, root, tmp_path / "two", *flags)
    where = arguments.index("--dataset")
    run_twofold(arguments[:where] + arguments[where + 2 :])
    train(load_config(config_file, ["--output", str(tmp_path / "one"), *flags]), False)
    one, two = (
        [line["flow"] for line in log_lines(tmp_path / name) if "step_s" in line] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-3)
    assert len({loss for loss in one if loss > 0}) > 2  # windows with tracks were drawn


@pytest.fixture
def broken(dataset, monkeypatch):  # noqa: F811
    """In the third step, one window has a progress that is not a number."""
    spoil_step(monkeypatch, 3)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_window_named_and_the_weights_of_before_saved(
    config_file,  # noqa: F811
    dataset,  # noqa: F811
    tmp_path,
    broken,
):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=r"not finite at step 3 .*episode \d+, frame \d+\. .*step 2"):
        run(config_file, dataset, output, "--train.checkpoint_every=0", "--model.supervised_share=0.5")
    folder, step = latest_checkpoint(output / "checkpoints")
    assert step == 2 and not (output / "model").exists()
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_data_without_a_target_for_any_objective_are_refused_before_the_first_step(config_file, tmp_path):  # noqa: F811
    bare = make_dataset(
        tmp_path / "bare", 2, 8, cameras=("front", "side"), size=(32, 32), depth=False, tracks=False
    ).root
    flags = ["--data.missing_targets", "true", "--model.objectives", "[depth, flow]"]
    with pytest.raises(ValueError, match="nothing to train.*depth \\(.*flow \\("):
        run(config_file, bare, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "config.yaml").exists()


class Ranks:
    """Threads that stand in for the processes of `torch.distributed`."""

    def __init__(self, size: int):
        self.size, self.local, self.given = size, threading.local(), {}
        self.barrier = threading.Barrier(size, timeout=60)

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self.local.rank

    def get_world_size(self) -> int:
        return self.size

    def all_gather_object(self, gathered: list, own: object) -> None:
        self.given[self.local.rank] = pickle.dumps(own)
        self.barrier.wait()
        gathered[:] = [pickle.loads(self.given[rank]) for rank in range(self.size)]
        self.barrier.wait()

    def run(self, work) -> list:
        def start(rank: int):
            self.local.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(start, range(self.size)))


def test_the_final_measurement_is_shared_over_ranks(config_file, dataset, tmp_path, monkeypatch):  # noqa: F811
    config = load_config(config_file, ["--dataset", str(dataset), "--output", str(tmp_path / "run")])
    torch.manual_seed(0)
    data = RunData(config, starting_config(config))
    model, processor = build_model(config, data)
    model.eval()
    alone = measure_held_out(model, processor, data, batch_size=3, baseline_windows=9)

    ranks, seen = Ranks(2), {}
    monkeypatch.setattr("training.run_data.distributed", ranks)
    monkeypatch.setattr("training.evaluation.open_loop.distributed", ranks)
    monkeypatch.setattr("training.evaluation.means.distributed", ranks)
    getitem = ForesightWindows.__getitem__

    def note(self, item):
        seen.setdefault(ranks.get_rank(), []).append((id(self), item))
        return getitem(self, item)

    monkeypatch.setattr(ForesightWindows, "__getitem__", note)
    first, second = ranks.run(lambda rank: measure_held_out(model, processor, data, 3, 9))
    assert flatten(first) == flatten(second) == pytest.approx(flatten(alone), rel=1e-4, abs=1e-6)
    shares = {rank: len(range(rank, 9, 2)) + len(range(rank, len(data.val), 2)) for rank in (0, 1)}
    assert {rank: len(windows) for rank, windows in seen.items()} == shares
    assert not set(seen[0]) & set(seen[1])


def test_the_model_is_exported_before_it_is_measured(config_file, dataset, tmp_path, monkeypatch):  # noqa: F811
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("training.loop.measure_held_out", fail)
    with contextlib.suppress(RuntimeError):
        run(config_file, dataset, tmp_path / "run", "--train.steps", "1")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("every", ["0", "1"])
def test_weights_that_an_update_broke_are_neither_saved_nor_exported(
    config_file,  # noqa: F811
    dataset,  # noqa: F811
    tmp_path,
    monkeypatch,
    every,
):
    update, updates = torch.optim.AdamW.step, []

    def overflow(self, *args, **kwargs):
        result = update(self, *args, **kwargs)
        updates.append(self)
        if len(updates) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    output = tmp_path / "run"
    flags = ["--train.steps", "2", "--train.checkpoint_every", every]
    with pytest.raises(ValueError, match="not finite after step 2 .* not saved.*learning_rate"):
        run(config_file, dataset, output, *flags)
    saved = [folder.name for folder in (output / "checkpoints").glob("*")]
    assert saved == (["step-0000001"] if every == "1" else []) and not (output / "model").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused_before_data_are_read(tmp_path):
    config = load_config(None, ["--train.batch_size", "12", "--train.gradient_accumulation_steps", "2"])
    loop.check_settings(config, SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="batch_size=12 .* each of 4 processes: choose a multiple of 8"):
        loop.check_settings(config, SimpleNamespace(num_processes=4))


@pytest.mark.slow  # a process that loads data imports everything again
def test_a_run_whose_loader_process_is_killed_saves_and_resumes_with_fewer(
    config_file,  # noqa: F811
    dataset,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    read_step, output = loop.read_step, tmp_path / "run"

    def kill_the_loader(run, batches, step):
        if step == 1:
            (loader,) = multiprocessing.active_children()
            loader.kill()
            loader.join()
        return read_step(run, batches, step)

    monkeypatch.setattr(loop, "read_step", kill_the_loader)
    flags = ["--train.checkpoint_every", "0", "--train.val_every", "0"]
    with pytest.raises(ValueError, match=r"loader process was killed.*num_workers.*is saved; continue with"):
        run(config_file, dataset, output, *flags, "--data.num_workers", "1")
    assert latest_checkpoint(output / "checkpoints")[1] >= 1
    monkeypatch.undo()
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    assert run(config_file, dataset, output, *flags, resume=True) == 0


def test_a_mixture_says_how_much_each_dataset_gives(config_file, dataset, tmp_path, capsys):  # noqa: F811
    other = shutil.copytree(dataset, tmp_path / "other")
    flags = [*ONE_STEP, "--data.datasets", f"[{{path: {dataset}}}, {{path: {other}}}]"]
    flags += ["--data.mixture", "[0.75, 0.25]", "--output", str(tmp_path / "run")]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(load_config(config_file, flags), False) == 0
    printed = capsys.readouterr().out
    assert re.search(r"dataset: \d+ windows, 75\.0% .*\n.*other: \d+ windows, 25\.0% of the batches", printed)
