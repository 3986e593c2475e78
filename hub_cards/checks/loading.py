"""Whether a folder loads as what it claims to be: weights, configuration, statistics, files of a dataset."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers.utils import logging

from datasets_scripts.storage.dataset_folder import data_files, load_info
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.cards.evidence import is_folder, read_json
from hub_cards.sample import SAMPLE, check_sample
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.streaming import SHARED
from training.checkpoint_folder import load_checkpoint

__all__ = ["check_adapter", "check_dataset", "check_model"]

EXPORT = "export the model again with training/train.py"
NAMED = 3  # tensors in one line


def check_model(folder: Path) -> list[str]:
    """Weights, processor, statistics, LeRobot's files and the stored sample of a model."""
    problems = _check_weight_files(folder)
    if problems:
        return problems
    try:
        with _quiet():
            model, loaded = ForesightForActionPrediction.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # safetensors, JSON and config classes raise types of their own
        return [f"the model does not load: {_short(error)}: {EXPORT}"]
    for what, names in (
        ("lack", loaded["missing_keys"]),
        ("have, beyond the configuration,", loaded["unexpected_keys"]),
        ("have another shape for", [key for key, *_ in loaded["mismatched_keys"]]),
    ):
        if names:
            problems.append(f"the weights {what} {_some(names)} (config.json decides): {EXPORT}")
    broken = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        problems.append(f"the weights are not finite in {_some(broken)}: train again")
    problems += _check_processor(folder, model.config) + _check_lerobot(folder)
    return problems or _check_sample(folder)


def check_adapter(folder: Path) -> list[str]:
    """Adapter, its base, and the processor."""
    try:
        config = read_json(folder / "adapter_config.json")
    except ValueError as error:
        return [f"{_short(error)}: {EXPORT}"]
    base, problems = config.get("base_model_name_or_path") or "", []
    if is_folder(base):
        problems.append(
            f"its base {base!r} is a folder of this machine: publish the base, then write its Hub id and "
            "commit into base_model_name_or_path and revision of adapter_config.json (docs/lora.md)"
        )
    try:
        with _quiet():
            model, _ = load_checkpoint(folder)
    except ValueError as error:
        return [*problems, f"the adapter does not load: {_short(error)}"]
    problems += _check_processor(folder, model.config)
    return problems or _check_sample(folder)


def check_dataset(folder: Path) -> list[str]:
    """Metadata, statistics, rows and video files of a LeRobot dataset, and its first and last frame."""
    import pyarrow.parquet as pq

    try:
        info, rows = load_info(folder), sum(pq.read_metadata(path).num_rows for path in data_files(folder))
        read_provenance(folder)
    except (ValueError, OSError) as error:
        return [_short(error)]
    problems = []
    said = info.get("total_frames")
    if rows != said:
        problems.append(f"data/ has {rows} frames, meta/info.json says {said}: make or download it again")
    path = folder / "meta" / "stats.json"
    try:
        known = read_json(path) if path.is_file() else {}
    except ValueError:
        known = {}
    lacking = [key for key in info["features"] if key in ("action", "observation.state") and key not in known]
    if lacking:
        problems.append(
            f"meta/stats.json lacks {' and '.join(lacking)}: compute them with LeRobot's recompute_stats"
        )
    episodes = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not episodes or not (folder / "meta" / "tasks.parquet").is_file():
        return [*problems, "meta/episodes or meta/tasks.parquet is missing: make or download it again"]
    try:
        missing = sorted({name for path in episodes for name in _videos(pq.read_table(path), info, folder)})
    except (ValueError, OSError) as error:  # Arrow's are these
        return [*problems, f"meta/episodes cannot be read: {_short(error)}: make or download it again"]
    if missing:
        return [*problems, f"videos are missing: {_some(missing)}: make or download it again"]
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    try:
        dataset = LeRobotDataset("local/check", root=folder)
        dataset[0], dataset[len(dataset) - 1]  # a file that was cut off lacks its end
    except Exception as error:  # LeRobot, its decoders and Arrow raise types of their own
        problems.append(f"LeRobot does not read it: {_short(error)}: make or download it again")
    return problems


def _videos(episodes, info: dict, folder: Path) -> Iterator[str]:
    """Video files that the episodes are said to be in, and are not there."""
    for key, feature in info["features"].items():
        columns = [f"videos/{key}/{part}" for part in ("chunk_index", "file_index")]
        if feature["dtype"] != "video" or columns[0] not in episodes.column_names:
            continue
        for chunk, file in zip(*(episodes[column].to_pylist() for column in columns), strict=True):
            name = info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
            if not (folder / name).is_file():
                yield name


def _check_weight_files(folder: Path) -> list[str]:
    """The files that hold the weights: there, and whole."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"{index.name} does not say which file holds what ({_short(error)}): {EXPORT}"]
    problems = []
    for name in names:
        if not (folder / name).is_file():
            problems.append(f"{name} is missing, the weights: {EXPORT}")
        elif damage := _damage(folder / name):
            problems.append(f"{name} cannot be read ({damage}): copy it again, or {EXPORT}")
    return problems


def _damage(path: Path) -> str:
    """Why a safetensors file cannot be opened; empty if it can."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except Exception as error:  # safetensors raises a type of its own, and OSError
        return _short(error)
    return ""


def _check_processor(folder: Path, config) -> list[str]:
    if not (folder / "processor_config.json").is_file():
        return [f"processor_config.json is missing, without which nobody can prepare its inputs: {EXPORT}"]
    try:
        processor = ForesightProcessor.from_pretrained(folder)
    except Exception as error:  # tokenizers raise types of their own
        return [f"the processor does not load: {_short(error)}: {EXPORT}"]
    problems = []
    for name in SHARED:
        ours, theirs = (getattr(one, name) for one in (processor, config))
        if (list(ours) if isinstance(ours, Sequence) else ours) != (
            list(theirs) if isinstance(theirs, Sequence) else theirs
        ):
            problems.append(
                f"{name} is {ours} in processor_config.json and {theirs} in config.json: {EXPORT}"
            )
    needed = {"action": config.action_dim} if config.has("action") else {}
    if config.action_codec == "local_delta":
        needed = {}  # its actions have fixed units
    if config.state_dim and config.state_representation == "absolute":
        needed["state"] = config.state_dim
    for name, size in needed.items():
        stats = getattr(processor, f"{name}_stats")
        if not stats:
            problems.append(
                f"processor_config.json has no {name}_stats, so that {name}s pass in whatever units: {EXPORT}"
            )
        elif any(np.shape(stats[key]) != (size,) or not np.isfinite(stats[key]).all() for key in stats):
            problems.append(
                f"{name}_stats of processor_config.json are not {size} finite numbers each: {EXPORT}"
            )
    return problems


def _check_lerobot(folder: Path) -> list[str]:
    """The pipelines of a folder that says it is a policy of LeRobot, and the files they name."""
    if "type" not in json.loads((folder / "config.json").read_text()):
        return []
    bad = []
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        try:
            steps = read_json(folder / name)["steps"]
            states = [step["state_file"] for step in steps if "state_file" in step]
        except (OSError, ValueError, KeyError, TypeError):
            bad.append(name)
            continue
        bad += [state for state in states if _damage(folder / state)]
    remedy = "write them with `python -m lerobot_policy_foresight FOLDER`"
    return [f"LeRobot's files are missing or damaged: {_some(bad)}: {remedy}"] if bad else []


def _check_sample(folder: Path) -> list[str]:
    try:
        if (folder / SAMPLE).is_file():  # publish.py writes one where there is none
            check_sample(folder)
    except ValueError as error:
        return [str(error)]
    return []


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers would print of keys, we say."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)


def _some(names: Sequence[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]}..."
