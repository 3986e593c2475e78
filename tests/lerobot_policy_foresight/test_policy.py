"""3D Foresight as LeRobot sees it: found, trained, resumed, loaded; its folder shared with transformers."""

import importlib.metadata
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_policy
from lerobot.utils.import_utils import register_third_party_plugins
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel

from lerobot_policy_foresight import LeRobotForesightConfig
from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from lerobot_policy_foresight.lerobot_version import TESTED_LEROBOT
from lerobot_policy_foresight.window_reading import WindowReader
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from tests.lerobot_policy_foresight.miniature import (
    assert_same_actions,
    lerobot_train,
    load_policy,
    observation,
    policy_options,
    run_options,
    small_model,
)
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from tests.tiny_pipeline import save_tiny_pipeline
from training.config import TrainConfig
from training.windows import ForesightWindows, WindowConfig, collate_windows

# Initial weights with which a fresh model's action depends on what it sees.
ATTENTIVE = {"initializer_range": 0.3, "embedding_initializer_range": 0.02}
NO_FLOW = ["action", "depth", "future", "progress"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of `lerobot-train` on a dataset with depth and tracks: dataset, run and checkpoint folder."""
    root = tmp_path_factory.mktemp("lerobot")
    facts = make_dataset(root / "data", use_videos=False, action_dim=4, state_dim=5, frames=[11, 13])
    model = small_model(binary_action_indices=[2], **ATTENTIVE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lerobot_train(*policy_options(model), *run_options(facts.root, root / "run"))
    said = [str(warning.message) for warning in caught if "are not trained" in str(warning.message)]
    last = root / "run" / "checkpoints" / "last" / "pretrained_model"
    return SimpleNamespace(facts=facts, folder=last.resolve(), warnings=said)


@pytest.fixture
def copied(trained, tmp_path):
    """A checkpoint of one's own, to damage."""
    return shutil.copytree(trained.folder, tmp_path / "copy")


def dataset_for(config, root):
    """The dataset with the windows that the config asks for."""
    meta = LeRobotDataset("local/synthetic", root=root).meta
    return LeRobotDataset(
        "local/synthetic", root=root, delta_timestamps=resolve_delta_timestamps(config, meta)
    )


def test_lerobot_discovers_the_policy_by_its_own_means():
    register_third_party_plugins()
    assert "foresight" in PreTrainedConfig.get_known_choices()
    assert get_policy_class("foresight").config_class is PreTrainedConfig.get_choice_class("foresight")


def test_a_dataset_with_all_labels_trains_all_objectives_without_a_warning(trained):
    assert trained.warnings == []


def test_labels_are_not_inputs_of_the_policy(trained):
    config = PreTrainedConfig.from_pretrained(trained.folder)
    assert list(config.input_features) == [
        "observation.images.main",
        "observation.images.wrist",
        "observation.state",
    ]
    assert config.cameras == {"main": "observation.images.main", "wrist": "observation.images.wrist"}
    assert (config.chunk_size, config.n_obs_steps, config.action_dim) == (4, 4, 4)


def test_a_folder_of_lerobot_opens_with_transformers_and_acts_the_same(trained):
    assert_same_actions(trained.folder, trained.facts)


def test_a_folder_of_transformers_opens_with_lerobot_and_acts_the_same(trained, tmp_path):
    robot = {"action_dim": 4, "state_dim": 5, "binary_state_indices": ()}
    config = tiny_config(history_length=4, future_shift=2, **robot, **ATTENTIVE)
    stats = LeRobotDataset("local/synthetic", root=trained.facts.root).meta.stats
    torch.manual_seed(0)
    model, folder = ForesightForActionPrediction(config), tmp_path / "model"
    model.save_pretrained(folder)
    tiny_processor(
        config, action_stats=stats["action"], state_stats=stats["observation.state"]
    ).save_pretrained(folder)
    before = AutoConfig.from_pretrained(folder).to_dict() | {"dtype": None}  # LeRobot's has another meaning
    write_lerobot_files(folder)
    after = AutoConfig.from_pretrained(folder)
    assert {name: after.to_dict()[name] for name in before} == before
    assert callable(after.push_to_hub)  # no setting of LeRobot took its place
    assert_same_actions(folder, trained.facts)


def test_transformers_passes_lerobots_fields_on(trained, tmp_path):
    AutoConfig.from_pretrained(trained.folder).save_pretrained(tmp_path)
    one, other = (PreTrainedConfig.from_pretrained(folder) for folder in (trained.folder, tmp_path))
    assert one == other


def test_a_run_resumes(trained, tmp_path):
    run = shutil.copytree(trained.folder.parents[2], tmp_path / "run", symlinks=True)
    at = run / "checkpoints" / "000002" / "pretrained_model" / "train_config.json"
    lerobot_train(f"--config_path={at}", "--resume=true", f"--output_dir={run}", "--steps=3")
    saved = run / "checkpoints" / "000003"
    assert json.loads((saved / "training_state" / "training_step.json").read_text())["step"] == 3
    old, new = (load_file(folder / "model.safetensors") for folder in (at.parent, saved / "pretrained_model"))
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_a_run_that_is_repeated_from_its_file_gives_the_same_weights(trained, tmp_path):
    at = trained.folder / "train_config.json"
    lerobot_train(f"--config_path={at}", f"--output_dir={tmp_path / 'run'}")
    last = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    old, new = (load_file(folder / "model.safetensors") for folder in (trained.folder, last))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_run_does_not_resume_on_data_with_other_statistics(trained, tmp_path):
    run = shutil.copytree(trained.folder.parents[2], tmp_path / "run", symlinks=True)
    root = shutil.copytree(trained.facts.root, tmp_path / "data")
    stats = json.loads((root / "meta" / "stats.json").read_text())
    stats["action"]["mean"][0] += 1  # as after more episodes
    (root / "meta" / "stats.json").write_text(json.dumps(stats))
    at = run / "checkpoints" / "000002" / "pretrained_model" / "train_config.json"
    options = [f"--config_path={at}", f"--dataset.root={root}", "--steps=3"]
    with pytest.raises(ValueError, match="other statistics than when the run .* began.*--policy.path"):
        lerobot_train(*options, "--resume=true", f"--output_dir={run}")
    more = [f"--policy.path={at.parent}", *run_options(root, tmp_path / "more"), "--steps=1"]
    lerobot_train(*more)  # as the message says


def test_options_of_the_hub_reach_every_file(trained, monkeypatch):
    asked = []
    for kind in (ForesightProcessor, PreTrainedConfig):
        load = kind.from_pretrained
        noted = lambda *args, load=load, **kwargs: asked.append(kwargs) or load(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(kind, "from_pretrained", noted)
    load_policy(trained.folder, token="secret", cache_dir="here", revision="v1")
    assert len(asked) == 2
    assert all((a["token"], a["cache_dir"], a["revision"]) == ("secret", "here", "v1") for a in asked)


@pytest.mark.parametrize("damage", ["lacks", "holds"])
def test_missing_and_unexpected_weights_are_refused(copied, damage):
    weights = load_file(copied / "model.safetensors")
    if damage == "lacks":
        weights.pop(next(name for name in weights if "action_decoder" in name))
    else:
        weights["model.stranger.weight"] = torch.zeros(3)
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{damage} weights.*(action_decoder|stranger)"):
        load_policy(copied)


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_pipeline_that_would_run_a_program_is_refused_before_it_runs(copied, tmp_path, name):
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(tmp_path / "ran")]}}
    (copied / name).write_text(json.dumps({"name": "pipeline", "steps": [step]}))
    with pytest.raises(ValueError, match=rf"{name} of {copied} has steps .*: subprocess.Popen"):
        load_policy(copied)
    assert not (tmp_path / "ran").exists()


def loaded_for(policy, facts, places) -> dict:
    """Frames of the dataset as a data loader of `lerobot-train` reads them."""
    data = dataset_for(policy.config, facts.root)
    policy.windows = WindowReader(data.meta, policy.config.cameras, policy.model.config, "auto")
    policy.windows.attach()
    return next(iter(DataLoader(data, len(places), sampler=places)))


def test_the_loss_is_that_of_the_trainer_on_the_same_windows(trained):
    policy, before, _ = load_policy(trained.folder)
    policy.model.config.objectives = NO_FLOW
    config = policy.model.config
    windows = ForesightWindows(
        trained.facts.root,
        WindowConfig(
            views=tuple(config.views),
            objectives=tuple(NO_FLOW),
            history_length=config.history_length,
            chunk_size=config.chunk_size,
            random_shift=0.0,
        ),
    )
    samples = [windows[i] for i in (0, len(windows) // 2, len(windows) - 1)]
    batch = before(loaded_for(policy, trained.facts, [int(sample["index"]) for sample in samples]))
    theirs = collate_windows(samples)
    ours = policy.windows.read_batch(batch)
    for name in ("images", "depth", "state", "actions", "action_mask", "frame_mask", "progress"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)
    loss, parts = policy.forward(batch)
    expected = policy.model(**policy.processor.prepare_batch(theirs, history_length=config.history_length))
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)
    assert set(parts) == {f"{name}_loss" for name in expected.losses} and parts["depth_loss"] > 0


def test_every_sample_can_have_its_own_loss(trained):
    policy, before, _ = load_policy(trained.folder)
    policy.model.config.objectives = NO_FLOW  # whose points are drawn
    places = (1, 8, 15)
    batch = before(loaded_for(policy, trained.facts, places))
    losses, parts = policy.forward(batch, reduction="none")
    alone = [policy.forward(before(loaded_for(policy, trained.facts, [place])))[0] for place in places]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert losses.shape == (3,) and losses.requires_grad and "action_loss" in parts
    with pytest.raises(ValueError, match="reduction='sum'.*'mean' or 'none'"):
        policy.forward(batch, reduction="sum")


def test_a_policy_that_was_made_for_no_dataset_says_that_it_cannot_train(trained):
    policy, before, _ = load_policy(trained.folder)
    with pytest.raises(ValueError, match="make it for a dataset"):
        policy.forward(before(observation(trained.facts, 0, (0, 1))))


def test_statistics_of_new_data_reach_the_processor(trained):
    meta = LeRobotDataset("local/synthetic", root=trained.facts.root).meta
    other = {key: {name: value + 1 for name, value in stats.items()} for key, stats in meta.stats.items()}
    policy, *_ = load_policy(trained.folder, dataset_stats=other)
    assert policy.processor.action_stats["mean"] == pytest.approx(other["action"]["mean"].tolist())
    renamed = {"action": other["action"]}
    with pytest.raises(ValueError, match=r"no statistics of \['observation.state'\]"):
        load_policy(trained.folder, dataset_stats=renamed)


def test_what_does_not_fit_the_policy_is_named(trained):
    policy, before, _ = load_policy(trained.folder)
    seen = observation(trained.facts, 0, (0,))
    for absent, message in (
        ("observation.images.wrist", "lacks 'observation.images.wrist'"),
        ("observation.state", "lacks 'observation.state'"),
        ("task", "0 instructions"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.select_action({key: value for key, value in before(seen).items() if key != absent})
    unbatched = before(seen) | {"observation.images.main": torch.zeros(3, 48, 48)}
    with pytest.raises(ValueError, match=r"images.main has shape \(3, 48, 48\); expected \(environments, 3"):
        policy.select_action(unbatched)
    for value in (float("nan"), float("inf")):
        broken = before(seen)
        broken["observation.images.main"][0, 1, 2, 3] = value
        with pytest.raises(ValueError, match="images.main holds NaN or infinite values"):
            policy.select_action(broken)
    for scale, shift in ((255, 0), (2, -1.5)):
        other = before(seen)
        other["observation.images.main"] = torch.rand(2, 3, 48, 48) * scale + shift
        with pytest.raises(ValueError, match=r"images.main holds values from .*neither 0..255 nor stand"):
            policy.select_action(other)
    meta = LeRobotDataset("local/synthetic", root=trained.facts.root).meta
    meta.info.fps = 31
    with pytest.raises(ValueError, match="31 frames per second; the policy learned from 20"):
        load_policy(trained.folder, dataset_meta=meta, dataset_stats=meta.stats)
    meta.info.fps, meta.features["observation.state"]["shape"] = 20, (9,)
    with pytest.raises(ValueError, match=r"state has shape \(9,\); the policy was made for 5"):
        load_policy(trained.folder, dataset_meta=meta, dataset_stats=meta.stats)
    meta = LeRobotDataset("local/synthetic", root=trained.facts.root).meta
    with pytest.raises(ValueError, match="fps=7, but the dataset has 20 frames per second"):
        make_policy(LeRobotForesightConfig(device="cpu", **small_model(fps=7)), ds_meta=meta)
    config = PreTrainedConfig.from_pretrained(trained.folder)
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (6,))}
    with pytest.raises(ValueError, match=r"action has shape \(6,\), but the policy was made for 4"):
        config.validate_features()


def test_a_policy_that_is_cast_acts_again_after_a_reset(trained):
    policy, before, _ = load_policy(trained.folder)
    policy.config.compile_model = True  # whose stream a reset keeps; nothing is compiled before a step
    seen = before(observation(trained.facts, 0, (0, 1)))
    policy._update_stream(["open it", "push it"])
    policy.to(torch.float64)
    policy.reset()
    policy.config.compile_model = False
    assert policy.select_action(seen).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_weights_is_not_taken_for_the_precision_of_training(trained, tmp_path, dtype):
    AutoModel.from_pretrained(trained.folder).to(dtype).save_pretrained(tmp_path)
    ForesightProcessor.from_pretrained(trained.folder).save_pretrained(tmp_path)
    write_lerobot_files(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path).dtype == LeRobotForesightConfig().dtype
    assert AutoModel.from_pretrained(tmp_path).dtype == dtype


def test_an_instruction_that_changes_restarts_its_environment(trained):
    policy, before, _ = load_policy(trained.folder)
    steps = [observation(trained.facts, t, (0, 1)) for t in range(3)]
    steps[2]["task"] = [steps[2]["task"][0], "push it"]
    for seen in steps:
        last = policy.select_action(before(seen))
    policy.reset()
    alone = policy.select_action(before(steps[2]))
    torch.testing.assert_close(last[1], alone[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(last[0], alone[0], rtol=1e-4, atol=1e-5)


def test_several_actions_of_a_chunk_are_executed_and_every_observation_is_seen(trained):
    policy, before, after = load_policy(trained.folder)
    policy.config.n_action_steps = 2
    model, processor = policy.model, policy.processor
    stream = model.stream(processor, num_envs=2)
    stream.reset([trained.facts.task(e) for e in (0, 1)])
    expected, given = [], []
    for t in range(6):
        seen = observation(trained.facts, t, (0, 1))
        images = {
            view: (seen[f"observation.images.{view}"] * 255).round().byte() for view in model.config.views
        }
        chunk = stream.step_chunk(images, seen["observation.state"])
        if t % 2 == 0:
            expected += chunk[:, :2].unbind(1)
        given.append(after(policy.select_action(before(seen))))
    torch.testing.assert_close(torch.stack(given), torch.stack(expected), rtol=1e-4, atol=1e-5)
    policy.select_action(before(seen))
    policy.reset()
    assert policy._plan is None


def test_an_instruction_that_changes_ends_its_environments_plan_and_no_other(trained):
    policy, before, _ = load_policy(trained.folder)
    policy.config.n_action_steps = 3
    steps = [observation(trained.facts, t, (0, 1)) for t in range(6)]
    for step in steps[1:]:
        step["task"] = [step["task"][0], "push it"]
    given = torch.stack([policy.select_action(before(step)) for step in steps])
    for robot, first in ((0, 0), (1, 1)):
        policy.reset()
        alone = []
        for t in range(first, 6):
            own = {key: value[robot : robot + 1] for key, value in steps[t].items()}
            alone.append(policy.select_action(before(own))[0])
        torch.testing.assert_close(given[first:, robot], torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_one_instruction_is_that_of_every_environment(trained):
    policy, before, _ = load_policy(trained.folder)
    seen = observation(trained.facts, 0, (0, 1))
    expected = policy.select_action(before({**seen, "task": ["push it"] * 2}))
    policy.reset()
    torch.testing.assert_close(policy.select_action(before({**seen, "task": "push it"})), expected)


def test_a_policy_without_a_tower_is_refused_because_lerobot_gives_no_features():
    with pytest.raises(ValueError, match=r"towers=\['vision'\] lacks \['text'\]"):
        LeRobotForesightConfig(device="cpu", towers=["vision"])


def test_more_actions_than_a_chunk_has_are_refused():
    with pytest.raises(ValueError, match="n_action_steps=6 must be between 1 and chunk_size=5"):
        LeRobotForesightConfig(device="cpu", n_action_steps=6)


@pytest.mark.slow  # diffusion
def test_a_generator_gives_the_robots_goals_awaited_or_beside_the_loop(goal_extra, trained, tmp_path):
    robot = {"action_dim": 4, "state_dim": 5, "binary_state_indices": ()}
    config, folder = tiny_config(goal_image=True, **robot, **ATTENTIVE), tmp_path / "model"
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    write_lerobot_files(folder)
    generator, seen = save_tiny_pipeline(tmp_path / "generator"), observation(trained.facts, 0, (0, 1))
    actions = {}
    for name in ("without", "awaited", "beside"):
        policy, before, _ = load_policy(folder)
        policy.config.goal_generator = None if name == "without" else str(generator)
        policy.config.goal_background = name == "beside"
        actions[name] = policy.select_action(before(seen))
        source = policy._goal_source
        policy.reset()
        torch.testing.assert_close(policy.select_action(before(seen)), actions[name])
        assert policy._goal_source is source, "loaded once"
        policy.config._save_pretrained(tmp_path)
        assert "goal_generator" not in json.loads((tmp_path / "config.json").read_text())
        if name == "beside":
            source.close()
    torch.testing.assert_close(actions["awaited"], actions["beside"])
    assert (actions["awaited"] - actions["without"]).abs().max() > 1e-3


def test_a_generator_for_a_policy_that_reads_no_goals_is_refused():
    with pytest.raises(ValueError, match="goal_image=False"):
        LeRobotForesightConfig(device="cpu", goal_generator="outputs/goal_generator")


def test_the_presets_are_the_trainers_recipe():
    config = LeRobotForesightConfig(device="cpu", scheduler_warmup_steps=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = config.get_optimizer_preset().build([weight])
    schedule = config.get_scheduler_preset().build(optimizer, 10)
    rates = []
    for _ in range(11):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[3] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-5)
    ours, theirs = LeRobotForesightConfig(device="cpu"), TrainConfig()
    preset, plan = ours.get_optimizer_preset(), ours.get_scheduler_preset()
    assert (preset.lr, list(preset.betas)) == (theirs.learning_rate, theirs.betas)
    assert (preset.weight_decay, preset.grad_clip_norm) == (theirs.weight_decay, theirs.max_grad_norm)
    assert plan.num_warmup_steps == theirs.warmup_steps
    assert plan.min_lr_ratio == theirs.min_learning_rate_ratio


def test_another_lerobot_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.0")
    with pytest.raises(ImportError, match=r"tested with lerobot>=0.6.1,<0.7, but 0.7.0 is installed: pip"):
        LeRobotForesightConfig(device="cpu")
    with pytest.raises(SystemExit):
        lerobot_train("--policy.type=foresight", "--dataset.repo_id=local/none")
    assert "but 0.7.0 is installed" in capsys.readouterr().err


def test_the_tested_range_is_what_is_installed_with_the_project():
    needed = [Requirement(text) for text in importlib.metadata.requires("lerobot_policy_foresight")]
    assert {r.specifier for r in needed if r.name == "lerobot"} == {SpecifierSet(TESTED_LEROBOT)}


def test_parts_that_are_sharded_apart_are_in_the_model(trained):
    policy, _, _ = load_policy(trained.folder)
    there = {type(module).__name__ for module in policy.modules()}
    assert set(policy._fsdp_wrap_modules) <= there


def test_a_second_normalization_by_lerobot_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="STATE.*twice.*python -m lerobot_policy_foresight FOLDER"):
        LeRobotForesightConfig(device="cpu", normalization_mapping={"STATE": NormalizationMode.MEAN_STD})


def test_lerobots_pipelines_leave_numbers_alone_under_the_names_that_its_commands_override(trained):
    steps = [
        step
        for name in ("policy_preprocessor", "policy_postprocessor")
        for step in json.loads((trained.folder / f"{name}.json").read_text())["steps"]
    ]
    names = {step["registry_name"] for step in steps}
    assert names >= {
        "rename_observations_processor",
        "device_processor",
        "normalizer_processor",
        "unnormalizer_processor",
    }
    _, before, after = load_policy(trained.folder)
    seen = observation(trained.facts, 3, (0, 1))
    assert torch.equal(before(dict(seen))["observation.state"], seen["observation.state"])
    actions = torch.rand(2, 4)
    assert torch.equal(after(actions), actions)


def test_a_trained_policy_trains_on_with_other_cameras(trained, tmp_path):
    other = {"cameras": ("top",), "depth": False, "tracks": False, "state_dim": 5, "use_videos": False}
    facts = make_dataset(tmp_path / "data", episodes=1, **other)
    cameras = '--policy.cameras={"main": "observation.images.top", "wrist": null}'
    with pytest.warns(UserWarning, match="depth .no camera.*flow .no observation.points.top") as caught:
        lerobot_train(f"--policy.path={trained.folder}", cameras, *run_options(facts.root, tmp_path / "run"))
    assert sum("are not trained" in str(warning.message) for warning in caught) == 1
    config = PreTrainedConfig.from_pretrained(tmp_path / "run" / "checkpoints" / "last" / "pretrained_model")
    assert config.cameras == {"main": "observation.images.top"} and config.views == ["main", "wrist"]
    assert list(config.input_features) == ["observation.images.top", "observation.state"]
    assert config.pretrained_path is None  # a place on this machine


def test_a_policy_whose_cameras_have_other_names_says_how_to_name_them(trained):
    meta = LeRobotDataset("local/synthetic", root=trained.facts.root).meta
    config = LeRobotForesightConfig(device="cpu", views=["front"])
    with pytest.raises(ValueError, match=r"\['front'\].*--policy.cameras"):
        make_policy(config, ds_meta=meta)
