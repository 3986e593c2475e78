"""LIBERO's suites are read from hf-libero's files, and mistakes are named."""

import numpy as np
import pytest
import torch

from datasets_scripts.simulation import libero_files
from datasets_scripts.simulation.libero_files import (
    SUITES,
    libero_instruction,
    load_initial_states,
    resolve_libero_tasks,
)

STARTS, SIZE = 3, 5


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the installed package."""
    names = {suite: [f"{suite}_{number}" for number in range(10)] for suite in (*SUITES, "libero_90")}
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {names}")
    monkeypatch.setattr(libero_files, "installed_folder", lambda: tmp_path)
    libero_files._load_tasks.cache_clear()
    yield tmp_path
    libero_files._load_tasks.cache_clear()


def test_tasks_are_those_of_the_suites_in_their_order(installed):
    tasks = resolve_libero_tasks("libero_goal, libero_10,libero_goal", [7, 2, 7])
    assert tasks == [
        "libero_goal/libero_goal_7",
        "libero_goal/libero_goal_2",
        "libero_10/libero_10_7",
        "libero_10/libero_10_2",
    ]
    assert len(resolve_libero_tasks("libero_object")) == 10


@pytest.mark.parametrize(
    ("suites", "numbers", "message"),
    [
        ("libero_objects", None, "unknown LIBERO suite 'libero_objects'; did you mean libero_object"),
        ("libero_90", None, "unknown LIBERO suite 'libero_90'"),
        (" ,", None, "no suite given"),
        ("libero_goal", [10], "libero_goal has the tasks 0 to 9; 10 is not"),
        ("libero_goal", [-1], "-1 is not"),
    ],
)
def test_an_unknown_suite_or_task_is_named(installed, suites, numbers, message):
    with pytest.raises(ValueError, match=message):
        resolve_libero_tasks(suites, numbers)


def test_instructions_are_the_names_in_words_without_their_scene():
    assert libero_instruction("libero_goal/turn_on_the_stove") == "turn on the stove"
    long = "libero_10/LIVING_ROOM_SCENE2_put_both_the_soup_and_the_box_in_the_basket"
    assert libero_instruction(long) == "put both the soup and the box in the basket"


def test_initial_states_are_read_without_running_what_a_pickle_asks_for(installed, tmp_path):
    path = installed / "init_files" / "libero_goal" / "stove.pruned_init"
    path.parent.mkdir(parents=True)
    states = np.arange(STARTS * SIZE, dtype=float).reshape(STARTS, SIZE)
    torch.save(states, path)
    with pytest.raises(ValueError, match="stove.pruned_init is damaged"):
        load_initial_states("libero_goal/stove")  # torch names the folder inside after the file
    torch.save(states, tmp_path / "archive.pt")
    (tmp_path / "archive.pt").replace(path)
    assert (load_initial_states("libero_goal/stove") == states).all()
    torch.save({"states": SUITES["libero_goal"]}, tmp_path / "archive.pt")
    (tmp_path / "archive.pt").replace(path)
    with pytest.raises(ValueError, match="stove.pruned_init is damaged .*Suite"):
        load_initial_states("libero_goal/stove")
