"""LoRA as a user runs it: an adapter trained on a base, resumed, loaded, merged; refused where it must be."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.lora import LORA_TARGETS, lora_config
from tests.synthetic import make_dataset
from tests.tiny import BATCH_NORM_TOWER, tiny_batch, tiny_config, tiny_inputs
from tests.training.test_train import TINY, command, environment, log_lines
from training.config_reading import load_config
from training.loop import train
from training.models.adapters import load_adapter
from training.models.model_folder import load_checkpoint

STEPS, RANK = 4, 3
LORA = ["--lora.r", str(RANK), "--lora.dropout", "0.1", "--train.steps", str(STEPS)]
NO_LORA = ["--lora.r", "0", "--lora.dropout", "0"]
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "foresight_adapter.json"}


@pytest.fixture(autouse=True)
def fresh_accelerate(cache, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(cache))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two datasets of one robot, a config, a base trained on the first and an adapter on the second."""
    root = tmp_path_factory.mktemp("lora")
    sizes = {"cameras": ("front", "side"), "size": (32, 40), "fps": 10}
    make_dataset(root / "first", episodes=2, frames=8, **sizes)
    make_dataset(root / "second", episodes=4, frames=11, **{**sizes, "fps": 5})
    # A tower with running statistics, which are no parameters.
    model = {**TINY["model"], "vision_config": BATCH_NORM_TOWER}
    settings = {**TINY, "model": model, "train": {**TINY["train"], "checkpoint_every": 2, "val_every": 0}}
    (root / "base.yaml").write_text(yaml.safe_dump(settings))
    (root / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "model"}))
    arguments = ["--dataset", str(root / "first"), "--output", str(root / "base"), "--train.steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORESIGHT_CACHE", str(root / "cache"))
        AcceleratorState._reset_state(reset_partial_state=True)
        train(load_config(root / "base.yaml", [*arguments, "--data.val_fraction", "0"]), False)
        run(root, root / "adapter", "--lora.merge", "true")
    return root


def run(work, output, *flags, base=None, dataset=None, resume=False) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    places = ["--dataset", str(dataset or work / "second"), "--output", str(output)]
    places += ["--init_from", str(base or work / "base" / "model")]
    return train(load_config(work / "tiny.yaml", [*places, *LORA, *flags]), resume)


def observation(work, seed=0) -> dict:
    """A model batch of the dataset's robot."""
    generator = torch.Generator().manual_seed(seed)
    processor = AutoProcessor.from_pretrained(work / "adapter" / "model")
    images = {
        view: torch.randint(0, 256, (2, 3, 32, 40, 3), generator=generator, dtype=torch.uint8)
        for view in ("front", "side")
    }
    return processor(images=images, text=["open the drawer", "close it"], state=torch.rand(2, 3, 3))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_run_exports_the_adapter_alone_and_names_its_base(work):
    folder, base = work / "adapter" / "model", work / "base" / "model"
    names = {file.name for file in folder.iterdir()}
    assert names >= ADAPTER_FILES | {"processor_config.json", "tokenizer.json"}
    assert not names & {"config.json", "model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == RANK

    tensors = load_file(folder / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in tensors.items())
    assert not any("text_encoder" in name or "vision_encoder" in name for name in tensors)
    assert any(name.endswith("action_decoder.predict_continuous.weight") for name in tensors)
    summary = json.loads((work / "adapter" / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert summary["lora"]["r"] == RANK


def test_checkpoints_hold_the_adapter_alone_and_name_their_base(work):
    for step in (2, 4):
        checkpoint = work / "adapter" / "checkpoints" / f"step-{step:07d}"
        names = {file.name for file in checkpoint.iterdir()}
        assert names >= ADAPTER_FILES | {"optimizer.bin"} and "model.safetensors" not in names
        trained = sum(t.nbytes for t in load_file(checkpoint / "adapter_model.safetensors").values())
        assert size(checkpoint) < 3 * trained + 300_000  # adapter, two moments, names and states
        facts = json.loads((checkpoint / "foresight_adapter.json").read_text())
        assert facts["base_model"] == str(work / "base" / "model") and len(facts["base_weights_sha256"]) == 64


def test_an_adapter_of_the_papers_size_is_a_few_megabytes():
    with torch.device("meta"):
        model = ForesightForActionPrediction(ForesightConfig())
        model = get_peft_model(model, lora_config(model, r=16))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 1e6 < 4 * trained < 12e6


def test_training_an_adapter_changes_no_bit_of_the_base(work, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(work / "base" / "model", base)
    before = digest(base)
    run(work, tmp_path / "run", "--train.steps", "1", base=base)
    assert digest(base) == before

    model = AutoModel.from_pretrained(base)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, tmp_path / "run" / "model").unload()
    saved = ("embed_state", "predict_continuous", "predict_binary")
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, expected[name]) or any(part in name for part in saved), name


def test_resuming_gives_the_adapter_of_an_uninterrupted_run(work, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(work / "adapter", broken)
    shutil.rmtree(broken / "checkpoints" / f"step-{STEPS:07d}")
    shutil.rmtree(broken / "model")
    (broken / "summary.json").unlink()
    assert run(work, broken, "--lora.merge", "true", resume=True) == 0
    expected, resumed = (
        load_file(folder / "model" / "adapter_model.safetensors") for folder in (work / "adapter", broken)
    )
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    base = load_file(work / "base" / "model" / "model.safetensors")
    merged = load_file(broken / "model-merged" / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any("running_mean" in name for name in base)
    assert moved and not any("vision_encoder" in name or "text_encoder" in name for name in moved)
    losses = [[line["loss"] for line in log_lines(folder)] for folder in (work / "adapter", broken)]
    assert losses[0] == losses[1]


def test_resuming_on_a_changed_base_is_refused(work, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(work / "base" / "model", base)
    run(work, tmp_path / "run", "--train.steps", "1", base=base)
    (tmp_path / "run" / "summary.json").unlink()
    change_weights(base)
    with pytest.raises(ValueError, match="other weights than .*base has now.*--output"):
        run(work, tmp_path / "run", "--train.steps", "1", base=base, resume=True)


def test_a_run_continues_on_the_commit_of_its_base_when_the_branch_has_moved(work, tmp_path, monkeypatch):
    repo, begun, moved = tmp_path / "hub" / "models--you--base", "a" * 40, "b" * 40  # the Hub's cache
    for commit in (begun, moved):
        shutil.copytree(work / "base" / "model", repo / "snapshots" / commit)
    change_weights(repo / "snapshots" / moved)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(begun)
    for module in (huggingface_hub.constants, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    run(work, tmp_path / "run", "--train.steps", "1", base="you/base")
    (repo / "refs" / "main").write_text(moved)
    for named in ([], ["--init_revision", "main"]):
        (tmp_path / "run" / "summary.json").unlink(missing_ok=True)
        again = ("--train.steps", "1", *named)
        assert run(work, tmp_path / "run", *again, base="you/base", resume=True) == 0
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["init_revision"] == begun


def test_every_way_of_loading_gives_the_same_actions(work):
    folder, batch = work / "adapter" / "model", observation(work)
    base = AutoModel.from_pretrained(work / "base" / "model").eval()
    untouched = base.predict_action(**batch)
    adapted = PeftModel.from_pretrained(base, folder)
    actions = adapted.predict_action(**batch)
    assert (actions - untouched).abs().max() > 1e-3

    loaded, processor = load_checkpoint(folder)
    assert type(loaded) is ForesightForActionPrediction and loaded.config.fps == 5
    exported, _ = load_checkpoint(work / "adapter" / "model-merged")
    for model in (adapted.merge_and_unload(), loaded, exported):
        torch.testing.assert_close(model.predict_action(**batch), actions, atol=2e-6, rtol=0)
    assert exported.config.fps == 5
    assert processor.action_stats == AutoProcessor.from_pretrained(folder).action_stats


def test_merging_leaves_every_output_within_float_tolerance(work):
    folder, batch = work / "adapter" / "model", observation(work)
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(work / "base" / "model"), folder)
    with torch.no_grad():
        before = adapted(**batch)
        after = adapted.merge_and_unload()(**batch)
    for name in ("actions", "depth", "future_rgb", "future_depth", "flow", "progress"):
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)


def test_an_adapter_serves_a_base_without_auxiliary_heads(work):
    folder, batch = work / "adapter" / "model", observation(work)
    whole = PeftModel.from_pretrained(AutoModel.from_pretrained(work / "base" / "model"), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acting = AutoModel.from_pretrained(work / "base" / "model", auxiliary_heads=False)
        acting = PeftModel.from_pretrained(acting, folder)
    assert not hasattr(acting.get_base_model(), "depth_decoder")
    expected = whole.predict_action(**batch)
    torch.testing.assert_close(acting.predict_action(**batch), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(acting.merge_and_unload().predict_action(**batch), expected, atol=2e-6, rtol=0)


def test_ways_that_would_load_a_part_say_how_to_load_all(work):
    folder = work / "adapter" / "model"
    remedy = "load only a part.*PeftModel.from_pretrained"
    with pytest.raises(ValueError, match=remedy):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=remedy):
        AutoModel.from_pretrained(work / "base" / "model").load_adapter(folder)


def test_a_missing_or_changed_base_is_named(work, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(work / "base" / "model", base)
    shutil.copytree(work / "adapter" / "model", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    load_checkpoint(tmp_path / "adapter")  # the same weights elsewhere are the same base
    change_weights(base)
    with pytest.raises(ValueError, match="base .*base has other weights"):
        load_checkpoint(tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="base .*base cannot be loaded.*adapter_config.json"):
        load_checkpoint(tmp_path / "adapter")


def test_an_adapter_that_names_a_module_to_import_is_refused(tmp_path):
    config = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names code in megatron_core"):
        load_adapter(str(tmp_path))


def test_an_adapter_of_the_hub_may_not_name_a_folder_here(tmp_path, monkeypatch):
    config = PeftConfig(base_model_name_or_path=str(tmp_path))
    monkeypatch.setattr("training.models.adapters.PeftConfig.from_pretrained", lambda *_, **__: config)
    with pytest.raises(
        ValueError, match=r"v/adapter of the Hub names a folder of this machine.*correct base"
    ):
        load_adapter("v/adapter")


def test_an_adapter_that_lacks_weights_is_refused(work, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(work / "adapter" / "model", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing adapter keys"):
        load_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_checkpoint(folder)


def test_statistics_are_the_datasets_unless_the_models_are_asked_for(work, tmp_path):
    base, own = (
        ForesightProcessor.from_pretrained(work / run / "model").action_stats for run in ("base", "adapter")
    )
    assert own != base
    run(work, tmp_path / "run", "--data.statistics", "model", "--train.steps", "1")
    assert ForesightProcessor.from_pretrained(tmp_path / "run" / "model").action_stats == base


@pytest.mark.parametrize(("name", "value"), [("std", 0.0), ("max", -1.0)])
def test_statistics_of_a_model_that_never_moved_what_moves_here_are_refused(work, tmp_path, name, value):
    base = shutil.copytree(work / "base" / "model", tmp_path / "base")
    config = json.loads((base / "processor_config.json").read_text())
    config["action_stats"]["min"][2], config["action_stats"][name][2] = -1.0, value
    config["binary_action_indices"] = [] if name == "std" else [2]
    (base / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"entries \[2\] of the action move.*data.statistics=dataset"):
        run(work, tmp_path / "run", "--data.statistics", "model", base=base)


@pytest.mark.parametrize("targets", [None, ["q_proj", "fc1"], "all-linear", r".*\.(q_proj|attn\.proj|fc2)"])
def test_no_choice_of_targets_reaches_into_the_towers(targets):
    timm = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "do_pooling": False}
    sizes = {"img_size": 40, "patch_size": 10, "embed_dim": 36, "depth": 1, "num_heads": 3}
    for vision in ({}, {"vision_config": {**timm, "model_args": sizes}}):
        model = ForesightForActionPrediction(tiny_config(**vision))
        adapted = get_peft_model(model, lora_config(model, r=RANK, target_modules=targets))
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert any("layers.1.self_attn.q_proj" in name for name in trained)
        assert not any("_encoder.tower" in name for name in trained)


def test_peft_finds_the_targets_of_a_config_without_any():
    model = ForesightForActionPrediction(tiny_config())
    names = get_peft_model(model, LoraConfig(r=RANK)).base_model.targeted_module_names
    # 6 layers in each of 2 blocks; 4 in each of 2 in the depth, image, flow, action and progress decoders and
    # in the action encoder.
    assert len(names) == 2 * 6 + 6 * 2 * 4
    linear = ForesightForActionPrediction(tiny_config(action_head="linear", chunk_size=1))
    names = get_peft_model(linear, LoraConfig(r=RANK)).base_model.targeted_module_names
    assert {"action_decoder.shared.0", "action_decoder.shared.1"} <= set(names)


def test_the_targets_are_the_same_inside_a_wrapper():
    model = ForesightForActionPrediction(tiny_config())
    names = [name for name, _ in model.named_modules()]
    matching = {name for name in names if re.fullmatch(LORA_TARGETS, name)}
    assert 0 < len(matching) < len(names)
    assert {name for name in names if re.fullmatch(LORA_TARGETS, f"policy.{name}")} == matching


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_a_name_that_no_module_has_is_refused(option):
    model = ForesightForActionPrediction(tiny_config())
    with pytest.raises(ValueError, match=f"{option}.*q_projj"):
        lora_config(model, **{option: ["q_projj"]})


def test_everything_trained_gets_a_gradient_with_and_without_targets():
    config = tiny_config(attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(1)
    model = ForesightForActionPrediction(config)
    model = get_peft_model(model, lora_config(model, r=RANK)).train()
    batch = tiny_batch(config)
    only_actions = tiny_inputs(config) | {"actions": batch["actions"]}
    noise = torch.randn(*batch["actions"].shape[:2], config.latent_dim)
    gradients = {}
    for name, inputs, checkpointing in (
        ("all", batch, False),
        ("actions", only_actions, False),
        ("checkpointed", batch, True),
    ):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, style_noise=noise).loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in trained.values())
        gradients[name] = {n: g.clone() for n, g in trained.items()}
    for name, expected in gradients["all"].items():
        torch.testing.assert_close(gradients["checkpointed"][name], expected, atol=1e-6, rtol=1e-4)
    assert any("layers.0" in name and g.abs().max() > 0 for name, g in gradients["all"].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from", "null"], "lora.r adapts a trained model.*--init_from"),
        (["--lora.r", "0"], "without a rank.*--lora.r 16"),
        (["--lora.r", "-1"], "lora.r=-1"),
        (["--lora.dropout", "1.5"], "lora.dropout=1.5"),
        (["--lora.rank", "3"], "lora.rank is unknown"),
        (["--lora.alpha", "0"], "lora.alpha is 0.*above 0"),
        (["--lora.modules_to_save", "[embed_views]"], "'embed_views', which is a list.*name embed_views.0"),
        (["--init_revision", "v1", "--init_from", "null", *NO_LORA], "init_revision belongs"),
        (["--model.hidden_size", "48"], "model.hidden_size cannot change"),
        (["--lora.target_modules", "[q_projj]"], "target_modules.*q_projj"),
        (["--data.statistics", "mean"], "data.statistics is 'mean'"),
        (["--data.statistics", "model", "--init_from", "null", *NO_LORA], "data.statistics=model needs"),
    ],
)
def test_bad_settings_are_named_before_training(work, tmp_path, flags, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(work, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_adapter_is_no_base(work, tmp_path):
    with pytest.raises(ValueError, match="is an adapter, not a model.*--resume.*--lora.merge"):
        run(work, tmp_path / "run", base=work / "adapter" / "model")


def test_a_robot_of_other_sizes_is_refused(work, tmp_path):
    sizes = {"cameras": ("front", "side"), "size": (32, 40), "action_dim": 6}
    make_dataset(tmp_path / "other", episodes=2, frames=8, **sizes)
    with pytest.raises(ValueError, match="actions of 4 entries, the dataset's have 6"):
        run(work, tmp_path / "run", dataset=tmp_path / "other")


def test_loss_weights_may_change_under_an_adapter(work, tmp_path):
    assert run(work, tmp_path / "run", "--model.depth_loss_weight", "0.2", "--train.steps", "1") == 0


def test_an_adapter_stays_float32_in_mixed_precision_with_checkpointing(work, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run_state.has_bfloat16", lambda device: True)
    flags = ["--train.mixed_precision", "bf16", "--train.gradient_checkpointing", "true"]
    assert run(work, tmp_path / "run", "--train.steps", "2", *flags) == 0
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any("layers.0" in name and "lora_B" in name and t.abs().max() > 0 for name, t in tensors.items())


def test_the_named_run_for_a_few_demonstrations_is_complete_but_for_places():
    config = load_config(Path("training/configs/lora_custom.yaml"), ["--init_from", "me/base"])
    assert config.lora.r == 16 and config.data.missing_targets and not config.model


@pytest.mark.slow  # two processes are launched
def test_two_processes_train_one_adapter(work, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    plain = make_dataset(  # without labels: the heads that have nothing to learn must not hold up the others
        tmp_path / "plain",
        episodes=4,
        frames=8,
        cameras=("front", "side"),
        size=(32, 32),
        depth=False,
        tracks=False,
    )
    flags = ["--init_from", str(work / "base" / "model"), *LORA, "--data.missing_targets", "true"]
    # A second step, because a parameter without gradient is noticed there.
    flags += ["--train.steps", "2", "--train.warmup_steps", "0", "--data.val_fraction", "0"]
    arguments = command(work / "tiny.yaml", plain.root, tmp_path / "run", *flags)
    result = subprocess.run(
        [*launch, *arguments], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "a folder that other machines do not have" in result.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["processes"] == 2
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    learnt = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert any("model.layers.0" in name for name in learnt)
    assert not any("depth_decoder" in name or "flow_decoder" in name for name in learnt)
