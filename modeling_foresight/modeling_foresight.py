# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""3D Foresight: a policy that predicts depth, future RGB-D and 3D flow beside its actions.

[`ForesightModel`] turns a window of T frames into tokens, adds queries and runs a causal transformer over
them; [`ForesightForActionPrediction`] decodes the queries and computes the losses. Dimension letters: B
batch, T frames, V views, K action chunk, L flow steps, P flow points, r latents per image, N patches, D
width, A action size, S tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_mask import (
    Kind,
    TokenLayout,
    allowed_pairs,
    build_attention_mask,
    build_layout,
    valid_columns,
)
from .configuration_foresight import ForesightConfig
from .decoders import ActionDecoder, ActionEncoder, FlowDecoder, PatchDecoder, ProgressDecoder
from .encoders import (
    ImageProjection,
    PerceiverResampler,
    SpatialReadout,
    StateEncoder,
    TextEncoder,
    VisionEncoder,
    flow_grid_points,
    load_text_tower,
    load_vision_tower,
    sincos_2d,
)
from .losses import (
    action_losses,
    check_shapes,
    check_targets,
    depth_loss,
    flow_loss,
    future_loss,
    kl_loss,
    masked_target,
    progress_loss,
)

ALL_QUERIES = (Kind.FLOW, Kind.ACTION, Kind.FUTURE, Kind.PROGRESS)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: `(B, heads, S, head_dim)` -> `(B, S, heads, head_dim)` and the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ForesightAttention(nn.Module):
    """Multi-head self-attention of the transformer, through the library's attention interface."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        # The mask says everything; without this flag sdpa would assume a causal one where there is none.
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """`(B, S, D)` -> `(B, S, D)` and, with eager attention, the weights `(B, heads, S, S)`."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights


class ForesightBlock(GradientCheckpointingLayer):
    """Pre-norm GPT-2 block: attention, then feed-forward, each with a residual connection and dropout."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ForesightAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, attention_mask=None, **kwargs) -> Tensor:
        """`(B, S, D)` -> `(B, S, D)`."""
        attended, _ = self.self_attn(self.norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.activation(self.up_proj(self.norm2(hidden_states)))
        return hidden_states + self.dropout(self.down_proj(expanded))


@dataclass
class ForesightModelOutput(ModelOutput):
    """What [`ForesightModel`] returns.

    Attributes:
        last_hidden_state: `(B, S, D)` after the final LayerNorm, in the order of [`ForesightModel.layout`].
        hidden_states: One `(B, S, D)` per layer input and the last one, if asked for.
        attentions: One `(B, heads, S, S)` per layer, if asked for (eager attention).
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ForesightOutput(ModelOutput):
    """What [`ForesightForActionPrediction`] returns. Fields of heads that are off are `None`.

    Attributes:
        loss: Weighted sum of all losses whose targets were given.
        losses: The single losses by name, unweighted and detached.
        actions: float32 `(B, T, K, A)` normalised; logits at `config.binary_action_indices`.
        style_mean, style_log_var: float32 `(B, T, latent)` of the action CVAE, if actions were given.
        depth: `(B, T, V, N, patch_size**2)` current depth, normalised per patch.
        future_rgb: `(B, T', V, N, patch_size**2 * 3)` RGB `future_shift` frames ahead, normalised per patch.
            T' is T, or fewer where the batch holds no target for the newest frames.
        future_depth: `(B, T', V, N, patch_size**2)` depth `future_shift` frames ahead, normalised per patch.
        flow: float32 `(B, T, L, P, 3)` x, y as fractions of the flow view, z in metres.
        progress: float32 `(B, T)` in [0, 1].
        hidden_states, attentions: Of the transformer, if asked for.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    actions: Tensor | None = None
    style_mean: Tensor | None = None
    style_log_var: Tensor | None = None
    depth: Tensor | None = None
    future_rgb: Tensor | None = None
    future_depth: Tensor | None = None
    flow: Tensor | None = None
    progress: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ForesightPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two model classes."""

    config: ForesightConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ForesightBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True
    # Its kernels take no arbitrary 4D mask.
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ForesightBlock, "attentions": ForesightAttention}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in `transformers`; frozen towers are frozen again, as loading makes every weight trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info=True`
        for module in model.modules():
            if isinstance(module, ForesightModel):
                module.freeze_towers()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GR-MG's initialisation: the transformer as GPT-2, everything else as PyTorch does.

        Every bare parameter and every buffer is set here, because `from_pretrained` starts from empty memory.
        """
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_initializer_range)
        else:
            super()._init_weights(module)
        if isinstance(module, ForesightBlock):
            std = self.config.initializer_range
            residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
            attention = module.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, module.up_proj):
                init.normal_(linear.weight, std=std)
                init.zeros_(linear.bias)
            for linear in (attention.o_proj, module.down_proj):
                init.normal_(linear.weight, std=residual_std)
                init.zeros_(linear.bias)
        elif isinstance(module, PerceiverResampler):
            init.normal_(module.latents, std=self.config.embedding_initializer_range)
            init.normal_(module.media_pos_emb, std=self.config.embedding_initializer_range)
        elif isinstance(module, SpatialReadout):
            init.normal_(module.maps, std=module.maps.shape[1] ** -0.5)
        elif isinstance(module, PatchDecoder):
            init.zeros_(module.mask_token)
            init.copy_(module.positions, sincos_2d(module.side, module.side, module.width)[None])
        elif isinstance(module, FlowDecoder):
            init.zeros_(module.mask_token)
            # Small, so that training starts from "points stay put".
            init.normal_(module.predict.weight, std=1e-4)
            init.zeros_(module.predict.bias)


class ForesightModel(ForesightPreTrainedModel):
    """Encoders, queries and the causal transformer (3D Foresight, Sec. III-A; GR-MG).

    Args:
        config (`ForesightConfig`): Sizes and objectives. Nothing is downloaded; see
            [`ForesightForActionPrediction.from_encoder_checkpoints`] for pretrained towers.
    """

    def __init__(self, config: ForesightConfig):
        super().__init__(config)
        width = config.hidden_size
        # The transformer comes first: tools that look for "the first layer" mean this one, not a tower's.
        self.layers = nn.ModuleList(ForesightBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

        self.vision_encoder = VisionEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.resampler = PerceiverResampler(config, self.vision_encoder.width)
        self.embed_language = nn.Linear(self.text_encoder.width, width)
        self.embed_views = nn.ModuleList(
            ImageProjection(self.vision_encoder.width, width) for _ in config.views
        )
        if config.goal_image:
            self.embed_goal = ImageProjection(self.vision_encoder.width, width)
        if config.state_dim:
            self.embed_state = StateEncoder(config)
        self.embed_timestep = nn.Embedding(config.history_length, width)
        self.embed_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)

        if config.has("flow"):
            self.flow_query = nn.Embedding(config.num_flow_queries, width)
            self.embed_flow_points = nn.Linear(2 * config.num_flow_points, width)
        if config.has("action"):
            self.action_query = nn.Embedding(1, width)
        if config.has("future"):
            self.future_queries = nn.ModuleList(
                nn.Embedding(config.num_latents + 1, width) for _ in config.views
            )
        if config.has("progress"):
            self.progress_query = nn.Embedding(1, width)

        self._layouts: dict[tuple, tuple[TokenLayout, Tensor, Tensor]] = {}
        self.post_init()
        self.freeze_towers()

    def _frozen_towers(self) -> list[nn.Module]:
        towers = (
            (self.config.freeze_vision, self.vision_encoder.tower),
            (self.config.freeze_text, self.text_encoder.tower),
        )
        return [tower for frozen, tower in towers if frozen]

    def freeze_towers(self) -> None:
        """Fixes the towers that the config calls frozen: no gradient, evaluation mode."""
        for tower in self._frozen_towers():
            tower.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Sets training mode; frozen towers stay in evaluation mode."""
        super().train(mode)
        for tower in self._frozen_towers():
            tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the text tower."""
        return self.text_encoder.tower.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the text tower."""
        self.text_encoder.tower.set_input_embeddings(value)

    def layout(
        self, num_frames: int, query_frames: list[int] | None = None, queries: tuple[Kind, ...] = ALL_QUERIES
    ) -> TokenLayout:
        """The tokens that [`forward`] lays out for these arguments, on the model's device."""
        return self._layout_and_mask(num_frames, query_frames, queries)[0]

    def _layout_and_mask(self, num_frames, query_frames, queries) -> tuple[TokenLayout, Tensor, Tensor]:
        """Layout, allowed pairs `(S, S)`, and the order `(S,)` that puts groups into their places."""
        device = self.embed_timestep.weight.device
        key = (num_frames, tuple(query_frames) if query_frames is not None else None, tuple(queries), device)
        if key not in self._layouts:
            # What is kept from a first call under inference mode must also serve training.
            with torch.inference_mode(False):
                layout = build_layout(self.config, num_frames, query_frames, queries, device)
                # Tokens are computed group by group and then brought into the order of the sequence at once.
                order = torch.cat([layout.positions(*group) for group in self._groups(queries)]).argsort()
                self._layouts[key] = layout, allowed_pairs(self.config, layout), order
        return self._layouts[key]

    def _groups(self, queries: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
        """Groups of tokens in the order in which [`forward`] concatenates them."""
        views = range(len(self.config.views))
        groups = [(Kind.GOAL, 0), (Kind.LANGUAGE, 0), (Kind.STATE, 0), *((Kind.IMAGE, v) for v in views)]
        for kind in ALL_QUERIES:
            if kind in queries:
                groups += [(kind, v) for v in views] if kind == Kind.FUTURE else [(kind, 0)]
        return groups

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Instructions `(B, length)` -> unit-length features `(B, width of the text tower)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.text_encoder)):
            return self.text_encoder(input_ids, attention_mask)

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(..., 3, H, W)`, each on its own -> CLS features `(..., C)`, latents `(..., r, C)`."""
        lead = pixel_values.shape[:-3]
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.vision_encoder)):
            cls, patches = self.vision_encoder(pixel_values.flatten(0, -4).to(self.dtype))
        return cls.unflatten(0, lead), self.resampler(patches).unflatten(0, lead)

    @can_return_tuple
    @capture_outputs
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        frame_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
        state_mask: Tensor | None = None,
        goal_pixel_values: Tensor | None = None,
        goal_mask: Tensor | None = None,
        track_start: Tensor | None = None,
        query_frames: list[int] | None = None,
        queries: tuple[Kind, ...] = ALL_QUERIES,
        **kwargs,
    ) -> ForesightModelOutput:
        """Runs the transformer over a window.

        Args:
            pixel_values (`torch.Tensor`): `(B, T, V, 3, H, W)` normalised RGB, oldest frame first.
            input_ids (`torch.Tensor`): int64 `(B, length)` instruction, each row with the end-of-text id.
            attention_mask (`torch.Tensor`, *optional*): `(B, length)`, 1 for real text tokens.
            state (`torch.Tensor`, *optional*): `(B, T, state_dim)` normalised. Missing: masked for all
                samples.
            frame_mask (`torch.Tensor`, *optional*): Boolean `(B, T)`; padding is at the end. All real by
                default.
            view_mask (`torch.Tensor`, *optional*): Boolean `(B, V)`. All present by default.
            state_mask (`torch.Tensor`, *optional*): Boolean `(B,)`.
            goal_pixel_values (`torch.Tensor`, *optional*): `(B, 3, H, W)` goal image of the first view.
            goal_mask (`torch.Tensor`, *optional*): Boolean `(B,)`.
            track_start (`torch.Tensor`, *optional*): `(B, query frames, P, 2)` x, y fractions of the flow
                points; the grid by default.
            query_frames (`list[int]`, *optional*): Frames that carry queries; all by default.
            queries (`tuple[Kind]`): Which queries to lay out.
            **kwargs: `output_hidden_states`, `output_attentions`.

        Raises:
            ValueError: If a shape does not fit the config; the message names what was expected and what came.
        """
        config = self.config
        self._check_images(pixel_values)
        batch, frames, views = pixel_values.shape[:3]
        num_query_frames = frames if query_frames is None else len(query_frames)
        if state is not None and not config.state_dim:
            raise ValueError("state was given, but config.state_dim is 0: leave it out.")
        if goal_pixel_values is not None and not config.goal_image:
            raise ValueError("goal_pixel_values was given, but config.goal_image is false: leave it out.")
        check_shapes(
            state=(state, (batch, frames, config.state_dim)),
            frame_mask=(frame_mask, (batch, frames)),
            view_mask=(view_mask, (batch, views)),
            state_mask=(state_mask, (batch,)),
            goal_pixel_values=(goal_pixel_values, (batch, *pixel_values.shape[3:])),
            goal_mask=(goal_mask, (batch,)),
            track_start=(track_start, (batch, num_query_frames, config.num_flow_points, 2)),
        )
        device, dtype = pixel_values.device, self.dtype
        layout, allowed, order = self._layout_and_mask(frames, query_frames, queries)
        if frame_mask is None:
            frame_mask = torch.ones(batch, frames, dtype=torch.bool, device=device)

        timestep = self.embed_timestep.weight[:frames]  # (T, D)
        groups = []
        if config.goal_image:
            if goal_pixel_values is None:
                goal_mask = torch.zeros(batch, dtype=torch.bool, device=device)
                goal_pixel_values = torch.zeros_like(pixel_values[:, 0, 0])
            goal_cls, goal_latents = self.encode_images(goal_pixel_values)
            groups.append(self.embed_goal(goal_latents, goal_cls))  # (B, r + 1, D)
        language = self.embed_language(self.encode_text(input_ids, attention_mask).to(dtype))
        groups.append(language[:, None] + timestep)  # (B, T, D)
        if config.state_dim:
            if state is None:
                state_mask = torch.zeros(batch, dtype=torch.bool, device=device)
                state = torch.zeros(batch, frames, config.state_dim, dtype=dtype, device=device)
            groups.append(self.embed_state(state.to(dtype)) + timestep)
        cls, latents = self.encode_images(pixel_values)
        for view, embed in enumerate(self.embed_views):
            tokens = embed(latents[:, :, view], cls[:, :, view]) + timestep[:, None]  # (B, T, r + 1, D)
            groups.append(tokens.flatten(1, 2))
        groups += self._query_tokens(batch, num_query_frames, queries, track_start)

        x = torch.cat([group.to(dtype) for group in groups], dim=1)[:, order]  # (B, S, D)
        x = self.embed_dropout(self.embed_norm(x))
        valid = valid_columns(layout, *(_as_bool(m) for m in (frame_mask, view_mask, state_mask, goal_mask)))
        mask = build_attention_mask(config, x, allowed, valid)
        for layer in self.layers:
            x = layer(x, mask, **kwargs)
        return ForesightModelOutput(last_hidden_state=self.norm(x))

    def _query_tokens(self, batch: int, frames: int, queries, track_start: Tensor | None) -> list[Tensor]:
        """Queries group by group, each `(B, frames * tokens, D)`; they get no timestep or position."""
        config, groups = self.config, []

        def repeat(query: nn.Embedding) -> Tensor:
            return query.weight.expand(batch, frames, -1, -1).flatten(1, 2)

        if config.has("flow") and Kind.FLOW in queries:
            if track_start is None:
                grid = flow_grid_points(*config.flow_grid, device=self.embed_flow_points.weight.device)
                track_start = grid.expand(batch, frames, -1, -1)
            points = self.embed_flow_points((2 * track_start - 1).flatten(2).to(self.dtype))  # (B, T, D)
            groups.append((self.flow_query.weight + points[:, :, None]).flatten(1, 2))
        if config.has("action") and Kind.ACTION in queries:
            groups.append(repeat(self.action_query))
        if config.has("future") and Kind.FUTURE in queries:
            groups += [repeat(query) for query in self.future_queries]
        if config.has("progress") and Kind.PROGRESS in queries:
            groups.append(repeat(self.progress_query))
        return groups

    def _check_images(self, pixel_values: Tensor) -> None:
        config = self.config
        size = (3, config.image_size, config.image_size)
        if pixel_values.ndim != 6 or tuple(pixel_values.shape[3:]) != size:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, frames, views, "
                f"{', '.join(map(str, size))}). ForesightProcessor builds it from images."
            )
        frames, views = pixel_values.shape[1:3]
        if views != len(config.views):
            raise ValueError(f"pixel_values has {views} views; the config names {list(config.views)}.")
        if not 1 <= frames <= config.history_length:
            raise ValueError(
                f"pixel_values has {frames} frames; the config takes 1 to {config.history_length}."
            )


class ForesightForActionPrediction(ForesightPreTrainedModel):
    """The policy: [`ForesightModel`] with its decoders and losses. This is what `AutoModel` gives.

    Args:
        config (`ForesightConfig`): Sizes, objectives and loss weights.
    """

    def __init__(self, config: ForesightConfig):
        super().__init__(config)
        self.model = ForesightModel(config)
        if config.has("depth") or config.has("future"):
            self.depth_decoder = PatchDecoder(config, channels=1)
        if config.has("future"):
            self.image_decoder = PatchDecoder(config, channels=3)
        if config.has("flow"):
            self.flow_decoder = FlowDecoder(config)
        if config.has("action"):
            self.action_encoder = ActionEncoder(config)
            self.action_decoder = ActionDecoder(config)
        if config.has("progress"):
            self.progress_decoder = ProgressDecoder(config)
        self.post_init()

    @classmethod
    def from_encoder_checkpoints(
        cls, config: ForesightConfig, text: str | None = None, vision: str | None = None, **kwargs
    ) -> "ForesightForActionPrediction":
        """A fresh policy on pretrained towers.

        Args:
            config (`ForesightConfig`): The policy; its tower configs are replaced by those of the
                checkpoints.
            text (`str`, *optional*): Folder or Hub id of a CLIP checkpoint, for example
                `openai/clip-vit-base-patch32`.
            vision (`str`, *optional*): Folder or Hub id of an image encoder: a ViTMAE checkpoint such as
                `facebook/vit-mae-base` (its encoder loads into `ViTModel`, which does not shuffle patches),
                a ViT, or a timm model.
            **kwargs: Passed to `from_pretrained` of both towers, for example `local_files_only`.

        Raises:
            ValueError: If a pretrained tower lacks weights, which names them.
        """
        config = copy.deepcopy(config)
        text_tower = None if text is None else load_text_tower(text, **kwargs)
        vision_tower = None if vision is None else load_vision_tower(vision, **kwargs)
        if text_tower is not None:
            config.text_config = text_tower.config
        if vision_tower is not None:
            config.vision_config = vision_tower.config
        config.validate()
        model = cls(config)
        if text_tower is not None:
            model.model.text_encoder.tower.load_state_dict(text_tower.state_dict())
        if vision_tower is not None:
            model.model.vision_encoder.tower.load_state_dict(vision_tower.state_dict())
        return model

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the text tower."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the text tower."""
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        frame_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
        state_mask: Tensor | None = None,
        goal_pixel_values: Tensor | None = None,
        goal_mask: Tensor | None = None,
        actions: Tensor | None = None,
        action_mask: Tensor | None = None,
        depth: Tensor | None = None,
        lookahead_pixel_values: Tensor | None = None,
        lookahead_depth: Tensor | None = None,
        lookahead_mask: Tensor | None = None,
        track_start: Tensor | None = None,
        track: Tensor | None = None,
        track_weight: Tensor | None = None,
        progress: Tensor | None = None,
        style_noise: Tensor | None = None,
        **kwargs,
    ) -> ForesightOutput:
        """Predicts everything for every frame of the window, and the losses of the targets that are given.

        Inputs are those of [`ForesightModel.forward`]; the schema of a batch stands in
        `processing_foresight.py`.

        Args:
            pixel_values, input_ids, attention_mask, state, frame_mask, view_mask, state_mask,
                goal_pixel_values, goal_mask: See [`ForesightModel.forward`].
            actions (`torch.Tensor`, *optional*): `(B, T, K, A)` normalised, 0/1 at binary entries, masked
                steps zero.
            action_mask (`torch.Tensor`, *optional*): Boolean `(B, T, K)`; all present by default.
            depth (`torch.Tensor`, *optional*): `(B, T, V, H, W)` metres; 0 = invalid.
            lookahead_pixel_values (`torch.Tensor`, *optional*): `(B, F, V, 3, H, W)` the F frames after the
                window.
            lookahead_depth (`torch.Tensor`, *optional*): `(B, F, V, H, W)` metres.
            lookahead_mask (`torch.Tensor`, *optional*): Boolean `(B, F)`; all real by default.
            track_start (`torch.Tensor`, *optional*): `(B, T, P, 2)` x, y fractions; the grid by default.
            track (`torch.Tensor`, *optional*): `(B, T, L, P, 3)` x, y fractions, z metres.
            track_weight (`torch.Tensor`, *optional*): `(B, T, L, P)`; 1 by default.
            progress (`torch.Tensor`, *optional*): `(B, T)` in [0, 1].
            style_noise (`torch.Tensor`, *optional*): `(B, T, latent)` standard normal, to fix the CVAE's
                sample. In training it is drawn; in evaluation the style is zero unless this is given.
            **kwargs: `output_hidden_states`, `output_attentions`.

        Raises:
            ValueError: If a shape does not fit the config; the message names what was expected and what came.
        """
        config = self.config
        frames = pixel_values.shape[1]
        outputs = self.model(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            state=state,
            frame_mask=frame_mask,
            view_mask=view_mask,
            state_mask=state_mask,
            goal_pixel_values=goal_pixel_values,
            goal_mask=goal_mask,
            track_start=track_start if config.has("flow") else None,
            **kwargs,
        )
        batch, views, device = pixel_values.shape[0], pixel_values.shape[2], pixel_values.device
        check_targets(
            config,
            pixel_values.shape,
            actions=actions,
            action_mask=action_mask,
            style_noise=style_noise,
            depth=depth,
            lookahead_pixel_values=lookahead_pixel_values,
            lookahead_depth=lookahead_depth,
            lookahead_mask=lookahead_mask,
            track=track,
            track_weight=track_weight,
            progress=progress,
        )
        if frame_mask is None:
            frame_mask = torch.ones(batch, frames, dtype=torch.bool, device=device)
        frame_mask = _as_bool(frame_mask)
        if view_mask is None:
            view_mask = torch.ones(batch, views, dtype=torch.bool, device=device)
        present = frame_mask[:, :, None] & _as_bool(view_mask)[:, None]  # (B, T, V)

        def tokens(kind: Kind, group: int = 0) -> Tensor:
            """Hidden states of one group, `(B, T, tokens, D)`."""
            positions = layout.positions(kind, group)
            return outputs.last_hidden_state[:, positions].unflatten(1, (frames, -1))

        layout = self.model.layout(frames)
        result = ForesightOutput(hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        losses: dict[str, Tensor] = {}
        idle: list[Tensor] = []  # what heads without a target gave

        if config.has("depth"):
            images = torch.stack([tokens(Kind.IMAGE, v) for v in range(views)], dim=2)  # (B, T, V, r + 1, D)
            result.depth = self.depth_decoder(images)
            if depth is not None:
                losses["depth"] = depth_loss(result.depth, depth, present, config.patch_size)
            else:
                idle.append(result.depth)

        if config.has("future"):
            targets = self._future_targets(
                pixel_values, depth, present, lookahead_pixel_values, lookahead_depth, lookahead_mask
            )
            known = targets[0].shape[1]
            # In training only the frames that have a target are decoded.
            predicted = known if self.training and known else frames
            future = torch.stack([tokens(Kind.FUTURE, v)[:, :predicted] for v in range(views)], dim=2)
            result.future_rgb, result.future_depth = self.image_decoder(future), self.depth_decoder(future)
            if known:
                losses["future"] = future_loss(
                    result.future_rgb[:, :known], result.future_depth[:, :known], *targets, config.patch_size
                )
            else:
                idle += [result.future_rgb, result.future_depth]

        if config.has("flow"):
            if track_start is None:
                track_start = flow_grid_points(*config.flow_grid, device=device).expand(batch, frames, -1, -1)
            result.flow = self.flow_decoder(tokens(Kind.FLOW), track_start)
            if track is not None:
                weight = torch.ones_like(track[..., 0]) if track_weight is None else track_weight
                losses["flow"] = flow_loss(result.flow, track, weight * frame_mask[:, :, None, None])
            else:
                idle.append(result.flow)

        if config.has("action"):
            style = torch.zeros(batch * frames, config.latent_dim, device=device)
            mask = frame_mask[:, :, None].expand(-1, -1, config.chunk_size)
            if action_mask is not None:
                mask = mask & _as_bool(action_mask)
            if actions is not None:
                # The CVAE reads all steps and its KL counts all frames: what does not exist must be zero.
                actions = masked_target(actions, mask[..., None])
                mean, log_var = self.action_encoder(actions.flatten(0, 1).to(self.dtype))
                if self.training and style_noise is None:
                    style_noise = torch.randn_like(mean)
                if style_noise is not None:
                    style = mean + (0.5 * log_var).exp() * style_noise.reshape_as(mean)
                result.style_mean, result.style_log_var = (
                    x.unflatten(0, (batch, frames)) for x in (mean, log_var)
                )
                losses["kl"] = kl_loss(mean, log_var)
            elif self.training:
                idle += self.action_encoder(
                    torch.zeros(1, config.chunk_size, config.action_dim, dtype=self.dtype, device=device)
                )
            chunks = self.action_decoder(tokens(Kind.ACTION).flatten(0, 2), style)  # (B * T, K, A)
            result.actions = chunks.unflatten(0, (batch, frames))
            if actions is not None:
                losses["action"], losses["gripper"] = action_losses(
                    result.actions, actions, mask, list(config.binary_action_indices), config.action_loss
                )
            else:
                idle.append(result.actions)

        if config.has("progress"):
            result.progress = self.progress_decoder(tokens(Kind.PROGRESS).flatten(0, 2)).unflatten(
                0, (batch, frames)
            )
            if progress is not None:
                losses["progress"] = progress_loss(result.progress, progress, frame_mask)
            else:
                idle.append(result.progress)

        if losses:
            result.loss = sum(getattr(config, f"{name}_loss_weight") * loss for name, loss in losses.items())
            if self.training:
                # Distributed training waits for a gradient of every parameter: here it is zero.
                result.loss = result.loss + sum(0 * output.float().sum() for output in idle)
            result.losses = {name: loss.detach() for name, loss in losses.items()}
        return result

    def _future_targets(self, pixel_values, depth, present, later_pixel_values, later_depth, later_mask):
        """Frames `future_shift` ahead as far as there are any: RGB, depth (or `None`), mask `(B, T', V)`."""
        shift, frames = self.config.future_shift, pixel_values.shape[1]
        mask = present
        if later_pixel_values is not None:
            pixel_values = torch.cat([pixel_values, later_pixel_values], dim=1)
            # Frame 0 is always real, so its row says which views there are.
            later_present = present[:, :1].expand(-1, later_pixel_values.shape[1], -1)
            if later_mask is not None:
                later_present = later_present & _as_bool(later_mask)[..., None]
            mask = torch.cat([present, later_present], dim=1)
            if depth is not None:
                if later_depth is None:
                    later_depth = depth.new_zeros(*depth.shape[:1], mask.shape[1] - frames, *depth.shape[2:])
                depth = torch.cat([depth, later_depth], dim=1)
        end = min(shift + frames, pixel_values.shape[1])
        mask = mask[:, shift:end] & present[:, : max(end - shift, 0)]
        return pixel_values[:, shift:end], None if depth is None else depth[:, shift:end], mask

    @torch.no_grad()
    def predict_action(
        self, pixel_values: Tensor, input_ids: Tensor, frame_mask: Tensor | None = None, **inputs
    ) -> Tensor:
        """The action chunk of the newest real frame, without any head that the action does not need.

        Only the newest frame carries queries, and only ACTION and the FLOW that it reads. This is exact:
        queries of past frames are seen by nobody, and a query after padded frames sees the same keys as one
        before them.

        Args:
            pixel_values (`torch.Tensor`): `(B, T, V, 3, H, W)` normalised RGB, oldest first, padding at the
                end.
            input_ids (`torch.Tensor`): `(B, length)` instruction.
            frame_mask (`torch.Tensor`, *optional*): Boolean `(B, T)`, true for real frames.
            **inputs: Other inputs of [`ForesightModel.forward`].

        Returns:
            `torch.Tensor`: float32 `(B, K, A)` normalised; probabilities at the binary entries.
            `ForesightProcessor.decode_actions` turns it into the dataset's units.

        Raises:
            ValueError: If the model was built without the objective `action`.
        """
        config = self.config
        if not config.has("action"):
            raise ValueError(f"This model has no action head: its objectives are {list(config.objectives)}.")
        newest = pixel_values.shape[1] - 1
        needed = {"query_frames": [newest], "queries": (Kind.FLOW, Kind.ACTION)}
        outputs = self.model(
            pixel_values=pixel_values, input_ids=input_ids, frame_mask=frame_mask, **inputs, **needed
        )
        layout = self.model.layout(newest + 1, **needed)
        query = outputs.last_hidden_state[:, layout.positions(Kind.ACTION)].flatten(0, 1)  # (B, D)
        actions = self.action_decoder(query, query.new_zeros(len(query), config.latent_dim))
        binary = list(config.binary_action_indices)
        actions[..., binary] = actions[..., binary].sigmoid()
        return actions


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


__all__ = [
    "ForesightForActionPrediction",
    "ForesightModel",
    "ForesightModelOutput",
    "ForesightOutput",
    "ForesightPreTrainedModel",
]
