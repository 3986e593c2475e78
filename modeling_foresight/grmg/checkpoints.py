# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
r"""GR-MG policy checkpoints -> ours, and back.

    python -m modeling_foresight.convert_grmg_checkpoint epoch=47-step=83712.ckpt \
        --config policy/config/train.json --output grmg_calvin
    python -m modeling_foresight.convert_grmg_checkpoint grmg_calvin --to-grmg --output grmg_again

One table, [`TABLE`], names every tensor on both sides and serves both directions. Sizes are read from the
tensors where they show; numbers of heads and loss weights come from GR-MG's train or pretrain json. See
docs/grmg_checkpoints.md.
"""

import argparse
import json
import re
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from .configuration_foresight import PRESETS, ForesightConfig
from .encoders import sincos_2d
from .grmg_config import (
    ConversionError,
    Facts,
    check_names,
    check_values,
    drop_unknown_towers,
    grmg_settings,
    read_config,
    some,
)
from .grmg_names import IGNORED, MAY_BE_FRESH, NEW_IN_3D, POSITIONS, TABLE, Row, table_rows
from .modeling_foresight import ForesightForActionPrediction
from .processing_foresight import ForesightProcessor

# With this number begin the pickles of torch.save before it wrote zip files.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SIGNATURE = ("transformer.ln_f.weight", "embed_timestep.weight", "perceiver_resampler.latents")


def load_payload(path: Path, allow_pickle: bool):
    """What a `.pt`, `.ckpt` or safetensors file holds, told apart by its first bytes.

    Raises:
        ConversionError: If the file is damaged, of another kind, or needs `allow_pickle`.
    """
    if path.is_dir():
        raise ConversionError(
            f"{path} is a folder: give a GR-MG file, or add --to-grmg to convert one of our folders."
        )
    with open(path, "rb") as file:
        head = file.read(32)
    damaged = f"{path} is damaged or cut short: copy or download it again."
    is_zip = head[:2] == b"PK"
    if head[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{damaged} ({first_line(error)})") from error
    if not is_zip and head[:1] != b"\x80":
        raise ConversionError(f"{path} is neither a PyTorch nor a safetensors file, or it is damaged.")
    if not is_zip and LEGACY_MAGIC not in head:
        raise ConversionError(
            f"{path} is a plain pickle, which only Python's pickle reads: write its weights with torch.save "
            "or safetensors first."
        )
    records = zip_records(path, damaged) if is_zip else {"data.pkl"}
    is_script = "constants.pkl" in records
    if "data.pkl" not in records:
        raise ConversionError(f"{path} is a zip file, but none that torch.save wrote.")
    if is_script and not allow_pickle:
        raise ConversionError(
            f"{path} is a TorchScript archive, which holds code beside its weights. If you trust its source, "
            "add --allow-pickle."
        )
    try:
        if is_script:
            return torch.jit.load(path, map_location="cpu").state_dict()
        # Only a zip file can be mapped; older ones are read whole.
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=is_zip)
    except UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
        if "Weights only" not in str(error) or not what:
            raise ConversionError(f"{damaged} ({first_line(error)})") from error
        raise ConversionError(
            f"{path} holds pickled objects beside its weights ({what[1]}); loading them could run code. If "
            "you trust its source, add --allow-pickle."
        ) from None
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConversionError(f"{path} needs code that is not here to be unpickled: {error}.") from error
    except (RuntimeError, EOFError) as error:
        raise ConversionError(f"{damaged} ({first_line(error)})") from error


def zip_records(path: Path, damaged: str) -> set[str]:
    """Names of what lies in a zip file, without folders; every checksum is compared (1 GB in half a second).

    Raises:
        ConversionError: Begins with `damaged`, if the file is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            # torch.serialization.set_crc32_options(False) leaves all checksums out.
            wrong = archive.testzip() if any(record.CRC for record in records) else None
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ConversionError(f"{damaged} ({first_line(error)})") from error
    if wrong is not None:
        raise ConversionError(f"{damaged} (The checksum of {wrong} is wrong.)")
    return {record.filename.rsplit("/", 1)[-1] for record in records}


def first_line(error: Exception) -> str:
    """Of an error's message, or its name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def read_tensors(path: str | Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Reads weights: safetensors, a `.pt`/`.ckpt` file with or without `state_dict`, or TorchScript.

    Args:
        path (`str` or `Path`): The file.
        allow_pickle (`bool`): Read TorchScript and arbitrary pickled objects, which can run code of whoever
            made the file.

    Returns:
        Tensors by name, one leading `model.` stripped, floating ones in float32; and the json that Lightning
        kept among its hyper-parameters, or `{}`.

    Raises:
        ConversionError: If the file is damaged, needs `allow_pickle`, or holds something else.
    """
    payload = load_payload(Path(path), allow_pickle)
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


def check_is_grmg(path: str | Path, names: set[str]) -> None:
    """Refuses what is no GR-MG policy.

    Raises:
        ConversionError: Says what the file seems to be.
    """
    if {"layers.0.self_attn.q_proj.weight", "resampler.latents"} & names:
        raise ConversionError(
            f"{path} is a checkpoint of this project already: load it with from_pretrained, or give its "
            "folder with --to-grmg."
        )
    if any(name.startswith(("model_clip.", "pred_act_mlps.")) for name in names):
        raise ConversionError(f"{path} is a GR-1 checkpoint; only GR-MG's can be converted.")
    missing = [name for name in SIGNATURE if name not in names]
    if missing:
        raise ConversionError(
            f"{path} is no GR-MG policy: it lacks {missing} and holds, for example, {sorted(names)[:3]}."
        )


def table_positions(side: int, width: int) -> Tensor:
    """GR-MG's `decoder_pos_embed` `(1, side**2, width)`, in numpy's float32 arithmetic as it was made there.

    The same equation as [`sincos_2d`], whose last bits differ.
    """
    frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float32) / np.float32(width // 4))
    row, col = np.divmod(np.arange(side * side), side)
    angles = [place.astype(np.float32)[:, None] * frequency.astype(np.float32) for place in (col, row)]
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        kind: What the file was.
        output: Where the result lies.
        mapped: Number of GR-MG tensors that went over.
        fresh: Parts and tensors of ours that the file does not have; they start untrained.
        ignored: GR-MG's tensors that nothing of ours corresponds to.
        notices: What a user should know.
        config: Of the model.
    """

    kind: str
    output: Path
    mapped: int
    fresh: list[str]
    ignored: list[str]
    notices: list[str]
    config: ForesightConfig

    def __str__(self) -> str:
        config = self.config
        lines = [
            f"{self.kind}: width {config.hidden_size}, {config.num_hidden_layers} layers of "
            f"{config.num_attention_heads} heads, T={config.history_length}, K={config.chunk_size}, "
            f"{config.num_latents} latents, images of {config.image_size} px in patches of "
            f"{config.patch_size}, towers {list(config.towers)}",
            f"{self.mapped} tensors of GR-MG mapped, {len(self.ignored)} ignored"
            + (f" ({some(self.ignored[:2])}, ...)" if self.ignored else ""),
            *(f"fresh: {name}" for name in self.fresh),
            *(f"notice: {notice}" for notice in self.notices),
            f"written to {self.output}",
        ]
        return "\n".join(lines)


def to_foresight(
    checkpoint: str | Path,
    settings: dict | None,
    output: str | Path,
    preset: str | None = None,
    text_tower: str | None = None,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    seed: int = 0,
) -> Report:
    """Converts a GR-MG policy checkpoint into a folder with config, weights and processor.

    Args:
        checkpoint (`str` or `Path`): `.pt`, `.ckpt` or safetensors file.
        settings (`dict`, *optional*): GR-MG's train or pretrain json; by default the one inside a Lightning
            checkpoint.
        output (`str` or `Path`): Folder to make; must not exist or be empty.
        preset (`str`, *optional*): Start this variant from the file, for example `foresight_3d`; by default
            the GR-MG variant that the file holds.
        text_tower, vision_tower (`str`, *optional*): Towers that replace the file's: folders of a CLIP and of
            a ViTMAE or ViT checkpoint, or files of weights in CLIP's and MAE's original names.
        tokenizer (`str`, *optional*): Folder of the text tower's tokenizer; by default `text_tower`.
        allow_pickle (`bool`): Unpickle arbitrary objects of a trusted file.
        seed (`int`): Of the fresh parts.

    Raises:
        ConversionError: Names what does not fit; nothing is written then.
    """
    output = free_folder(output)
    towers = {"text": text_tower, "vision": vision_tower}
    files = {name: source for name, source in towers.items() if source and Path(source).is_file()}
    folders = {name: source for name, source in towers.items() if source and name not in files}
    check_folders(folders)
    facts, ignored = read_facts(checkpoint, settings, towers, allow_pickle)
    drop_unknown_towers(facts, files)
    check_names(facts)
    check_values(facts)
    config = read_config(facts, preset)
    if POSITIONS in facts.tensors:
        check_positions(facts.tensors[POSITIONS], config)
        ignored.append(POSITIONS)

    rows = table_rows(config)
    fresh = [part for part in rows if not facts.has_part(part)]
    if wrong := [part for part in fresh if preset is None or part not in MAY_BE_FRESH]:
        raise ConversionError(f"The checkpoint lacks the {some(wrong)} of the preset {preset!r}.")
    if homeless := [part for part in TABLE if facts.has_part(part) and part not in rows]:
        raise ConversionError(f"The preset {preset!r} has no place for the checkpoint's {some(homeless)}.")
    mapped = [row for part in rows if part not in fresh for row in rows[part]]
    torch.manual_seed(seed)
    model = build_model(config, folders)
    untouched = fill(model, mapped, facts.tensors)
    new = {prefix: [name for name in untouched if name.startswith(prefix)] for prefix in NEW_IN_3D}
    planned = {name for part in fresh for row in rows[part] for name in row.ours}.union(*new.values())
    given = tuple(f"model.{name}_encoder." for name in folders)
    if lost := [name for name in untouched if name not in planned and not name.startswith(given)]:
        raise ConversionError(f"Nothing of GR-MG's becomes {some(lost)}.")
    for name in ("text", "vision"):
        if name not in model.config.towers and not any(f"{name} tower" in notice for notice in facts.notices):
            facts.notices.append(
                f"there is no {name} tower (--{name}-tower): the model wants {name}_features in its place"
            )
    processor = build_processor(model.config, tokenizer, folders.get("text"), facts)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        again = ForesightForActionPrediction.from_pretrained(folder, dtype=torch.float32).state_dict()
        if wrong := [n for n, value in model.state_dict().items() if not torch.equal(value, again[n])]:
            raise ConversionError(f"Reading the result back gave other values of {some(wrong)}.")

    write_whole(output, write)
    kind = "GR-MG policy" if facts.has_part("action decoder") else "GR-MG video pretraining"
    return Report(
        kind=kind + (f" -> {preset}" if preset else ""),
        output=output,
        mapped=len(mapped),
        fresh=fresh + [prefix.removeprefix("model.").rstrip(".") for prefix, names in new.items() if names],
        ignored=sorted(ignored),
        notices=facts.notices,
        config=model.config,
    )


def check_folders(folders: dict[str, str]) -> None:
    """Raises if a folder for `text` or `vision` is not there, or holds the other kind of tower."""
    for name, source in folders.items():
        try:
            kind = AutoConfig.from_pretrained(source).model_type
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"--{name}-tower {source} is no file of weights and no folder with a model's config.json."
            ) from error
        is_text = kind in ("clip", "clip_text_model")
        if is_text != (name == "text"):
            wanted = "a CLIP" if name == "text" else "a ViTMAE or ViT"
            raise ConversionError(f"--{name}-tower {source} is a {kind}; {wanted} checkpoint belongs there.")


def read_facts(
    checkpoint: str | Path, settings: dict | None, towers: dict[str, str | None], allow_pickle: bool
) -> tuple[Facts, list[str]]:
    """Reads a policy and its json; returns them, and the names that nothing will become of.

    A tower given apart takes the place of the file's: its names are left out, and those of an original file
    come in.

    Raises:
        ConversionError: If the file is no GR-MG policy, or there is no json.
    """
    tensors, inside = read_tensors(checkpoint, allow_pickle)
    check_is_grmg(checkpoint, set(tensors))
    if not (settings or inside):
        raise ConversionError(
            "Nothing tells the numbers of heads: add --config with the train.json or pretrain.json that the "
            "checkpoint was trained with (GR-MG's policy/config)."
        )
    ignored = {name for name in tensors if IGNORED.fullmatch(name)}
    for name, source in towers.items():
        prefix = TABLE[f"{name} tower"][0]
        if source is None:
            continue
        replaced = {n for n in tensors if n.startswith(prefix)}
        ignored |= replaced
        tensors = {n: tensor for n, tensor in tensors.items() if n not in replaced}
        if Path(source).is_file():
            tensors |= {prefix + n: t for n, t in read_tensors(source, allow_pickle)[0].items()}
    return Facts(tensors, settings or inside), sorted(ignored)


def check_positions(table: Tensor, config: ForesightConfig) -> None:
    """Raises if a file's constant position table `(1, N, D)` is not what its equation says."""
    side = config.image_size // config.patch_size
    difference = (table - sincos_2d(side, side, config.hidden_size)).abs().max().item()
    if not difference < 4e-3:  # bfloat16's rounding; NaN fails too
        raise ConversionError(f"{POSITIONS} differs from its equation by {difference:.3g}: damaged weights?")


def build_model(config: ForesightConfig, folders: dict[str, str]) -> ForesightForActionPrediction:
    """A fresh model, on towers from folders by `text` and `vision`.

    Raises:
        ConversionError: If their features have another width than the policy takes.
    """
    if not folders:
        return ForesightForActionPrediction(config)
    model = ForesightForActionPrediction.from_encoder_checkpoints(config, **folders)
    for name, given, wanted in (
        ("text", model.config.text_config.projection_dim, config.text_config.projection_dim),
        ("vision", model.model.vision_width, config.vision_config.hidden_size),
    ):
        if given != wanted:
            raise ConversionError(
                f"--{name}-tower gives features of {given} numbers; this policy takes {wanted}."
            )
    if "vision" in folders and AutoConfig.from_pretrained(folders["vision"]).model_type == "vit_mae":
        # MAE, and so GR-MG, has 1e-6 where ViTMAE's published config says 1e-12.
        model.config.vision_config.layer_norm_eps = 1e-6
        for module in model.model.vision_encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
    return model


def fill(model: ForesightForActionPrediction, rows: list[Row], tensors: dict[str, Tensor]) -> list[str]:
    """Copies GR-MG's tensors into the model; returns the names of ours that none went to.

    Raises:
        ConversionError: If a shape differs.
    """
    ours = model.state_dict()  # shares the model's memory
    untouched = set(ours)
    for row in rows:
        for name, tensor in row.to_ours(tensors[row.theirs]).items():
            if name not in ours or ours[name].shape != tensor.shape:
                wanted = tuple(ours[name].shape) if name in ours else "nothing"
                raise ConversionError(
                    f"{row.theirs} gives {name} the shape {tuple(tensor.shape)}, but the sizes say {wanted}: "
                    "json and checkpoint do not belong together."
                )
            ours[name].copy_(tensor)
            untouched.remove(name)
    return sorted(untouched)


def build_processor(
    config: ForesightConfig, tokenizer: str | None, tower: str | None, facts: Facts
) -> ForesightProcessor:
    """The processor of a converted model, with the tokenizer in the folder `tokenizer` or beside the tower.

    Raises:
        ConversionError: If the folder has no tokenizer, or one that cannot be the tower's.
    """
    found = None
    try:
        if tokenizer or tower:
            found = AutoTokenizer.from_pretrained(tokenizer or tower, local_files_only=True)
    except (OSError, ValueError) as error:
        if tokenizer:
            raise ConversionError(f"There is no tokenizer in {tokenizer}. ({error})") from error
    if found is None:
        facts.notices.append(
            "the processor has no tokenizer yet: give CLIP's with --tokenizer, or set processor.tokenizer"
        )
        return ForesightProcessor.from_config(config, placeholder_tokenizer())
    if "text" in config.towers:
        text = config.text_config
        # The tower of a folder may say end-of-text in its own way.
        if len(found) > text.vocab_size or (tower is None and found.eos_token_id != text.eos_token_id):
            raise ConversionError(
                f"The tokenizer in {tokenizer or tower} has {len(found)} tokens and ends texts with "
                f"{found.eos_token_id}; the text tower has {text.vocab_size} and {text.eos_token_id}."
            )
    return ForesightProcessor.from_config(config, found)


def placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """Stands where a tokenizer must be: it knows no word and raises at the first one."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(special)}, unk_token="<|no tokenizer|>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        is_placeholder=True,
    )


# What GR-MG computes, whatever its sizes.
GRMG_SEMANTICS = {
    "within_frame": "causal",
    "vision_sees_state": True,
    "future_sees_state": True,
    "goal_image": True,
    "action_head": "cvae",
    "auxiliary_heads": True,
    "layer_norm_eps": 1e-5,
}


def to_grmg(
    folder: str | Path,
    output: str | Path,
    settings: dict | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
) -> Report:
    """Converts one of our `grmg` or `grmg_pretrain` folders back to GR-MG's names.

    Args:
        folder (`str` or `Path`): Config and weights.
        output (`str` or `Path`): Folder to make; gets `model.safetensors` and `config.json`, GR-MG's json.
        settings (`dict`, *optional*): The json to write; by default what the config says.
        base (`str` or `Path`, *optional*): A GR-MG file that supplies what ours does not hold: CLIP's image
            side and the constant position table.
        allow_pickle (`bool`): For `base`.

    Raises:
        ConversionError: If the model has parts or meanings that GR-MG has not, or the json contradicts it.
    """
    output = free_folder(output)
    if not (Path(folder) / "config.json").is_file():
        raise ConversionError(
            f"{folder} is no folder of this project: --to-grmg wants one with a config.json."
        )
    model = ForesightForActionPrediction.from_pretrained(folder, dtype=torch.float32)
    config, ours = model.config, model.state_dict()
    rows = sum(table_rows(config).values(), [])
    extra = set(ours) - {name for row in rows for name in row.ours}
    if wrong := foreign_fields(config) + sorted(extra):
        raise ConversionError(f"{folder} is no GR-MG model; it has {some(wrong)}.")
    theirs = {row.theirs: row.to_theirs(ours) for row in rows}
    if config.has("future"):
        theirs[POSITIONS] = table_positions(config.image_size // config.patch_size, config.hidden_size)
    if settings is not None:
        read_config(Facts(theirs, settings))
    notices = [f"there is no {t} tower in {folder}" for t in ("text", "vision") if t not in config.towers]
    if base is not None:
        tensors, _ = read_tensors(base, allow_pickle)
        check_is_grmg(base, set(tensors))
        theirs |= {n: t for n, t in tensors.items() if n == POSITIONS or IGNORED.fullmatch(n)}
    elif "text" in config.towers:
        notices.append("CLIP's image side is not part of our models; --base GRMG_FILE copies it from there")

    def write(target: Path) -> None:
        save_file({name: theirs[name].clone() for name in sorted(theirs)}, target / "model.safetensors")
        written = settings or grmg_settings(config)
        (target / "config.json").write_text(json.dumps(written, indent=2) + "\n")

    write_whole(output, write)
    return Report("our model -> GR-MG", output, len(rows), [], [], notices, config)


def foreign_fields(config: ForesightConfig) -> list[str]:
    """Fields in which a config means something that GR-MG does not compute."""
    foreign = [f"{k}={getattr(config, k)!r}" for k, v in GRMG_SEMANTICS.items() if getattr(config, k) != v]
    if len(config.views) > 2:
        foreign.append(f"views={list(config.views)}")
    for name in ("state", "action"):
        size, binary = getattr(config, f"{name}_dim"), list(getattr(config, f"binary_{name}_indices"))
        if size and binary != [size - 1]:
            foreign.append(f"binary_{name}_indices={binary}")
    return foreign


def free_folder(path: str | Path) -> Path:
    """The folder to make.

    Raises:
        ConversionError: If something is there already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConversionError(f"{path} exists and is not empty: choose another --output, or remove it.")
    return path


def write_whole(output: Path, write) -> None:
    """Lets `write(folder)` fill a folder beside `output` that takes its place when all went well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        write(partial)
        partial.chmod(0o755)  # mkdtemp lets nobody else read
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_foresight.convert_grmg_checkpoint",
        description="GR-MG policy checkpoints -> a folder for from_pretrained; --to-grmg goes back.",
        epilog="Example: python -m modeling_foresight.convert_grmg_checkpoint pretrained.pt "
        "--config pretrain.json --preset foresight_3d --output start",
    )
    parser.add_argument(
        "checkpoint", help="GR-MG's .pt, .ckpt or safetensors; with --to-grmg one of our folders"
    )
    parser.add_argument(
        "--config", help="GR-MG's train or pretrain json; may add vision_stand_in, text_stand_in"
    )
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument(
        "--preset", choices=[name for name in PRESETS if name != "gr1"], help="start this variant"
    )
    parser.add_argument("--text-tower", help="folder of a CLIP checkpoint, or file in CLIP's own names")
    parser.add_argument("--vision-tower", help="folder of a ViTMAE or ViT checkpoint, or MAE's own file")
    parser.add_argument("--tokenizer", help="folder of CLIP's tokenizer; by default that of --text-tower")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled objects or TorchScript of a file that you trust",
    )
    parser.add_argument("--to-grmg", action="store_true", help="from our folder to GR-MG's names")
    parser.add_argument("--base", help="with --to-grmg: GR-MG file that supplies CLIP's image side")
    args = parser.parse_args(arguments)
    useless = ("preset", "text_tower", "vision_tower", "tokenizer") if args.to_grmg else ("base",)
    for name in useless:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes {'without' if args.to_grmg else 'with'} --to-grmg")
    logging.disable_progress_bar()
    try:
        settings = None if args.config is None else read_settings(args.config)
        if args.to_grmg:
            report = to_grmg(args.checkpoint, args.output, settings, args.base, args.allow_pickle)
        else:
            report = to_foresight(
                args.checkpoint,
                settings,
                args.output,
                args.preset,
                args.text_tower,
                args.vision_tower,
                args.tokenizer,
                args.allow_pickle,
            )
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(report)
    return 0


def read_settings(path: str | Path) -> dict:
    """GR-MG's json.

    Raises:
        ConversionError: If it is none.
    """
    try:
        settings = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} is no json: {error}.") from error
    if not isinstance(settings, dict) or "policy" not in settings:
        raise ConversionError(f"{path} is no train or pretrain json of GR-MG: it has no 'policy'.")
    return settings


if __name__ == "__main__":
    sys.exit(main())
