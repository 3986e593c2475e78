# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""What the model classes share: their outputs, loading, and initialization."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, TransformersKwargs, find_adapter_config_file

from .checkpoint_sizes import SOURCE_OPTIONS, check_sizes, read_shapes
from .configuration_foresight import ForesightConfig
from .decoders import FlowDecoder, PatchDecoder
from .encoders import PerceiverResampler, SpatialReadout, sincos_2d, tower_attention
from .inputs import ForesightInputs
from .transformer import ForesightAttention, ForesightBlock

LISTED_NAMES = 8  # before "and 3 more"
LIBRARY_ARGUMENTS = frozenset(TransformersKwargs.__annotations__)


class EmbeddedInputs(NamedTuple):
    """A window that is encoded, before its tokens are placed in time. `state` and masks: [`ForesightInputs`].

    Attributes:
        language: `(B, D)` from [`ForesightModel.embed_text`].
        images: `(B, T, V, r + 1, D)` from [`ForesightModel.embed_images`].
        goal: `(B, r + 1, D)` from [`ForesightModel.embed_goal_image`].
    """

    language: Tensor
    images: Tensor
    frame_mask: Tensor
    goal: Tensor | None = None
    state: Tensor | None = None
    view_mask: Tensor | None = None
    state_mask: Tensor | None = None
    goal_mask: Tensor | None = None


@dataclass
class ForesightModelOutput(ModelOutput):
    """Output of [`ForesightModel`].

    Attributes:
        last_hidden_state: `(B, S, D)` after the final LayerNorm, in the order of [`ForesightModel.layout`].
        embeddings: `(B, S, D)` all tokens before the embedding LayerNorm, with `output_hidden_states`.
        hidden_states: `(B, S, D)` after the embedding LayerNorm and dropout, then after every block (the last
            one before the final LayerNorm).
        attentions: One `(B, heads, S, S)` per layer (eager attention).
    """

    last_hidden_state: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ForesightOutput(ModelOutput):
    """Output of [`ForesightForActionPrediction`]. Fields of heads that are off are `None`.

    Attributes:
        loss: Weighted sum of all losses whose targets were given.
        losses: The losses by name, unweighted and detached.
        actions: float32 `(B, T, K, A)` normalized; logits at `config.binary_action_indices`.
        style_mean, style_log_var: float32 `(B, T, latent)` of the action CVAE, if actions were given.
        depth: `(B, T, V, N, patch_size**2)` current depth, normalized per patch.
        depth_scale: float32 `(B, T, V, N, 2)` mean of log depth (meters) of a patch and log of its deviation,
            with `depth_form="metric"`.
        predicted_depth: float32 `(B, T, V, H, W)` current depth in meters, with `depth_form="metric"` and not
            in training mode.
        future_rgb: `(B, T', V, N, patch_size**2 * 3)` RGB `future_shift` frames ahead, normalized per patch.
            T' is T, or fewer where the batch holds no target for the newest frames.
        future_depth: `(B, T', V, N, patch_size**2)` depth `future_shift` frames ahead, normalized per patch.
        future_depth_scale, predicted_future_depth: Of future depth, as those of current depth.
        flow: float32 `(B, T, L, P, 3)` x, y as fractions of the flow view, z in meters; without z for
            `flow_2d`.
        progress: float32 `(B, T)` in [0, 1].
        embeddings, hidden_states, attentions: See [`ForesightModelOutput`].
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    actions: Tensor | None = None
    style_mean: Tensor | None = None
    style_log_var: Tensor | None = None
    depth: Tensor | None = None
    depth_scale: Tensor | None = None
    predicted_depth: Tensor | None = None
    future_rgb: Tensor | None = None
    future_depth: Tensor | None = None
    future_depth_scale: Tensor | None = None
    predicted_future_depth: Tensor | None = None
    flow: Tensor | None = None
    progress: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def adapter_message(name) -> str:
    """How to load an adapter."""
    return (
        f"{name} is an adapter, of which transformers would load only a part. Load it with peft: "
        "PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), ADAPTER), where BASE is the "
        "base_model_name_or_path in its adapter_config.json."
    )


def list_names(names: Sequence[str]) -> str:
    """The first few of many names: `a, b and 3 more`; empty without any."""
    shown = ", ".join(names[:LISTED_NAMES])
    return shown + (f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else "")


def broken_weights(model: nn.Module) -> str:
    """Names of weights and buffers that hold NaN or infinity; empty without any."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    return list_names(sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()))


def refuse_broken_weights(model: nn.Module, source) -> None:
    """Refuses a checkpoint with weights that would turn every action into NaN.

    Raises:
        ValueError: The message names them.
    """
    if broken := broken_weights(model):
        raise ValueError(
            f"{source} cannot be used, the weights are not finite in {broken}: take an earlier checkpoint, "
            "or train again. Weights that are too large for float16 load in bfloat16 or float32."
        )


class ForesightPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization shared by the two model classes."""

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
    _schema: type = ForesightInputs  # what `forward` takes
    _can_record_outputs = {"hidden_states": ForesightBlock, "attentions": ForesightAttention}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        strict: bool = True,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in `transformers`, but a checkpoint that does not fit is refused.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id.
            *args, **kwargs: As in `transformers`; fields of the config too, such as `auxiliary_heads=False`.
            strict (`bool`): Refuse a checkpoint that lacks weights of the model or holds others. Without it
                missing weights start fresh, as in `transformers`.
            output_loading_info (`bool`): Return what was missing and unexpected as well, and allow it.

        Raises:
            ValueError: If weights are missing, unexpected, of other sizes (unless `ignore_mismatched_sizes`),
                unreadable or not finite, which the message names; if the config describes a much larger
                model; if it is an adapter; or if parts were left on disk.
        """
        resize = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        try:
            if kwargs.get("state_dict") is None:
                cls.check_checkpoint(pretrained_model_name_or_path, strict=strict, **kwargs)
            model, report = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with their names
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} cannot be read ({error}): a file is "
                "truncated or not a safetensors file. Copy or download it again."
            ) from error
        except OSError as error:  # no weights; an adapter of LeRobot has a config.json too
            if find_adapter_config_file(str(pretrained_model_name_or_path), revision=kwargs.get("revision")):
                raise ValueError(adapter_message(pretrained_model_name_or_path)) from error
            raise
        wrong = {}
        if not resize:
            wrong["has weights of other sizes than"] = [
                f"{name} {tuple(found)} where {tuple(expected)} is expected"
                for name, found, expected in report["mismatched_keys"]
            ]
        if strict and not output_loading_info and not resize:
            wrong["lacks weights of"] = report["missing_keys"]
            wrong["holds weights that are not in"] = report["unexpected_keys"]
        for what, names in wrong.items():
            if names:
                raise ValueError(
                    f"The checkpoint {pretrained_model_name_or_path} {what} this {cls.__name__}: "
                    f"{list_names(sorted(names))}. "
                    "Its config.json and weights must belong together; strict=False loads what is there, "
                    "ignore_mismatched_sizes=True what fits."
                )
        refuse_broken_weights(model, pretrained_model_name_or_path)
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "Parts of the model do not fit and were left on disk, where its fixed tables would be lost: "
                "give a device_map of devices with enough memory, or dtype=torch.bfloat16."
            )
        if cls._auto_class is None:
            # Code that came with the checkpoint was not used: what is saved from here does not name it.
            vars(model.config).pop("auto_map", None)
        for module in model.modules():
            if hasattr(module, "freeze_towers"):
                module.freeze_towers()  # loading makes every weight trainable
        return (model, report) if output_loading_info else model

    @classmethod
    def check_checkpoint(
        cls, source, config: ForesightConfig | None = None, strict: bool = True, **options
    ) -> None:
        """Refuses a config that describes a much larger model than the weights beside it; allocates nothing.

        Args:
            source (`str` or `Path`): Folder or Hub id.
            config (`ForesightConfig`, *optional*): In place of the one there.
            strict (`bool`): As in [`from_pretrained`].
            **options: Of [`from_pretrained`].
        """
        if shapes := read_shapes(source, options):
            if not isinstance(config, PreTrainedConfig):  # a published class may be loaded twice
                found = {name: options[name] for name in SOURCE_OPTIONS if name in options}
                fields = {name: options[name] for name in ForesightConfig.__annotations__ if name in options}
                config = ForesightConfig.from_pretrained(config or source, **found, **fields)
            check_sizes(cls, config, shapes, source, strict)

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """Refused: `transformers` leaves out modules that an adapter holds in full, almost silently.

        `AutoModel.from_pretrained(ADAPTER)` comes here too.
        """
        raise ValueError(adapter_message(peft_model_id or "This"))

    def post_init(self):
        """Ends construction."""
        super().post_init()
        self._choose_attention_kernels()

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As in `transformers`: `sdpa`, `eager` or `flex_attention`, for the whole model."""
        if isinstance(attn_implementation, str):
            towers = ("text_config", "vision_config")
            parts = {
                name: tower_attention(getattr(self.config, name), attn_implementation) for name in towers
            }
            attn_implementation = {"": attn_implementation, **parts}
        super().set_attn_implementation(attn_implementation, **kwargs)
        self._choose_attention_kernels()

    def _choose_attention_kernels(self) -> None:
        """Sets the kernels of the parts that do not ask the library: the resampler and timm's blocks."""
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                by_default = module.__dict__.setdefault("_fused_by_default", module.fused_attn)
                module.fused_attn = by_default and self.config._attn_implementation != "eager"

    def _split_options(self, given: dict) -> tuple[dict, dict]:
        """Splits arguments into a batch and options of the library; refuses others (misspelled masks)."""
        known = self._schema.__annotations__
        options = {name: value for name, value in given.items() if name in LIBRARY_ARGUMENTS}
        batch = {name: value for name, value in given.items() if name in known}
        if unknown := [name for name in given if name not in options and name not in batch]:
            near = get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}."
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}: {hint}")
        return batch, options

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GR-MG's initialization: the transformer as GPT-2, everything else as PyTorch does.

        Only leaves are set: since transformers 5.13 a module whose parameters all belong to its children is
        never passed here. Other linear layers are marked (`start_normal`). Every bare parameter and every
        buffer is set too, because `from_pretrained` starts from empty memory.
        """
        config = self.config
        if isinstance(module, nn.Linear):
            if (std := getattr(module, "init_std", None)) is None:
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    init.uniform_(module.bias, -bound, bound)
            else:
                init.normal_(module.weight, std=std)
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.embedding_initializer_range)
        else:
            super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents, std=config.embedding_initializer_range)
            init.normal_(module.media_pos_emb, std=config.embedding_initializer_range)
        elif isinstance(module, SpatialReadout):
            init.normal_(module.maps, std=module.maps.shape[1] ** -0.5)
        elif isinstance(module, PatchDecoder | FlowDecoder):
            init.zeros_(module.mask_token)
            if isinstance(module, PatchDecoder):
                init.copy_(module.positions, sincos_2d(module.side, module.side, module.width)[None])
