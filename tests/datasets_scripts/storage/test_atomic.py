"""Files appear whole or not at all."""

import json

import pytest

from datasets_scripts.storage import atomic


def test_replacing_keeps_the_old_file_on_errors(tmp_path):
    path = tmp_path / "file.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
