"""Settings of a run, from YAML and the command line."""

import pytest
import yaml

from training.config import load_config, rename_setting


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
