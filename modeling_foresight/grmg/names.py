# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Every tensor of a GR-MG policy and its name here: one table for both directions."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configuration_foresight import ForesightConfig
from ..encoders import TIMM_TO_VIT, expand_names


def vit_blocks(theirs: str, ours: str) -> str:
    """Lines of [`TABLE`] for a stack of timm's ViT blocks, which both sides have."""
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return "\n".join(f"    {theirs}.#.{part}.*  {ours}.#.{part}.*" for part in parts)


# One section per part: GR-MG's prefix -> ours, then the names behind them. `*` stands for weight and bias,
# `#` for the index of a block, `[q|k|v]` for one tensor of ours per third of GR-MG's rows. A last column `T`
# marks weights that GR-MG stores as (in, out), `1` a leading axis of size one that ours lack. Our names are
# those in a file, the same under every version of transformers; in memory a tower's parts may differ.
TABLE = f"""
[vision tower] model_mae. -> model.vision_encoder.tower.
{TIMM_TO_VIT}
[text tower] text_encoder. -> model.text_encoder.tower.
    token_embedding.weight                  text_model.embeddings.token_embedding.weight
    positional_embedding                    text_model.embeddings.position_embedding.weight
    transformer.resblocks.#.attn.in_proj_*  text_model.encoder.layers.#.self_attn.[q|k|v]_proj.*
    transformer.resblocks.#.attn.out_proj.* text_model.encoder.layers.#.self_attn.out_proj.*
    transformer.resblocks.#.ln_1.*          text_model.encoder.layers.#.layer_norm1.*
    transformer.resblocks.#.ln_2.*          text_model.encoder.layers.#.layer_norm2.*
    transformer.resblocks.#.mlp.c_fc.*      text_model.encoder.layers.#.mlp.fc1.*
    transformer.resblocks.#.mlp.c_proj.*    text_model.encoder.layers.#.mlp.fc2.*
    ln_final.*                              text_model.final_layer_norm.*
    text_projection                         text_projection.weight               T
[resampler] perceiver_resampler. -> model.resampler.
    latents                      latents
    media_pos_emb                media_pos_emb
    layers.#.0.norm_media.*      layers.#.norm_media.*
    layers.#.0.norm_latents.*    layers.#.norm_latents.*
    layers.#.0.to_q.weight       layers.#.to_q.weight
    layers.#.0.to_kv.weight      layers.#.to_kv.weight
    layers.#.0.to_out.weight     layers.#.to_out.weight
    layers.#.1.0.*               layers.#.feed_forward.0.*
    layers.#.1.1.weight          layers.#.feed_forward.1.weight
    layers.#.1.3.weight          layers.#.feed_forward.3.weight
    norm.*                       norm.*
[input embeddings] embed_ -> model.
    lang.*           embed_language.*
    img.*            embed_views.0.cls.*
    patch.*          embed_views.0.latents.*
    timestep.weight  embed_timestep.weight
    ln.*             embed_norm.*
[goal embeddings] embed_goal_ -> model.embed_goal.
    image.*  cls.*
    patch.*  latents.*
[state embeddings] embed_ -> model.embed_state.
    arm_state.*      embed_continuous.*
    gripper_state.*  embed_binary.*
    state.*          join.*
[wrist embeddings] embed_hand_ -> model.embed_views.1.
    img.*    cls.*
    patch.*  latents.*
[backbone] transformer. -> model.
    h.#.ln_1.*         layers.#.norm1.*
    h.#.attn.c_attn.*  layers.#.self_attn.[q|k|v]_proj.*  T
    h.#.attn.c_proj.*  layers.#.self_attn.o_proj.*        T
    h.#.ln_2.*         layers.#.norm2.*
    h.#.mlp.c_fc.*     layers.#.up_proj.*                 T
    h.#.mlp.c_proj.*   layers.#.down_proj.*               T
    ln_f.*             norm.*
[future] ->
    obs_queries.weight  model.future_queries.0.weight
    decoder_embed.*     image_decoder.embed.*
    mask_token          image_decoder.mask_token       1
    decoder_norm.*      image_decoder.norm.*
    decoder_pred.*      image_decoder.predict.*
{vit_blocks("decoder_blocks", "image_decoder.blocks")}
[wrist future query] obs_hand_queries. -> model.future_queries.1.
    weight  weight
[action encoder] -> action_encoder.
    embed_arm_action.*                           embed_continuous.*
    embed_gripper_action.weight                  embed_binary.weight
    embed_action.*                               join.*
    action_encoder_cls_token.weight              cls_token.weight
    action_encoder_positional_embeddings.weight  positions.weight
    pred_style_vector.*                          predict.*
{vit_blocks("encode_action", "blocks")}
[action decoder] ->
    action_queries.weight                        model.action_query.weight
    embed_style_vector.*                         action_decoder.embed_style.*
    proj_action_output_embed.*                   action_decoder.embed_query.*
    action_mask_token_embedding.weight           action_decoder.mask_token.weight
    action_decoder_positional_embeddings.weight  action_decoder.positions.weight
    pred_arm_act.*                               action_decoder.predict_continuous.*
    pred_gripper_act.*                           action_decoder.predict_binary.*
{vit_blocks("decode_action", "action_decoder.blocks")}
[progress] ->
    progress_queries.weight               model.progress_query.weight
    proj_progress_output_embed.*          progress_decoder.embed_query.*
    progress_mask_token_embedding.weight  progress_decoder.mask_token.weight
    pred_progress.*                       progress_decoder.predict.*
{vit_blocks("decode_progress", "progress_decoder.blocks")}
"""
# Part -> GR-MG's prefix, ours, and the lines of names.
PARTS: dict[str, tuple[str, str, str]] = {}
for _part, _prefixes, _lines in re.findall(r"^\[(.+)\](.*)\n((?:(?!\[).*\n)+)", TABLE, re.MULTILINE):
    _theirs, _ours = _prefixes.split("->")
    PARTS[_part] = _theirs.strip(), _ours.strip(), _lines
# What a file may lack when another preset starts from it: video pretraining has none of these.
MAY_BE_FRESH = (
    *("state embeddings", "wrist embeddings", "wrist future query"),
    *("action encoder", "action decoder", "progress"),
)
# Parts of ours that GR-MG never had.
NEW_IN_3D = ("depth_decoder.", "flow_decoder.", "model.flow_query.", "model.embed_flow_points.")
POSITIONS = "decoder_pos_embed"  # a constant: recomputed and compared, never copied
IGNORED = re.compile(
    r"text_encoder\.(visual\..+|logit_scale|input_resolution|context_length|vocab_size)"
    r"|transformer\.h\.\d+\.attn\.(bias|masked_bias)"
)


@dataclass(frozen=True)
class Row:
    """One tensor of GR-MG and the tensors of ours that it becomes; see [`TABLE`] for `form`."""

    theirs: str
    ours: tuple[str, ...]
    form: str = ""

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """GR-MG's tensor -> ours by name."""
        tensor = tensor[0] if self.form == "1" else tensor
        tensor = tensor.T if self.form == "T" and tensor.ndim == 2 else tensor
        pieces = tensor.tensor_split(len(self.ours)) if len(self.ours) > 1 else [tensor]
        return dict(zip(self.ours, pieces, strict=True))

    def to_theirs(self, tensors: dict[str, Tensor]) -> Tensor:
        """Ours by name -> GR-MG's tensor."""
        tensor = torch.cat([tensors[name] for name in self.ours])
        tensor = tensor.T if self.form == "T" and tensor.ndim == 2 else tensor
        return (tensor[None] if self.form == "1" else tensor).contiguous()


def part_rows(part: str, depth: int) -> list[Row]:
    """The rows of one part of [`TABLE`] for a stack of `depth` blocks."""
    their_prefix, our_prefix, lines = PARTS[part]
    return [
        Row(their_prefix + theirs, tuple(our_prefix + name for name in ours), form)
        for theirs, ours, form in expand_names(lines, depth)
    ]


def table_rows(config: ForesightConfig) -> dict[str, list[Row]]:
    """All rows of the parts that a config has, by part."""
    text, vision = config.text_config, config.vision_config
    wrist, future, action = len(config.views) > 1, config.has("future"), config.has("action")
    depths = {  # whether the part exists, and its blocks
        "vision tower": ("vision" in config.towers, getattr(vision, "num_hidden_layers", 0)),
        "text tower": ("text" in config.towers, text.num_hidden_layers),
        "resampler": (True, config.resampler_depth),
        "input embeddings": (True, 0),
        "goal embeddings": (config.goal_image, 0),
        "state embeddings": (config.state_dim > 0, 0),
        "wrist embeddings": (wrist, 0),
        "backbone": (True, config.num_hidden_layers),
        "future": (future, config.decoder_depth),
        "wrist future query": (future and wrist, 0),
        "action encoder": (action and config.auxiliary_heads, config.action_encoder_depth),
        "action decoder": (action, config.action_decoder_depth),
        "progress": (config.has("progress"), config.progress_decoder_depth),
    }
    return {part: part_rows(part, depth) for part, (exists, depth) in depths.items() if exists}
