"""LoRA through LeRobot's own command: what is adapted, saved, resumed, merged, and where it loads."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from lerobot_policy_foresight.__main__ import main
from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from lerobot_policy_foresight.modeling_foresight import LeRobotForesightPolicy
from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.lora import lora_config
from tests.lerobot_policy_foresight.miniature import lerobot_train, observation, run_options
from tests.synthetic import make_dataset
from tests.tiny import BATCH_NORM_TOWER, tiny_config, tiny_processor

RANK = 3
ROBOT = {"action_dim": 4, "binary_action_indices": (2,), "state_dim": 5, "binary_state_indices": ()}
# Statistics that are not those of the dataset.
BASE_STATS = {
    name: {"mean": [0.1] * size, "std": [0.5] * size, "min": [-1.0] * size, "max": [1.0] * size}
    for name, size in (("action_stats", 4), ("state_stats", 5))
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base that both libraries read and two steps of `lerobot-train --peft.*` on it."""
    root = tmp_path_factory.mktemp("peft")
    facts = make_dataset(root / "data", use_videos=False, action_dim=4, state_dim=5, frames=[11, 13])
    # A tower with running statistics, which are no parameters.
    tower = {"vision_config": BATCH_NORM_TOWER, "freeze_vision": False}
    config = tiny_config(history_length=4, future_shift=2, initializer_range=0.3, **tower, **ROBOT)
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(root / "base")
    tiny_processor(config, **BASE_STATS).save_pretrained(root / "base")
    write_lerobot_files(root / "base")
    lerobot_train(
        f"--policy.path={root / 'base'}",
        "--peft.method_type=LORA",
        f"--peft.r={RANK}",
        "--policy.optimizer_lr=0.05",
        "--policy.scheduler_warmup_steps=0",
        *run_options(facts.root, root / "run"),
    )
    last = root / "run" / "checkpoints" / "last" / "pretrained_model"
    stats = LeRobotDataset("local/synthetic", root=facts.root).meta.stats
    return SimpleNamespace(facts=facts, stats=stats, base=root / "base", folder=last.resolve())


def load_adapted(adapted, folder=None):
    """Policy with its adapter and its pipelines, as `lerobot-eval` loads them: without a dataset."""
    config = PreTrainedConfig.from_pretrained(folder or adapted.folder)
    config.pretrained_path = folder or adapted.folder
    robot = SimpleNamespace(features=config.input_features | config.output_features, features_map={})
    robot.features_map = {key: key for key in robot.features}
    policy = make_policy(config, env_cfg=robot).eval()
    return policy, *make_pre_post_processors(config, str(config.pretrained_path))


def acts(policy, before, after, facts):
    """What the policy does in two episodes, `(steps, 2, A)`."""
    policy.reset()
    steps = [observation(facts, t, (0, 1)) for t in range(3)]
    return torch.stack([after(policy.select_action(before(seen))) for seen in steps])


def test_only_the_adapter_is_saved_and_no_tower_is_in_it(adapted):
    names = {file.name for file in adapted.folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= names
    assert {"processor_config.json", "tokenizer.json", "policy_preprocessor.json"} <= names
    assert "model.safetensors" not in names
    weights = load_file(adapted.folder / "adapter_model.safetensors")
    assert not any("text_encoder" in name or "vision_encoder" in name for name in weights)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in weights.items())
    assert any(name.endswith("action_decoder.predict_continuous.weight") for name in weights)
    config = json.loads((adapted.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(adapted.base) and config["r"] == RANK


def test_the_adapter_goes_by_the_statistics_of_its_own_data(adapted):
    policy, before, after = load_adapted(adapted)
    expected = torch.as_tensor(adapted.stats["action"]["mean"]).float()
    torch.testing.assert_close(torch.tensor(policy.processor.action_stats["mean"]), expected)
    torch.testing.assert_close(torch.as_tensor(after.steps[0].stats["action"]["mean"]).float(), expected)


def test_a_merged_adapter_is_a_folder_of_both_libraries_and_acts_the_same(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["lerobot_policy_foresight", str(adapted.folder), "--merge", str(tmp_path / "merged")]
    )
    main()
    policy = LeRobotForesightPolicy.from_pretrained(tmp_path / "merged")
    assert not policy.config.use_peft
    pipelines = make_pre_post_processors(policy.config, str(tmp_path / "merged"))
    merged = acts(policy, *pipelines, adapted.facts)
    with_adapter = acts(*load_adapted(adapted), adapted.facts)
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-5)
    base = acts(LeRobotForesightPolicy.from_pretrained(adapted.base), *pipelines, adapted.facts)
    assert (base - merged).abs().max() > 1e-2  # or the adapter would not matter
    weights = AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    assert [n for n, t in policy.model.state_dict().items() if not torch.equal(t, weights[n])] == []
    before = AutoModel.from_pretrained(adapted.base).state_dict()
    tower = [name for name in before if "vision_encoder" in name]
    assert any("running_mean" in name for name in tower)
    assert [name for name in tower if not torch.equal(before[name], weights[name])] == []


def test_an_adapter_whose_cameras_are_renamed_stays_one(adapted, tmp_path):
    folder = shutil.copytree(adapted.folder, tmp_path / "adapter")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_action_steps": 2}))
    before = PreTrainedConfig.from_pretrained(folder)
    write_lerobot_files(folder, {"wrist": "observation.images.hand"})
    after = PreTrainedConfig.from_pretrained(folder)
    assert after.use_peft and after.n_action_steps == 2
    assert after.cameras == {**before.cameras, "wrist": "observation.images.hand"}
    assert "observation.images.hand" in after.input_features
    after.cameras, after.input_features = before.cameras, before.input_features
    assert after == before
    load_adapted(adapted, folder)


def test_the_adapter_fits_the_model_that_transformers_opens(adapted):
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(adapted.base), adapted.folder)
    merged = model.merge_and_unload().state_dict()
    policy, _, _ = load_adapted(adapted)
    expected = policy.merge_and_unload().model.state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


def test_an_adapter_of_the_trainer_fits_the_policy(adapted, tmp_path):
    model = ForesightForActionPrediction.from_pretrained(adapted.base)
    model = get_peft_model(model, lora_config(model, r=RANK, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(LeRobotForesightPolicy.from_pretrained(adapted.base), tmp_path)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in policy.merge_and_unload().model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_opening_an_adapter_as_a_whole_policy_names_the_remedy(adapted):
    with pytest.raises(ValueError, match="is an adapter.*make_policy.*--merge"):
        LeRobotForesightPolicy.from_pretrained(adapted.folder)
    with pytest.raises(ValueError, match="is an adapter.*PeftModel.from_pretrained"):
        AutoModel.from_pretrained(adapted.folder)


def test_an_adapters_run_resumes(adapted, tmp_path):
    run = shutil.copytree(adapted.folder.parents[2], tmp_path / "run", symlinks=True)
    at = run / "checkpoints" / "000002" / "pretrained_model" / "train_config.json"
    lerobot_train(f"--config_path={at}", "--resume=true", f"--output_dir={run}", "--steps=3")
    new = run / "checkpoints" / "000003" / "pretrained_model"
    old, weights = (load_file(folder / "adapter_model.safetensors") for folder in (at.parent, new))
    assert old.keys() == weights.keys() and any(not torch.equal(old[name], weights[name]) for name in old)
    config = json.loads((new / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(adapted.base)
    assert (acts(*load_adapted(adapted, new), adapted.facts)).isfinite().all()


def test_towers_are_left_out_whatever_layers_are_chosen(adapted):
    policy = LeRobotForesightPolicy.from_pretrained(adapted.base)
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"target_modules": ["q_proj", "query"], "r": RANK})
    adapters = [name for name, p in wrapped.named_parameters() if "lora_" in name]
    assert adapters and not any("_encoder.tower" in name for name in adapters)
    assert all(
        "lora_" in n or "modules_to_save" in n for n, p in wrapped.named_parameters() if p.requires_grad
    )
