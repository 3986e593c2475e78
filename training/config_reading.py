"""Reads the settings of a training run from a YAML file and the command line, and writes them."""

import contextlib
import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import draccus
import yaml
from draccus.utils import ParsingError

from datasets_scripts.storage.atomic import write_whole_file
from modeling_foresight import ForesightConfig
from training.config import OTHER_UNIT, DatasetSource, RunConfig, resolve_presets, suggest

__all__ = ["check_fields", "load_config", "rename_setting", "save_config", "write_overrides"]

LARGEST_CONFIG = 10_000  # values in a YAML file
RENAMED = {"standardise_tokens": "standardize_tokens"}  # of `train`; older run folders have the first


def load_config(path: str | Path | None, overrides: list[str]) -> RunConfig:
    """Reads a run from YAML and command-line overrides.

    Args:
        path (`str` or `Path`, *optional*): YAML file; defaults alone if omitted.
        overrides (`list[str]`): `--key.sub value` or `--key.sub=value`; names and places stay as they are,
            other values are read as YAML. `--dataset` keeps how a single dataset of the file is read.

    Raises:
        ValueError: If the file cannot be read, a key is unknown or a value has the wrong type; names it.
    """
    values, given = _read_config(Path(path)) if path else {}, {}
    pairs = _parse_pairs(overrides)
    for key, other in [*OTHER_UNIT.items(), *((epochs, steps) for steps, epochs in OTHER_UNIT.items())]:
        if any(name == f"train.{key}" for name, _ in pairs):  # replaces the other unit in the file
            values.get("train", {}).pop(other, None)
    for key, value in pairs:
        if key == "dataset":
            key, value = "data.datasets", _replace_dataset(values, value)
        if key.startswith("model."):
            _set_nested(given, key.removeprefix("model."), value)
        else:
            _set_nested(values, key, value)
    if given:
        values["model"] = resolve_presets([values.get("model") or {}, given])
    _rename_settings(values)
    check_fields(RunConfig, values, "")
    try:
        return draccus.decode(RunConfig, values)
    except ParsingError as error:
        # draccus hides a dataclass's own ValueError behind a general sentence.
        raise ValueError(f"config {path or ''}: {error.__cause__ or error}") from None


def _replace_dataset(values: dict[str, Any], path: str) -> list[dict]:
    """`--dataset` in place of the datasets of the file: a single one keeps its cameras, stride and robot."""
    known = (values.get("data") or {}).get("datasets") or []
    if len(known) == 1 and isinstance(known[0], dict):
        return [{**known[0], "path": path}]
    return [{"path": path}]


def rename_setting(name: str) -> str:
    """Today's name of a setting, which may stand behind groups (`train/...`); run folders keep older ones."""
    groups, slash, last = name.rpartition("/")
    return groups + slash + RENAMED.get(last, last)


def _rename_settings(values: dict) -> None:
    """Gives the settings of `train` today's names, in place."""
    if isinstance(values.get("train"), dict):
        values["train"] = {rename_setting(name): value for name, value in values["train"].items()}


def _read_config(path: Path) -> dict:
    """Settings of a YAML file, whose names and types fit; an error names the file."""
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict | None):
            raise ValueError(f"it holds {reprlib.repr(values)} instead of settings by name")
        values = values or {}
        _rename_settings(values)
        check_fields(RunConfig, values, "")
    except FileNotFoundError:
        named = sorted(p.name for p in (Path(__file__).parent / "configs").glob("*.yaml"))
        raise ValueError(f"config {path} does not exist; training/configs has {', '.join(named)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path}: {error}") from None
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the last one would count, and the first vanish."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            problem = f"{max(keys, key=keys.count)} is given twice"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        return node


def _parse_yaml(text: str) -> Any:
    """A value in YAML, of bounded size: aliases of aliases can stand for billions of values."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    parts, count = [value], 0
    while parts:
        part, count = parts.pop(), count + 1
        if count > LARGEST_CONFIG:
            raise ValueError(f"its aliases stand for more than {LARGEST_CONFIG} values: write them out")
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return value


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved run as YAML; `load_config` reads it back."""
    with write_whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _set_nested(values: dict, key: str, value: Any) -> None:
    """Sets `a.b.c` in nested dicts."""
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--{key}: {parent} is a value, not a group")
    values[leaf] = value


def _parse_pairs(arguments: list[str]) -> list[tuple[str, Any]]:
    """`["--a.b", "1", "--c=x"]` -> `[("a.b", 1), ("c", "x")]`."""
    pairs, rest = [], iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"argument {argument!r}: expected --key.sub value")
        key, equals, value = argument[2:].partition("=")
        value = value if equals else next(rest, "--")
        if not equals and value.startswith("--"):
            raise ValueError(f"--{key} needs a value")
        pairs.append((key, _read_value(key, value)))
    return pairs


def write_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings by dotted name as overrides of [`load_config`], whatever characters their texts have."""
    return [
        f"--{key}={value if _is_text(key) and isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]


def _is_text(key: str) -> bool:
    return key == "dataset" or _type_of(key) in (str, str | None)


def _read_value(key: str, text: str) -> Any:
    """The value of an override. Text stays as it is: a folder may be called `2026_01_05` or `run #2`."""
    if _is_text(key):
        return None if _type_of(key) == str | None and text == "null" else text
    try:
        parsed = _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--{key} {text}: {error}") from None
    # YAML 1.1 reads 1e-3 as text.
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    return parsed


def _type_of(key: str) -> Any:
    """Type of a setting by its dotted name; `None` for fields of the model, and for what is unknown."""
    kind: Any = RunConfig
    for name in rename_setting(key.replace(".", "/")).split("/"):
        is_group = dataclasses.is_dataclass(kind)
        kind = {f.name: f.type for f in dataclasses.fields(kind)}.get(name) if is_group else None
    return kind


def check_fields(cls: type, values: dict, prefix: str) -> None:
    """Refuses unknown keys, with the closest known one, and values of another type; names the field."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    is_model = cls is ForesightConfig
    for name, value in values.items():
        if name not in fields:
            if is_model:  # a preset; other names are refused when it is resolved
                continue
            known = [*fields, "dataset"] if not prefix else fields
            raise ValueError(f"{prefix}{name} is unknown{suggest(str(name), known)}")
        kind = ForesightConfig if (cls, name) == (RunConfig, "model") else fields[name].type
        if not _fits(value, kind, strict=is_model):
            told = str(kind) if typing.get_args(kind) else kind.__name__
            told = "a group of settings" if dataclasses.is_dataclass(kind) else told
            raise ValueError(f"{prefix}{name} is {reprlib.repr(value)}; it must be {told}, or left out")
        if dataclasses.is_dataclass(kind):
            check_fields(kind, value, f"{prefix}{name}.")
        elif typing.get_args(kind) == (DatasetSource,):
            for i, source in enumerate(value):
                check_fields(DatasetSource, source, f"{prefix}{name}.{i}.")


def _fits(value: Any, kind: Any, strict: bool) -> bool:
    """Whether a value of YAML is of a type; `strict` as transformers' configs, which convert no text."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part, strict) for part in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(part, arguments[0], strict) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(part, arguments[1], strict) for part in value.values())
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (int, float):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = value if strict else float(value)  # YAML 1.1 reads 1e-3 as text
            whole = kind is float or number == int(number)
            return whole and math.isfinite(number) and not isinstance(value, bool)
        return False
    if kind is str and not strict:  # a folder may be named 2026
        return value not in ("", None) and not isinstance(value, dict | list)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)
