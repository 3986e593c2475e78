"""Examples of the README and the docs run as they stand; tables are what commands print."""

import re
from pathlib import Path

import pytest

from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.__main__ import describe_variant
from modeling_foresight.configuration_foresight import PRESETS
from tests.tiny import tiny_config, tiny_processor
from tests.tiny_pipeline import save_tiny_pipeline

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.parametrize(("page", "printed"), [("README.md", "(5, 4)"), ("docs/control.md", "[4]")])
def test_the_example_acts(page, printed, tmp_path, monkeypatch, capsys):
    robot = {"action_dim": 4, "binary_action_indices": [], "state_dim": 4, "binary_state_indices": []}
    config = tiny_config(chunk_size=5, **robot)
    folder = tmp_path / "outputs" / "quickstart" / "model"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    # The README's policy comes with the repository.
    monkeypatch.chdir(ROOT if page == "README.md" else tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert page != "README.md" or len(example.splitlines()) <= 12
    exec(compile(example, page, "exec"), {})
    assert printed in capsys.readouterr().out


@pytest.mark.slow  # diffusion
def test_the_example_with_goal_images_acts(goal_extra, tmp_path, monkeypatch, capsys):
    robot = {"action_dim": 7, "state_dim": 7, "binary_state_indices": []}
    config, outputs = tiny_config(goal_image=True, **robot), tmp_path / "outputs"
    ForesightForActionPrediction(config).save_pretrained(outputs / "calvin_d_d" / "model")
    tiny_processor(config).save_pretrained(outputs / "calvin_d_d" / "model")
    save_tiny_pipeline(outputs / "goal_generator")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/goal_images.md").read_text(), re.DOTALL)
    exec(compile(example, "goal_images.md", "exec"), {})
    assert "[7]" in capsys.readouterr().out


def test_the_table_of_variants_is_what_the_command_prints():
    page = (ROOT / "docs" / "training.md").read_text().partition("## Variants")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(PRESETS)
    for name, cells in rows:
        row = describe_variant(name)
        expected = [
            f"{row[c]:,}" if row[c] else "" for c in ("tokens", "per frame", "trained", "all", "to act")
        ]
        assert [cell.strip() for cell in cells.split("|")] == [*expected, row["objectives"]], name


def test_nothing_in_it_waits_to_be_filled_in():
    assert "MEASURED" not in README.read_text()
