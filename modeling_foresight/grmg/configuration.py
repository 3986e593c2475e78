# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""GR-MG's train and pretrain json, with the shapes of its tensors, <-> [`ForesightConfig`]."""

import re
from dataclasses import dataclass, field
from math import isqrt

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPTextConfig, ViTConfig
from transformers.activations import ACT2FN

from ..configuration_foresight import PRESETS, ForesightConfig
from .names import IGNORED, POSITIONS, TABLE, Row, part_rows

SWITCHES = {  # flag in GR-MG's json -> the part that it builds
    "trainer.act_pred": "action decoder",
    "trainer.fwd_pred": "future",
    "trainer.fwd_pred_hand": "wrist future query",
    "trainer.progress_pred": "progress",
    "input.use_hand_rgb": "wrist embeddings",
    "input.use_state": "state embeddings",
}
# Width, layers, heads of the towers that GR-MG was published with: heads of others no tensor shows.
PUBLISHED_TOWERS = {"vision": (768, 12, 12), "text": (512, 12, 8)}


class ConversionError(ValueError):
    """A checkpoint, json or option that cannot be converted; the message names it and the remedy."""


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# Names that people give to what no tensor of a reduced tower shows.
HEADS = ("heads", "num_heads", "num_attention_heads", "n_head", "n_heads", "nhead")
EPSILONS = ("eps", "layer_norm_eps", "norm_eps")


@dataclass
class Facts:
    """What tensors and json say about sizes; where both speak they must agree."""

    tensors: dict[str, Tensor]
    settings: dict
    notices: list[str] = field(default_factory=list)

    def said(self, path: str):
        """The json's entry at a dotted path, or `None`."""
        value = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def seen(self, name: str, axis: int) -> int | None:
        """Size of a tensor along one axis, or `None` if it is not there."""
        tensor = self.tensors.get(name)
        if tensor is not None and tensor.ndim <= axis:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}: not what GR-MG stores there.")
        return None if tensor is None else tensor.shape[axis]

    def depth(self, stack: str) -> int | None:
        """Number of blocks whose names begin with `stack` and an index, or `None` if there are none."""
        found = (re.match(re.escape(stack) + r"\.(\d+)\.", name) for name in self.tensors)
        return max((int(match[1]) + 1 for match in found if match), default=None)

    def agree(self, path: str, seen: int | None = None, default=None):
        """The number that tensors show, or the json states at `path`, or `default`.

        Raises:
            ConversionError: If they differ, or the json has no number there.
        """
        said = self.said(path)
        if said is not None and (isinstance(said, bool) or not isinstance(said, int | float)):
            raise ConversionError(f"The json says {path}={said!r}, which is no number.")
        if seen is not None and said is not None and said != seen:
            raise ConversionError(
                f"The json says {path}={said}, but the checkpoint's tensors say {seen}: give the json that "
                "the checkpoint was trained with."
            )
        return seen if seen is not None else default if said is None else said

    def needed(self, path: str):
        """The number that the json states at `path`, which no tensor shows.

        Raises:
            ConversionError: If the json has none there.
        """
        if (said := self.agree(path)) is None:
            raise ConversionError(
                f"The json has no {path}, and no tensor shows it: give the json that the checkpoint was "
                "trained with, or add it."
            )
        return said

    def stand_in(self, tower: str, keys: tuple[str, ...], default=None):
        """The first of `keys` under `vision_stand_in` or `text_stand_in`: the json on a reduced tower."""
        given = self.said(f"{tower}_stand_in") or self.said(f"policy.{tower}_stand_in")
        given = given if isinstance(given, dict) else {}
        return next((given[key] for key in keys if given.get(key) is not None), default)

    def rows(self, part: str) -> list[Row]:
        """The rows of a part with as many blocks as the file has."""
        their_prefix, _, lines = TABLE[part]
        stack = re.search(r"^ *(\S+)\.#", lines, re.MULTILINE)
        return part_rows(part, (self.depth(their_prefix + stack[1]) or 1) if stack else 0)

    def has_part(self, part: str) -> bool:
        """Whether the file has any tensor of a part."""
        return any(row.theirs in self.tensors for row in self.rows(part))


def side_of(area: int, what: str) -> int:
    """Side of a square of `area`."""
    if isqrt(area) ** 2 != area:
        raise ConversionError(f"{what} is {area}, which is no square number.")
    return isqrt(area)


def heads_of(facts: Facts, tower: str) -> int | None:
    """Heads of the file's `text` or `vision` tower: as the json says, or the published ones; else `None`.

    Raises:
        ConversionError: If the tower's width cannot be split into the heads that the json says.
    """
    width_name, stack = {
        "vision": ("model_mae.norm.weight", "model_mae.blocks"),
        "text": ("text_encoder.ln_final.weight", "text_encoder.transformer.resblocks"),
    }[tower]
    width, layers = facts.seen(width_name, 0), facts.depth(stack)
    heads = facts.stand_in(tower, HEADS)
    if heads is None:
        *published, usual = PUBLISHED_TOWERS[tower]
        return usual if [width, layers] == published else None
    if type(heads) is not int or heads < 1 or (width and width % heads):
        raise ConversionError(
            f"The json says {tower}_stand_in.heads={heads!r}, but the tower is {width} wide."
        )
    return heads


def vision_config_of(facts: Facts, width: int, image_size: int | None) -> ViTConfig:
    """The vision tower's config; without tensors only the width of its features matters."""
    if not facts.has_part("vision tower"):
        return ViTConfig(hidden_size=width, num_attention_heads=1, image_size=image_size or 224)
    patch = facts.seen("model_mae.patch_embed.proj.weight", 2)
    patches = facts.seen("model_mae.pos_embed", 1) - 1
    return ViTConfig(
        hidden_size=facts.agree("policy.patch_feat_dim", facts.seen("model_mae.norm.weight", 0)),
        num_hidden_layers=facts.depth("model_mae.blocks"),
        num_attention_heads=heads_of(facts, "vision"),
        intermediate_size=facts.seen("model_mae.blocks.0.mlp.fc1.weight", 0),
        image_size=side_of(patches, "The number of patches in model_mae.pos_embed") * patch,
        patch_size=patch,
        layer_norm_eps=facts.stand_in("vision", EPSILONS, 1e-6),
    )


def text_config_of(facts: Facts, feature: int) -> CLIPTextConfig:
    """The text tower's config; without tensors only the size of its feature matters."""
    width = facts.seen("text_encoder.ln_final.weight", 0)
    if width is None:
        return CLIPTextConfig(projection_dim=feature, eos_token_id=49407, bos_token_id=49406)
    vocabulary = facts.seen("text_encoder.token_embedding.weight", 0)
    stack = "text_encoder.transformer.resblocks"
    return CLIPTextConfig(
        projection_dim=facts.seen("text_encoder.text_projection", 1),
        hidden_size=width,
        num_hidden_layers=facts.depth(stack),
        num_attention_heads=heads_of(facts, "text"),
        intermediate_size=facts.seen(f"{stack}.0.mlp.c_fc.weight", 0),
        max_position_embeddings=facts.seen("text_encoder.positional_embedding", 0),
        vocab_size=vocabulary,
        hidden_act="quick_gelu",
        # CLIP reads its feature at the largest token id, which is the end of text.
        eos_token_id=vocabulary - 1,
        bos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 1,
    )


def read_config(facts: Facts, preset: str | None = None) -> ForesightConfig:
    """The config of a GR-MG file; with `preset`, that of another variant of the same sizes.

    Raises:
        ConversionError: If json and tensors contradict each other, or our model has no such form.
    """
    check_switches(facts)
    fields = size_fields(facts)
    if preset is None:
        video = not (facts.has_part("action decoder") or facts.has_part("state embeddings"))
        preset = "grmg_pretrain" if video else "grmg"
        fields |= own_fields(facts)
        has_state = facts.has_part("state embeddings")
    else:
        has_state = PRESETS[preset].get("state_dim", 7) > 0
    if not has_state:
        fields |= {"state_dim": 0, "binary_state_indices": []}
    if fields["state_dim"] < 7:
        fields["state_representation"] = "absolute"
    if fields["state_dim"] < 7 or fields["action_dim"] != 7:
        fields["action_codec"] = "recorded"
        if facts.has_part("action decoder"):
            facts.notices.append("without 7 numbers of state and action, actions are passed on as they are")
    try:
        return ForesightConfig.from_preset(preset, **fields)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"These sizes make no model: {str(error).splitlines()[-1].strip()}") from error


def check_switches(facts: Facts) -> None:
    """Raises if the json's flags and the parts in the file disagree, or make a form that ours has not."""
    said = facts.said
    if facts.has_part("wrist future query") and said("trainer.fwd_pred_hand") is False:
        # GR-MG makes the query, and leaves it unused, wherever there is a wrist camera.
        raise ConversionError(
            "input.use_hand_rgb without trainer.fwd_pred_hand is not supported: our model predicts the "
            "future of every camera that it sees."
        )
    for path, part in SWITCHES.items():
        if said(path) is not None and bool(said(path)) != facts.has_part(part):
            found = "no tensors" if said(path) else "tensors"
            raise ConversionError(
                f"The json says {path}={said(path)}, but the checkpoint has {found} of the {part}: give the "
                "json that the checkpoint was trained with."
            )
    wrist_future = facts.has_part("wrist embeddings") and facts.has_part("future")
    if facts.has_part("wrist future query") != wrist_future:
        raise ConversionError("The wrist camera must have both its input and its future query, or neither.")
    media = said("policy.resampler_params.num_media_embeds")
    if said("policy.use_resampler") is False or media not in (None, 1):
        raise ConversionError("Only GR-MG with a resampler and num_media_embeds=1 can be converted.")


def size_fields(facts: Facts) -> dict:
    """Fields of the config that every variant takes from a file and its json."""
    seen, agree = facts.seen, facts.agree
    vision_width = agree("policy.patch_feat_dim", seen("perceiver_resampler.latents", 1))
    if (width := agree("policy.img_feat_dim", seen("embed_img.weight", 1), vision_width)) != vision_width:
        raise ConversionError(
            f"policy.img_feat_dim={width} differs from policy.patch_feat_dim={vision_width}: a vision tower "
            "of ours has one width for both."
        )
    activation = facts.said("policy.activation_function")
    if activation is None:
        activation = "relu"
        facts.notices.append(
            "the json has no policy.activation_function: relu is taken, as GR-MG published it"
        )
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise ConversionError(
            f"The json says policy.activation_function={activation!r}, which transformers does not have: "
            "give one of its names, such as relu, gelu or gelu_new."
        )
    arm_state = seen("embed_arm_state.weight", 1)
    state_dim = agree("input.state_dim", arm_state and arm_state + 1, 7)
    fields = {
        "state_dim": state_dim,
        "binary_state_indices": [state_dim - 1],  # the gripper is last
        "hidden_size": agree("policy.embed_dim", seen("embed_ln.weight", 0)),
        "num_hidden_layers": agree("policy.n_layer", facts.depth("transformer.h")),
        "num_attention_heads": facts.needed("policy.n_head"),
        "intermediate_size": seen("transformer.h.0.mlp.c_fc.weight", 1),
        "hidden_act": activation,
        "history_length": agree("policy.seq_len", seen("embed_timestep.weight", 0)),
        "decoder_heads": agree("policy.decoder_heads", default=16),
    }
    if (depth := facts.depth("decoder_blocks")) is not None:
        fields["decoder_depth"] = depth
    if (dropout := agree("policy.dropout")) is not None:
        fields |= {"attention_dropout": dropout, "resid_pdrop": dropout}
    if (shift := agree("trainer.fwd_pred_next_n")) is not None:
        fields["future_shift"] = shift
        if shift >= fields["history_length"]:
            fields["future_targets"] = "lookahead"
            facts.notices.append(f"future_shift={shift} leaves the window, so targets are taken after it")
    fields |= resampler_fields(facts, vision_width) | action_fields(facts)
    return fields | image_fields(facts, vision_width)


def resampler_fields(facts: Facts, width: int) -> dict:
    """Shape of the resampler of features `width` wide."""
    seen, agree = facts.seen, facts.agree
    inner = seen("perceiver_resampler.layers.0.0.to_q.weight", 0)
    head_dim, heads = (agree(f"policy.resampler_params.{name}") for name in ("dim_head", "heads"))
    heads = heads or (inner // head_dim if head_dim else facts.needed("policy.resampler_params.heads"))
    head_dim = head_dim or inner // heads
    if heads * head_dim != inner:
        raise ConversionError(
            f"policy.resampler_params means {heads} heads of {head_dim}, but the checkpoint's to_q has "
            f"{inner} rows: give the json that the checkpoint was trained with."
        )
    return {
        "num_latents": agree("policy.resampler_params.num_latents", seen("perceiver_resampler.latents", 0)),
        "resampler_depth": agree("policy.resampler_params.depth", facts.depth("perceiver_resampler.layers")),
        "resampler_heads": heads,
        "resampler_head_dim": head_dim,
        "resampler_ff_mult": seen("perceiver_resampler.layers.0.1.1.weight", 0) // width,
    }


def action_fields(facts: Facts) -> dict:
    """Shapes of the action encoder and of the action and progress decoders."""
    seen, agree = facts.seen, facts.agree
    progress_width = seen("proj_progress_output_embed.weight", 0)
    width = agree("policy.act_decoder_dim", seen("proj_action_output_embed.weight", 0), progress_width or 128)
    if (progress_width := agree("policy.progress_decoder_dim", progress_width, width)) != width:
        raise ConversionError(
            f"policy.progress_decoder_dim={progress_width} differs from policy.act_decoder_dim={width}: "
            "GR-MG runs with equal ones only."
        )
    encoder_width = agree("policy.act_encoder_dim", seen("embed_action.weight", 0), width)
    arm_action = seen("pred_arm_act.weight", 0)
    action_dim = agree("input.act_dim", arm_action and arm_action + 1, 7)
    fields = {
        "action_dim": action_dim,
        "binary_action_indices": [action_dim - 1],  # the gripper is last
        "chunk_size": agree("policy.act_len", seen("action_decoder_positional_embeddings.weight", 0), 5),
        "action_hidden_size": width,
        "action_encoder_hidden_size": None if encoder_width == width else encoder_width,
        "latent_dim": agree("policy.act_latent_dim", seen("embed_style_vector.weight", 1), 32),
        "action_num_heads": agree("policy.action_heads", default=8),
    }
    for name, stack in (
        ("action_encoder_depth", "encode_action"),
        ("action_decoder_depth", "decode_action"),
        ("progress_decoder_depth", "decode_progress"),
    ):
        if (depth := facts.depth(stack)) is not None:
            fields[name] = depth
    return fields


def image_fields(facts: Facts, vision_width: int) -> dict:
    """Image and patch size, and the towers."""
    fields, image_size = {}, None
    if facts.has_part("future"):
        values = facts.seen("decoder_pred.weight", 0)
        fields["patch_size"] = side_of(values // 3, "A third of decoder_pred.weight's rows")
        patches = side_of(facts.seen(POSITIONS, 1), f"The number of patches in {POSITIONS}")
        image_size = patches * fields["patch_size"]
    vision = vision_config_of(facts, vision_width, image_size)
    fields |= {"image_size": image_size or vision.image_size, "vision_config": vision}
    text_width = facts.agree("policy.lang_feat_dim", facts.seen("embed_lang.weight", 1))
    fields["text_config"] = text_config_of(facts, text_width)
    fields["towers"] = [tower for tower in ("text", "vision") if facts.has_part(f"{tower} tower")]
    return fields


def own_fields(facts: Facts) -> dict:
    """What makes GR-MG's own variant of a file: its parts and its loss weights."""
    has = {"action": "action decoder", "future_rgb": "future", "progress": "progress"}
    fields = {
        "objectives": [name for name, part in has.items() if facts.has_part(part)],
        "views": ["main", "wrist"] if facts.has_part("wrist embeddings") else ["main"],
    }
    for name, path in {
        "gripper_loss_weight": "trainer.gripper_loss_ratio",
        "future_loss_weight": "trainer.fwd_loss_ratio",
        "kl_loss_weight": "trainer.kl_loss_ratio",
        "progress_loss_weight": "trainer.progress_loss_ratio",
    }.items():
        if (weight := facts.agree(path)) is not None:
            if not 0 <= weight < float("inf"):
                raise ConversionError(f"The json says {path}={weight}: a loss needs a weight of 0 or more.")
            fields[name] = weight
    if facts.said("trainer.without_norm_pix_loss"):
        facts.notices.append("GR-MG trained on raw pixels; training goes on with normalised patches here")
    return fields


def drop_unknown_towers(facts: Facts) -> None:
    """Leaves out reduced towers that cannot be rebuilt: another structure, or an unknown number of heads.

    Args:
        facts (`Facts`): Loses their tensors and gains a notice.
    """
    for tower in ("vision", "text"):
        part = f"{tower} tower"
        names = {n for n in facts.tensors if n.startswith(TABLE[part][0]) and not IGNORED.fullmatch(n)}
        known = names == {row.theirs for row in facts.rows(part)}
        declared = any(facts.said(f"{place}{tower}_stand_in") is not None for place in ("", "policy."))
        # One of the right structure with gaps or more in it is damaged, unless the json says what it is.
        damaged = not known and facts.has_part(part) and not declared
        if not names or damaged or (known and heads_of(facts, tower)):
            continue
        for name in names:
            del facts.tensors[name]
        reason = f'does not say its heads ("{tower}_stand_in": {{"heads": ...}})'
        facts.notices.append(
            f"the file's {part} {reason if known else 'is another network'}, so it is left out: the model "
            f"wants {tower}_features in place of its input"
        )


def check_facts(facts: Facts) -> None:
    """Leaves out towers that cannot be rebuilt; every other tensor must have its place and be finite.

    Raises:
        ConversionError: With the names of leftovers, gaps or damaged tensors.
    """
    drop_unknown_towers(facts)
    check_names(facts)
    check_values(facts)


def check_names(facts: Facts) -> None:
    """Every tensor has its place in the table, and every part that is there is whole.

    Raises:
        ConversionError: With the names of leftovers or gaps.
    """
    parts = {part: {row.theirs for row in facts.rows(part)} for part in TABLE}
    known = set().union(*parts.values(), {POSITIONS})
    leftover = sorted(name for name in facts.tensors if name not in known and not IGNORED.fullmatch(name))
    if leftover:
        raise ConversionError(f"The checkpoint holds tensors that GR-MG has not: {some(leftover)}.")
    needed = {"resampler", "input embeddings", "goal embeddings", "backbone"}
    needed |= {part for part in TABLE if facts.has_part(part)}
    gaps = sorted(name for part in needed for name in parts[part] if name not in facts.tensors)
    if "future" in needed and POSITIONS not in facts.tensors:
        gaps.append(POSITIONS)
    if gaps:
        raise ConversionError(f"The checkpoint lacks tensors of GR-MG: {some(gaps)}. Is it complete?")
    if facts.has_part("action encoder") != facts.has_part("action decoder"):
        raise ConversionError("The checkpoint has only one of the action encoder and the action decoder.")


def check_values(facts: Facts) -> None:
    """Raises if weights are no finite floating-point numbers, naming them."""
    wanted = {name: value for name, value in facts.tensors.items() if not IGNORED.fullmatch(name)}
    if wrong := sorted(name for name, value in wanted.items() if not value.is_floating_point()):
        raise ConversionError(f"{some(wrong)}: {wanted[wrong[0]].dtype} is no type of a weight.")
    if wrong := sorted(name for name, value in wanted.items() if not value.isfinite().all()):
        raise ConversionError(f"{some(wrong)}: not every value is finite. Damaged, or training diverged?")


def grmg_settings(config: ForesightConfig) -> dict:
    """GR-MG's json of a config, as far as it concerns the model."""
    wrist = len(config.views) > 1
    settings = {
        "policy": {
            "resampler_params": {
                "depth": config.resampler_depth,
                "dim_head": config.resampler_head_dim,
                "heads": config.resampler_heads,
                "num_latents": config.num_latents,
                "num_media_embeds": 1,
            },
            "seq_len": config.history_length,
            "act_len": config.chunk_size,
            "act_latent_dim": config.latent_dim,
            "act_encoder_dim": config.action_encoder_hidden_size or config.action_hidden_size,
            "act_decoder_dim": config.action_hidden_size,
            "progress_decoder_dim": config.action_hidden_size,
            "patch_feat_dim": config.vision_config.hidden_size,
            "img_feat_dim": config.vision_config.hidden_size,
            "lang_feat_dim": config.text_config.projection_dim,
            "embed_dim": config.hidden_size,
            "use_resampler": True,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "activation_function": config.hidden_act,
            "dropout": config.resid_pdrop,
        },
        "trainer": {
            "without_norm_pix_loss": False,
            "gripper_loss_ratio": config.gripper_loss_weight,
            "fwd_loss_ratio": config.future_loss_weight,
            "kl_loss_ratio": config.kl_loss_weight,
            "progress_loss_ratio": config.progress_loss_weight,
            "act_pred": config.has("action"),
            "fwd_pred": config.has("future"),
            "progress_pred": config.has("progress"),
            "fwd_pred_hand": config.has("future") and wrist,
            "fwd_pred_next_n": config.future_shift,
        },
        "input": {
            "state_dim": config.state_dim or 7,
            "act_dim": config.action_dim,
            "use_hand_rgb": wrist,
            "use_state": config.state_dim > 0,
        },
    }
    for name, heads, usual in (
        ("decoder_heads", config.decoder_heads, 16),
        ("action_heads", config.action_num_heads, 8),
    ):
        if heads != usual:  # GR-MG has these in its code
            settings["policy"][name] = heads
    for name, tower in (("vision", config.vision_config), ("text", config.text_config)):
        if name in config.towers:
            sizes = tower.hidden_size, tower.num_hidden_layers, tower.num_attention_heads
            if sizes != PUBLISHED_TOWERS[name]:
                settings[f"{name}_stand_in"] = {"heads": tower.num_attention_heads}
    return settings
