# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Reads a GR-MG policy and its json from their files, and refuses anything else by name."""

import json
import re
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .configuration import ConversionError

SIGNATURE = ("transformer.ln_f.weight", "embed_timestep.weight", "perceiver_resampler.latents")
READ_ERRORS = (UnpicklingError, SafetensorError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError)
READ_ERRORS += (EOFError,)


def read_payload(path: Path, allow_pickle: bool):
    """What a `.pt`, `.ckpt` or safetensors file holds; damage and pickled objects are refused."""
    if path.is_dir():
        raise ConversionError(
            f"{path} is a folder: give a GR-MG file, or add --to-grmg to convert one of our folders."
        )
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:9] == b"{":
            return load_file(path)
        if head[:2] == b"PK":
            check_sums(path)
            payload = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
            return payload.state_dict() if isinstance(payload, torch.nn.Module) else payload
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConversionError(
            f"{path} holds pickled objects of code that cannot be imported here: install it. ({error})"
        ) from error
    except READ_ERRORS as error:
        # OpenAI publishes CLIP as a TorchScript archive.
        if what := re.search(r"Weights only.*?(?:GLOBAL|class) (\S+)|(TorchScript)", str(error), re.DOTALL):
            raise ConversionError(
                f"{path} holds pickled objects next to its weights ({what[1] or what[2]}); loading them "
                "could run code. If you trust its source, add --allow-pickle."
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ConversionError(
            f"{path} is damaged, cut short or of another program: copy or download it again. ({reason})"
        ) from error
    raise ConversionError(
        f"{path} is neither a safetensors file nor one of torch.save since 2020: load its weights "
        "and write them with either."
    )


def check_sums(path: Path) -> None:
    """Raises if a checksum in a zip file is wrong: `torch.load` compares none (1 GB in half a second)."""
    with zipfile.ZipFile(path) as archive:
        # torch.serialization.set_crc32_options(False) leaves all of them out.
        has_sums = any(record.CRC for record in archive.infolist())
        if has_sums and (wrong := archive.testzip()):
            raise ValueError(f"The checksum of {wrong} is wrong.")


def read_tensors(path: str | Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Reads weights: safetensors, or a `.pt`/`.ckpt` file with or without `state_dict`.

    Args:
        path (`str` or `Path`): The file.
        allow_pickle (`bool`): Unpickle arbitrary objects, which can run code of whoever made the file.

    Returns:
        Tensors by name, one leading `model.` stripped, floating ones in float32; and the json that Lightning
        kept among its hyper-parameters, or `{}`.

    Raises:
        ConversionError: If the file is damaged, needs `allow_pickle`, or holds something else.
    """
    payload = read_payload(Path(path), allow_pickle)
    if not isinstance(payload, dict):
        raise ConversionError(f"{path} holds a {type(payload).__name__}, not a dict of weights.")
    hyper = payload.get("hyper_parameters")
    settings = hyper.get("configs", hyper) if isinstance(hyper, dict) else None
    settings = settings if isinstance(settings, dict) and "policy" in settings else {}
    weights = payload.get("state_dict", payload.get("model", payload))
    nested = [k for k, v in weights.items() if not isinstance(v, Tensor)] if isinstance(weights, dict) else []
    if "unet" in nested or "unet_ema" in nested:
        raise ConversionError(
            f"{path} holds {nested}: it is GR-MG's goal-image generator, not its policy. Give the policy's "
            "checkpoint (pretrained.pt, or the .ckpt of CALVIN training)."
        )
    if not isinstance(weights, dict) or not weights or nested:
        raise ConversionError(f"{path} has no tensors by name: {nested[:5] or type(weights).__name__}.")
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        # One leading `model.` only: `model_mae.` begins with "model" too.
        short = name.removeprefix("model.")
        if short in tensors:
            raise ConversionError(f"{path} has {short} twice, with and without a leading 'model.'.")
        tensors[short] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors, settings


def read_policy(path: str | Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict]:
    """As [`read_tensors`], of a GR-MG policy; anything else is refused with what it seems to be."""
    tensors, settings = read_tensors(path, allow_pickle)
    if {"layers.0.self_attn.q_proj.weight", "resampler.latents"} & set(tensors):
        raise ConversionError(
            f"{path} is a checkpoint of this project already: load it with from_pretrained, or give its "
            "folder with --to-grmg."
        )
    if any(name.startswith(("model_clip.", "pred_act_mlps.")) for name in tensors):
        raise ConversionError(f"{path} is a GR-1 checkpoint; only GR-MG's can be converted.")
    if missing := [name for name in SIGNATURE if name not in tensors]:
        raise ConversionError(
            f"{path} is not a GR-MG policy: it lacks {missing} and holds, for example, {sorted(tensors)[:3]}."
        )
    return tensors, settings


def read_settings(path: str | Path) -> dict:
    """GR-MG's train or pretrain json."""
    try:
        settings = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict) or "policy" not in settings:
        raise ConversionError(f"{path} is not a train or pretrain json of GR-MG: it has no 'policy'.")
    return settings
