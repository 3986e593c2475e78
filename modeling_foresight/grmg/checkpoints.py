# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""GR-MG policy checkpoints -> folders for `from_pretrained`, and back.

One table, [`TABLE`], names every tensor on both sides and serves both directions. Sizes are read from the
tensors where they show; numbers of heads and loss weights come from GR-MG's train or pretrain json.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from ..configuration_foresight import ForesightConfig
from ..encoders import sincos_2d
from ..modeling_foresight import ForesightForActionPrediction
from ..processing_foresight import ForesightProcessor
from .configuration import ConversionError, Facts, check_facts, grmg_settings, read_config, some
from .names import IGNORED, MAY_BE_FRESH, NEW_IN_3D, POSITIONS, TABLE, Row, table_rows
from .reading import read_policy


def tensors_in_file(model: ForesightForActionPrediction) -> dict[str, Tensor]:
    """The model's own tensors under their names in a checkpoint.

    Versions of transformers call parts of a ViT differently in memory, but write the same names.
    """
    return revert_weight_conversion(model, model.state_dict())


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
            a MAE or ViT checkpoint.
        tokenizer (`str`, *optional*): Folder of the text tower's tokenizer; by default `text_tower`.
        allow_pickle (`bool`): Unpickle arbitrary objects of a trusted file.

    Raises:
        ConversionError: Names what does not fit; nothing is written then.
    """
    output = free_folder(output)
    folders = {name: path for name, path in (("text", text_tower), ("vision", vision_tower)) if path}
    check_folders(folders)
    facts, ignored = read_facts(checkpoint, settings, folders, allow_pickle)
    check_facts(facts)
    config = read_config(facts, preset)
    if POSITIONS in facts.tensors:
        check_positions(facts.tensors[POSITIONS], config)
        ignored.append(POSITIONS)
    rows, fresh = plan(facts, config, preset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the fresh parts
        model = build_model(config, folders)
    mapped = [row for part in rows if part not in fresh for row in rows[part]]
    untouched = fill(model, mapped, facts.tensors)
    new = [prefix for prefix in NEW_IN_3D if any(name.startswith(prefix) for name in untouched)]
    planned = {name for part in fresh for row in rows[part] for name in row.ours}
    given = (*new, *(f"model.{name}_encoder." for name in folders))
    if lost := [name for name in untouched if name not in planned and not name.startswith(given)]:
        raise ConversionError(f"Nothing of GR-MG's becomes {some(lost)}.")
    for name in ("text", "vision"):
        if name not in model.config.towers and not any(f"{name} tower" in notice for notice in facts.notices):
            facts.notices.append(
                f"there is no {name} tower (--{name}-tower): the model wants {name}_features in its place"
            )
    processor = build_processor(model.config, tokenizer, folders.get("text"), facts)
    write_whole(output, lambda folder: write_ours(model, processor, folder))
    kind = "GR-MG policy" if facts.has_part("action decoder") else "GR-MG video pretraining"
    kind += f" -> {preset}" if preset else ""
    fresh += [prefix.removeprefix("model.").rstrip(".") for prefix in new]
    return Report(kind, output, len(mapped), fresh, sorted(ignored), facts.notices, model.config)


def plan(facts: Facts, config: ForesightConfig, preset: str | None) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of every part of the model, and the parts that the file lacks, which start fresh.

    Raises:
        ConversionError: If another part is missing, or one of the file's has no place in the model.
    """
    rows = table_rows(config)
    fresh = [part for part in rows if not facts.has_part(part)]
    if wrong := [part for part in fresh if preset is None or part not in MAY_BE_FRESH]:
        raise ConversionError(f"The checkpoint lacks the {some(wrong)} of the preset {preset!r}.")
    if homeless := [part for part in TABLE if facts.has_part(part) and part not in rows]:
        raise ConversionError(f"The preset {preset!r} has no place for the checkpoint's {some(homeless)}.")
    return rows, fresh


def write_ours(model: ForesightForActionPrediction, processor: ForesightProcessor, folder: Path) -> None:
    """Saves model and processor, and compares with what `from_pretrained` reads back."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again = tensors_in_file(ForesightForActionPrediction.from_pretrained(folder, dtype=torch.float32))
    wrong = [name for name, value in tensors_in_file(model).items() if not torch.equal(value, again[name])]
    if wrong:
        raise ConversionError(f"Reading the result back gave other values of {some(wrong)}.")


def check_folders(folders: dict[str, str]) -> None:
    """Raises if a folder for `text` or `vision` is not there, or holds the other kind of tower."""
    for name, source in folders.items():
        try:
            kind = AutoConfig.from_pretrained(source).model_type
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"--{name}-tower {source} is no folder with a model's config.json."
            ) from error
        is_text = kind in ("clip", "clip_text_model")
        if is_text != (name == "text"):
            wanted = "a CLIP" if name == "text" else "a MAE or ViT"
            raise ConversionError(f"--{name}-tower {source} is a {kind}; {wanted} checkpoint belongs there.")


def read_facts(
    checkpoint: str | Path, settings: dict | None, folders: dict[str, str], allow_pickle: bool
) -> tuple[Facts, list[str]]:
    """A policy and its json, without the towers that `folders` replace; and the names that are left out.

    Raises:
        ConversionError: If the file is no GR-MG policy, or there is no json.
    """
    tensors, inside = read_policy(checkpoint, allow_pickle)
    if not (settings or inside):
        raise ConversionError(
            "Nothing tells the numbers of heads: add --config with the train.json or pretrain.json that the "
            "checkpoint was trained with (GR-MG's policy/config)."
        )
    replaced = tuple(TABLE[f"{name} tower"][0] for name in folders)
    ignored = [name for name in tensors if IGNORED.fullmatch(name) or name.startswith(replaced)]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(replaced)}
    return Facts(kept, settings or inside), ignored


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
    ours = tensors_in_file(model)  # shares the model's memory
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
    config, ours = model.config, tensors_in_file(model)
    rows = sum(table_rows(config).values(), [])
    extra = set(ours) - {name for row in rows for name in row.ours}
    if wrong := foreign_fields(config) + sorted(extra):
        raise ConversionError(f"{folder} is no GR-MG model; it has {some(wrong)}.")
    theirs = {row.theirs: row.to_theirs(ours) for row in rows}
    if config.has("future"):
        side = config.image_size // config.patch_size
        theirs[POSITIONS] = sincos_2d(side, side, config.hidden_size)[None]
    if settings is not None:
        read_config(Facts(theirs, settings))
    notices = [f"there is no {t} tower in {folder}" for t in ("text", "vision") if t not in config.towers]
    if base is not None:
        tensors, _ = read_policy(base, allow_pickle)
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
