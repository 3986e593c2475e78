"""Ceiling of imitation: how often the scripted experts solve the tasks under the recording's settings.

The noise on the executed actions, how long each action is held and the limit of steps can make an expert
fail. The size of the pictures cannot: experts read the simulator's state.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets_scripts.simulation.metaworld import MetaWorldSim
from datasets_scripts.simulation.perturbation import Perturbation
from datasets_scripts.simulation.recording import Recording, plan_episode
from datasets_scripts.storage.atomic import read_json, write_json
from training.run_record import describe_run

__all__ = ["measure_experts"]


def measure_experts(
    recording: Recording,
    starts: Sequence[int],
    folder: Path,
    perturbation: Perturbation = Perturbation(),  # noqa: B008 - frozen
    only_read: bool = False,
) -> dict[str, dict]:
    """Success of the experts from given starts, with the recording's noise and without any.

    Args:
        recording (`Recording`): Tasks, noise, stride, steps.
        starts (`Sequence[int]`): Seeds of the starts, for each task.
        folder (`Path`): One file per task, which is not measured again.
        perturbation (`Perturbation`): Of the scenes.
        only_read (`bool`): Measure nothing.

    Returns:
        `dict`: By task: `noisy` and `clean`, lists of 0 and 1, one per start.

    Raises:
        ValueError: If the folder holds results of other settings, or with `only_read` lacks some.
    """
    settings = {**recording.to_dict(), "starts": list(starts), **perturbation.changes()}
    for name in ("tasks", "episodes", "n_points", "image_size"):
        del settings[name]
    found = {}
    for task in tqdm(recording.tasks, desc="experts", unit="task", disable=only_read):
        path = folder / f"{task}.json"
        if not path.exists():
            if only_read:
                raise ValueError(
                    f"{path} is missing: copy it from where the experts were measured, or leave out --tables"
                )
            outcomes = try_expert(recording, task, starts, perturbation)
            write_json(path, {"settings": settings, **outcomes, **describe_run()})
        known = read_json(path)
        if known["settings"] != settings:
            names = sorted(settings.keys() | known["settings"].keys())
            changed = [name for name in names if settings.get(name) != known["settings"].get(name)]
            raise ValueError(
                f"{path} was measured with other settings ({', '.join(changed)}): choose another --output"
            )
        found[task] = {name: known[name] for name in ("noisy", "clean")}
    return found


def try_expert(
    recording: Recording, task: str, starts: Sequence[int], perturbation: Perturbation
) -> dict[str, list[int]]:
    """Outcomes of one task."""
    recordings = {"noisy": recording, "clean": dataclasses.replace(recording, noise=0.0, detour=0)}
    outcomes: dict[str, list[int]] = {}
    with MetaWorldSim(task, recording.cameras[:1], image_size=16, perturbation=perturbation) as sim:
        for name, one in recordings.items():
            outcomes[name] = []
            for start in starts:
                generator = np.random.default_rng((one.seed, zlib.crc32(task.encode()), start))
                outcomes[name].append(int(plan_episode(sim, one, start, generator) is not None))
    return outcomes
