# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""GR-MG policy checkpoints -> folders for `from_pretrained`, and back.

One table (`names.py`) has every tensor on both sides and serves both directions. Sizes come from the tensors
that show them; numbers of heads and loss weights come from GR-MG's train or pretrain json.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from ..base_model import list_names
from ..configuration_foresight import ForesightConfig
from ..encoders import sincos_2d
from ..modeling_foresight import ForesightForActionPrediction
from ..processing_foresight import ForesightProcessor
from .configuration import (
    Checkpoint,
    ConversionError,
    build_settings,
    check_checkpoint,
    read_config,
)
from .names import IGNORED, MAY_BE_FRESH, NEW_IN_3D, PARTS, POSITIONS, Row, table_rows
from .reading import read_policy, read_tensors


@dataclass
class Report:
    """What a conversion did."""

    kind: str  # what the file was
    output: Path
    mapped: int  # number of GR-MG's tensors that were converted
    fresh: list[str]  # parts of ours that the file lacks; they start untrained
    ignored: list[str]  # GR-MG's tensors that nothing of ours corresponds to
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
            + (f" ({list_names(self.ignored[:2])}, ...)" if self.ignored else ""),
            *(f"fresh: {name}" for name in self.fresh),
            *(f"notice: {notice}" for notice in self.notices),
            f"written to {self.output}",
        ]
        return "\n".join(lines)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill that becomes `output`, which must not hold anything, when all went well."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not empty: choose another --output, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        yield folder
        folder.replace(output)


def tensors_in_file(model: ForesightForActionPrediction) -> dict[str, Tensor]:
    """The model's own tensors under their names in a checkpoint.

    Versions of transformers name parts of a ViT differently in memory, but write the same names.
    """
    return revert_weight_conversion(model, model.state_dict())


# ---------------------------------------------------------------------- from GR-MG


def to_foresight(
    checkpoint: str | Path,
    settings: dict | None,
    output: str | Path,
    preset: str | None = None,
    text_tower: str | None = None,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
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
            a MAE or ViT checkpoint of transformers, or files of weights in OpenAI's and MAE's own names.
        tokenizer (`str`, *optional*): Folder of the text tower's tokenizer; by default `text_tower`.
        allow_pickle (`bool`): Unpickle arbitrary objects of trusted files.

    Raises:
        ConversionError: Names what does not fit; nothing is written then.
    """
    towers = {name: path for name, path in (("text", text_tower), ("vision", vision_tower)) if path}
    folders = {name: path for name, path in towers.items() if not Path(path).is_file()}
    with new_folder(Path(output)) as folder:
        kinds = {name: read_kind(name, path) for name, path in folders.items()}
        source, ignored = read_checkpoint(checkpoint, settings, towers, allow_pickle)
        config = read_config(source, preset)
        rows, fresh = find_rows(source, config, preset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the fresh parts
            model = build_model(config, folders, kinds)
        mapped = [row for part in rows if part not in fresh for row in rows[part]]
        untouched = copy_weights(model, mapped, source.tensors)
        new = [prefix for prefix in NEW_IN_3D if any(name.startswith(prefix) for name in untouched)]
        given = (*new, *(f"model.{name}_encoder." for name in folders))
        given += tuple(name for part in fresh for row in rows[part] for name in row.ours)
        if lost := [name for name in untouched if not name.startswith(given)]:
            raise ConversionError(f"Nothing of GR-MG's becomes {list_names(lost)}.")
        for name in ("text", "vision"):
            if name not in model.config.towers and not any(f"{name} tower" in n for n in source.notices):
                source.notices.append(
                    f"there is no {name} tower (--{name}-tower): the model takes {name}_features instead"
                )
        model.save_pretrained(folder)
        build_processor(model.config, tokenizer, folders.get("text"), source).save_pretrained(folder)
        check_written(model, folder)
    kind = "GR-MG policy" if source.has_part("action decoder") else "GR-MG video pretraining"
    kind += f" -> {preset}" if preset else ""
    fresh += [prefix.removeprefix("model.").rstrip(".") for prefix in new]
    return Report(kind, Path(output), len(mapped), fresh, sorted(ignored), source.notices, model.config)


def read_kind(name: str, folder: str) -> str:
    """The kind of model in a folder for the `text` or `vision` tower, which must belong there."""
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"--{name}-tower {folder} is neither a file nor a folder with a model's config.json."
        ) from error
    if (kind in ("clip", "clip_text_model")) != (name == "text"):
        wanted = "a CLIP" if name == "text" else "a MAE or ViT"
        raise ConversionError(f"--{name}-tower {folder} is a {kind}; {wanted} checkpoint belongs there.")
    return kind


def read_tower(name: str, file: str, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a file for the `text` or `vision` tower, under their names in a policy."""
    prefix, (tensors, _) = PARTS[f"{name} tower"][0], read_tensors(file, allow_pickle)
    tower = {prefix + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if not Checkpoint(tower, {}).has_part(f"{name} tower"):
        raise ConversionError(f"--{name}-tower {file}: the file's {name} tower is another network.")
    return tower


def read_checkpoint(
    path: str | Path, settings: dict | None, towers: dict[str, str], allow_pickle: bool
) -> tuple[Checkpoint, list[str]]:
    """A policy and its json, with the towers of files and without those of folders; and what is left out."""
    files = {name: file for name, file in towers.items() if Path(file).is_file()}
    given: dict[str, Tensor] = {}
    for name, file in files.items():
        given |= read_tower(name, file, allow_pickle)
    tensors, inside = read_policy(path, allow_pickle)
    if not (settings or inside):
        raise ConversionError(
            "Nothing tells the numbers of heads: add --config with the train.json or pretrain.json that the "
            "checkpoint was trained with (GR-MG's policy/config)."
        )
    replaced = tuple(PARTS[f"{name} tower"][0] for name in towers)
    ignored = [name for name in tensors if IGNORED.fullmatch(name) or name.startswith(replaced)]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(replaced)} | given
    source = Checkpoint(kept, settings or inside)
    check_checkpoint(source)
    for name, file in files.items():
        if not source.has_part(f"{name} tower"):
            raise ConversionError(f"--{name}-tower {file}: {source.notices[-1]}.")
    return source, ignored + [POSITIONS] * (POSITIONS in kept)


def find_rows(
    source: Checkpoint, config: ForesightConfig, preset: str | None
) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of every part of the model, and the parts that may be missing and start fresh."""
    rows = table_rows(config)
    fresh = [part for part in rows if not source.has_part(part)]
    if wrong := [part for part in fresh if preset is None or part not in MAY_BE_FRESH]:
        raise ConversionError(
            f"The checkpoint lacks the {list_names(wrong)}, which {preset or 'GR-MG'} needs."
        )
    if homeless := [part for part in PARTS if source.has_part(part) and part not in rows]:
        raise ConversionError(
            f"The preset {preset!r} has no place for the checkpoint's {list_names(homeless)}."
        )
    if POSITIONS in source.tensors:
        side = config.image_size // config.patch_size
        table = sincos_2d(side, side, config.hidden_size)
        difference = (source.tensors[POSITIONS] - table).abs().max().item()
        if not difference < 4e-3:  # bfloat16's rounding; NaN fails too
            raise ConversionError(
                f"{POSITIONS} differs from its equation by {difference:.3g}: damaged weights?"
            )
    return rows, fresh


def build_model(
    config: ForesightConfig, folders: dict[str, str], kinds: dict[str, str]
) -> ForesightForActionPrediction:
    """A fresh model, on towers of these kinds from folders by `text` and `vision`, of fitting width."""
    model = ForesightForActionPrediction.from_encoder_checkpoints(config, **folders)
    for name, given, wanted in (
        ("text", model.config.text_config.projection_dim, config.text_config.projection_dim),
        ("vision", model.model.vision_width, config.vision_config.hidden_size),
    ):
        if given != wanted:
            raise ConversionError(
                f"--{name}-tower gives features of {given} numbers; this policy takes {wanted}."
            )
    if kinds.get("vision") == "vit_mae":
        # MAE, and so GR-MG, has 1e-6 where ViTMAE's published config says 1e-12.
        model.config.vision_config.layer_norm_eps = 1e-6
        for module in model.model.vision_encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
    return model


def copy_weights(
    model: ForesightForActionPrediction, rows: list[Row], tensors: dict[str, Tensor]
) -> list[str]:
    """Copies GR-MG's tensors into the model; returns the names of ours that none went to."""
    ours = tensors_in_file(model)  # shares the model's memory
    untouched = set(ours)
    for row in rows:
        for name, tensor in row.to_ours(tensors[row.theirs]).items():
            if ours[name].shape != tensor.shape:
                raise ConversionError(
                    f"{row.theirs} gives {name} the shape {tuple(tensor.shape)}, but the sizes say "
                    f"{tuple(ours[name].shape)}: json and checkpoint do not belong together."
                )
            ours[name].copy_(tensor)
            untouched.remove(name)
    return sorted(untouched)


def build_processor(
    config: ForesightConfig, tokenizer: str | None, tower: str | None, source: Checkpoint
) -> ForesightProcessor:
    """The processor of a converted model, with the tokenizer in `tokenizer` or in the tower's folder."""
    found = None
    try:
        if tokenizer or tower:
            found = AutoTokenizer.from_pretrained(tokenizer or tower, local_files_only=True)
    except (OSError, ValueError) as error:
        if tokenizer:
            raise ConversionError(f"There is no tokenizer in {tokenizer}. ({error})") from error
    if found is None:
        source.notices.append(
            "the processor has no tokenizer yet: give CLIP's with --tokenizer, or set processor.tokenizer"
        )
        return ForesightProcessor.from_config(config, placeholder_tokenizer())
    text = config.text_config
    # The tower of a folder may have another end-of-text id.
    other_end = tower is None and found.eos_token_id != text.eos_token_id
    if "text" in config.towers and (len(found) > text.vocab_size or other_end):
        raise ConversionError(
            f"The tokenizer in {tokenizer or tower} has {len(found)} tokens and ends texts with "
            f"{found.eos_token_id}; the text tower has {text.vocab_size} and {text.eos_token_id}."
        )
    return ForesightProcessor.from_config(config, found)


def placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without words, which raises at the first one."""
    words = models.WordLevel({"<|startoftext|>": 0, "<|endoftext|>": 1}, unk_token="<|no tokenizer|>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, is_placeholder=True)


def check_written(model: ForesightForActionPrediction, folder: Path) -> None:
    """Raises if `from_pretrained` does not read back the model's tensors."""
    again = tensors_in_file(ForesightForActionPrediction.from_pretrained(folder, dtype=torch.float32))
    if wrong := [n for n, value in tensors_in_file(model).items() if not torch.equal(value, again[n])]:
        raise ConversionError(
            f"Reading the written folder gave other values of {list_names(wrong)}: is the disk damaged?"
        )


# ---------------------------------------------------------------------- to GR-MG

# Fields in which a model means the same as GR-MG, whatever its sizes.
GRMG_SEMANTICS = ("within_frame", "vision_sees_state", "future_sees_state", "goal_image", "action_head")
GRMG_SEMANTICS += ("auxiliary_heads", "layer_norm_eps")


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
        ConversionError: If the model has parts or meanings that GR-MG lacks, or the json contradicts it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConversionError(f"{folder} has no config.json: --to-grmg takes a folder of this project.")
    with new_folder(Path(output)) as target:
        model = ForesightForActionPrediction.from_pretrained(folder, dtype=torch.float32)
        config, ours = model.config, tensors_in_file(model)
        rows = sum(table_rows(config).values(), [])
        extra = set(ours) - {name for row in rows for name in row.ours}
        if wrong := foreign_fields(config) + sorted(extra):
            raise ConversionError(f"{folder} is not a GR-MG model; it has {list_names(wrong)}.")
        theirs = {row.theirs: row.to_theirs(ours) for row in rows}
        if config.has("future"):
            side = config.image_size // config.patch_size
            theirs[POSITIONS] = sincos_2d(side, side, config.hidden_size)[None]
        if settings is not None:
            read_config(Checkpoint(theirs, settings))
        notices = [f"there is no {t} tower in {folder}" for t in ("text", "vision") if t not in config.towers]
        if base is not None:
            tensors, _ = read_policy(base, allow_pickle)
            theirs |= {n: t for n, t in tensors.items() if n == POSITIONS or IGNORED.fullmatch(n)}
        elif "text" in config.towers:
            notices.append("CLIP's image side is not part of our models; --base GRMG_FILE supplies it")
        save_file({name: theirs[name].clone() for name in sorted(theirs)}, target / "model.safetensors")
        written = json.dumps(settings or build_settings(config), indent=2)
        (target / "config.json").write_text(written + "\n")
    return Report("our model -> GR-MG", Path(output), len(rows), [], [], notices, config)


def foreign_fields(config: ForesightConfig) -> list[str]:
    """Fields in which a config means something that GR-MG does not compute."""
    grmg, given = ForesightConfig.from_preset("grmg").to_dict(), config.to_dict()
    foreign = [f"{name}={given[name]!r}" for name in GRMG_SEMANTICS if given[name] != grmg[name]]
    if len(config.views) > 2:
        foreign.append(f"views={list(config.views)}")
    for name in ("state", "action"):
        size, binary = getattr(config, f"{name}_dim"), list(getattr(config, f"binary_{name}_indices"))
        if size and binary != [size - 1]:
            foreign.append(f"binary_{name}_indices={binary}")
    return foreign
