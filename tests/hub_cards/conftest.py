"""A finished run and its model with a card, made once."""

import shutil

import pytest

from hub_cards.build import main as build
from tests.hub_cards.finished_run import make_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run; read only."""
    return make_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def built(finished, tmp_path_factory):
    """The folder of that run's model with its card; read only."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("built") / "run")
    assert build([str(run)]) == 0
    return run / "model"
