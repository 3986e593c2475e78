"""What is known of labels is written and read."""

import numpy as np
import pytest

from datasets_scripts.storage import provenance
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


def test_provenance_round_trip_and_moving_flags(tmp_path):
    moving = np.arange(POINTS) % 4 == 1
    facts = {"n_points": POINTS, "n_moving": 2, "moving": provenance.encode_flags(moving)}
    provenance.write_provenance(tmp_path, {"episodes": {"3": {"main": facts, "task": "x"}}})
    read = provenance.read_provenance(tmp_path)
    assert read["version"] == provenance.PROVENANCE_VERSION
    assert (provenance.moving_flags(read, 3, "main", POINTS) == moving).all()
    assert not provenance.moving_flags(read, 0, "main", POINTS).any()
    assert provenance.moving_flags(read, 3, "main", POINTS + 5).sum() == moving.sum()
    assert provenance.read_provenance(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ('{"version": 99}', "version 99")])
def test_unreadable_provenance_is_refused(tmp_path, text, message):
    path = tmp_path / provenance.PROVENANCE_PATH
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        provenance.read_provenance(tmp_path)
