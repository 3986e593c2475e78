# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Compares the model that a config.json describes with the weights beside it, before memory is allocated.

Both come from the same stranger: `hidden_size: 40000` beside 10 MB of weights would allocate 25 GB before
`transformers` finds that they do not belong together.
"""

import copy
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import prod

import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_foresight import explain_config_errors

SOURCE_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# What a model may have beyond its checkpoint: tables that are not saved, towers made to learn their shapes.
# With `strict=False` new parts start fresh.
NEW_NUMBERS = 2**28
MORE_NUMBERS, MORE_TENSORS = 2**22, 4000


def read_shapes(source: str, options: Mapping) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's weights, from the headers of its safetensors files; empty without any.

    Args:
        source (`str` or `Path`): Folder or Hub id.
        options (`Mapping`): Arguments of `from_pretrained`.
    """
    options = {name: options[name] for name in (*SOURCE_OPTIONS, "variant") if options.get(name) is not None}
    variant = f".{options.pop('variant')}" if "variant" in options else ""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        stem, _, ending = name.rpartition(".")
        file = cached_file(
            source, f"{stem}{variant}.{ending}", _raise_exceptions_for_missing_entries=False, **options
        )
        if file is not None:
            break
    else:
        return {}
    files = [file]
    if file.endswith(".json"):
        try:
            with open(file, encoding="utf-8") as index:
                shards = set(json.load(index)["weight_map"].values())
            outside = [shard for shard in shards if os.path.basename(shard) != shard]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}): copy or download it again.") from error
        if outside:
            raise ValueError(f"{file} names files outside of its folder, {outside[0]!r}: download it again.")
        files = [cached_file(source, shard, **options) for shard in sorted(shards)]
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


def check_sizes(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    shapes: Mapping,
    source: str,
    strict: bool = True,
) -> None:
    """Refuses a config whose model is much larger than the weights; smaller differences have their names.

    Raises:
        ValueError: The message names both sizes and the largest numbers of the config.
    """
    held = sum(prod(shape) for shape in shapes.values())
    with explain_config_errors(f" of {source}"):
        try:
            most = 4 * len(shapes) + MORE_TENSORS
            with _limit_parameters(most), init.no_init_weights(), torch.device("meta"):
                model = model_class(copy.deepcopy(config))
            wanted = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
            size = f"{wanted:,} numbers"
        except (OverflowError, RuntimeError) as error:
            if "overflow" not in str(error):  # PyTorch's word for a size beyond 64 bits
                raise
            wanted, size = None, "far more"
    if wanted is None or wanted > 2 * held + (MORE_NUMBERS if strict else NEW_NUMBERS):
        numbers = sorted(_list_numbers("", config.to_dict()), reverse=True)
        raise ValueError(
            f"The config.json of {source} describes a model of {size}, but its weights hold {held:,} in "
            f"{len(shapes)} tensors: they do not belong together. The largest entries of config.json are "
            f"{', '.join(f'{name}={value}' for value, name in numbers[:4])}: copy or download both again."
        )


@contextmanager
def _limit_parameters(most: int) -> Iterator[None]:
    """Ends construction at that many parameters: a million empty layers take minutes without any memory."""
    count, here = 0, threading.get_ident()

    def check(module, name, parameter) -> None:
        nonlocal count
        count += threading.get_ident() == here
        if count > most:
            raise OverflowError(f"overflow: more than {most} parameters")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _list_numbers(prefix: str, fields: Mapping) -> Iterator[tuple[int, str]]:
    """Whole numbers of a config and lengths of its lists, with their names."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _list_numbers(f"{prefix}{name}.", value)
        elif isinstance(value, list):
            yield from ((entry, f"{prefix}{name}") for entry in value if isinstance(entry, int))
            yield len(value), f"len({prefix}{name})"
        elif isinstance(value, int) and not name.endswith("token_id"):
            yield value, prefix + name
