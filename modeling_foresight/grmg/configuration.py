# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""GR-MG's train and pretrain json, with the shapes of its tensors, <-> [`ForesightConfig`]."""

import re
from dataclasses import dataclass, field
from math import inf, isqrt
from operator import attrgetter

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPTextConfig, ViTConfig
from transformers.activations import ACT2FN

from ..base_model import list_names
from ..configuration_foresight import PRESETS, ForesightConfig
from .names import IGNORED, PARTS, POSITIONS, Row, part_rows, table_rows

BLOCKS = "blocks"  # in place of an axis: the number of blocks with this name
# Our field, its entry in GR-MG's json, the tensor that shows it, the axis, and what is added to that.
MODEL_SIZES = (
    ("hidden_size", "policy.embed_dim", "embed_ln.weight", 0),
    ("num_hidden_layers", "policy.n_layer", "transformer.h", BLOCKS),
    ("num_attention_heads", "policy.n_head"),
    ("intermediate_size", None, "transformer.h.0.mlp.c_fc.weight", 1),
    ("attention_dropout", "policy.dropout"),
    ("resid_pdrop", "policy.dropout"),
    ("history_length", "policy.seq_len", "embed_timestep.weight", 0),
    ("future_shift", "trainer.fwd_pred_next_n"),
    ("vision_config.hidden_size", "policy.patch_feat_dim", "perceiver_resampler.latents", 1),
    ("vision_config.hidden_size", "policy.img_feat_dim", "embed_img.weight", 1),
    ("vision_config.num_hidden_layers", None, "model_mae.blocks", BLOCKS),
    ("vision_config.intermediate_size", None, "model_mae.blocks.0.mlp.fc1.weight", 0),
    ("vision_config.patch_size", None, "model_mae.patch_embed.proj.weight", 2),
    ("text_config.projection_dim", "policy.lang_feat_dim", "embed_lang.weight", 1),
    ("text_config.hidden_size", None, "text_encoder.ln_final.weight", 0),
    ("text_config.num_hidden_layers", None, "text_encoder.transformer.resblocks", BLOCKS),
    ("text_config.intermediate_size", None, "text_encoder.transformer.resblocks.0.mlp.c_fc.weight", 0),
    ("text_config.max_position_embeddings", None, "text_encoder.positional_embedding", 0),
    ("text_config.vocab_size", None, "text_encoder.token_embedding.weight", 0),
    ("num_latents", "policy.resampler_params.num_latents", "perceiver_resampler.latents", 0),
    ("resampler_depth", "policy.resampler_params.depth", "perceiver_resampler.layers", BLOCKS),
    ("resampler_heads", "policy.resampler_params.heads"),
    ("resampler_head_dim", "policy.resampler_params.dim_head"),
    ("decoder_depth", None, "decoder_blocks", BLOCKS),
    ("decoder_heads", "policy.decoder_heads"),
    ("state_dim", "input.state_dim", "embed_arm_state.weight", 1, 1),  # and the gripper
    ("action_dim", "input.act_dim", "pred_arm_act.weight", 0, 1),
    ("chunk_size", "policy.act_len", "action_decoder_positional_embeddings.weight", 0),
    ("latent_dim", "policy.act_latent_dim", "embed_style_vector.weight", 1),
    ("action_hidden_size", "policy.act_decoder_dim", "proj_action_output_embed.weight", 0),
    ("action_hidden_size", "policy.progress_decoder_dim", "proj_progress_output_embed.weight", 0),
    ("action_encoder_hidden_size", "policy.act_encoder_dim", "embed_action.weight", 0),
    ("action_encoder_depth", None, "encode_action", BLOCKS),
    ("action_decoder_depth", None, "decode_action", BLOCKS),
    ("progress_decoder_depth", None, "decode_progress", BLOCKS),
    ("action_num_heads", "policy.action_heads"),
)
LOSS_WEIGHTS = {
    "gripper_loss_weight": "trainer.gripper_loss_ratio",
    "future_loss_weight": "trainer.fwd_loss_ratio",
    "kl_loss_weight": "trainer.kl_loss_ratio",
    "progress_loss_weight": "trainer.progress_loss_ratio",
}
SWITCHES = {  # flag in GR-MG's json -> the part that it builds
    "trainer.act_pred": "action decoder",
    "trainer.fwd_pred": "future",
    "trainer.fwd_pred_hand": "wrist future query",
    "trainer.progress_pred": "progress",
    "input.use_hand_rgb": "wrist embeddings",
    "input.use_state": "state embeddings",
}
# Entries that GR-MG's json lacks, because its code has these numbers.
IN_GRMGS_CODE = {"decoder_heads": 16, "action_num_heads": 8}
TOWER_NAMES = {  # a tensor as wide as the tower, and the name of its blocks
    "vision": ("model_mae.norm.weight", "model_mae.blocks"),
    "text": ("text_encoder.ln_final.weight", "text_encoder.transformer.resblocks"),
}
# Width, layers, heads of the towers that GR-MG was published with. No tensor shows the heads of others.
PUBLISHED_TOWERS = {"vision": (768, 12, 12), "text": (512, 12, 8)}
# Names that people give to what no tensor of a reduced tower shows.
HEADS = ("heads", "num_heads", "num_attention_heads", "n_head", "n_heads", "nhead")
EPSILONS = ("eps", "layer_norm_eps", "norm_eps")
GIVE_ITS_JSON = "give the json that the checkpoint was trained with"


class ConversionError(ValueError):
    """A checkpoint, json or option that cannot be converted; the message names it and the remedy."""


@dataclass
class Checkpoint:
    """A GR-MG policy: its tensors and json, which must agree about sizes, and notices for the user."""

    tensors: dict[str, Tensor]
    settings: dict
    notices: list[str] = field(default_factory=list)

    def entry(self, path: str | None):
        """The json's entry at a dotted path, or `None`."""
        value = self.settings if path else None
        for key in (path or "").split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def size(self, name: str, axis: int | str) -> int | None:
        """Size of a tensor along one axis, or the number of its [`BLOCKS`]; `None` if it is absent."""
        if axis == BLOCKS:
            found = (
                key.removeprefix(f"{name}.").split(".")[0] for key in self.tensors if key.startswith(name)
            )
            return max((int(index) + 1 for index in found if index.isdigit()), default=None)
        tensor = self.tensors.get(name)
        if tensor is not None and tensor.ndim <= axis:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}: not what GR-MG stores there.")
        return None if tensor is None else tensor.shape[axis]

    def number(self, path: str | None, tensor: str | None = None, axis: int | str = 0, added: int = 0):
        """The number in the json at `path` and in a tensor's shape, which must agree; `None` without."""
        stated, shown = self.entry(path), None if tensor is None else self.size(tensor, axis)
        if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int | float)):
            raise ConversionError(f"The json says {path}={stated!r}, which is not a number.")
        if shown is None:
            return stated
        if stated not in (None, shown + added):
            raise ConversionError(
                f"The json says {path}={stated}, but the checkpoint's tensors say {shown + added}: "
                f"{GIVE_ITS_JSON}."
            )
        return shown + added

    def stand_in(self, tower: str, keys: tuple[str, ...], default=None):
        """The first of `keys` under `vision_stand_in` or `text_stand_in`: the json about a reduced tower."""
        paths = (f"{place}{tower}_stand_in.{key}" for place in ("", "policy.") for key in keys)
        return next((value for path in paths if (value := self.entry(path)) is not None), default)

    def rows(self, part: str) -> list[Row]:
        """The rows of a part with as many blocks as the file has."""
        their_prefix, _, lines = PARTS[part]
        stack = re.search(r"^ *(\S+)\.#", lines, re.MULTILINE)
        return part_rows(part, (self.size(their_prefix + stack[1], BLOCKS) or 1) if stack else 0)

    def has_part(self, part: str) -> bool:
        """Whether the file has any tensor of a part."""
        return any(row.theirs in self.tensors for row in self.rows(part))


def square_side(area: int, what: str) -> int:
    """Side of a square of `area`."""
    if isqrt(area) ** 2 != area:
        raise ConversionError(f"{what} is {area}, which is not a square number.")
    return isqrt(area)


def count_heads(checkpoint: Checkpoint, tower: str) -> int | None:
    """Heads of the file's `text` or `vision` tower: the json's, or the published ones; or `None`."""
    norm, stack = TOWER_NAMES[tower]
    width, layers = checkpoint.size(norm, 0), checkpoint.size(stack, BLOCKS)
    heads = checkpoint.stand_in(tower, HEADS)
    if heads is None:
        *published, usual = PUBLISHED_TOWERS[tower]
        return usual if [width, layers] == published else None
    if type(heads) is not int or heads < 1 or (width and width % heads):
        raise ConversionError(
            f"The json says {tower}_stand_in.heads={heads!r}, but the tower is {width} wide."
        )
    return heads


def read_config(checkpoint: Checkpoint, preset: str | None = None) -> ForesightConfig:
    """The config of a GR-MG file, whose json and tensors must agree; with `preset`, of another variant."""
    check_switches(checkpoint)
    fields, has_part = read_sizes(checkpoint), checkpoint.has_part
    has_state = has_part("state embeddings") if preset is None else PRESETS[preset].get("state_dim", 7) > 0
    if preset is None:
        preset = "grmg" if has_part("action decoder") or has_state else "grmg_pretrain"
        fields |= read_variant(checkpoint)
    if not has_state:
        fields |= {"state_dim": 0, "binary_state_indices": []}
    if fields["state_dim"] < 7:
        fields["state_representation"] = "absolute"
    if fields["state_dim"] < 7 or fields["action_dim"] != 7:
        fields["action_codec"] = "recorded"
        if has_part("action decoder"):
            checkpoint.notices.append("without 7 numbers of state and action, actions keep their form")
    try:
        return ForesightConfig.from_preset(preset, **fields)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"These sizes make no model: {str(error).splitlines()[-1].strip()}") from error


def check_switches(checkpoint: Checkpoint) -> None:
    """Raises if the json's flags and the parts in the file disagree, or make a form that ours lacks."""
    entry, has_part = checkpoint.entry, checkpoint.has_part
    if has_part("wrist future query") and entry("trainer.fwd_pred_hand") is False:
        # GR-MG makes the query, and leaves it unused, wherever there is a wrist camera.
        raise ConversionError(
            "input.use_hand_rgb without trainer.fwd_pred_hand is not supported: our model predicts the "
            "future of every camera that it sees."
        )
    for path, part in SWITCHES.items():
        if entry(path) is not None and bool(entry(path)) != has_part(part):
            found = "no tensors" if entry(path) else "tensors"
            raise ConversionError(
                f"The json says {path}={entry(path)}, but the checkpoint has {found} of the {part}: "
                f"{GIVE_ITS_JSON}."
            )
    media = entry("policy.resampler_params.num_media_embeds")
    if entry("policy.use_resampler") is False or media not in (None, 1):
        raise ConversionError("Only GR-MG with a resampler and num_media_embeds=1 can be converted.")


def read_sizes(checkpoint: Checkpoint) -> dict:
    """Numbers that every variant takes from a file and its json; what neither has is left out."""
    fields: dict = {}
    for name, path, *shown in MODEL_SIZES:
        value = checkpoint.number(path, *shown)
        if value is not None and fields.setdefault(name, value) != value:
            raise ConversionError(
                f"{path}={value}, but {name}={fields[name]}: our model has one number for both."
            )
    inner = checkpoint.size("perceiver_resampler.layers.0.0.to_q.weight", 0)
    if width := fields.get("resampler_head_dim"):
        fields.setdefault("resampler_heads", inner // width)
    for name, path in (("resampler_heads", "resampler_params.heads"), ("num_attention_heads", "n_head")):
        if name not in fields:
            raise ConversionError(f"The json has no policy.{path}, and no tensor shows it: {GIVE_ITS_JSON}.")
    heads = fields["resampler_heads"]
    width = fields["resampler_head_dim"] = width or inner // (heads or 1)
    if heads * width != inner:
        raise ConversionError(
            f"policy.resampler_params means {heads} heads of {width}, but the checkpoint's to_q has {inner} "
            f"rows: {GIVE_ITS_JSON}."
        )
    feed_forward = checkpoint.size("perceiver_resampler.layers.0.1.1.weight", 0)
    fields["resampler_ff_mult"] = feed_forward // fields["vision_config.hidden_size"]
    if fields.get("action_encoder_hidden_size") == fields.get("action_hidden_size"):
        fields["action_encoder_hidden_size"] = None
    for name in ("state", "action"):
        size = fields.setdefault(f"{name}_dim", 7)
        fields[f"binary_{name}_indices"] = [size - 1]  # the gripper is last
    fields["hidden_act"] = checkpoint.entry("policy.activation_function") or "relu"
    if not isinstance(fields["hidden_act"], str) or fields["hidden_act"] not in ACT2FN:
        raise ConversionError(
            f"The json says policy.activation_function={fields['hidden_act']!r}, which transformers does not "
            "have: give one of its names, such as relu, gelu or gelu_new."
        )
    if checkpoint.entry("policy.activation_function") is None:
        checkpoint.notices.append("the json has no policy.activation_function: GR-MG's relu is taken")
    if fields.get("future_shift", 0) >= fields["history_length"]:
        fields["future_targets"] = "lookahead"
        checkpoint.notices.append(
            f"future_shift={fields['future_shift']} leaves the window, so targets are taken after it"
        )
    towers = {name: {} for name in ("vision_config", "text_config")}
    for name in [name for name in fields if "." in name]:
        tower, _, size = name.partition(".")
        towers[tower][size] = fields.pop(name)
    return fields | read_towers(checkpoint, towers["vision_config"], towers["text_config"])


def read_towers(checkpoint: Checkpoint, vision: dict, text: dict) -> dict:
    """The towers of these sizes (an absent tower: of this feature size), and sizes of images and patches."""
    fields: dict = {"towers": [name for name in ("text", "vision") if checkpoint.has_part(f"{name} tower")]}
    if checkpoint.has_part("future"):
        values, patches = checkpoint.size("decoder_pred.weight", 0), checkpoint.size(POSITIONS, 1)
        fields["patch_size"] = square_side(values // 3, "A third of decoder_pred.weight's rows")
        side = square_side(patches, f"The number of patches in {POSITIONS}")
        fields["image_size"] = side * fields["patch_size"]
    if "vision" in fields["towers"]:
        patches = checkpoint.size("model_mae.pos_embed", 1) - 1
        side = square_side(patches, "The number of patches in model_mae.pos_embed")
        vision |= {
            "num_attention_heads": count_heads(checkpoint, "vision"),
            "image_size": side * vision["patch_size"],
            "layer_norm_eps": checkpoint.stand_in("vision", EPSILONS, 1e-6),
        }
    else:
        vision |= {"num_attention_heads": 1, "image_size": fields.get("image_size", 224)}
    if "text" in fields["towers"]:
        text |= {"num_attention_heads": count_heads(checkpoint, "text"), "hidden_act": "quick_gelu"}
    # CLIP reads its feature at the largest token id, which is the end of text.
    end = text.get("vocab_size", 49408) - 1
    text |= {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    fields.setdefault("image_size", vision["image_size"])
    return fields | {"vision_config": ViTConfig(**vision), "text_config": CLIPTextConfig(**text)}


def read_variant(checkpoint: Checkpoint) -> dict:
    """What makes a file GR-MG's own variant: its objectives, views and loss weights."""
    parts = {"action": "action decoder", "future_rgb": "future", "progress": "progress"}
    fields = {
        "objectives": [name for name, part in parts.items() if checkpoint.has_part(part)],
        "views": ["main", "wrist"] if checkpoint.has_part("wrist embeddings") else ["main"],
    }
    for name, path in LOSS_WEIGHTS.items():
        if (weight := checkpoint.number(path)) is not None:
            if not 0 <= weight < inf:
                raise ConversionError(f"The json says {path}={weight}: a loss needs a weight of 0 or more.")
            fields[name] = weight
    if checkpoint.entry("trainer.without_norm_pix_loss"):
        checkpoint.notices.append("GR-MG trained on raw pixels; training here normalizes patches")
    return fields


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Leaves out towers that cannot be rebuilt; all other tensors must have their place and be finite."""
    for tower in ("vision", "text"):
        drop_unknown_tower(checkpoint, tower)
    check_names(checkpoint)
    wanted = {name: value for name, value in checkpoint.tensors.items() if not IGNORED.fullmatch(name)}
    if wrong := sorted(name for name, value in wanted.items() if not value.is_floating_point()):
        raise ConversionError(f"{list_names(wrong)}: {wanted[wrong[0]].dtype} is not a type of weights.")
    if wrong := sorted(name for name, value in wanted.items() if not value.isfinite().all()):
        raise ConversionError(
            f"{list_names(wrong)}: not every value is finite. Damaged, or training diverged?"
        )


def drop_unknown_tower(checkpoint: Checkpoint, tower: str) -> None:
    """Leaves out a reduced tower of another structure, or with an unknown number of heads, with a notice."""
    part = f"{tower} tower"
    prefix = PARTS[part][0]
    names = {name for name in checkpoint.tensors if name.startswith(prefix) and not IGNORED.fullmatch(name)}
    known = names == {row.theirs for row in checkpoint.rows(part)}
    declared = any(checkpoint.entry(f"{place}{tower}_stand_in") is not None for place in ("", "policy."))
    # A tower of the right structure with gaps or additions is damaged, unless the json declares it.
    damaged = not known and checkpoint.has_part(part) and not declared
    if not names or damaged or (known and count_heads(checkpoint, tower)):
        return
    for name in names:
        del checkpoint.tensors[name]
    reason = f'does not say its heads ("{tower}_stand_in": {{"heads": ...}})'
    checkpoint.notices.append(
        f"the file's {part} {reason if known else 'is another network'}, so it is left out: the model "
        f"wants {tower}_features in place of its input"
    )


def check_names(checkpoint: Checkpoint) -> None:
    """Raises if a tensor has no place in the table, or a part of the file is not whole."""
    tensors, has_part = checkpoint.tensors, checkpoint.has_part
    parts = {part: {row.theirs for row in checkpoint.rows(part)} for part in PARTS}
    known = set().union(*parts.values(), {POSITIONS})
    if leftover := sorted(name for name in tensors if name not in known and not IGNORED.fullmatch(name)):
        raise ConversionError(f"The checkpoint holds tensors that GR-MG lacks: {list_names(leftover)}.")
    needed = {"resampler", "input embeddings", "goal embeddings", "backbone", *filter(has_part, PARTS)}
    gaps = sorted(name for part in needed for name in parts[part] if name not in tensors)
    if "future" in needed and POSITIONS not in tensors:
        gaps.append(POSITIONS)
    if gaps:
        raise ConversionError(f"The checkpoint lacks tensors of GR-MG: {list_names(gaps)}. Is it complete?")
    if has_part("action encoder") != has_part("action decoder"):
        raise ConversionError(
            "The checkpoint has only one of the action encoder and the action decoder. Is it complete?"
        )
    if has_part("wrist future query") != (has_part("wrist embeddings") and has_part("future")):
        raise ConversionError(
            "The checkpoint has only one of the wrist camera's input and its future query. Is it complete?"
        )


def build_settings(config: ForesightConfig) -> dict:
    """GR-MG's json of a config, as far as it concerns the model."""
    parts = table_rows(config)
    entries = {path: attrgetter(name)(config) for name, path, *_ in MODEL_SIZES if path}
    entries |= {path: getattr(config, name) for name, path in LOSS_WEIGHTS.items()}
    entries |= {path: part in parts for path, part in SWITCHES.items()}
    entries |= {
        "policy.resampler_params.num_media_embeds": 1,
        "policy.use_resampler": True,
        "policy.activation_function": config.hidden_act,
        "policy.act_encoder_dim": config.action_encoder_hidden_size or config.action_hidden_size,
        "trainer.without_norm_pix_loss": False,
        "input.state_dim": config.state_dim or 7,
    }
    usual = {path: IN_GRMGS_CODE[name] for name, path, *_ in MODEL_SIZES if name in IN_GRMGS_CODE}
    settings: dict = {}
    for path, value in entries.items():
        if value != usual.get(path):
            *sections, key = path.split(".")
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
    for name, tower in (("vision", config.vision_config), ("text", config.text_config)):
        sizes = tower.hidden_size, tower.num_hidden_layers, tower.num_attention_heads
        if name in config.towers and sizes != PUBLISHED_TOWERS[name]:
            settings[f"{name}_stand_in"] = {"heads": tower.num_attention_heads}
    return settings
