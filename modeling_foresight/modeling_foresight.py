# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""3D Foresight: a policy that predicts depth, future RGB-D and 3D flow along with its actions.

[`ForesightModel`] turns a window of T frames into tokens, adds queries and runs a causal transformer over
them; [`ForesightForActionPrediction`] decodes the queries and computes the losses. Dimension letters: B
batch, T frames, V views, K action chunk, L flow steps, P flow points, r latents per image, N patches, D
width, A action size, S tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .attention_mask import allowed_pairs, build_attention_mask, build_layout, valid_columns
from .base_model import (
    EmbeddedInputs,
    ForesightModelOutput,
    ForesightOutput,
    ForesightPreTrainedModel,
    broken_weights,
)
from .checkpoint_sizes import check_sizes  # noqa: F401
from .configuration_foresight import ForesightConfig

# From the Hub, transformers copies only the files that this one names: it imports every helper.
from .decoders import ActionDecoder  # noqa: F401
from .encoders import (
    ImageProjection,
    PerceiverResampler,
    StateEncoder,
    TextEncoder,
    VisionEncoder,
    load_text_tower,
    load_vision_tower,
    normalize_length,
    vision_width,
)
from .heads import AUXILIARY_DECODERS, AUXILIARY_QUERIES, DECODERS, heads_of, query_groups, query_heads
from .inputs import (
    ForesightBatch,
    ForesightInputs,
    batch_size,
    blank_masked,
    check_inputs,
    check_targets,
    present_views,
    real_frames,
)
from .lora import FROM_LEROBOT, declare_lora_targets
from .losses import LossSum  # noqa: F401
from .robot_stream import RobotStream  # noqa: F401
from .streaming import ForesightStream
from .targets import Target, draw_supervision  # noqa: F401
from .tokens import QUERIES, Kind, TokenLayout
from .transformer import ForesightBlock

logger = logging.get_logger(__name__)

# Weights beyond the trunk, and beyond a policy with `auxiliary_heads=False`. With a timm tower in the model,
# transformers puts `timm_model.` before names that the model lacks.
HEAD_WEIGHTS = rf"^(timm_model\.)?({'|'.join(DECODERS)})\."
INPUTS = tuple(ForesightInputs.__annotations__)
PER_VIEW = ("depth", "future")  # losses that are one mean per view, summed over views
NO_GOAL = (
    "This policy was trained with goal images (config.goal_image) and acts without one: give "
    "goal_pixel_values, or call ForesightStream.set_goal. Otherwise only the instruction guides it."
)
AUXILIARY_WEIGHTS = [
    rf"^(timm_model\.)?({'|'.join(AUXILIARY_DECODERS)})\.",
    rf"^(model\.)?({'|'.join(AUXILIARY_QUERIES)})\.",
]


class ForesightModel(ForesightPreTrainedModel):
    """Encoders, queries and the causal transformer (3D Foresight, Sec. III-A; GR-MG).

    Nothing is downloaded; for pretrained towers see
    [`ForesightForActionPrediction.from_encoder_checkpoints`].
    """

    # The trunk loads from a policy's checkpoint too.
    _keys_to_ignore_on_load_unexpected = [HEAD_WEIGHTS]

    def __init__(self, config: ForesightConfig):
        super().__init__(config)
        width = config.hidden_size
        # The transformer comes first: tools that take the first layer mean this one, not a tower's.
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

        for head in query_heads(config, QUERIES):
            head.add_queries(self)
        if not config.auxiliary_heads:
            self._keys_to_ignore_on_load_unexpected = [HEAD_WEIGHTS, *AUXILIARY_WEIGHTS]
        self._layouts: dict[tuple, tuple[TokenLayout, Tensor, Tensor]] = {}
        self.post_init()
        self.freeze_towers()

    def _frozen_towers(self) -> list[nn.Module]:
        frozen = [self.vision_encoder] if self.config.freeze_vision else []
        frozen += [self.text_encoder] if self.config.freeze_text else []
        return [encoder.tower for encoder in frozen if encoder is not None]

    def freeze_towers(self) -> None:
        """Fixes frozen towers (no gradient, evaluation mode) and layers that never run (no gradient)."""
        for tower in self._frozen_towers():
            tower.requires_grad_(False).eval()
        # timm keeps layers for pooling. They never get a gradient, which DDP would wait for.
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
        """Token embeddings of the text tower."""
        if self.text_encoder is None:  # this error means "there are none" to libraries
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

    def layout(self, num_frames: int) -> TokenLayout:
        """The tokens of [`forward`] for a window of `num_frames`, on the model's device."""
        return self._plan(num_frames, None, QUERIES, self.device)[0]

    def _plan(self, num_frames, query_frames, queries, device) -> tuple[TokenLayout, Tensor, Tensor]:
        """Layout, allowed pairs `(S, S)`, and the order `(S,)` that puts groups into their places."""
        key = (num_frames, query_frames and tuple(query_frames), queries, device)
        if key not in self._layouts:
            # The first call may be in inference mode; training uses the same tensors.
            with torch.inference_mode(False):
                layout = build_layout(self.config, num_frames, query_frames, queries, device)
                # Tokens are computed group by group, then all at once put in the order of the sequence.
                order = torch.cat([layout.positions(*group) for group in self._groups(queries)]).argsort()
                self._layouts[key] = layout, allowed_pairs(self.config, layout), order
        return self._layouts[key]

    def _groups(self, queries: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
        """Groups of tokens in the order in which [`forward`] concatenates them."""
        views = range(len(self.config.views))
        groups = [(Kind.GOAL, 0), (Kind.LANGUAGE, 0), (Kind.STATE, 0), *((Kind.IMAGE, v) for v in views)]
        return groups + [(kind, group) for kind, group, _ in query_groups(self.config, queries)]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Instructions `(B, length)` -> projected features `(B, text width)`."""
        tower = self._tower("text")
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(tower)):
            return self.text_encoder(input_ids, attention_mask)

    def embed_text(self, features: Tensor) -> Tensor:
        """Features of the text tower `(B, text width)`, of any length -> language tokens `(B, D)`."""
        return self.embed_language(normalize_length(features.float()).to(self.dtype))

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(..., 3, H, W)`, each on its own -> CLS `(..., C)` and patch features `(..., N, C)`."""
        lead = pixel_values.shape[:-3]
        self._tower("vision")  # refuses pixels without a tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision_encoder)):
            cls, patches = self.vision_encoder(pixel_values.flatten(0, -4).to(self.dtype))
        return cls.unflatten(0, lead), patches.unflatten(0, lead)

    def embed_images(self, cls: Tensor, patches: Tensor, views: Sequence[int] | None = None) -> Tensor:
        """Features `(B, T, V, C)` and `(B, T, V, N, C)` -> tokens `(B, T, V, r + 1, D)`.

        They depend on the image alone, not on its place in the window: control keeps them. `views` are the
        indices of the V views in the config; all of them by default.
        """
        latents = self.resample_patches(patches)
        views = range(len(self.embed_views)) if views is None else views
        tokens = [self.embed_views[v](latents[:, :, i], cls[:, :, i]) for i, v in enumerate(views)]
        return torch.stack(tokens, dim=2)

    def embed_goal_image(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Features `(B, C)` and `(B, N, C)` of goal images -> tokens `(B, r + 1, D)`."""
        return self.embed_goal(self.resample_patches(patches), cls)

    def resample_patches(self, patches: Tensor) -> Tensor:
        """Patch features `(..., N, C)`, each image on its own -> latents `(..., r, C)`."""
        return self.resampler(patches.flatten(0, -3)).unflatten(0, patches.shape[:-2])

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **inputs: Unpack[ForesightInputs],
    ) -> ForesightModelOutput:
        """Runs the transformer over a window.

        Args:
            pixel_values, input_ids, attention_mask, **inputs: See [`ForesightInputs`], and of the library
                `output_hidden_states`, `output_attentions`.

        Raises:
            TypeError: If an argument is not known; the message names the one closest to it.
            ValueError: If a shape does not fit the config; the message names both.
        """
        inputs |= {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs, options = self._split_options(inputs)
        embedded = self.embed_inputs(**inputs)
        size, device = embedded.images.shape[:2], embedded.images.device
        plan = self._plan(size[1], None, QUERIES, device)
        queries = self._query_tokens(size, QUERIES, inputs, device)
        embeddings, mask = self._place_tokens(embedded, queries, plan)
        x = self.embed_dropout(self.embed_norm(embeddings))
        for layer in self.layers:
            x = layer(x, mask, **options)
        wanted = options.get("output_hidden_states", self.config.output_hidden_states)
        return ForesightModelOutput(last_hidden_state=self.norm(x), embeddings=embeddings if wanted else None)

    def embed_inputs(self, **inputs: Unpack[ForesightInputs]) -> EmbeddedInputs:
        """Checks inputs and encodes all except the flow points."""
        check_inputs(self.config, self.vision_width, inputs)
        given = inputs.get
        vision, text, goal_features = given("vision_features"), given("text_features"), given("goal_features")
        present, real = present_views(self.config, inputs), real_frames(inputs)
        goal_mask = _as_bool(given("goal_mask"))
        if given("pixel_values") is not None:
            vision = self.encode_images(blank_masked(given("pixel_values"), present))
        else:
            vision = [blank_masked(features, present) for features in vision]
        if given("input_ids") is not None:
            text = self.encode_text(given("input_ids"), given("attention_mask"))
        if given("goal_pixel_values") is not None:
            goal_features = self.encode_images(blank_masked(given("goal_pixel_values"), goal_mask))
        elif goal_features is not None:
            goal_features = [blank_masked(features, goal_mask) for features in goal_features]
        images = self.embed_images(*(x.to(self.dtype) for x in vision))
        goal, state = None, given("state")
        if state is not None:
            with_state = _as_bool(given("state_mask"))
            state = blank_masked(state, real if with_state is None else real & with_state[:, None])
        if goal_features is not None:
            goal = self.embed_goal_image(*(x.to(self.dtype) for x in goal_features))
            if self.training and self.config.goal_dropout:
                draw = given("goal_draw")
                draw = torch.rand(len(images), device=images.device) if draw is None else draw
                kept = draw >= self.config.goal_dropout
                goal_mask = kept if goal_mask is None else kept & goal_mask
        return EmbeddedInputs(
            language=self.embed_text(text),
            images=images,
            frame_mask=real,
            goal=goal,
            goal_mask=goal_mask,
            state=state,
            view_mask=given("view_mask"),
            state_mask=given("state_mask"),
        )

    def _place_tokens(
        self, embedded: EmbeddedInputs, queries: list[Tensor], plan: tuple[TokenLayout, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """All tokens `(B, S, D)` in the order of the sequence, placed in time, and their attention mask."""
        config, dtype, device = self.config, self.dtype, embedded.images.device
        (batch, frames), (layout, allowed, order) = embedded.images.shape[:2], plan
        goal, goal_mask = embedded.goal, embedded.goal_mask
        state, state_mask = embedded.state, embedded.state_mask
        timestep = self.embed_timestep(torch.arange(frames, device=device))  # (T, D)
        nothing = torch.zeros(batch, dtype=torch.bool, device=device)
        groups = []
        if config.goal_image:
            if goal is None:  # masked, but its projection is part of the graph of distributed training
                goal_mask = nothing
                empty = torch.zeros(batch, config.num_latents, self.vision_width, dtype=dtype, device=device)
                goal = self.embed_goal(empty, empty[:, 0])
            groups.append(goal)
        groups.append(embedded.language[:, None] + timestep)  # (B, T, D)
        if config.state_dim:
            if state is None:
                state_mask = nothing
                state = torch.zeros(batch, frames, config.state_dim, device=device)
            groups.append(self.embed_state(state.to(dtype)) + timestep)
        tokens = embedded.images + timestep[:, None, None]  # (B, T, V, r + 1, D)
        groups += [tokens[:, :, view].flatten(1, 2) for view in range(len(config.views))]
        x = torch.cat([group.to(dtype) for group in groups + queries], dim=1)[:, order]  # (B, S, D)
        masks = (embedded.frame_mask, embedded.view_mask, state_mask, goal_mask)
        valid = valid_columns(layout, *map(_as_bool, masks))
        return x, build_attention_mask(config, x, allowed, valid)

    def plan_newest(
        self, num_frames: int, device: torch.device, queries: tuple[Kind, ...] = (Kind.ACTION,)
    ) -> tuple[TokenLayout, Tensor, Tensor]:
        """Layout, allowed pairs and order of [`read_newest`]; kept, so that no compiler sees them built."""
        return self._plan(num_frames, [num_frames - 1], (Kind.FLOW, *queries), device)

    def read_newest(self, embedded: EmbeddedInputs, queries: tuple[Kind, ...] = (Kind.ACTION,)) -> Tensor:
        """Final hidden states of the newest frame's queries, from embedded inputs: what control runs.

        Only the newest frame has queries, only those asked for and the FLOW that ACTION reads, and the last
        block runs for the rows that are read. This is exact (method of GR-MG): no token attends to queries of
        past frames, and a query after padded frames sees the same keys as one before them.

        Args:
            embedded (`EmbeddedInputs`): The window.
            queries (`tuple[Kind]`): `ACTION` and `PROGRESS`, in this order.

        Returns:
            `torch.Tensor`: `(B, queries, D)` after the final LayerNorm.
        """
        (batch, frames), device = embedded.images.shape[:2], embedded.images.device
        tokens = self._query_tokens((batch, 1), (Kind.FLOW, *queries), {}, device)
        embeddings, mask = self._place_tokens(embedded, tokens, self.plan_newest(frames, device, queries))
        x = self.embed_norm(embeddings)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        rows = len(queries)  # at the end of the sequence
        if self.config._attn_implementation == "flex_attention":  # its mask cannot be cut
            return self.norm(self.layers[-1](x, mask)[:, -rows:])
        return self.norm(self.layers[-1](x, mask[:, :, -rows:], last_rows=rows))

    def _query_tokens(
        self, size: tuple[int, int], queries: Sequence[Kind], inputs: Mapping, device: torch.device
    ) -> list[Tensor]:
        """Queries group by group, each `(B, frames * tokens, D)`; they get no timestep or position."""
        heads = query_heads(self.config, queries)
        return [group for head in heads for group in head.embed_queries(self, size, inputs, device)]


class ForesightForActionPrediction(ForesightPreTrainedModel):
    """The policy: [`ForesightModel`] with its decoders and losses. This is what `AutoModel` gives."""

    _checkpoint_conversion_mapping = FROM_LEROBOT  # peft's name; adapters that LeRobot saved
    _schema = ForesightBatch

    def __init__(self, config: ForesightConfig):
        super().__init__(config)
        declare_lora_targets()
        self.model = ForesightModel(config)
        for head in heads_of(config):
            head.add_decoders(self)
        if not config.auxiliary_heads:
            self._keys_to_ignore_on_load_unexpected = AUXILIARY_WEIGHTS
        self.post_init()

    @classmethod
    def from_encoder_checkpoints(
        cls,
        config: ForesightConfig,
        text: str | None = None,
        vision: str | None = None,
        text_revision: str | None = None,
        vision_revision: str | None = None,
        **kwargs,
    ) -> "ForesightForActionPrediction":
        """A fresh policy on pretrained towers.

        Args:
            config (`ForesightConfig`): The policy; the checkpoints replace its tower configs.
            text (`str`, *optional*): Folder or Hub id of a CLIP checkpoint, for example
                `openai/clip-vit-base-patch32`.
            vision (`str`, *optional*): Folder or Hub id of an image encoder: MAE's such as
                `timm/vit_base_patch16_224.mae` or a ViTMAE checkpoint (both load into `ViTModel`, which does
                not shuffle patches), a ViT, or any other timm model.
            text_revision, vision_revision (`str`, *optional*): Commit, branch or tag of each on the Hub.
            **kwargs: Passed to `from_pretrained` of both towers, for example `local_files_only`.

        Raises:
            ValueError: If a checkpoint lacks weights of its tower, or a `dtype` is given: the policy is made
                in float32, to be trained.
        """
        if {"dtype", "torch_dtype"} & kwargs.keys():
            raise ValueError(
                "The towers are loaded in float32, to be trained: leave dtype out, and cast the model."
            )
        config = copy.deepcopy(config)
        towers = {}
        if text is not None:
            towers["text"] = load_text_tower(text, **{"revision": text_revision, **kwargs})
        if vision is not None:
            towers["vision"] = load_vision_tower(vision, **{"revision": vision_revision, **kwargs})
        for name, tower in towers.items():
            setattr(config, f"{name}_config", tower.config)
        config.towers = [name for name in ("text", "vision") if name in {*config.towers, *towers}]
        config.validate()
        model = cls(config)
        for name, tower in towers.items():
            getattr(model.model, f"{name}_encoder").tower.load_state_dict(tower.state_dict())
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        loss_counts: dict[str, Tensor] | None = None,
        **batch: Unpack[ForesightBatch],
    ) -> ForesightOutput:
        """Predictions for every frame of the window, and the losses of the targets that are given.

        Args:
            pixel_values, input_ids, attention_mask, **batch: See [`ForesightBatch`], and of the library
                `output_hidden_states`, `output_attentions`.
            loss_counts (`dict[str, torch.Tensor]`, *optional*): Divisor of each loss, in place of the batch's
                own [`count_targets`]. Training that averages gradients over W processes and A accumulated
                parts gives the counts summed over all W * A batches, divided by W * A: then the averaged
                gradient is that of one mean over all their elements. The losses of the output are this
                batch's share, and a batch without any target has the loss zero.

        Raises:
            TypeError: If an argument is not known; the message names the one closest to it.
            ValueError: If a shape does not fit the config; the message names both.
        """
        batch |= {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        batch, options = self._split_options(batch)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        if not self.config.has_flow_query:
            inputs.pop("track_start", None)
        outputs = self.model(**inputs, **options, return_dict=True)
        check_targets(self.config, batch)
        if not self.training:
            batch.pop("supervision_order", None)
        elif batch.get("supervision_order") is None:
            batch |= draw_supervision(self.config, batch)
        frames = batch_size(batch)[1]
        layout = self.model.layout(frames)

        def read(kind: Kind, group: int = 0) -> Tensor:
            """Hidden states of one group, `(B, T, tokens, D)`."""
            return outputs.last_hidden_state[:, layout.positions(kind, group)].unflatten(1, (frames, -1))

        predictions, losses, zeros = {}, {}, []
        for head in heads_of(self.config):
            predicted = head.decode(self, read, batch)
            found = head.loss(self.config, predicted, batch)
            if self.training and not found:
                zeros.append(head.zero_loss(self, predicted))
            predictions |= predicted
            losses |= {name: loss.mean((loss_counts or {}).get(name)) for name, loss in found.items()}
        total = None
        if losses or loss_counts is not None:
            total = sum(getattr(self.config, f"{name}_loss_weight") * loss for name, loss in losses.items())
            # Distributed training waits for a gradient of every parameter.
            total = total + sum(zeros)
        return ForesightOutput(
            loss=total,
            losses={name: loss.detach() for name, loss in losses.items()} or None,
            embeddings=outputs.embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **predictions,
        )

    @torch.no_grad()
    def count_targets(self, batch: Mapping) -> dict[str, Tensor]:
        """Number of elements in each loss of a batch, its divisor; nothing is predicted.

        Sums over processes and accumulated parts go to `forward` as `loss_counts`.

        Args:
            batch (`Mapping`): A [`ForesightBatch`].

        Returns:
            `dict`: float32 per loss of the config's objectives, always all of them: `(V,)` for `depth` and
            `future`, `()` for the others; zero without targets.

        Raises:
            ValueError: If a target does not fit the config; the message names it.
        """
        check_targets(self.config, batch)
        counts = {}
        for head in heads_of(self.config):
            found = head.count(self.config, batch)
            for name in head.losses:
                views = (len(self.config.views),) if name in PER_VIEW else ()
                counts[name] = found.get(name, torch.zeros(views, device=self.device))
        return counts

    @torch.no_grad()
    def predict_action(self, **inputs) -> Tensor:
        """The action chunk of the newest real frame of a whole window; only what it needs is computed.

        Call `eval()` first, or dropout acts. Step by step, [`stream`] is faster: it encodes only new images.

        Args:
            **inputs: [`ForesightInputs`] except `track_start`.

        Returns:
            `torch.Tensor`: float32 `(B, K, A)` normalized; logits at the binary entries.
            `ForesightProcessor.decode_actions` turns it into the dataset's units.

        Raises:
            TypeError: If an input is not known.
            ValueError: If the model was built without the objective `action`, or a shape does not fit; or,
                unless this is compiled, if the actions are not finite: the message names the cause.
        """
        self.require_heads()
        inputs, _ = self._split_options(inputs)
        if inputs.get("goal_pixel_values") is None and inputs.get("goal_features") is None:
            self.warn_without_goal()
        actions = self.decode_newest(self.model.embed_inputs(**inputs))[0]
        # A compiled graph cannot end with an error.
        if not torch.compiler.is_compiling() and not actions.isfinite().all():
            raise ValueError(self.explain_broken_actions(inputs))
        return actions

    def explain_broken_actions(self, inputs: Mapping) -> str:
        """Why actions are not finite, which no robot may get: weights, inputs, or the model's dtype.

        Args:
            inputs (`Mapping`): What the actions were made from, by name; a value may be a tuple of tensors.
        """
        causes = []
        for name, value in inputs.items():
            tensors = value if isinstance(value, tuple) else (value,)
            if any(tensor is not None and not tensor.isfinite().all() for tensor in tensors):
                causes.append(name)
        if broken := broken_weights(self):  # these break what the inputs become, too
            causes = [f"weights that hold NaN or infinity ({broken})"]
        cause = ", ".join(causes) or f"numbers too large for {self.dtype}: use bfloat16 or float32"
        return f"The actions would be NaN or infinite, because of {cause}. Nothing is returned."

    def warn_without_goal(self) -> None:
        """Warns, once per process, that a policy trained with goal images acts without one."""
        if self.config.goal_image:
            logger.warning_once(NO_GOAL)

    def stream(self, processor: ProcessorMixin, **options) -> ForesightStream:
        """Controls a robot with this policy, one observation at a time.

        Args:
            processor (`ForesightProcessor`): Its processor.
            **options: `num_envs`, `embodiment`, `compile` and others of [`ForesightStream`].
        """
        return ForesightStream(self, processor, **options)

    def require_heads(self, with_progress: bool = False) -> None:
        """Refuses to act without the action head, or without the progress head where it is asked for."""
        for objective in ["action", "progress"] if with_progress else ["action"]:
            if not self.config.has(objective):
                raise ValueError(
                    f"This model has no {objective} head: its objectives are {list(self.config.objectives)}, "
                    f"auxiliary_heads={self.config.auxiliary_heads}."
                )

    def decode_newest(
        self, embedded: EmbeddedInputs, with_progress: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """From embedded inputs to the newest frame's action chunk: the part of control with static shapes.

        Args:
            embedded (`EmbeddedInputs`): The window.
            with_progress (`bool`): Predict the completed share of the instruction as well.

        Returns:
            Actions as [`predict_action`] gives them, float32 `(B, K, A)`, and progress `(B,)` or `None`.
        """
        queries = (Kind.ACTION, Kind.PROGRESS) if with_progress else (Kind.ACTION,)
        hidden = self.model.read_newest(embedded, queries)  # (B, queries, D)
        style = torch.zeros(hidden.shape[0], self.config.latent_dim, dtype=hidden.dtype, device=hidden.device)
        actions = self.action_decoder(hidden[:, 0], style)
        return actions, self.progress_decoder(hidden[:, 1]) if with_progress else None


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
