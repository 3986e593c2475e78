"""Files appear whole or not at all."""

import json

import pytest

from datasets_scripts.storage import atomic
from tests.synthetic import make_dataset

FRAMES, POINTS = (5, 7, 6), 9


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A dataset without depth and tracks."""
    root = tmp_path_factory.mktemp("columns") / "plain"
    make_dataset(root, frames=list(FRAMES), cameras=("main",), depth=False, tracks=False)
    return root


@pytest.fixture
def plain(pristine, tmp_path):
    """A copy of it to write to."""
    import shutil

    return shutil.copytree(pristine, tmp_path / "plain")


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A dataset of videos with depth and tracks."""
    root = tmp_path_factory.mktemp("columns") / "annotated"
    return make_dataset(root, frames=list(FRAMES), cameras=("main",), n_points=POINTS, n_padding=2)


def test_replacing_keeps_the_old_file_on_errors(tmp_path):
    path = tmp_path / "file.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
