"""Runs of both trainers as a user has them: what is exported, resumed, run by two processes."""

import pytest
import yaml
from accelerate.state import AcceleratorState
from lerobot.configs import PreTrainedConfig
from transformers import AutoModel

from lerobot_policy_foresight.checkpoint_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor, export_with_code
from tests.lerobot.miniature import assert_same_actions
from tests.synthetic import make_dataset
from tests.training.test_train import TINY
from training.checkpoint_folder import load_checkpoint
from training.config import load_config
from training.train import train


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A dataset with all labels."""
    root = tmp_path_factory.mktemp("data") / "dataset"
    cameras = {"front": (32, 40), "side": (32, 40)}
    return make_dataset(root, episodes=2, frames=[9, 11], cameras=cameras, use_videos=False)


def run_trainer(tmp_path, facts, *overrides):
    """`training/train.py` for two steps; the folder of its model."""
    # Weights with which the action depends on what is seen.
    model = {**TINY["model"], "initializer_range": 0.3, "embedding_initializer_range": 0.02}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**TINY, "model": model}))
    options = ["--dataset", str(facts.root), "--output", str(tmp_path / "run"), "--data.val_fraction", "0"]
    options += ["--train.steps", "2", "--train.batch_size", "2", "--train.val_every", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train(load_config(tmp_path / "run.yaml", [*options, *overrides]), False) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    return tmp_path / "run" / "model"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, facts):
    return run_trainer(tmp_path_factory.mktemp("trainer"), facts)


def test_what_the_trainer_exports_is_a_policy_of_lerobot_that_acts_the_same(exported, facts):
    config = PreTrainedConfig.from_pretrained(exported)
    assert config.cameras == {"front": "observation.images.front", "side": "observation.images.side"}
    assert_same_actions(exported, facts)
    load_checkpoint(exported)  # as evaluate.py does


def test_a_policy_with_its_code_is_one_of_lerobot_too(exported, facts, tmp_path):
    model = ForesightForActionPrediction.from_pretrained(exported)
    export_with_code(model, ForesightProcessor.from_pretrained(exported), tmp_path / "drawer")
    write_lerobot_files(tmp_path / "drawer")
    assert "auto_map" in (tmp_path / "drawer" / "config.json").read_text()
    assert (tmp_path / "drawer" / "modeling_foresight.py").is_file()
    assert_same_actions(tmp_path / "drawer", facts)


def test_cameras_of_an_exported_model_can_be_named_anew(exported, tmp_path):
    model = ForesightForActionPrediction.from_pretrained(exported)
    model.save_pretrained(tmp_path)
    ForesightProcessor.from_pretrained(exported).save_pretrained(tmp_path)
    write_lerobot_files(tmp_path, {"front": "observation.image", "side": None})
    assert PreTrainedConfig.from_pretrained(tmp_path).cameras == {"front": "observation.image"}


def test_a_model_without_actions_is_exported_all_the_same(facts, tmp_path, capsys):
    folder = run_trainer(tmp_path, facts, "--model.objectives", "[depth, flow]")
    assert f"{folder} is no policy for LeRobot's commands" in capsys.readouterr().out
    assert not (folder / "policy_preprocessor.json").exists()
    assert AutoModel.from_pretrained(folder).config.objectives == ["depth", "flow"]


def test_a_view_without_a_camera_is_left_out_of_the_policy(facts, tmp_path):
    source = yaml.safe_dump([{"path": str(facts.root), "cameras": {"side": None}}], default_flow_style=True)
    folder = run_trainer(tmp_path, facts, "--data.datasets", source.replace("\n", ""))
    assert PreTrainedConfig.from_pretrained(folder).cameras == {"front": "observation.images.front"}
