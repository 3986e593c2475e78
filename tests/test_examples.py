"""Scripts in `examples/` run as they stand, with the shipped policy and sample, and print what they found."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from lerobot.datasets.dataset_tools import remove_feature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from transformers import AutoModel

from datasets_scripts.storage.dataset_rows import DatasetRows
from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.export import main as export
from tests.hub_server import running_hub
from tests.synthetic import make_dataset
from training.config_reading import load_config
from training.loop import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
POLICY = EXAMPLES.parent / "hub_cards" / "models" / "3d-foresight-metaworld-tiny"
SAMPLE = EXAMPLES.parent / "hub_cards" / "sample_data" / "metaworld"


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs `python examples/NAME.py OPTIONS` in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> str:
        monkeypatch.setattr("sys.argv", [str(EXAMPLES / f"{name}.py"), *options])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    missing = [path.stem for path in EXAMPLES.glob("*.py") if f'run_example("{path.stem}"' not in here]
    assert not missing


def test_loading_and_predicting_prints_actions_and_draws_the_rest(run_example):
    printed = run_example("load_and_predict")
    actions = re.findall(r"^action \d: predicted +(.+?)   recorded (.+)$", printed, re.MULTILINE)
    assert len(actions) == 5 and all(len(side.split()) == 4 for pair in actions for side in pair)
    assert len(re.findall(r"^(?:recorded|predicted) flow: \d+ points move", printed, re.MULTILINE)) == 2
    assert Path("outputs/foresight.png").read_bytes().startswith(b"\x89PNG")


def test_a_dataset_without_states_and_actions_is_predicted_too(run_example, tmp_path):
    form = {"state_dim": 4, "action_dim": 4, "size": (96, 96), "state_key": None, "depth": False}
    data = make_dataset(tmp_path / "bare", episodes=1, frames=12, tracks=False, **form)
    remove_feature(LeRobotDataset("local/x", root=data.root), "action", tmp_path / "none", "local/none")
    printed = run_example("load_and_predict", "--dataset", str(tmp_path / "none"), "--window", "3")
    assert re.search(r"^action 4: predicted +\S+ +\S+ +\S+ +\S+$", printed, re.MULTILINE)


def test_the_control_loop_acts_in_simulation(run_example, simulator):
    printed = run_example("streaming_control", "--steps", "4")
    assert re.search(r"drawer-open-v3, seed 10000: no success after 4 actions, [\d.]+ ms each", printed)


def test_annotating_gives_the_sample_tracks(run_example):
    printed = run_example("annotate_dataset", "--limit", "1")
    frames, points, moving = map(
        int, re.search(r"episode 0: (\d+) frames, (\d+) points of camera main, (\d+) move", printed).groups()
    )
    assert frames > 5 and points > moving > 0


@pytest.mark.slow
def test_adapting_the_policy_makes_its_errors_on_the_sample_comparable(run_example):
    printed = run_example("finetune_lora", "--steps", "4")
    assert re.findall(r"^(\w+): next action is \d\.\d+ off", printed, re.MULTILINE) == ["base", "adapter"]
    assert Path("outputs/lora/model/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_trainer_of_transformers_goes_on_from_its_newest_checkpoint(run_example):
    losses = []
    for steps in (2, 4):
        printed = run_example("transformers_trainer", "--steps", str(steps), "--output", "run")
        losses.append(re.findall(r"^(?:before: loss|after step \d: loss) ([\d.]+)", printed, re.MULTILINE))
        assert f"after step {steps}: loss" in printed
    assert len(losses[0]) == len(losses[1]) == 2 and losses[0][0] == losses[1][0]
    assert Path("run/checkpoint-4/model.safetensors").is_file()
    write_lerobot_files("run")  # reads the settings that Trainer adds
    assert AutoModel.from_pretrained("run").config.history_length == 1


@pytest.mark.slow
def test_videos_alone_become_a_dataset_to_pretrain_on(run_example, tmp_path, monkeypatch):
    video = SAMPLE / "videos/observation.images.main/chunk-000/file-000.mp4"
    Path("clips.csv").write_text(f'{video},"Open, then close"\n{video},Wave a hand\n')
    options = ("clips.csv", "--fps", "5", "--height", "48", "--output", "hands")
    printed = run_example("videos_to_dataset", *options)
    frames = int(re.search(r"hands: 2 episodes, (\d+) frames", printed)[1])
    rows = DatasetRows("hands")
    assert (rows.fps, len(rows), rows.tasks) == (5, frames, ["Open, then close", "Wave a hand"])
    assert frames // 2 == -(-av_length(video) // 4)  # every fourth of its 20 frames a second
    settings = ["--model.objectives=[future_rgb]", "--model.views=[main]", "--data.state_key=null"]
    settings += ["--model.state_dim=0", "--model.binary_state_indices=[]", "--model.image_size=48"]
    settings += ["--model.vision_config.model_args.img_size=48", "--train.steps=1", "--data.val_fraction=0"]
    config = EXAMPLES.parent / "training/configs/quickstart.yaml"
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have trained in this process
    assert train(load_config(config, [*settings, "--dataset=hands", "--output=run"]), resume=False) == 0


def av_length(video: Path) -> int:
    with av.open(str(video)) as container:
        return container.streams.video[0].frames


def test_a_list_of_videos_that_cannot_be_read_is_refused_and_leaves_nothing(run_example, tmp_path):
    Path("empty.csv").write_text("")
    Path("comma.csv").write_text("clip.mp4,Wave a hand\nclip.mp4,Pick the cup, then pour\n")
    Path("clips.csv").write_text("clip.mp4,Wave a hand\n")
    Path("clip.mp4").write_text("not a video")
    for clips, message in {
        "none.csv": "No such file or directory: 'none.csv'",
        "empty.csv": "empty.csv has no line VIDEO,INSTRUCTION",
        "comma.csv": "line 2 has 3 fields and not VIDEO,INSTRUCTION: put an instruction with a comma",
        "clips.csv": "clip.mp4 cannot be read as a video",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run_example("videos_to_dataset", clips, "--output", "hands")
    assert not list(tmp_path.glob("*hands*"))


def test_converting_shows_the_policy_and_what_is_fresh(run_example):
    printed = run_example("convert_grmg")
    assert "['action', 'future_rgb', 'progress']" in printed
    assert "fresh in 3D Foresight: depth_decoder, flow_decoder" in printed


def test_converting_into_a_folder_that_exists_is_refused_with_what_to_do(run_example, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_example("convert_grmg", "--output", str(tmp_path))
    assert str(stopped.value) == f"error: {tmp_path} exists: delete it, or choose another --output"


@pytest.fixture
def exported_policy(tmp_path):
    """The shipped policy as ONNX."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is in the extra `export`")
    options = ["--checkpoint", str(POLICY), "--format", "onnx", "--output", str(tmp_path / "onnx")]
    assert export(options) == 0
    return tmp_path / "onnx"


@pytest.mark.slow  # tracing takes seconds
def test_an_exported_policy_acts_through_numpy_and_onnxruntime_alone(run_example, exported_policy):
    state, options = (
        [0.0, 0.6, 0.2, 1.0],
        ["--policy", str(exported_policy), "--state", "0", "0.6", "0.2", "1"],
    )
    run_example("run_onnx", *options)
    script = f"import runpy, sys; sys.argv = {['', *options]}; "
    script += f"runpy.run_path({str(EXAMPLES / 'run_onnx.py')!r}, run_name='__main__'); "
    script += "print(sorted({'torch', 'transformers', 'modeling_foresight'} & set(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    *steps, imported = printed.splitlines()
    assert imported == "[]" and len(steps) == 3
    model = ForesightForActionPrediction.from_pretrained(POLICY).eval()
    stream = model.stream(ForesightProcessor.from_pretrained(POLICY))
    stream.reset("Open a drawer")
    gray = np.full((96, 96, 3), 128, np.uint8)
    for step in steps:
        acted = [float(number) for number in step.partition(":")[2].split()]
        assert acted == pytest.approx(stream.step({"main": gray, "wrist": gray}, state).tolist(), abs=2e-4)


def test_a_folder_that_is_no_exported_policy_is_one_line(run_example, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `export`")
    with pytest.raises(SystemExit, match="error: .*policy.json"):
        run_example("run_onnx", "--policy", str(tmp_path))


def test_no_step_at_all_is_refused(run_example, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `export`")
    with pytest.raises(SystemExit, match="error: --steps is 0; it must be at least 1"):
        run_example("run_onnx", "--policy", str(tmp_path), "--steps", "0")


def test_a_damaged_exported_policy_is_named(run_example, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `export`")
    shutil.copy(POLICY / "tokenizer.json", tmp_path)
    graphs = {"text": {"file": "text.onnx"}}
    (tmp_path / "policy.json").write_text(json.dumps({"format": "onnx", "graphs": graphs}))
    (tmp_path / "text.onnx").write_bytes(b"half of a graph")
    with pytest.raises(SystemExit, match="is damaged or lacks a file: export again"):
        run_example("run_onnx", "--policy", str(tmp_path))


@pytest.mark.slow
def test_success_is_measured_in_closed_loop_and_errors_on_recorded_episodes(run_example, simulator):
    printed = run_example("evaluate_policy", "--tasks", "drawer-open-v3", "--episodes", "2")
    assert re.search(r"drawer-open-v3: \d/2 = .* \(95 % interval", printed)
    assert len(json.loads(Path("outputs/eval.json").read_text())["episodes"]) == 2
    assert "flow moving: x_px" in printed and "actions first: l1_mean" in printed


def test_publishing_lists_the_files_and_sends_nothing_unless_told(run_example):
    printed = run_example("publish_model", "--folder", str(SAMPLE), "--repo-id", "you/sample")
    assert "meta/info.json" in printed and "published" not in printed


def test_what_is_published_is_downloaded_and_compared(run_example, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    sample = ["--folder", str(SAMPLE), "--repo-id", "org/sample"]
    with running_hub(monkeypatch):
        assert "downloaded and compared" in run_example("publish_model", *sample, "--send")


@pytest.mark.parametrize("page", ["data_format"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub_cards").symlink_to(EXAMPLES.parent / "hub_cards")
    blocks = re.findall(
        r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / f"{page}.md").read_text(), re.DOTALL
    )
    assert len(blocks) > 1
    exec(compile("\n".join(blocks), page, "exec"), {})


def test_messages_in_the_troubleshooting_page_are_those_of_the_code():
    page = (EXAMPLES.parent / "docs" / "troubleshooting.md").read_text()
    folders = ("datasets_scripts", "modeling_foresight", "training", "lerobot_policy_foresight", "hub_cards")
    files = [path for folder in folders for path in (EXAMPLES.parent / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in files))
    symptoms = " ".join(re.findall(r"^\| (.+?) \| ", page, re.MULTILINE))
    quoted = [text for text in re.findall(r"`([^`]+)`", symptoms) if " " in text]
    of_others = {"Cannot initialize a EGL device display", "Could not load libtorchcodec"}
    assert len(quoted) > 20
    assert {text for text in quoted if text not in code} == of_others


def test_the_trainer_refuses_data_of_another_rate(run_example, tmp_path):
    data = make_dataset(tmp_path / "slow", episodes=2, frames=12, fps=7, tracks=False, depth=False).root
    with pytest.raises(SystemExit) as stopped:
        run_example("transformers_trainer", "--dataset", str(data))
    assert "has 7 frames per second, and" in str(stopped.value)


def test_what_does_not_exist_is_one_line_and_exit_code_1(run_example):
    with pytest.raises(SystemExit) as stopped:
        run_example("load_and_predict", "--checkpoint", "nowhere/at/all")
    assert str(stopped.value).startswith("error: ")


def test_a_window_that_the_dataset_does_not_have_is_refused_with_those_it_has(run_example):
    with pytest.raises(SystemExit) as stopped:
        run_example("load_and_predict", "--window", "100000")
    assert re.search(r"error: --window 100000: .* has windows 0 to \d+$", str(stopped.value))


@pytest.mark.parametrize(("rate", "start_s"), [(5, 0), (10, 0), (30, 0), (30, 2), (25, 1)])
def test_videos_of_any_rate_and_start_keep_their_speed(tmp_path, monkeypatch, rate, start_s):
    """Frame k of the dataset shows what the video shows k / 10 s after its beginning."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from videos_to_dataset import read_frames

    path, seconds = tmp_path / "clip.mkv", 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for number in range(rate * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), number, np.uint8), "rgb24")
            frame.pts, frame.time_base = number + rate * start_s, Fraction(1, rate)
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    shown = [int(image[0, 0, 0]) for image in read_frames(str(path), 10, 16, (0, 0))]
    assert shown == [k * rate // 10 for k in range(len(shown))]
    assert len(shown) == 1 + (rate * seconds - 1) * 10 // rate
