"""The datasets of a run: a dataset for validation alone, mixtures to pretrain on."""

import json

import pytest
import yaml

from modeling_foresight import ForesightConfig
from tests.synthetic import make_dataset
from tests.training.test_train import TINY
from training.config import load_config
from training.run_data import RunData

FORM = {"frames": 10, "cameras": ("front", "side"), "size": (32, 40), "use_videos": False, "action_dim": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets of one form."""
    folder = tmp_path_factory.mktemp("run_data")
    make_dataset(folder / "training", episodes=3, **FORM)
    make_dataset(folder / "validation", episodes=2, **FORM, limits=((-9, 9),) * 3)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


def open_run(folder, *flags):
    flags = ["--dataset", str(folder / "training"), "--data.frame_cache", "off", *map(str, flags)]
    config = load_config(folder / "tiny.yaml", flags)
    fields = {name: x for name, x in config.model.items() if not name.endswith("_config")}
    sizes = {"action_dim": 3, "state_dim": 3, "binary_action_indices": (), "binary_state_indices": ()}
    return config, RunData(config, ForesightConfig(**(fields | sizes)))


def test_a_validation_dataset_is_used_in_whole_and_all_others_are_trained_on(folder):
    config, data = open_run(folder, "--data.validation", folder / "validation")
    assert config.data.val_fraction == 0
    (train,), (val,) = data.train.datasets, data.val.datasets
    assert train.episodes.tolist() == [0, 1, 2] and val.episodes.tolist() == [0, 1]
    assert train.config.random_shift > 0 == val.config.random_shift
    _, alone = open_run(folder, "--data.val_fraction", 0)
    for key in ("action", "state"):
        for name, values in data.statistics(key).items():
            assert (values == alone.statistics(key)[name]).all(), "those of the data trained on"
    described = data.describe()
    assert [(d["name"], d["train_episodes"], d["validation_episodes"]) for d in described] == [
        ("training", 3, []),
        ("validation", 0, [0, 1]),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dim": 5}, "differ in state size: 5 and 3"),
        ({"action_dim": 5}, "differ in action size: 5 and 3"),
        ({"size": (32, 32)}, "differ in pictures"),
        ({"fps": 10}, "differ in frames a second: 10 and 20"),
        ({"tracks": False}, "annotate"),
    ],
)
def test_a_validation_dataset_of_another_form_is_refused(folder, tmp_path, changes, message):
    make_dataset(tmp_path / "other", episodes=2, **{**FORM, **changes})
    with pytest.raises(ValueError, match=message):
        open_run(folder, "--data.validation", tmp_path / "other")


def test_validation_on_the_data_trained_on_is_refused(folder):
    with pytest.raises(ValueError, match="is trained on too"):
        open_run(folder, "--data.validation", folder / "training")


def test_pretraining_on_five_sources_sees_one_camera_of_each_robot_and_no_actions(folder, tmp_path):
    make_dataset(tmp_path / "other", episodes=2, **{**FORM, "state_dim": 5, "action_dim": 5, "fps": 5})
    named = load_config("training/configs/pretrain_five_sources.yaml", [])
    assert (named.train.epochs, named.train.warmup_epochs, named.data.mixture) == (35, 5, "sqrt")
    sources = {source.path.split("/")[-1]: source for source in named.data.datasets}
    assert [name for name, one in sources.items() if one.frame_stride == 2] == [
        "mutex_annotated",
        "libero_annotated",
    ]
    paths = [str(folder / "training")] * (len(sources) - 1) + [str(tmp_path / "other")]
    datasets = [
        {"path": path, "cameras": {"main": "front"}, "frame_stride": one.frame_stride}
        for path, one in zip(paths, sources.values(), strict=True)
    ]
    flags = ["--data.datasets", json.dumps(datasets), "--data.frame_cache", "off"]
    config = load_config("training/configs/pretrain_five_sources.yaml", [*flags, "--model.history_length=4"])
    model = ForesightConfig(**config.model)
    with pytest.warns(UserWarning, match="differ in steps per second"):
        windows = RunData(config, model).train
    assert (windows.state_dim, windows.action_dim) == (0, 0) and model.goal_image
    for window in (windows[0], windows[len(windows) - 1]):
        assert set(window["images"]) == set(window["depth"]) == {"main"}
        assert window["track_weight"].any() and not {"state", "actions"} & set(window)


def test_the_small_pretraining_has_the_architecture_that_it_is_finetuned_with():
    small, policy = (
        load_config(f"training/configs/{n}.yaml", []).model for n in ("pretrain_small", "quickstart")
    )
    changed = {"views", "objectives", "state_dim", "binary_state_indices", "flow_loss_weight"}
    assert {name for name in small.keys() | policy.keys() if small.get(name) != policy.get(name)} == changed
