"""Settings of a run, from YAML and the command line."""

import pytest
import yaml

from training.config_reading import load_config, rename_setting, save_config, write_overrides


@pytest.mark.parametrize("name", ["standardise_tokens", "standardize_tokens"])
def test_a_setting_is_read_under_its_older_name_too(tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"train": {name: True, "steps": 7}}))
    assert load_config(path, []).train.standardize_tokens
    assert load_config(None, [f"--train.{name}", "true"]).train.standardize_tokens
    assert not load_config(path, ["--train.standardize_tokens", "false"]).train.standardize_tokens


def test_a_renamed_setting_keeps_the_groups_before_it():
    old = "variants/foresight_3d/train/standardise_tokens"
    assert rename_setting(old) == "variants/foresight_3d/train/standardize_tokens"
    assert rename_setting("train/steps") == "train/steps" and rename_setting("steps") == "steps"


PLACES = ["outputs/run #2", "2026_01_05", "12:30", "007", "1e3", "on", "no", "~", "a: b", "[x]", " spaced "]


@pytest.mark.parametrize("place", PLACES)
def test_names_of_places_stay_as_they_are_given(tmp_path, place):
    given = [f"--output={place}", f"--export={place}", f"--init_from={place}", f"--data.validation={place}"]
    config = load_config(None, [*given, f"--dataset={place}", "--towers.tokenizer", place])
    found = {config.output, config.export, config.init_from, config.data.validation, config.towers.tokenizer}
    assert found == {place} and [source.path for source in config.data.datasets] == [place]
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []) == config


def test_other_values_are_read_as_yaml_and_null_leaves_a_name_out():
    options = [
        "--train.learning_rate",
        "1e-3",
        "--train.betas",
        "[0.9, 0.95]",
        "--train.mixed_precision",
        "no",
    ]
    config = load_config(None, [*options, "--init_from", "null", "--model.state_dim=0"])
    assert (config.train.learning_rate, config.train.betas) == (1e-3, [0.9, 0.95])
    assert (config.train.mixed_precision, config.init_from, config.model["state_dim"]) == ("no", None, 0)


def test_another_dataset_in_place_of_a_single_one_is_read_in_the_same_way(tmp_path):
    one = {"path": "a", "cameras": {"main": "front"}, "frame_stride": 2}
    for datasets, kept in (([one], {**one, "path": "b"}), ([one, {"path": "c"}], {"path": "b"})):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"datasets": datasets}}))
        (source,) = load_config(tmp_path / "config.yaml", ["--dataset", "b"]).data.datasets
        assert {name: getattr(source, name) for name in kept} == kept
        assert source.frame_stride == kept.get("frame_stride", 1)


@pytest.mark.parametrize("name", ["train.min_learning_rate_ratio", "data.p_moving"])
def test_a_share_given_in_percent_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 10.*; it is a share and must be at most 1"):
        load_config(None, [f"--{name}", "10"])


def test_overrides_that_a_program_writes_are_read_as_they_were():
    given = {"output": "run #2", "init_from": None, "data.mixture": "sqrt", "train.steps": 7}
    given |= {"model.text_config.hidden_act": "no", "model.views": ["a b", "on"], "dataset": "12:30"}
    config = load_config(None, write_overrides(given))
    assert (config.output, config.init_from, config.data.mixture, config.train.steps) == (
        "run #2",
        None,
        "sqrt",
        7,
    )
    assert config.model["text_config"] == {"hidden_act": "no"} and config.model["views"] == ["a b", "on"]
    assert config.data.datasets[0].path == "12:30"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--model.text_config.num_hidden_layer=4",
            "num_hidden_layer is unknown; did you mean num_h",
        ),
        (
            "--model.vision_config.hidden_size=48",
            "config.hidden_size is unknown; known are architecture",
        ),
    ],
)
def test_fields_of_towers_that_would_be_ignored_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        load_config("training/configs/quickstart.yaml", [flag])  # its vision tower is one of timm
