# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""3D Foresight: a policy that predicts depth, future RGB-D and 3D flow beside its actions.

[`ForesightModel`] turns a window of T frames into tokens, adds queries and runs a causal transformer over
them; [`ForesightForActionPrediction`] decodes the queries and computes the losses. Dimension letters: B
batch, T frames, V views, K action chunk, L flow steps, P flow points, r latents per image, N patches, D
width, A action size, S tokens.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_mask import (
    Kind,
    TokenLayout,
    allowed_pairs,
    build_attention_mask,
    build_layout,
    valid_columns,
)
from .base_model import ForesightModelOutput, ForesightOutput, ForesightPreTrainedModel
from .checks import check_inputs, check_shapes, check_targets
from .configuration_foresight import ForesightConfig
from .decoders import (
    ActionDecoder,
    ActionEncoder,
    FlowDecoder,
    LinearActionDecoder,
    PatchDecoder,
    ProgressDecoder,
)
from .encoders import (
    ImageProjection,
    PerceiverResampler,
    StateEncoder,
    TextEncoder,
    VisionEncoder,
    all_rows,
    flow_grid_points,
    load_text_tower,
    load_vision_tower,
    unit_length,
    vision_width,
)
from .lora import FROM_LEROBOT, declare_lora_targets
from .losses import (
    action_losses,
    depth_loss,
    flow_loss,
    future_loss,
    kl_loss,
    masked_target,
    progress_loss,
)
from .streaming import ForesightStream
from .transformer import ForesightBlock

ALL_QUERIES = (Kind.FLOW, Kind.ACTION, Kind.FUTURE, Kind.PROGRESS)
# What a checkpoint holds beyond the trunk, and beyond a policy with `auxiliary_heads=False`.
# `timm_model.`: with a timm tower in the model, transformers puts this before names that the model lacks.
HEADS = (
    r"^(timm_model\.)?"
    r"(depth_decoder|image_decoder|flow_decoder|action_encoder|action_decoder|progress_decoder)\."
)
AUXILIARY_WEIGHTS = [
    r"^(timm_model\.)?(depth_decoder|image_decoder|flow_decoder|action_encoder|progress_decoder)\.",
    r"^(model\.)?(future_queries|progress_query|flow_query|embed_flow_points)\.",
]


class ForesightModel(ForesightPreTrainedModel):
    """Encoders, queries and the causal transformer (3D Foresight, Sec. III-A; GR-MG).

    Args:
        config (`ForesightConfig`): Sizes and objectives. Nothing is downloaded; see
            [`ForesightForActionPrediction.from_encoder_checkpoints`] for pretrained towers.
    """

    # The trunk loads from a policy's checkpoint too.
    _keys_to_ignore_on_load_unexpected = [HEADS]

    def __init__(self, config: ForesightConfig):
        super().__init__(config)
        width = config.hidden_size
        # The transformer comes first: tools that look for "the first layer" mean this one, not a tower's.
        self.layers = nn.ModuleList(ForesightBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

        self.vision_encoder = VisionEncoder(config) if "vision" in config.towers else None
        self.text_encoder = TextEncoder(config) if "text" in config.towers else None
        self.vision_width = self.vision_encoder.width if self.vision_encoder else vision_width(config)
        self.resampler = PerceiverResampler(config, self.vision_width)
        self.embed_language = nn.Linear(config.text_config.projection_dim, width)
        self.embed_views = nn.ModuleList(ImageProjection(self.vision_width, width) for _ in config.views)
        if config.goal_image:
            self.embed_goal = ImageProjection(self.vision_width, width)
        if config.state_dim:
            self.embed_state = StateEncoder(config)
        self.embed_timestep = nn.Embedding(config.history_length, width)
        self.embed_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)

        if config.has_flow_query:
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

        if not config.auxiliary_heads:
            self._keys_to_ignore_on_load_unexpected = [HEADS, *AUXILIARY_WEIGHTS]
        self._layouts: dict[tuple, tuple[TokenLayout, Tensor, Tensor]] = {}
        self.post_init()
        self.freeze_towers()

    def _frozen_towers(self) -> list[nn.Module]:
        encoders = (
            (self.config.freeze_vision, self.vision_encoder),
            (self.config.freeze_text, self.text_encoder),
        )
        return [encoder.tower for frozen, encoder in encoders if frozen and encoder is not None]

    def freeze_towers(self) -> None:
        """Fixes frozen towers (no gradient, evaluation mode) and what never runs (no gradient)."""
        for tower in self._frozen_towers():
            tower.requires_grad_(False).eval()
        # timm keeps layers for what it would pool. They never get a gradient, which DDP would wait for.
        timm_model = getattr(self.vision_encoder and self.vision_encoder.tower, "timm_model", None)
        for name in ("attn_pool", "fc_norm", "head"):
            if (unused := getattr(timm_model, name, None)) is not None:
                unused.requires_grad_(False)

    def train(self, mode: bool = True):
        """Sets training mode; frozen towers stay in evaluation mode."""
        super().train(mode)
        for tower in self._frozen_towers():
            tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the text tower.

        Raises:
            NotImplementedError: If the model has none; libraries take that for "there are no embeddings".
        """
        if self.text_encoder is None:
            raise NotImplementedError("This model has no text tower.")
        return self.text_encoder.tower.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the text tower."""
        self._tower("text").set_input_embeddings(value)

    def _tower(self, name: str) -> PreTrainedModel:
        encoder = self.vision_encoder if name == "vision" else self.text_encoder
        if encoder is None:
            raise ValueError(
                f"This model has no {name} tower (config.towers={list(self.config.towers)}): give "
                f"{name}_features in place of its input."
            )
        return encoder.tower

    def layout(
        self, num_frames: int, query_frames: list[int] | None = None, queries: tuple[Kind, ...] = ALL_QUERIES
    ) -> TokenLayout:
        """The tokens that [`forward`] lays out for these arguments, on the model's device."""
        return self._layout_and_mask(num_frames, query_frames, queries, self.device)[0]

    def _layout_and_mask(
        self, num_frames, query_frames, queries, device
    ) -> tuple[TokenLayout, Tensor, Tensor]:
        """Layout, allowed pairs `(S, S)`, and the order `(S,)` that puts groups into their places."""
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
        """Instructions `(B, length)` -> projected features `(B, text width)`."""
        tower = self._tower("text")  # says what to do if there is none
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(tower)):
            return self.text_encoder(input_ids, attention_mask)

    def embed_text(self, features: Tensor) -> Tensor:
        """Features of the text tower `(B, text width)`, of any length -> language tokens `(B, D)`.

        Raises:
            ValueError: If they have another width.
        """
        check_shapes(text_features=(features, (len(features), self.config.text_config.projection_dim)))
        return self.embed_language(unit_length(features.float()).to(self.dtype))

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(..., 3, H, W)`, each on its own -> CLS `(..., C)` and patch features `(..., N, C)`."""
        lead = pixel_values.shape[:-3]
        self._tower("vision")  # says what to do if there is none
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.vision_encoder)):
            cls, patches = self.vision_encoder(pixel_values.flatten(0, -4).to(self.dtype))
        return cls.unflatten(0, lead), patches.unflatten(0, lead)

    def embed_images(self, cls: Tensor, patches: Tensor, views: Sequence[int] | None = None) -> Tensor:
        """Features `(B, T, V, C)` and `(B, T, V, N, C)` -> tokens `(B, T, V, r + 1, D)`.

        They depend on the image alone, not on its place in the window: control keeps them. `views` says
        which views of the config the V given ones are; all of them by default.
        """
        latents = self._resample(patches)
        views = range(len(self.embed_views)) if views is None else views
        tokens = [self.embed_views[v](latents[:, :, i], cls[:, :, i]) for i, v in enumerate(views)]
        return torch.stack(tokens, dim=2)

    def embed_goal_image(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Features `(B, C)` and `(B, N, C)` of goal images -> tokens `(B, r + 1, D)`."""
        return self.embed_goal(self._resample(patches), cls)

    def _resample(self, patches: Tensor) -> Tensor:
        return self.resampler(patches.flatten(0, -3)).unflatten(0, patches.shape[:-2])

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        frame_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
        state_mask: Tensor | None = None,
        goal_pixel_values: Tensor | None = None,
        goal_mask: Tensor | None = None,
        track_start: Tensor | None = None,
        text_features: Tensor | None = None,
        vision_features: tuple[Tensor, Tensor] | None = None,
        goal_features: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
            view_mask (`torch.Tensor`, *optional*): Boolean `(B, V)`, or `(B, T, V)` if it differs between
                frames. All present by default.
            state_mask (`torch.Tensor`, *optional*): Boolean `(B,)`.
            goal_pixel_values (`torch.Tensor`, *optional*): `(B, 3, H, W)` goal image of the first view.
            goal_mask (`torch.Tensor`, *optional*): Boolean `(B,)`.
            track_start (`torch.Tensor`, *optional*): `(B, T, P, 2)` x, y fractions of the flow points; the
                grid by default.
            text_features (`torch.Tensor`, *optional*): `(B, text width)` projected features of the text
                tower, of any length, in place of `input_ids`.
            vision_features (`tuple[torch.Tensor, torch.Tensor]`, *optional*): CLS `(B, T, V, C)` and patch
                features `(B, T, V, N, C)` of the vision tower, in place of `pixel_values`.
            goal_features (`tuple[torch.Tensor, torch.Tensor]`, *optional*): `(B, C)` and `(B, N, C)`, in
                place of `goal_pixel_values`.
            **kwargs: `output_hidden_states`, `output_attentions`.

        Raises:
            TypeError: If an argument is not known; the message names the one closest to it.
            ValueError: If a shape does not fit the config; the message names what was expected and what came.
        """
        self._refuse_unknown(kwargs)
        embedded = self.embed_inputs(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            state=state,
            frame_mask=frame_mask,
            view_mask=view_mask,
            state_mask=state_mask,
            goal_pixel_values=goal_pixel_values,
            goal_mask=goal_mask,
            text_features=text_features,
            vision_features=vision_features,
            goal_features=goal_features,
        )
        (batch, frames), device = embedded["images"].shape[:2], embedded["images"].device
        check_shapes(track_start=(track_start, (batch, frames, self.config.num_flow_points, 2)))
        plan = self._layout_and_mask(frames, None, ALL_QUERIES, device)
        queries = self._query_tokens(batch, frames, ALL_QUERIES, device, track_start)
        embeddings, mask = self._place(**embedded, queries=queries, plan=plan)
        x = self.embed_dropout(self.embed_norm(embeddings))
        for layer in self.layers:
            x = layer(x, mask, **kwargs)
        wanted = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        return ForesightModelOutput(last_hidden_state=self.norm(x), embeddings=embeddings if wanted else None)

    def embed_inputs(self, **inputs) -> dict[str, Tensor | None]:
        """Checks the inputs of [`forward`] (but `track_start`) and encodes them: what [`read_newest`] takes.

        Raises:
            TypeError: If an input is not known.
            ValueError: If a shape does not fit the config; the message names what was expected and what came.
        """
        batch, frames = check_inputs(self.config, self.vision_width, **inputs)
        given = inputs.get
        vision, text, goal_features = given("vision_features"), given("text_features"), given("goal_features")
        if given("pixel_values") is not None:
            vision = self.encode_images(given("pixel_values"))
        if given("input_ids") is not None:
            text = self.encode_text(given("input_ids"), given("attention_mask"))
        if given("goal_pixel_values") is not None:
            goal_features = self.encode_images(given("goal_pixel_values"))
        images = self.embed_images(*(x.to(self.dtype) for x in vision))
        goal = None
        if goal_features is not None:
            goal = self.embed_goal_image(*(x.to(self.dtype) for x in goal_features))
        frame_mask = given("frame_mask")
        if frame_mask is None:
            frame_mask = torch.ones(batch, frames, dtype=torch.bool, device=images.device)
        masks = {name: given(name) for name in ("state", "view_mask", "state_mask", "goal_mask")}
        return {
            "language": self.embed_text(text),
            "images": images,
            "goal": goal,
            "frame_mask": frame_mask,
            **masks,
        }

    def _place(
        self,
        language: Tensor,
        images: Tensor,
        goal: Tensor | None,
        state: Tensor | None,
        frame_mask: Tensor,
        view_mask: Tensor | None,
        state_mask: Tensor | None,
        goal_mask: Tensor | None,
        queries: list[Tensor],
        plan: tuple[TokenLayout, Tensor, Tensor],
    ):
        """All tokens `(B, S, D)` in the order of the sequence, placed in time, and their attention mask."""
        config, dtype, device = self.config, self.dtype, images.device
        (batch, frames), (layout, allowed, order) = images.shape[:2], plan
        timestep = self.embed_timestep(torch.arange(frames, device=device))  # (T, D)
        nothing = torch.zeros(batch, dtype=torch.bool, device=device)
        groups = []
        if config.goal_image:
            if goal is None:  # masked, but its projection is part of the graph of distributed training
                goal_mask = nothing
                empty = torch.zeros(
                    batch, config.num_latents + 1, self.vision_width, dtype=dtype, device=device
                )
                goal = self.embed_goal(empty[:, 1:], empty[:, 0])
            groups.append(goal)
        groups.append(language[:, None] + timestep)  # (B, T, D)
        if config.state_dim:
            if state is None:
                state_mask = nothing
                state = torch.zeros(batch, frames, config.state_dim, device=device)
            groups.append(self.embed_state(state.to(dtype)) + timestep)
        tokens = images + timestep[:, None, None]  # (B, T, V, r + 1, D)
        groups += [tokens[:, :, view].flatten(1, 2) for view in range(len(config.views))]
        x = torch.cat([group.to(dtype) for group in groups + queries], dim=1)[:, order]  # (B, S, D)
        valid = valid_columns(layout, *(_as_bool(m) for m in (frame_mask, view_mask, state_mask, goal_mask)))
        return x, build_attention_mask(config, x, allowed, valid)

    def plan_newest(
        self, num_frames: int, device: torch.device, queries: tuple[Kind, ...] = (Kind.ACTION,)
    ) -> tuple[TokenLayout, Tensor, Tensor]:
        """Layout, allowed pairs and order of [`read_newest`]; kept, so that a compiler meets them ready."""
        return self._layout_and_mask(num_frames, [num_frames - 1], (Kind.FLOW, *queries), device)

    def read_newest(
        self,
        language: Tensor,
        images: Tensor,
        goal: Tensor | None = None,
        state: Tensor | None = None,
        frame_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
        state_mask: Tensor | None = None,
        goal_mask: Tensor | None = None,
        queries: tuple[Kind, ...] = (Kind.ACTION,),
    ) -> Tensor:
        """Final hidden states of the newest frame's queries, from embedded inputs: what control runs.

        Only the newest frame carries queries, only those asked for and the FLOW that ACTION reads, and the
        last block runs for the rows that are read. This is exact (method of GR-MG): queries of past frames
        are seen by nobody, and a query after padded frames sees the same keys as one before them.

        Args:
            language (`torch.Tensor`): `(B, D)` from `embed_language`.
            images (`torch.Tensor`): `(B, T, V, r + 1, D)` from [`embed_images`].
            goal (`torch.Tensor`, *optional*): `(B, r + 1, D)` from [`embed_goal_image`].
            state, frame_mask, view_mask, state_mask, goal_mask: As in [`forward`].
            queries (`tuple[Kind]`): `ACTION` and `PROGRESS`, in this order.

        Returns:
            `torch.Tensor`: `(B, queries, D)` after the final LayerNorm.
        """
        batch, frames = images.shape[:2]
        plan, laid_out = self.plan_newest(frames, images.device, queries), (Kind.FLOW, *queries)
        if frame_mask is None:
            frame_mask = torch.ones(batch, frames, dtype=torch.bool, device=images.device)
        embeddings, mask = self._place(
            language,
            images,
            goal,
            state,
            frame_mask,
            view_mask,
            state_mask,
            goal_mask,
            self._query_tokens(batch, 1, laid_out, images.device),
            plan,
        )
        x = self.embed_norm(embeddings)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        rows = len(queries)  # they end the sequence
        if self.config._attn_implementation == "flex_attention":  # its mask cannot be cut
            return self.norm(self.layers[-1](x, mask)[:, -rows:])
        return self.norm(self.layers[-1](x, mask[:, :, -rows:], last_rows=rows))

    def _query_tokens(
        self, batch: int, frames: int, queries, device: torch.device, track_start: Tensor | None = None
    ) -> list[Tensor]:
        """Queries group by group, each `(B, frames * tokens, D)`; they get no timestep or position."""
        config, groups = self.config, []

        def repeat(query: nn.Embedding) -> Tensor:
            return all_rows(query, device).expand(batch, frames, -1, -1).flatten(1, 2)

        if config.has_flow_query and Kind.FLOW in queries:
            if track_start is None:
                grid = flow_grid_points(*config.flow_grid, device=device)
                track_start = grid.expand(batch, frames, -1, -1)
            points = self.embed_flow_points((2 * track_start - 1).flatten(2).to(self.dtype))  # (B, T, D)
            groups.append((all_rows(self.flow_query, device) + points[:, :, None]).flatten(1, 2))
        if config.has("action") and Kind.ACTION in queries:
            groups.append(repeat(self.action_query))
        if config.has("future") and Kind.FUTURE in queries:
            groups += [repeat(query) for query in self.future_queries]
        if config.has("progress") and Kind.PROGRESS in queries:
            groups.append(repeat(self.progress_query))
        return groups


class ForesightForActionPrediction(ForesightPreTrainedModel):
    """The policy: [`ForesightModel`] with its decoders and losses. This is what `AutoModel` gives.

    Args:
        config (`ForesightConfig`): Sizes, objectives and loss weights.
    """

    _checkpoint_conversion_mapping = FROM_LEROBOT  # peft's name; adapters that LeRobot saved

    def __init__(self, config: ForesightConfig):
        super().__init__(config)
        declare_lora_targets()
        self.model = ForesightModel(config)
        if config.has_depth_decoder:
            self.depth_decoder = PatchDecoder(config, channels=1)
        if config.has("future"):
            self.image_decoder = PatchDecoder(config, channels=3)
        if config.has("flow"):
            self.flow_decoder = FlowDecoder(config)
        if config.has_style:
            self.action_encoder = ActionEncoder(config)
        if config.has("action"):
            linear = config.action_head == "linear"
            self.action_decoder = LinearActionDecoder(config) if linear else ActionDecoder(config)
        if config.has("progress"):
            self.progress_decoder = ProgressDecoder(config)
        if not config.auxiliary_heads:
            self._keys_to_ignore_on_load_unexpected = AUXILIARY_WEIGHTS
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
            vision (`str`, *optional*): Folder or Hub id of an image encoder: MAE's such as
                `timm/vit_base_patch16_224.mae` or a ViTMAE checkpoint (both load into `ViTModel`, which does
                not shuffle patches), a ViT, or any other timm model.
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
        needed = [
            name for name, tower in (("text", text_tower), ("vision", vision_tower)) if tower is not None
        ]
        config.towers = [name for name in ("text", "vision") if name in {*config.towers, *needed}]
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
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
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
        text_features: Tensor | None = None,
        vision_features: tuple[Tensor, Tensor] | None = None,
        goal_features: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ForesightOutput:
        """Predicts everything for every frame of the window, and the losses of the targets that are given.

        Inputs are those of [`ForesightModel.forward`]; the schema of a batch stands in
        `processing_foresight.py`.

        Args:
            pixel_values, input_ids, attention_mask, state, frame_mask, view_mask, state_mask,
                goal_pixel_values, goal_mask, text_features, goal_features: See [`ForesightModel.forward`].
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
            vision_features (`tuple[torch.Tensor, torch.Tensor]`, *optional*): In place of `pixel_values`;
                there is no future target then.
            **kwargs: `output_hidden_states`, `output_attentions`.

        Raises:
            TypeError: If an argument is not known; the message names the one closest to it.
            ValueError: If a shape does not fit the config; the message names what was expected and what came.
        """
        self._refuse_unknown(kwargs)
        config = self.config
        if style_noise is not None and (actions is None or not config.has_style):
            raise ValueError(
                "style_noise fixes the sample of the action CVAE: give actions, to a model with one."
            )
        if actions is not None and not config.auxiliary_heads:
            raise ValueError("A policy with auxiliary_heads=False acts but does not train: load it whole.")
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
            track_start=track_start if config.has_flow_query else None,
            text_features=text_features,
            vision_features=vision_features,
            goal_features=goal_features,
            **kwargs,
        )
        given = pixel_values if pixel_values is not None else vision_features[0]
        (batch, frames, views), device = given.shape[:3], given.device
        check_targets(
            config,
            (batch, frames, views, 3, config.image_size, config.image_size),
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
        view_mask = _as_bool(view_mask if view_mask.ndim == 3 else view_mask[:, None])
        present = frame_mask[:, :, None] & view_mask  # (B, T, V)

        def tokens(kind: Kind, group: int = 0) -> Tensor:
            """Hidden states of one group, `(B, T, tokens, D)`."""
            positions = layout.positions(kind, group)
            return outputs.last_hidden_state[:, positions].unflatten(1, (frames, -1))

        layout = self.model.layout(frames)
        result = ForesightOutput(
            embeddings=outputs.embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
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
            known = 0
            if pixel_values is not None:
                targets = self._future_targets(
                    pixel_values, depth, present, lookahead_pixel_values, lookahead_depth, lookahead_mask
                )
                known = targets[0].shape[1]
            # In training only the frames that have a target are decoded.
            predicted = known if self.training and known else frames
            future = torch.stack([tokens(Kind.FUTURE, v)[:, :predicted] for v in range(views)], dim=2)
            decoded = [self.image_decoder(future)]
            if "future" in config.objectives:
                decoded.append(self.depth_decoder(future))
            result.future_rgb, result.future_depth = (*decoded, None)[:2]
            if known:
                rgb, deep = (None if x is None else x[:, :known] for x in (*decoded, None)[:2])
                losses["future"] = future_loss(rgb, deep, *targets, config.patch_size)
            else:
                idle += decoded

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
                # The CVAE reads all steps of all frames, as in GR-MG: steps that do not exist are zero, and
                # padded frames hold what the batch says, unless that is no number.
                actions = actions if action_mask is None else masked_target(actions, action_mask[..., None])
                known = frame_mask[:, :, None, None] | actions.isfinite()
                actions = torch.where(known, actions, torch.zeros_like(actions))
            if actions is not None and config.has_style:
                mean, log_var = self.action_encoder(actions.flatten(0, 1).to(self.dtype))
                if self.training and style_noise is None:
                    style_noise = torch.randn_like(mean)
                if style_noise is not None:
                    style = mean + (0.5 * log_var).exp() * style_noise.reshape_as(mean)
                result.style_mean, result.style_log_var = (
                    x.unflatten(0, (batch, frames)) for x in (mean, log_var)
                )
                losses["kl"] = kl_loss(mean, log_var)
            elif self.training and config.has_style:
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
            # A camera that was there in the window is there after it.
            later_present = present.any(1, keepdim=True).expand(-1, later_pixel_values.shape[1], -1)
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
    def predict_action(self, **inputs) -> Tensor:
        """The action chunk of the newest real frame of a whole window, without anything it does not need.

        In training mode dropout acts: call `eval()` first. A robot that acts step by step is faster with
        [`stream`], which encodes new images only.

        Args:
            **inputs: Those of [`ForesightModel.forward`], but `track_start`.

        Returns:
            `torch.Tensor`: float32 `(B, K, A)` normalised; probabilities at the binary entries.
            `ForesightProcessor.decode_actions` turns it into the dataset's units.

        Raises:
            ValueError: If the model was built without the objective `action`, or a shape does not fit.
        """
        return self.decode_newest(**self.model.embed_inputs(**inputs))[0]

    def stream(self, processor: ProcessorMixin, **options) -> ForesightStream:
        """This policy at the controls of a robot, one observation at a time.

        Args:
            processor (`ForesightProcessor`): Its processor.
            **options: `num_envs`, `compile` and others of [`ForesightStream`].
        """
        return ForesightStream(self, processor, **options)

    def decode_newest(self, *, with_progress: bool = False, **embedded) -> tuple[Tensor, Tensor | None]:
        """From embedded inputs to the newest frame's action chunk: the part of control with static shapes.

        Args:
            with_progress (`bool`): Predict the completed share of the instruction as well.
            **embedded: Inputs of [`ForesightModel.read_newest`].

        Returns:
            Actions as [`predict_action`] gives them, float32 `(B, K, A)`, and progress `(B,)` or `None`.

        Raises:
            ValueError: If a head that this needs is off.
        """
        config = self.config
        for objective in ["action", "progress"] if with_progress else ["action"]:
            if not config.has(objective):
                raise ValueError(
                    f"This model has no {objective} head: its objectives are {list(config.objectives)}, "
                    f"auxiliary_heads={config.auxiliary_heads}."
                )
        queries = (Kind.ACTION, Kind.PROGRESS) if with_progress else (Kind.ACTION,)
        hidden = self.model.read_newest(**embedded, queries=queries)  # (B, queries, D)
        style = torch.zeros(len(hidden), config.latent_dim, dtype=hidden.dtype, device=hidden.device)
        actions = self.action_decoder(hidden[:, 0], style)
        for entry in config.binary_action_indices:
            actions[..., entry].sigmoid_()
        return actions, self.progress_decoder(hidden[:, 1]) if with_progress else None


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
