"""Compare the settings of a run, or any JSON values, with those of an earlier one."""

import textwrap
from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "name_changes"]


def flatten(settings: Mapping, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1.0}}` -> `{"a/b": 1.0}`; lists become `name/0`, `name/1`, ..."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        is_group = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}/") if is_group else {f"{prefix}{name}": value}
    return flat


def name_changes(before: Mapping, now: Mapping, most: int = 5) -> str:
    """Which settings differ, `a.b: 1 there, 2 here`, the first few; empty if none does.

    An empty list or mapping counts as absent, and so does `None`.
    """
    old, new = flatten(before), flatten(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [
        f"{key.replace('/', '.')}: {_cut(old.get(key))} there, {_cut(new.get(key))} here" for key in keys
    ]
    more = [f"{len(keys) - most} more"] if len(keys) > most else []
    return "; ".join(changed[:most] + more)


def _cut(value: Any) -> str:
    return textwrap.shorten(str(value), 60, placeholder=" ...")
