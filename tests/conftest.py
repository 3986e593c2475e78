"""Fixtures shared by all tests."""

import dataclasses
import functools
import gc
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ.setdefault("TQDM_DISABLE", "1")  # as in CI: a bar would be part of what a command prints

# What Hugging Face's libraries keep of datasets, metrics and code that exist for one test only stays out of
# the user's caches, and processes of pytest-xdist do not meet there. They read it when they are imported.
CACHES = tempfile.TemporaryDirectory(prefix="foresight-tests-", ignore_cleanup_errors=True)
for name in ("DATASETS", "EVALUATE", "METRICS", "MODULES"):
    os.environ[f"HF_{name}_CACHE"] = f"{CACHES.name}/{name.lower()}"

# timm imports it where it is installed, which takes a second in every process.
sys.modules.setdefault("wandb", None)
# So does LeRobot with this one; `goal_extra` brings it back.
sys.modules.setdefault("diffusers", None)


def pytest_collection_finish():
    """Keeps the garbage collector from going through the imported libraries again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    CACHES.cleanup()


@pytest.fixture(scope="session", autouse=True)
def libraries_do_not_repeat_themselves():
    """Saves a quarter of the suite's time, with the same results.

    When one of the hundred columns of LeRobot's `meta/episodes` is set, `datasets` inspects all of them, and
    draccus parses the source of LeRobot's classes again for every command.
    """
    if importlib.util.find_spec("draccus") is None:  # `make test-newest` has the model's libraries alone
        yield
        return
    from datasets.features import features
    from draccus.wrappers import docstring

    def set_column(self, name, feature):
        dict.__setitem__(self, name, feature)
        self._column_requires_decoding[name] = features.require_decoding(feature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.Features, "__setitem__", set_column)
        patch.setattr(
            docstring, "get_attribute_docstring", functools.cache(docstring.get_attribute_docstring)
        )
        yield


@dataclasses.dataclass(frozen=True)
class SimulatedDataset:
    """A small dataset made by `simulate.py` itself; read only."""

    root: Path
    recording: object  # datasets_scripts.simulation.recording.MetaWorldRecording


@pytest.fixture(scope="session", autouse=True)
def frame_cache_of_the_tests(tmp_path_factory):
    """Decoded frames of datasets that exist for one test only stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORESIGHT_CACHE", str(tmp_path_factory.mktemp("foresight_cache")))
        yield


@pytest.fixture(autouse=True)
def normal_scheduling():
    """Undoes what the SVT-AV1 encoder, which LeRobot's tools use, does to the thread that calls it as root.

    It becomes a real-time thread, and so do all that it starts from then on: torch's wait for each other by
    spinning, and on a machine of two cores nothing else may ever run again.
    """
    yield
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def simulator():
    """Skips where MuJoCo cannot render here."""
    for package in ("mujoco", "metaworld"):
        if importlib.util.find_spec(package) is None:  # importing MuJoCo would settle its renderer
            pytest.skip(f"{package} is not installed")
    from datasets_scripts.simulation.metaworld import MetaWorldSim

    try:
        MetaWorldSim("reach-v3", image_size=16).close()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def goal_extra():
    """Lets a test import diffusers, or skips where it is not installed."""
    if sys.modules["diffusers"] is None:
        del sys.modules["diffusers"]
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed; run `pip install 'lerobot_policy_foresight[goal]'`")


@pytest.fixture(scope="session")
def libero_simulator():
    """Skips where LIBERO's own simulator is not installed (`make libero`)."""
    from datasets_scripts.simulation.libero import _import_libero

    try:
        _import_libero()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def simulated_dataset(simulator, tmp_path_factory) -> SimulatedDataset:
    """Two drawer-open demonstrations, 64 px, 300 points, simulated once for all processes of pytest-xdist."""
    from datasets_scripts.simulation.job import simulate
    from datasets_scripts.simulation.simulators import MetaWorldRecording

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    root = shared / "simulated" / "dataset"
    root.parent.mkdir(exist_ok=True)
    recording = MetaWorldRecording(("drawer-open-v3",), episodes=2, image_size=64, n_points=300)
    with FileLock(f"{root}.lock"):
        simulate(recording, root)  # leaves a finished dataset as it is
    return SimulatedDataset(root, recording)
