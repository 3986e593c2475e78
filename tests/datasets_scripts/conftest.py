"""Datasets that several tests read, or copy before they write."""

import shutil

import pytest

from tests.synthetic import make_dataset

FRAMES, POINTS = (5, 7, 6), 9


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A dataset without depth and tracks; read only."""
    root = tmp_path_factory.mktemp("columns") / "plain"
    make_dataset(root, frames=list(FRAMES), cameras=("main",), size=(32, 40), depth=False, tracks=False)
    return root


@pytest.fixture
def plain(pristine, tmp_path):
    """A copy of it to write to."""
    return shutil.copytree(pristine, tmp_path / "plain")
