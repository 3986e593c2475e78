# ruff: noqa: F401, F811  (fixtures of another file)
"""A checkpoint of another engine is refused before it is loaded, with the command that resumes it."""

import shlex
import sys
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import FSDP2, ZERO2, ZERO3, run_ranks
from tests.training.engines.test_sharding import run_process
from tests.training.test_train import config_file, dataset, fresh_accelerate, run
from training.engines.checkpoint_form import check_form

SHORT = ["--model.objectives", "[action]", "--train.steps", "2", "--train.checkpoint_every", "1"]
SHORT += ["--train.warmup_steps", "0", "--data.val_fraction", "0"]
# Files by which a checkpoint is known, and the flags of the launcher that reads it.
FORMS = {
    "ddp": (["model.safetensors", "optimizer.bin"], ["ddp.yaml"]),
    "lora": (["adapter_model.safetensors", "optimizer.bin"], ["ddp.yaml"]),
    "fsdp2": (["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"], ["fsdp2.yaml"]),
    "fsdp2 whole": (["pytorch_model_fsdp.bin", "optimizer.bin"], ["fsdp2.yaml", "FULL_STATE_DICT"]),
    "zero2": (["pytorch_model/mp_rank_00_model_states.pt"], ["zero2.yaml"]),
    "zero3": (["pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt"], ["zero3.yaml"]),
}


def write_form(folder, name, processes):
    for file in [*FORMS[name][0], *(f"random_states_{rank}.pkl" for rank in range(processes))]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def accelerator_of(name, processes):
    kinds = {"fsdp2": "FSDP", "fsdp2 whole": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    kind = "FULL_STATE_DICT" if name == "fsdp2 whole" else "SHARDED_STATE_DICT"
    config = {"zero_optimization": {"stage": 3 if name == "zero3" else 2}}
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(state_dict_type=SimpleNamespace(name=kind)),
        deepspeed_plugin=SimpleNamespace(deepspeed_config=config),
    )
    kind = DistributedType[kinds.get(name, "MULTI_GPU")]
    return SimpleNamespace(distributed_type=kind, state=state, num_processes=processes)


@pytest.mark.parametrize("reader", ["ddp", "fsdp2", "fsdp2 whole", "zero2", "zero3"])
@pytest.mark.parametrize("writer", FORMS)
@pytest.mark.parametrize("processes", [4, 2])
def test_what_another_engine_wrote_is_refused_with_the_command_that_resumes(
    tmp_path, monkeypatch, writer, reader, processes
):
    write_form(tmp_path / "step-0000001", writer, 4)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "my run.yaml"])
    accelerator = accelerator_of(reader, processes)
    same = writer == reader or (writer, reader) == ("lora", "ddp")
    if same and (processes == 4 or "zero" not in writer):
        check_form(accelerator, tmp_path / "step-0000001")
        return
    with pytest.raises(ValueError, match=r"step-0000001 was written by .* \(4 processes\)") as caught:
        check_form(accelerator, tmp_path / "step-0000001")
    assert "delete" not in str(caught.value).lower()
    told = shlex.split(str(caught.value).partition("continue it with: ")[2])
    assert told[:2] == ["accelerate", "launch"]
    assert told[-4:] == ["train.py", "--config", "my run.yaml", "--resume"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(told[2:]))
    assert arguments.num_processes == (4 if "zero" in writer else processes)
    assert all(any(flag in word for word in told) for flag in FORMS[writer][1])


def test_a_run_that_lost_its_engine_is_refused_and_its_checkpoint_stays(config_file, dataset, tmp_path):
    output = tmp_path / "run"
    assert run(config_file, dataset, output, *SHORT, "--train.max_hours", "0") == 0
    checkpoint = output / "checkpoints" / "step-0000001"
    for name in ("files.json", "model.safetensors"):
        (checkpoint / name).unlink()
    write_form(checkpoint, "fsdp2", 1)
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(ValueError, match=r"written by FSDP2 .*fsdp2.yaml --num_processes 1"):
        run(config_file, dataset, output, *SHORT, resume=True)
    assert sorted(checkpoint.rglob("*")) == before


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("engine", [FSDP2, ZERO2, ZERO3])
def test_shards_are_refused_by_one_process_and_whole_weights_by_an_engine(
    config_file, dataset, tmp_path, engine, request
):
    name = request.node.callspec.id
    stopped = [*SHORT, "--train.max_hours", "0"]
    run_ranks(run_process, config_file, dataset, tmp_path / "shards", stopped, engine=engine)
    config = rf"{name}.yaml --num_processes {2 if 'zero' in name else 1}"
    with pytest.raises(ValueError, match=rf"(?i)written by .*{name[:4]}.*\(2 processes\).*{config}"):
        run(config_file, dataset, tmp_path / "shards", *SHORT, resume=True)
    run_ranks(run_process, config_file, dataset, tmp_path / "shards", SHORT, True, engine=engine)

    assert run(config_file, dataset, tmp_path / "whole", *stopped) == 0
    with pytest.raises(ProcessRaisedException, match="written by DDP or one process"):
        run_ranks(run_process, config_file, dataset, tmp_path / "whole", SHORT, True, engine=engine)
    assert run(config_file, dataset, tmp_path / "whole", *SHORT, resume=True) == 0
