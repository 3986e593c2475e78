"""`benchmarks/lerobot_train.py`: one config for two commands."""

import importlib
from pathlib import Path

import draccus
import pytest
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.import_utils import register_third_party_plugins

from tests.synthetic import make_dataset
from training.config_reading import load_config
from training.windows import split_episodes

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "configs" / "quickstart.yaml"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("lerobot_train")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    settings = {"episodes": 4, "frames": 10, "size": (32, 32), "state_dim": 4, "use_videos": False}
    return make_dataset(tmp_path_factory.mktemp("data") / "ds", **settings).root


def test_a_config_becomes_options_of_lerobot_train(script, dataset):
    config = load_config(CONFIG, ["--dataset", str(dataset), "--seed", "5", "--train.steps", "70"])
    register_third_party_plugins()
    told = draccus.parse(TrainPipelineConfig, args=script.lerobot_options(config))
    policy, train = told.policy, config.train
    assert {name: getattr(policy, name) for name in config.model} == config.model
    assert told.dataset.episodes == split_episodes(4, config.data.val_fraction, 5)[0]
    assert (told.steps, told.batch_size, told.seed, told.num_workers) == (70, train.batch_size, 5, 1)
    assert (policy.dtype, policy.attn_implementation) == ("bfloat16", "eager")
    optimizer, schedule = policy.get_optimizer_preset(), policy.get_scheduler_preset()
    assert (optimizer.lr, optimizer.grad_clip_norm) == (train.learning_rate, train.max_grad_norm)
    assert (optimizer.betas, optimizer.weight_decay) == (tuple(train.betas), train.weight_decay)
    assert schedule.num_warmup_steps == train.warmup_steps
    assert schedule.min_lr_ratio == train.min_learning_rate_ratio


def test_the_example_for_lerobot_train_is_the_quickstarts_run(script, dataset):
    register_third_party_plugins()
    options = script.lerobot_options(load_config(CONFIG, ["--dataset", str(dataset)]))
    told = draccus.parse(TrainPipelineConfig, args=options)
    shown = draccus.parse(TrainPipelineConfig, ROOT / "examples" / "lerobot_quickstart.yaml", args=[])
    told.policy.device = "cpu"
    assert shown.policy == told.policy
    for name in ("batch_size", "steps", "seed", "num_workers", "log_freq", "save_freq"):
        assert getattr(shown, name) == getattr(told, name), name


def test_what_lerobot_train_lacks_is_named(script, dataset):
    config = load_config(CONFIG, ["--dataset", str(dataset), "--data.random_shift", "0.05"])
    with pytest.raises(ValueError, match="data.random_shift"):
        script.lerobot_options(config)
