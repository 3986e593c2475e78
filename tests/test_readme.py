"""The README's example runs as it stands."""

import re
from pathlib import Path

from modeling_foresight import ForesightForActionPrediction
from tests.tiny import tiny_config, tiny_processor

README = Path(__file__).parents[1] / "README.md"


def test_the_example_predicts_a_chunk_of_actions(tmp_path, monkeypatch, capsys):
    robot = {"action_dim": 4, "binary_action_indices": [], "state_dim": 4, "binary_state_indices": []}
    config = tiny_config(chunk_size=5, **robot)
    folder = tmp_path / "outputs" / "quickstart" / "model"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert "(1, 5, 4)" in capsys.readouterr().out


def test_nothing_in_it_waits_to_be_filled_in():
    assert "MEASURED" not in README.read_text()
