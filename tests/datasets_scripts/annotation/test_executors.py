"""However the work is spread, the dataset is the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import dill
import pytest

from datasets_scripts.annotate import main
from datasets_scripts.annotation import executors
from datasets_scripts.storage.dataset_folder import data_files
from tests.synthetic import make_dataset


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Four episodes of one camera with depth."""
    return make_dataset(
        tmp_path_factory.mktemp("recorded") / "data",
        frames=[4, 6, 5, 3],
        cameras=("main",),
        tracks=False,
        size=(48, 64),
    )


@pytest.fixture(scope="module")
def alone(recorded, tmp_path_factory):
    """What one process makes of it."""
    output = tmp_path_factory.mktemp("alone") / "data"
    assert main(command_line(recorded, output, "--workers=1")) == 0
    return contents(output)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs of Slurm that note what is submitted, in `jobs/N` and `jobs/N.args`."""
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    number = f'n=$(($(ls {jobs} | wc -l) / 2 + 1)); for file; do true; done; cp "$file" {jobs}/$n'
    texts = {
        "sbatch": f'{number}; echo "$@" > {jobs}/$n.args; echo Submitted batch job $n',
        "scontrol": "echo node1",
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    return jobs


def command_line(recorded, output, *more: str) -> list[str]:
    return [*(f"--dataset={recorded.root}", f"--output={output}", "--n-points=40"), *more]


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run_slurm_task(pickled: Path, task: int, monkeypatch) -> None:
    """What `launch_pickled_pipeline` does on a node, where the array says which task it is."""
    with monkeypatch.context() as node, open(pickled, "rb") as file:
        node.setenv("SLURM_ARRAY_TASK_ID", str(task))
        dill.load(file).run()


def test_tasks_of_a_local_pipeline_make_what_one_process_makes(recorded, alone, tmp_path):
    output = tmp_path / "data"
    assert main(command_line(recorded, output, "--executor=local", "--tasks=3", "--workers=1")) == 0
    assert contents(output) == alone
    assert not output.with_name("data.partial").exists()


@pytest.mark.slow  # each worker imports LeRobot again
def test_two_workers_make_what_one_makes(recorded, alone, tmp_path):
    output = tmp_path / "data"
    assert main(command_line(recorded, output, "--executor=local", "--workers=2")) == 0
    assert contents(output) == alone


@pytest.mark.slow  # each process imports LeRobot again
def test_two_ranks_make_what_one_process_makes(recorded, alone, tmp_path):
    output, script = tmp_path / "data", Path(executors.__file__).parents[1] / "annotate.py"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command = [*accelerate, "--quiet", str(script), *command_line(recorded, output, "--workers=1")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(script.parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("4 episodes") == 1  # said by one of them
    assert contents(output) == alone


def test_slurm_gets_an_array_of_tasks_and_a_merge_after_them(recorded, alone, slurm, tmp_path, monkeypatch):
    output = tmp_path / "data"
    options = "--executor=slurm --tasks=2 --partition=gpu --gpus-per-task=1 --cpus-per-task=8 --time=02:00:00"
    assert main(command_line(recorded, output, *options.split(), "--sbatch=account=robots")) == 0
    assert not output.exists()  # nothing ran here
    shards, merge = ((slurm / str(n)).read_text() for n in (1, 3))  # 2 and 4 gather datatrove's statistics
    for option in (
        "array=0-1",
        "partition=gpu",
        "gpus=1",
        "cpus-per-task=8",
        "time=02:00:00",
        "account=robots",
    ):
        assert f"#SBATCH --{option}\n" in shards, option
    assert "#SBATCH --gpus" not in merge
    assert "--dependency=afterany:1" in (slurm / "3.args").read_text()
    pickled = [
        Path(re.search(r"launch_pickled_pipeline (\S+)", script).group(1)) for script in (shards, merge)
    ]
    for task in (0, 1):
        run_slurm_task(pickled[0], task, monkeypatch)
    run_slurm_task(pickled[1], 0, monkeypatch)
    assert contents(output) == alone


def test_a_merge_names_what_a_lost_task_left_out_and_the_next_run_makes_only_that(
    recorded, alone, slurm, tmp_path, monkeypatch
):
    output = tmp_path / "data"
    command = command_line(recorded, output, "--executor=slurm", "--tasks=2", "--partition=cpu")
    assert main(command) == 0
    logs = output.with_name("data.logs")
    run_slurm_task(logs / "shards" / "executor.pik", 0, monkeypatch)
    done = sorted(output.with_name("data.partial").glob("episodes/*/*"))
    stamps = [path.stat().st_mtime_ns for path in done]
    with pytest.raises(ValueError, match="2 of 4 episodes are missing"):
        run_slurm_task(logs / "merge" / "executor.pik", 0, monkeypatch)
    assert main(command) == 0  # the same command once more
    run_slurm_task(logs / "shards" / "executor.pik", 0, monkeypatch)
    run_slurm_task(logs / "shards" / "executor.pik", 1, monkeypatch)
    assert [path.stat().st_mtime_ns for path in done] == stamps
    run_slurm_task(logs / "merge" / "executor.pik", 0, monkeypatch)
    assert contents(output) == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--executor=slurm --partition=cpu", "needs --tasks"),
        ("--executor=slurm --tasks=2", "needs --partition"),
        ("--executor=ray --tasks=2", r"needs Ray .* pip install 'datatrove\[ray\]'"),
        ("--executor=local --tasks=0", "--tasks is 0; it must be at least 1"),
        ("--executor=slurm --tasks=2 --partition=cpu --sbatch=account", "write NAME=VALUE"),
    ],
)
def test_what_an_executor_lacks_is_said_before_anything_is_written(
    options, message, recorded, slurm, tmp_path, monkeypatch, capsys
):
    find = executors.importlib.util.find_spec
    monkeypatch.setattr(
        executors.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name)
    )
    assert main(command_line(recorded, tmp_path / "out" / "data", *options.split())) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "remedy"), [("datatrove", r"\[annotate\]"), ("sbatch", "submits to Slurm")]
)
def test_a_missing_package_or_program_is_named(missing, remedy, recorded, tmp_path, monkeypatch, capsys):
    find = executors.importlib.util.find_spec
    monkeypatch.setattr(
        executors.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ("--executor=slurm", "--tasks=2", "--partition=cpu")
    assert main(command_line(recorded, tmp_path / "data", *options)) == 1
    assert re.search(f"{missing}.*{remedy}", capsys.readouterr().err)


def test_a_damaged_episode_ends_the_pipeline_with_its_name(recorded, tmp_path, capsys):
    broken = make_dataset(
        tmp_path / "broken", frames=[3, 3], cameras=("main",), tracks=False, size=(48, 64), use_videos=False
    )
    (file,) = data_files(broken.root)
    file.write_bytes(file.read_bytes()[:-200])
    options = ("--executor=local", "--tasks=2", "--workers=1")
    assert main(command_line(broken, tmp_path / "data", *options)) == 1
    assert re.search(r"file-000.parquet is damaged or truncated", capsys.readouterr().err)
