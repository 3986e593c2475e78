"""Training on several robots: their sizes and statistics, losses of each dataset, robots that are added."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoProcessor

from tests.lerobot_policy_foresight.miniature import load_policy
from tests.ranks import run_ranks
from tests.synthetic import make_dataset
from tests.training.test_train import TINY, log_lines
from training.config_reading import load_config
from training.evaluate import main as evaluate
from training.loop import train
from training.models.model_folder import load_checkpoint
from training.windows import find_embodiments

FORM = {"episodes": 3, "frames": 9, "cameras": ("front", "side"), "size": (32, 40), "use_videos": False}
FORM |= {"depth": False, "tracks": False}
ACTION_ONLY = {**TINY["model"], "objectives": ["action"], "history_length": 2}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two robots, one with 3 actions and 2 states, one with 5 and 4, and a run that trains on both."""
    root = tmp_path_factory.mktemp("robots")
    make_dataset(root / "small", **FORM, action_dim=3, state_dim=2)
    make_dataset(root / "large", **FORM, action_dim=5, state_dim=4)
    settings = {**TINY, "model": ACTION_ONLY, "train": {**TINY["train"], "val_every": 0, "steps": 2}}
    settings["data"] = {"val_fraction": 0.34, "frame_cache": "off"}
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings))
    del settings["model"]
    (root / "more.yaml").write_text(yaml.safe_dump(settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_config(root / "tiny.yaml", run_flags(root, "run", both(root))), False)
    return SimpleNamespace(root=root, folder=root / "run" / "model")


def both(root):
    return [{"path": str(root / name), "embodiment": name} for name in ("small", "large")]


def run_flags(root, output, datasets, *flags):
    return ["--output", str(root / output), "--data.datasets", json.dumps(datasets), *flags]


def recorded(root, name, column):
    from datasets_scripts.storage.dataset_rows import DatasetRows

    rows = DatasetRows(root / name)
    return np.asarray(rows.column(column).read(range(len(rows))), np.float64)


def test_a_policy_of_two_robots_has_the_sizes_and_statistics_of_each(work):
    model, processor = load_checkpoint(work.folder)
    assert (model.config.action_dim, model.config.state_dim) == (8, 6)
    assert model.config.embodiments == processor.embodiments
    assert processor.embodiments == {
        "small": {"action": [0, 1, 2], "state": [0, 1]},
        "large": {"action": [3, 4, 5, 6, 7], "state": [2, 3, 4, 5]},
    }
    config = yaml.safe_load((work.root / "run" / "config.yaml").read_text())
    assert [source["embodiment"] for source in config["data"]["datasets"]] == ["small", "large"]
    described = json.loads((work.root / "run" / "summary.json").read_text())["datasets"]
    for name, one in zip(("small", "large"), described, strict=True):
        assert one["embodiment"] == name
        held_out = one["validation_episodes"]
        actions = recorded(work.root, name, "action")
        episodes = recorded(work.root, name, "episode_index")
        used = actions[~np.isin(episodes, held_out)]
        np.testing.assert_allclose(processor.statistics[name]["action"]["mean"], used.mean(0), atol=1e-6)


def test_the_log_has_the_losses_of_each_dataset_and_the_summary_the_errors_of_each_robot(work):
    lines = [line for line in log_lines(work.root / "run") if "step_s" in line]
    for line in lines:
        names = {name for name in line if name.startswith("action/")}
        assert names and names <= {"action/small", "action/large"}
        low, high = min(line[n] for n in names), max(line[n] for n in names)
        assert low - 1e-6 <= line["action"] <= high + 1e-6, "the loss is a mean over both"
    actions = json.loads((work.root / "run" / "summary.json").read_text())["validation"]["actions"]
    assert {name: len(group["model"]["l1"]) for name, group in actions.items()} == {
        "chunk/small": 3,
        "first/small": 3,
        "chunk/large": 5,
        "first/large": 5,
    }


def test_a_folder_of_two_robots_is_a_policy_of_lerobot_for_each(work):
    seen = {f"observation.images.{camera}": torch.rand(1, 3, 32, 40) for camera in ("front", "side")}
    for name, actions, states in (("small", 3, 2), ("large", 5, 4)):
        policy, before, after = load_policy(work.folder)
        policy.config.embodiment = name
        policy.config.validate_features()
        assert policy.config.action_feature.shape == (actions,)
        batch = before(seen | {"observation.state": torch.rand(1, states), "task": ["open the drawer"]})
        assert after(policy.select_action(batch)).shape == (1, actions)
    policy.config.embodiment = "ur5e"
    with pytest.raises(ValueError, match="embodiment=ur5e is unknown: the policy has the embodiments large"):
        policy.config.validate_features()
    policy.config.embodiment = None
    policy.reset()
    with pytest.raises(ValueError, match="has the embodiments large, small, and none is chosen"):
        policy.select_action(batch)
    with pytest.raises(ValueError, match="--policy.embodiment=NAME"):
        type(policy).from_pretrained(work.folder, config=policy.config)


def test_an_evaluation_says_which_robots_a_checkpoint_knows(work, tmp_path, capsys):
    options = [
        "--checkpoint",
        str(work.folder),
        "--tasks",
        "reach-v3",
        "--output",
        str(tmp_path / "eval.json"),
    ]
    assert evaluate(options) == 1
    assert (
        "error: This policy has the embodiments large, small, and none is chosen" in capsys.readouterr().err
    )
    assert evaluate([*options, "--embodiment", "large"]) == 1
    assert re.search("error: the checkpoint (sees the cameras|has action_dim 5)", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_a_robot_that_is_added_later_leaves_the_others(work, tmp_path, lora):
    make_dataset(tmp_path / "new", **FORM, action_dim=4, state_dim=3)
    datasets = [{"path": str(tmp_path / "new"), "embodiment": "new"}]
    flags = ["--init_from", str(work.folder), "--lora.r", str(lora), "--lora.merge", str(bool(lora)).lower()]
    flags = flags if lora else flags[:2]
    train(load_config(work.root / "more.yaml", run_flags(tmp_path, "run", datasets, *flags)), False)
    _, before = load_checkpoint(work.folder)
    folders = ["model", "model-merged"] if lora else ["model"]
    for folder in (tmp_path / "run" / name for name in folders):
        model, processor = load_checkpoint(folder)
        assert model.config.embodiments == processor.embodiments
        assert sorted(processor.statistics) == ["large", "new", "small"]
        assert processor.statistics["small"] == before.statistics["small"]
        images = {view: np.zeros((32, 40, 3), np.uint8) for view in model.config.views}
        stream = model.stream(processor, embodiment="new")
        stream.reset("open the drawer")
        assert stream.step(images, np.zeros(3)).shape == (4,)


@pytest.mark.slow
def test_statistics_of_the_base_serve_its_robots_and_no_other(work, tmp_path):
    flags = ["--init_from", str(work.folder), "--data.statistics", "model"]
    config = load_config(work.root / "more.yaml", run_flags(tmp_path, "run", both(work.root)[:1], *flags))
    train(config, False)
    assert AutoProcessor.from_pretrained(tmp_path / "run/model").statistics == (
        AutoProcessor.from_pretrained(work.folder).statistics
    )
    datasets = [{"path": str(work.root / "small"), "embodiment": "new"}]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"no statistics of the robots.*it knows \(large, small\)"):
        train(load_config(work.root / "more.yaml", run_flags(tmp_path, "other", datasets, *flags)), False)


def test_robots_have_places_of_their_own_unless_the_model_has_its_sizes():
    sources = [("d", "arm", {"action": 3, "state": 2}), ("e", "arm", {"action": 0, "state": 2})]
    sources += [("f", "hand", {"action": 2, "state": 0})]
    own = {"arm": {"action": [0, 1, 2], "state": [0, 1]}, "hand": {"action": [3, 4], "state": []}}
    assert find_embodiments(sources, None) == own
    shared = {"hand": {"action": [0, 1], "state": []}}
    assert find_embodiments(sources, {"arm": own["arm"]}, fresh=False) == own | shared
    assert find_embodiments([("d", None, sources[0][2])], {}) is None


@pytest.mark.parametrize(
    ("robots", "known", "message"),
    [
        (
            ("arm", "arm"),
            None,
            "actions of the embodiment arm have 5 entries, but .*small.*give other robots",
        ),
        (("arm", None), None, "dataset large does not say which robot .* add `embodiment: NAME`"),
        ((None, None), {"arm": {"action": [0], "state": []}}, "dataset small .*; the model knows arm"),
    ],
)
def test_robots_that_differ_are_refused_without_names_of_their_own(robots, known, message):
    sources = [
        (name, robot, {"action": n, "state": 2})
        for name, robot, n in zip(("small", "large"), robots, (3, 5), strict=True)
    ]
    with pytest.raises(ValueError, match=message):
        find_embodiments(sources, known)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.mixture", "[0, 0]"], r"data.mixture is \[0.0, 0.0\]; every weight must be above 0"),
        (["--data.mixture", "[1, 2, 3]"], "3 weights for 2 datasets"),
        (["--data.mixture", "nature"], "use natural, sqrt, or a weight per dataset"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_before_data_are_read(work, flags, message):
    with pytest.raises(ValueError, match=message):
        load_config(work.root / "tiny.yaml", run_flags(work.root, "never", both(work.root), *flags))


def test_a_mixture_in_which_only_some_robots_have_names_is_refused(work):
    datasets = both(work.root)
    del datasets[1]["embodiment"]
    with pytest.raises(ValueError, match="large has no embodiment, but others have"):
        load_config(work.root / "tiny.yaml", run_flags(work.root, "never", datasets))


@pytest.mark.slow
def test_an_entry_of_many_values_at_a_binary_place_is_refused(work, tmp_path):
    flags = ["--model.binary_action_indices", "[1]"]
    config = load_config(work.root / "tiny.yaml", run_flags(tmp_path, "run", both(work.root), *flags))
    with pytest.raises(
        ValueError, match="entry 1 of the action of .* more than two values.*model.embodiments"
    ):
        train(config, False)


@pytest.mark.slow
def test_entries_may_be_given_other_places(work, tmp_path):
    places = {"small": {"action": [4, 0, 5], "state": [3, 0]}}
    flags = ["--model.embodiments", json.dumps(places)]
    train(load_config(work.root / "tiny.yaml", run_flags(tmp_path, "run", both(work.root), *flags)), False)
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.embodiments["small"] == places["small"]
    assert model.config.embodiments["large"] == {"action": [6, 7, 8, 9, 10], "state": [4, 5, 6, 7]}


def train_rank(rank, root, flags):
    train(load_config(root / "tiny.yaml", flags), False)


@pytest.mark.slow
def test_two_processes_log_the_same_losses_by_dataset(work, tmp_path):
    flags = ["--train.log_every", "2", "--model.embd_pdrop", "0", "--model.attention_dropout", "0"]
    flags += ["--model.resid_pdrop", "0"]
    train_rank(0, work.root, run_flags(tmp_path, "one", both(work.root), *flags))
    run_ranks(train_rank, work.root, run_flags(tmp_path, "two", both(work.root), *flags))
    one, two = (log_lines(tmp_path / name)[0] for name in ("one", "two"))
    names = [name for name in one if "/" in name]
    assert len(names) == 4, "two losses of each dataset"
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
