"""LeRobot's policies beside ours: sizes, what is measured, what is refused."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("compare_policies")


def test_a_missing_extra_is_named_with_the_command_before_anything_is_built(script, monkeypatch, capsys):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(script, "measure_latency", lambda args: pytest.fail("too late"))
    assert script.main(["--policies", "act", "diffusion-ddim"]) == 1
    assert (
        "diffusion-ddim needs the package diffusers: pip install 'lerobot[diffusion]'"
        in capsys.readouterr().err
    )
    assert script.main(["--policies", "smolvla"]) == 1
    assert "smolvla needs the package num2words: pip install 'lerobot[smolvla]'" in capsys.readouterr().err


def policy_config(cameras=("main", "wrist"), state=4, action=4, **lengths):
    features = {"robot_state_feature": state, "action_feature": action}
    features = {name: SimpleNamespace(shape=(size,)) for name, size in features.items()}
    images = {f"observation.images.{c}": None for c in cameras}
    return SimpleNamespace(image_features=images, **features, **lengths)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (policy_config(("main", "top"), n_obs_steps=1), "sees the cameras .*top"),
        (policy_config(("main",), n_obs_steps=1), "and the comparison shows .*wrist"),
        (policy_config(n_obs_steps=12), "reads 12 frames, and the comparison gives 10: --history 12"),
        (policy_config(n_obs_steps=1, history_length=11), "--history 11"),
        (policy_config(n_obs_steps=1, state=6), r"theirs has state entries of shape \(6,\)"),
        (policy_config(n_obs_steps=1, action=7), r"theirs has action entries of shape \(7,\)"),
    ],
)
def test_a_policy_with_another_camera_or_a_longer_history_is_refused(script, config, message):
    with pytest.raises(ValueError, match=message):
        script.check_inputs("theirs", config, script.parse_arguments([]))
    script.check_inputs("ours", policy_config(n_obs_steps=1, history_length=10), script.parse_arguments([]))


def test_a_dataset_that_is_not_there_is_named_before_anything_is_measured(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(script, "measure_latency", lambda args: pytest.fail("minutes are lost"))
    output = ["--output", str(tmp_path / "out.csv")]
    assert script.main(["--policies", "act", "--train_on", str(tmp_path / "none"), *output]) == 1
    assert "none is not a LeRobot dataset: run `make quickstart` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--output", "out"], "--output is out; its name must end in .csv"),
        (["--paths", "none"], "--paths names none, which is not a folder"),
        (["--task", "draw-open-v3"], "unknown MetaWorld task 'draw-open-v3'; did you mean drawer-open-v3"),
        (["--train_on", "robot"], "--train_on robot lacks observation.images.wrist as MetaWorld has it"),
    ],
)
def test_what_would_end_the_comparison_halfway_is_refused_before_it(
    script, monkeypatch, tmp_path, capsys, change, message
):
    pytest.importorskip("metaworld", reason="MetaWorld is in the extra `sim`")
    monkeypatch.setattr(script, "measure_latency", lambda args: pytest.fail("minutes are lost"))
    monkeypatch.chdir(tmp_path)
    cameras = {f"observation.images.{name}": {"shape": [96, 96, 3]} for name in ("main", "wrist")}
    numbers = {"observation.state": {"shape": [4]}, "action": {"shape": [4]}}
    for folder, features in {"good": cameras | numbers, "robot": dict(list(cameras.items())[:1])}.items():
        (tmp_path / folder / "meta").mkdir(parents=True)
        (tmp_path / folder / "meta" / "info.json").write_text(json.dumps({"features": features}))
    assert script.main(["--policies", "act", "--train_on", "good", "--output", "out.csv", *change]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow  # uses processor time
def test_a_command_is_stopped_when_its_processor_time_is_used(script, tmp_path):
    args = SimpleNamespace(threads=1)
    endless = [sys.executable, "-c", "while True: pass"]
    assert 0.2 <= script.run_for(endless, tmp_path / "log", args, budget_s=0.2) < 5
    with pytest.raises(RuntimeError, match="broken"):
        script.run_for([sys.executable, "-c", "raise SystemExit('broken')"], tmp_path / "log", args)


@pytest.mark.slow  # builds five policies, in processes of their own too
def test_all_policies_act_on_the_same_pictures_without_a_download(script, tmp_path):
    pytest.importorskip("num2words", reason="pip install 'lerobot[smolvla]'")
    output = tmp_path / "compare.csv"
    small = ["--small", "--camera_px", "64", "--warmup", "0", "--repeats", "1", "--threads", "1"]
    # In a process of its own: LeRobot looks for diffusers once, and tests before this one may have hidden it.
    command = [sys.executable, str(FOLDER / "compare_policies.py"), *small, "--output", str(output)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(printed.splitlines()[-1])["latency"]
    assert [row["policy"] for row in rows] == list(script.POLICIES)
    assert all(row["step_ms"] > 0 and row["peak_rss_mb"] > 100 for row in rows) and output.is_file()
    assert {row["policy"]: row["actions_per_plan"] for row in rows}["smolvla"] == 50


@pytest.mark.slow  # builds a model of 1.8 GB
def test_smolvla_has_its_published_size(script, tmp_path):
    pytest.importorskip("num2words", reason="pip install 'lerobot[smolvla]'")
    policy, *_ = script.build_policy("smolvla", script.parse_arguments([]), tmp_path)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(450e6, rel=0.005)
