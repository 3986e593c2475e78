# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Images, language and proprioception -> tokens of the transformer's width (3D Foresight, Sec. III-A)."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from .configuration_foresight import ForesightConfig


def sincos_2d(rows: int, cols: int, dim: int, device=None) -> Tensor:
    """Fixed 2D sin-cos positions of a grid, row-major (MAE, He et al. 2022).

    The first `dim / 2` entries encode the column, the last the row; each is `[sin, cos]` with frequencies
    `10000 ** (-k / (dim / 4))`. float32 `(rows * cols, dim)`; `dim` is divisible by 4.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    row, col = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device),
        torch.arange(cols, dtype=torch.float32, device=device),
        indexing="ij",
    )
    angles = [coordinate.flatten()[:, None] * frequency for coordinate in (col, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


@contextmanager
def name_config(name: str) -> Iterator[None]:
    """Makes any error while a tower is built a `ValueError` that names its config."""
    try:
        yield
    except Exception as error:
        if "overflow" in str(error):  # a size that `check_sizes` explains
            raise
        raise ValueError(f"{name} describes no tower that can be built: {error!r}") from error


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """The vision tower from its config alone (nothing is downloaded). `ViTModel` comes without its pooler."""
    config._attn_implementation = tower_attention(config, config._attn_implementation)
    if config.model_type == "vit":
        return ViTModel._from_config(config, add_pooling_layer=False)
    return AutoModel.from_config(config)


def tower_attention(config: PreTrainedConfig, implementation: str | None) -> str | None:
    """Attention of a tower in a model with this `implementation`.

    `eager` for timm, which has its own kernels (`fused_attn`), and for a ResNet, which has no attention.
    Flex attention gains nothing without a mask, and its CPU kernel may crash.
    """
    tower = MODEL_MAPPING.get(type(config), None)
    if config.model_type == "timm_wrapper" or not getattr(tower, "_supports_sdpa", True):
        return "eager"
    return "sdpa" if implementation == "flex_attention" else implementation


def load_text_tower(source: str, **kwargs) -> PreTrainedModel:
    """The text tower of a CLIP checkpoint; `kwargs` go to `from_pretrained`."""
    return _load_whole(CLIPTextModelWithProjection, source, **kwargs)


def load_vision_tower(source: str, **kwargs) -> PreTrainedModel:
    """The image encoder of a ViTMAE, ViT, timm or other checkpoint; `kwargs` go to `from_pretrained`."""
    config = AutoConfig.from_pretrained(source, **kwargs)
    if config.model_type not in ("vit", "vit_mae"):
        tower = _load_whole(AutoModel, source, **kwargs)
        is_mae = (getattr(config, "pretrained_cfg", None) or {}).get("tag") == "mae"
        return timm_to_vit(tower.timm_model) if is_mae else tower
    # ViTMAE's encoder loads into `ViTModel`, which has the same weights but does not shuffle the patches.
    known = ViTConfig()
    shared = {k: v for k, v in config.to_dict().items() if k != "model_type" and hasattr(known, k)}
    return _load_whole(ViTModel, source, config=ViTConfig(**shared), add_pooling_layer=False, **kwargs)


def _load_whole(cls: type, source: str, **kwargs) -> PreTrainedModel:
    """`from_pretrained` that refuses a checkpoint without some of the class's weights."""
    model, report = cls.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **kwargs)
    if report["missing_keys"]:
        raise ValueError(
            f"{source} lacks weights of {cls.__name__}: {sorted(report['missing_keys'])[:5]}. "
            "Give a checkpoint of that architecture."
        )
    return model


# Names in timm's plain ViT, and so in MAE's own file, and in files of `ViTModel`; see `expand_names`.
TIMM_TO_VIT = """
    cls_token            embeddings.cls_token
    pos_embed            embeddings.position_embeddings
    patch_embed.proj.*   embeddings.patch_embeddings.projection.*
    blocks.#.norm1.*     encoder.layer.#.layernorm_before.*
    blocks.#.attn.qkv.*  encoder.layer.#.attention.attention.[query|key|value].*
    blocks.#.attn.proj.* encoder.layer.#.attention.output.dense.*
    blocks.#.norm2.*     encoder.layer.#.layernorm_after.*
    blocks.#.mlp.fc1.*   encoder.layer.#.intermediate.dense.*
    blocks.#.mlp.fc2.*   encoder.layer.#.output.dense.*
    norm.*               layernorm.*
"""


def expand_names(table: str, depth: int) -> list[tuple[str, list[str], str]]:
    """One entry per tensor of a table of names: its name, its names in the other format, a mark or `""`.

    Args:
        table (`str`): One line per kind of tensor. `*` stands for weight and bias, `#` for the index of a
            block, `[q|k|v]` for tensors that are joined along their first axis on the left.
        depth (`int`): Number of blocks.
    """
    entries = []
    for line in filter(None, map(str.strip, table.splitlines())):
        for index in range(depth) if "#" in line else [0]:
            for leaf in ("weight", "bias") if "*" in line else [""]:
                name, other, mark = [*line.replace("#", str(index)).replace("*", leaf).split(), ""][:3]
                pieces = re.search(r"\[(.+)\]", other)
                pieces = pieces[1].split("|") if pieces else [""]
                entries.append((name, [re.sub(r"\[.+\]", piece, other) for piece in pieces], mark))
    return entries


def timm_to_vit(timm_model: nn.Module) -> ViTModel:
    """MAE's encoder as timm builds it -> the same as `ViTModel`, the class of every other MAE tower here.

    Raises:
        ValueError: If the encoder has other weights than a plain ViT.
    """
    blocks, patches, theirs = timm_model.blocks, timm_model.patch_embed, timm_model.state_dict()
    config = ViTConfig(
        hidden_size=timm_model.embed_dim,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        intermediate_size=blocks[0].mlp.fc1.out_features,
        image_size=patches.img_size[0],
        patch_size=patches.patch_size[0],
        layer_norm_eps=timm_model.norm.eps,
    )
    names = expand_names(TIMM_TO_VIT, len(blocks))
    if {name for name, _, _ in names} != set(theirs):
        odd = sorted({name for name, _, _ in names} ^ set(theirs))[:5]
        raise ValueError(f"This MAE is not a plain ViT: it has or lacks {odd}. Give one of timm's vit_*.mae.")
    ours = {}
    for name, others, _ in names:
        ours |= zip(others, theirs[name].tensor_split(len(others)), strict=True)
    # `from_pretrained` renames the weights to those of the installed version of transformers.
    return ViTModel.from_pretrained(None, config=config, state_dict=ours, add_pooling_layer=False)


def take_entries(values: Tensor, entries: list[int]) -> Tensor:
    """`values[..., entries]` by slices: an index list would wait for a copy to the GPU each time."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry:
            runs[-1] = runs[-1][0], entry + 1
        else:
            runs.append((entry, entry + 1))
    return torch.cat([values[..., start:end] for start, end in runs], dim=-1)


def embed_all(embedding: nn.Embedding, device) -> Tensor:
    """The whole table `(rows, D)`, by a call: hooks that load offloaded weights do not see `.weight`."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


def flow_grid_points(rows: int, cols: int, device=None) -> Tensor:
    """Centers of the flow grid's cells, row-major: float32 `(rows * cols, 2)`, x, y as image fractions."""
    y, x = torch.meshgrid(
        (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) / rows,
        (torch.arange(cols, dtype=torch.float32, device=device) + 0.5) / cols,
        indexing="ij",
    )
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def normalize_length(features: Tensor) -> Tensor:
    """Text features `(B, width)` divided by their L2 norm + 1e-6, as GR-MG does."""
    return features / (features.norm(dim=-1, keepdim=True) + 1e-6)


def vision_width(config: ForesightConfig) -> int:
    """C, width of the vision tower's features."""
    if config.vision_config.model_type == "vit":
        return config.vision_config.hidden_size
    return VisionEncoder(config).width


def feature_shape(config: ForesightConfig) -> torch.Size:
    """Shape of the vision tower's features of one image, found on the meta device: nothing is computed."""
    side, vision = config.image_size, copy.deepcopy(config.vision_config)
    if vision.model_type == "vit":
        return torch.Size((1, 1 + (side // vision.patch_size) ** 2, vision.hidden_size))
    vision._attn_implementation = "eager"  # flex attention has no meta kernel
    with torch.device("meta"), torch.no_grad():
        tower = build_vision_tower(vision).eval()
        features = tower(torch.empty(1, 3, side, side)).last_hidden_state
    return (features[-1] if isinstance(features, list | tuple) else features).shape


class SpatialReadout(nn.Module):
    """Patch features -> one feature that keeps positions, for towers without a CLS token.

    Every channel is summed over the image under 8 learned weight maps, then mixed. A mean over patches would
    lose positions, which an attention that starts out uniform takes long to learn again.
    """

    def __init__(self, num_patches: int, width: int):
        super().__init__()
        self.maps = nn.Parameter(torch.randn(8, num_patches, width) / num_patches**0.5)
        self.mix = nn.Linear(8 * width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """`(M, N, C)` -> `(M, C)`."""
        read = torch.einsum("mnc,fnc->mfc", patches, self.maps.to(patches.dtype))
        return self.mix(read.flatten(1))


class VisionEncoder(nn.Module):
    """An image encoder of any library: one CLS feature and N patch features per image.

    Vision transformers give their CLS token and their patches; registers are left out. Feature maps of
    convolutional networks are read row by row as patches, with fixed 2D sin-cos positions added because
    nothing downstream knows the place of a patch. A [`SpatialReadout`] replaces a CLS token that is missing.

    Raises:
        ValueError: If the tower's features are neither `(M, tokens, C)` nor `(M, C, rows, cols)`.
    """

    def __init__(self, config: ForesightConfig):
        super().__init__()
        vision = config.vision_config
        with name_config("vision_config"):
            self.tower = build_vision_tower(vision)
            shape = feature_shape(config)
        timm_model = getattr(self.tower, "timm_model", None)
        if len(shape) not in (3, 4):
            raise ValueError(
                f"The vision tower {type(self.tower).__name__} returns features of shape {tuple(shape)}; "
                "expected (images, tokens, width) or (images, width, rows, cols): choose one without head."
            )
        self.is_map = len(shape) == 4
        # timm's Swin-like models put the channels last.
        self.channels_last = str(getattr(timm_model, "output_fmt", "")).endswith("NHWC")
        self.width = shape[1] if self.is_map and not self.channels_last else shape[-1]
        if self.is_map:
            self.num_prefix_tokens, has_cls = 0, False
        elif timm_model is not None:
            self.num_prefix_tokens = getattr(timm_model, "num_prefix_tokens", 0)
            has_cls = getattr(timm_model, "cls_token", None) is not None
        else:  # transformers has no such field; everything before the patches is a prefix
            self.num_prefix_tokens = shape[1] - (config.image_size // vision.patch_size) ** 2
            has_cls = self.num_prefix_tokens > 0
        num_patches = shape.numel() // self.width - self.num_prefix_tokens
        self.readout = None if has_cls else SpatialReadout(num_patches, self.width)

    def hold_fixed_statistics(self) -> None:
        """Put layers whose parameters are fixed, as under an adapter, in evaluation mode.

        Otherwise running statistics (of BatchNorm, EvoNorm), which are not parameters, would drift away from
        the base that an adapter is loaded on.
        """
        for norm in self.tower.modules():
            if not any(name.startswith("running_") for name, _ in norm.named_buffers(recurse=False)):
                continue
            # A layer without parameters is as fixed as its tower.
            parameters = list(norm.parameters()) or self.tower.parameters()
            if not any(parameter.requires_grad for parameter in parameters):
                norm.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized RGB `(M, 3, H, W)` -> CLS `(M, C)` and patch features `(M, N, C)`, row-major."""
        if self.training:
            self.hold_fixed_statistics()
            if self.is_map:  # a CPU computes convolutions and pooling faster so
                pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.tower(pixel_values).last_hidden_state
        if not isinstance(features, Tensor):  # timm's `features_only` gives one map per chosen stage
            features = features[-1]
        if self.is_map:
            features = features.movedim(-1, 1) if self.channels_last else features
            rows, cols = features.shape[-2:]
            patches = features.flatten(2).transpose(1, 2)  # (M, rows * cols, C)
            patches = patches + sincos_2d(rows, cols, self.width, features.device).to(patches.dtype)
        else:
            patches = features[:, self.num_prefix_tokens :]
        return features[:, 0] if self.readout is None else self.readout(patches), patches


class ResamplerLayer(nn.Module):
    """Latents read media and themselves, then a feed-forward part; the media are never updated (Flamingo)."""

    def __init__(self, config: ForesightConfig, width: int):
        super().__init__()
        heads, head_dim, eps = config.resampler_heads, config.resampler_head_dim, config.layer_norm_eps
        self.heads, self.scaling = heads, head_dim**-0.5
        self.fused_attn = True  # named as in timm's blocks: `set_attn_implementation` finds them by it
        self.norm_media = nn.LayerNorm(width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width, eps=eps),
            nn.Linear(width, config.resampler_ff_mult * width, bias=False),
            nn.GELU(),
            nn.Linear(config.resampler_ff_mult * width, width, bias=False),
        )

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """`(M, N, C)` media and `(M, r, C)` latents -> new latents `(M, r, C)`."""
        normed = self.norm_latents(latents)
        query = self.to_q(normed)
        key, value = self.to_kv(torch.cat([self.norm_media(media), normed], dim=1)).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if self.fused_attn:
            attended = F.scaled_dot_product_attention(query, key, value)  # (M, heads, r, head_dim)
        else:
            attended = (query @ key.transpose(2, 3) * self.scaling).softmax(-1) @ value
        latents = latents + self.to_out(attended.transpose(1, 2).flatten(2))
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """N patch features of an image -> r latents, for all views and the goal (Flamingo, Alayrac 2022)."""

    def __init__(self, config: ForesightConfig, width: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents, width))
        # One vector for all patches: an image is a single "medium" of Flamingo's many.
        self.media_pos_emb = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(ResamplerLayer(config, width) for _ in range(config.resampler_depth))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        """`(M, N, C)` patch features -> `(M, r, C)` latents."""
        media = patches + self.media_pos_emb
        latents = self.latents.expand(patches.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(media, latents)
        return self.norm(latents)


class ImageProjection(nn.Module):
    """Latents and CLS of one image -> its r + 1 tokens; one projection per view, and one for the goal."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.latents = nn.Linear(width, hidden_size)
        self.cls = nn.Linear(width, hidden_size)

    def forward(self, latents: Tensor, cls: Tensor) -> Tensor:
        """`(..., r, C)` and `(..., C)` -> `(..., r + 1, D)`, the CLS last."""
        return torch.cat([self.latents(latents), self.cls(cls)[..., None, :]], dim=-2)


class StateEncoder(nn.Module):
    """Proprioception -> one token: numbers and one-hot binaries are embedded apart, then joined (GR-MG)."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        self.continuous, self.binary = config.continuous_state_indices, list(config.binary_state_indices)
        if self.continuous:
            self.embed_continuous = nn.Linear(len(self.continuous), config.hidden_size)
        if self.binary:
            self.embed_binary = nn.Linear(2 * len(self.binary), config.hidden_size)
        parts = bool(self.continuous) + bool(self.binary)
        self.join = nn.Linear(parts * config.hidden_size, config.hidden_size)

    def forward(self, state: Tensor) -> Tensor:
        """`(B, T, state_dim)` -> `(B, T, D)`. Binary entries are 0 or 1 and enter as [closed, open]."""
        parts = []
        if self.continuous:
            parts.append(self.embed_continuous(take_entries(state, self.continuous)))
        if self.binary:
            is_open = (take_entries(state, self.binary) > 0.5).to(state.dtype)
            parts.append(self.embed_binary(torch.stack([1 - is_open, is_open], dim=-1).flatten(-2)))
        return self.join(torch.cat(parts, dim=-1))


class TextEncoder(nn.Module):
    """CLIP's text tower: the projected end-of-text feature."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        text = config.text_config
        text._attn_implementation = tower_attention(text, text._attn_implementation)
        with name_config("text_config"):
            self.tower = CLIPTextModelWithProjection._from_config(text)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids `(B, length)`, each row with the end-of-text id and padding on either side -> `(B, width)`."""
        if attention_mask is not None:
            # CLIP counts positions from the left, and its padding is an end-of-text id: text comes first.
            order = attention_mask.argsort(dim=-1, descending=True, stable=True)
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        return self.tower(input_ids=input_ids, attention_mask=attention_mask).text_embeds
