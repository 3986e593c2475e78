"""LIBERO's suites: tasks, instructions and initial states, read from the files of hf-libero.

They are read as files because importing hf-libero takes seconds, and its list of tasks imports PyTorch.
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.command_line import split_names
from datasets_scripts.extras import install_advice
from datasets_scripts.storage.numpy_pickles import NumpyUnpickler

__all__ = [
    "INSTALL_ADVICE",
    "SUITES",
    "Suite",
    "config_path",
    "installed_folder",
    "libero_instruction",
    "libero_partners",
    "load_initial_states",
    "resolve_libero_names",
    "resolve_libero_tasks",
    "task_file",
]

INSTALL_ADVICE = f"run `{install_advice('libero')}`, or `make libero` in a clone"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Ten tasks.

    Attributes:
        title (`str`): Its column in Table II of the paper.
        max_steps (`int`): Control steps after which an episode has failed, as in LeRobot.
    """

    title: str
    max_steps: int


SUITES = {
    "libero_spatial": Suite("Spatial", 280),
    "libero_object": Suite("Object", 280),
    "libero_goal": Suite("Goal", 300),
    "libero_10": Suite("Long", 520),
}


def config_path() -> Path:
    """LIBERO's file of paths."""
    return Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"


def installed_folder() -> Path:
    """Folder of the installed package `libero.libero`, without importing it.

    Raises:
        RuntimeError: If hf-libero is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("libero")
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place) / "libero"
        if (folder / "benchmark" / "libero_suite_task_map.py").is_file():
            return folder
    raise RuntimeError(f"LIBERO's simulator is not installed; {INSTALL_ADVICE}")


@functools.cache
def _load_tasks() -> dict[str, list[str]]:
    path = installed_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {suite: list(module.libero_task_map[suite]) for suite in SUITES}


def resolve_libero_tasks(suites: str, numbers: Sequence[int] | None = None) -> list[str]:
    """Tasks as `suite/name`, in LIBERO's order.

    Args:
        suites (`str`): Comma-separated names of `SUITES`.
        numbers (`Sequence[int]`, *optional*): Only these tasks of every suite, 0 to 9.

    Raises:
        ValueError: If a suite or a number is unknown, or none is given.
        RuntimeError: If hf-libero is not installed.
    """
    names = list(dict.fromkeys(split_names(suites)))
    for name in names:
        if name not in SUITES:
            close = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"unknown LIBERO suite '{name}'; {hint}(suites: {', '.join(SUITES)})")
    if not names:
        raise ValueError(f"no suite given; name one of {', '.join(SUITES)}")
    tasks = []
    for name in names:
        known = _load_tasks()[name]
        for number in range(len(known)) if numbers is None else dict.fromkeys(numbers):
            if not 0 <= number < len(known):
                raise ValueError(f"{name} has the tasks 0 to {len(known) - 1}; {number} is not one of them")
            tasks.append(f"{name}/{known[number]}")
    return tasks


def resolve_libero_names(names: str) -> list[str]:
    """Tasks as `suite/name`, each once, of comma-separated suites, `suite/number` and `suite/name`.

    Raises:
        ValueError: If a suite or a task is unknown, or none is given.
        RuntimeError: If hf-libero is not installed.
    """
    tasks = []
    for part in split_names(names) or [names]:
        suite, _, task = part.partition("/")
        found = resolve_libero_tasks(suite, [int(task)] if task.isdecimal() else None)
        if task and not task.isdecimal() and (found := [part] if part in found else []) == []:
            raise ValueError(f"{suite} has no task '{task}'; give its number, 0 to 9, or its name in full")
        tasks += found
    return list(dict.fromkeys(tasks))


def libero_instruction(task: str) -> str:
    """Instruction of a task (`suite/name` or `name`), for example `pick up the milk and place ...`."""
    name = task.rpartition("/")[2]
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


def task_file(task: str) -> Path:
    """The BDDL file that describes the scene and the goal of a task."""
    return installed_folder() / "bddl_files" / f"{task}.bddl"


def libero_partners(tasks: Sequence[str]) -> dict[str, str]:
    """Another task of the same suite that the scene of a task allows, by task.

    It is the next one of the suite whose goal is another one and speaks of things that are in the scene.
    Tasks that have none are left out: in `libero_spatial` all goals are the same.
    """
    partners = {}
    for task in tasks:
        known = resolve_libero_tasks(task.partition("/")[0])
        start = known.index(task)
        things, goal = _read_scene(task)
        for other in known[start + 1 :] + known[:start]:
            other_goal = _read_scene(other)[1]
            if other_goal != goal and all(things.issuperset(words) for _, *words in other_goal):
                partners[task] = other
                break
    return partners


@functools.cache
def _read_scene(task: str) -> tuple[frozenset[str], frozenset[tuple[str, ...]]]:
    """Names of things and their regions in the scene of a task, and its goal: predicates of things."""
    text = task_file(task).read_text(encoding="utf-8").lower()
    parts = {name: text.partition(f"(:{name}")[2].partition("(:")[0] for name in ("objects", "fixtures")}
    things = {
        word for part in parts.values() for line in re.findall(r"([\w ]+) - ", part) for word in line.split()
    }
    regions = re.findall(r"\((\w+)\s*\(:target (\w+)\)", text)
    goal = re.findall(r"\((\w+) ([\w ]+)\)", text.partition("(:goal")[2])
    names = things | {f"{target}_{region}" for region, target in regions}
    return frozenset(names), frozenset((predicate, *words.split()) for predicate, words in goal)


def load_initial_states(task: str) -> np.ndarray:
    """The suite's own starts: `(starts, size)` float64, MuJoCo's time, positions and velocities.

    Raises:
        ValueError: If the file is damaged.
    """
    path = installed_folder() / "init_files" / f"{task}.pruned_init"
    try:
        with zipfile.ZipFile(path) as archive, archive.open("archive/data.pkl") as file:
            states = NumpyUnpickler(file).load()
    except (OSError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); install hf-libero again") from error
    return np.asarray(states, np.float64)
