"""Check a model or an adapter: weights, configuration, statistics, LeRobot's files, stored sample."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open
from transformers.utils import logging

from datasets_scripts.command_line import list_some
from datasets_scripts.storage.atomic import read_json
from hub_cards.cards.measurements import is_folder
from hub_cards.checks.sample import SAMPLE_FILE, check_sample
from hub_cards.checks.wording import EXPORT_AGAIN, shorten_error
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.configuration_foresight import PROCESSOR_FIELDS
from training.models.model_folder import load_checkpoint

__all__ = ["check_adapter", "check_model"]


def check_model(folder: Path) -> list[str]:
    """Problems of weights, processor, statistics, LeRobot's files and the stored sample of a model."""
    if problems := list(_check_weight_files(folder)):
        return problems
    try:
        with _silence_transformers():
            model, loaded = ForesightForActionPrediction.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # safetensors, JSON and config classes raise their own types
        return [f"the model does not load: {shorten_error(error)}: {EXPORT_AGAIN}"]
    for what, names in (
        ("lack", loaded["missing_keys"]),
        ("have, beyond the configuration,", loaded["unexpected_keys"]),
        ("have another shape for", [key for key, *_ in loaded["mismatched_keys"]]),
    ):
        if names:
            problems.append(
                f"the weights {what} {list_some(sorted(names))} (config.json decides): {EXPORT_AGAIN}"
            )
    problems += [*_check_processor(folder, model.config), *_check_lerobot_files(folder)]
    return problems or list(_check_stored_sample(folder))


def check_adapter(folder: Path) -> list[str]:
    """Problems of an adapter, its base and its processor."""
    problems = []
    try:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
        if is_folder(base):
            problems.append(
                f"its base {base!r} is a folder of this machine: publish it (python hub_cards/publish.py "
                f"{base or 'BASE'} --repo-id YOU/BASE), write YOU/BASE into base_model_name_or_path of "
                "adapter_config.json, then run hub_cards/build.py again"
            )
        with _silence_transformers():
            model, _ = load_checkpoint(folder)
    except ValueError as error:
        return [*problems, f"the adapter does not load: {shorten_error(error)}"]
    problems += _check_processor(folder, model.config)
    return problems or list(_check_stored_sample(folder))


def _check_weight_files(folder: Path) -> Iterator[str]:
    """Weight files that are missing or damaged; loading finds out whether one of several is missing."""
    for path in sorted(folder.glob("model-*.safetensors")) or [folder / "model.safetensors"]:
        if not path.is_file():
            yield f"{path.name} is missing, the weights: {EXPORT_AGAIN}"
        elif damage := _find_damage(path):
            yield f"{path.name} cannot be read ({damage}): copy it again, or {EXPORT_AGAIN}"


def _find_damage(path: Path) -> str:
    """Why a safetensors file cannot be opened; empty if it can."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except Exception as error:  # safetensors raises its own type, and OSError
        return shorten_error(error)
    return ""


def _check_processor(folder: Path, config) -> Iterator[str]:
    """Fields that differ from the configuration, and statistics that are missing or of another size."""
    if not (folder / "processor_config.json").is_file():
        yield f"processor_config.json is missing; nobody can prepare inputs without it: {EXPORT_AGAIN}"
        return
    try:
        processor = ForesightProcessor.from_pretrained(folder)
    except Exception as error:  # tokenizers raise their own types
        yield f"the processor does not load: {shorten_error(error)}: {EXPORT_AGAIN}"
        return
    for name in PROCESSOR_FIELDS:
        ours, theirs = (getattr(one, name) for one in (processor, config))
        if np.shape(ours) != np.shape(theirs) or np.any(np.asarray(ours) != np.asarray(theirs)):
            yield f"{name} is {ours} in processor_config.json and {theirs} in config.json: {EXPORT_AGAIN}"
    needed = {}
    if config.has("action") and config.action_codec != "local_delta":  # local deltas have fixed units
        needed["action"] = config.action_dim
    if config.state_dim and config.state_representation == "absolute":
        needed["state"] = config.state_dim
    for robot, name in itertools.product(sorted(config.embodiments or {}), needed):
        # Their sizes are compared when the processor loads.
        if config.embodiments[robot][name] and not (processor.statistics or {}).get(robot, {}).get(name):
            yield f"processor_config.json has no statistics of the {name} of {robot}: {EXPORT_AGAIN}"
    for name, size in () if config.embodiments else needed.items():
        stats = getattr(processor, f"{name}_stats")
        if not stats:
            yield f"processor_config.json has no {name}_stats, so {name}s are not normalized: {EXPORT_AGAIN}"
        elif any(len(value) != size for value in stats.values()):
            yield f"{name}_stats of processor_config.json are not {size} numbers each: {EXPORT_AGAIN}"


def _check_lerobot_files(folder: Path) -> Iterator[str]:
    """The pipelines of a LeRobot policy (`type` in config.json), and the files that they name."""
    if "type" not in read_json(folder / "config.json"):
        return
    bad = []
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        try:
            steps = read_json(folder / name)["steps"]
            states = [step["state_file"] for step in steps if "state_file" in step]
        except (OSError, ValueError, KeyError, TypeError):
            bad.append(name)
        else:
            bad += [state for state in states if _find_damage(folder / state)]
    if bad:
        remedy = "write them with `python -m lerobot_policy_foresight FOLDER`"
        yield f"LeRobot's files are missing or damaged: {list_some(sorted(bad))}: {remedy}"


def _check_stored_sample(folder: Path) -> Iterator[str]:
    try:
        if (folder / SAMPLE_FILE).is_file():  # publish.py writes one where there is none
            check_sample(folder)
    except ValueError as error:
        yield str(error)


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Hide what transformers prints about keys: the problems name them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)
