# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Configuration of 3D Foresight: sizes, views, objectives and loss weights."""

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPTextConfig, PreTrainedConfig, ViTConfig
from transformers.activations import ACT2FN

OBJECTIVES = ("action", "depth", "future", "future_rgb", "flow", "flow_2d", "progress")
# Objectives that are a smaller form of another one: same head and tokens, fewer outputs.
FAMILIES = {"future_rgb": "future", "flow_2d": "flow"}

# What the variants share: goal images, and states and actions as GR-MG has them on CALVIN.
_CALVIN = {"goal_image": True, "state_representation": "relative", "action_codec": "local_delta"}
_SEES_STATE = {"future_sees_state": True}
_FORESIGHT = ("action", "depth", "future", "flow", "progress")
# Pretraining on video of any embodiment: one camera, neither proprioception nor actions nor progress.
_VIDEO = {"views": ("main",), "state_dim": 0, "binary_state_indices": (), "goal_image": True}

# The method, its baselines and its ablations, at the paper's size.
PRESETS = {
    "gr1": {"objectives": ("action", "future_rgb"), "action_head": "linear", "chunk_size": 1, **_SEES_STATE},
    "grmg": {**_CALVIN, "objectives": ("action", "future_rgb", "progress"), **_SEES_STATE},
    "foresight_2d": {**_CALVIN, "objectives": ("action", "future_rgb", "flow_2d", "progress")},
    "foresight_3d": {**_CALVIN, "objectives": _FORESIGHT},
    # Not the paper's: flow whose motion is learned. Nearly all of the squared error of absolute z is depth at
    # the start, so `foresight_3d` hardly learns motion in depth: after 600 quickstart steps it is 5 % better
    # than zero motion on held-out moving points, this form 58 % or more, with the same error of the action.
    "foresight_3d_displacement": {
        **_CALVIN,
        "objectives": _FORESIGHT,
        "flow_form": "displacement",
        "flow_loss_weight": 0.03,
    },
    # Not the paper's: two more numbers per patch, with which predicted depth is in meters.
    "foresight_3d_metric": {**_CALVIN, "objectives": _FORESIGHT, "depth_form": "metric"},
    "no_depth": {**_CALVIN, "objectives": ("action", "future", "flow", "progress")},
    "no_future": {**_CALVIN, "objectives": ("action", "depth", "flow", "progress")},
    "no_flow": {**_CALVIN, "objectives": ("action", "depth", "future", "progress")},
    "grmg_pretrain": {**_VIDEO, "objectives": ("future_rgb",), **_SEES_STATE, "future_loss_weight": 1.0},
    "foresight_3d_pretrain": {**_VIDEO, "objectives": ("depth", "future", "flow")},
}

# Fields that the processor has too; both must agree.
PROCESSOR_FIELDS = ("views", "image_size", "image_mean", "image_std", "binary_action_indices")
PROCESSOR_FIELDS += ("binary_state_indices", "action_codec", "state_representation", "embodiments")

# Fields that name one of several options.
CHOICES = {
    "depth_form": ("normalized", "metric"),
    "flow_form": ("absolute", "displacement"),
    "future_targets": ("window", "lookahead"),
    "within_frame": ("causal", "full"),
    "action_loss": ("smooth_l1", "l1"),
    "action_head": ("cvae", "linear"),
    "action_codec": ("recorded", "local_delta"),
    "state_representation": ("absolute", "relative"),
}
_SIZES = """
image_size patch_size history_length future_shift chunk_size flow_length action_dim num_latents
num_flow_queries num_attention_heads decoder_heads action_num_heads hidden_size latent_dim num_hidden_layers
intermediate_size action_hidden_size resampler_heads resampler_head_dim resampler_ff_mult
resampler_depth decoder_depth action_encoder_depth action_decoder_depth progress_decoder_depth
"""
POSITIVE = frozenset(_SIZES.split())
# A config.json comes from anybody. Larger numbers exhaust memory before any weight is compared with them.
LARGEST_SIZE = 2**20
EMBODIMENT = r"[\w-]+"  # a robot's name
MISSPELLED = 0.8  # likeness of two names above which one is taken for the other, see difflib
# Arguments of `timm.create_model` that a vision_config may hold. All others are refused: some name a file or
# a repo, which timm reads, or unpickles.
_ARGUMENTS = """
aa_layer act_layer attn_drop_rate base_width bn_eps bn_momentum bottleneck_ratio cardinality channels
class_token conv_mlp depth depths dims drop_block_rate drop_path_rate drop_rate dynamic_img_pad
dynamic_img_size embed_dim features_only fc_norm global_pool img_size in_chans init_values layers mlp_ratio
no_embed_class norm_layer num_heads out_indices output_stride patch_size pos_embed pre_norm proj_drop_rate
qk_norm qkv_bias reg_tokens stem_type stem_width strict_img_size weight_init window_size
"""
TIMM_ARGUMENTS = tuple(_ARGUMENTS.split())
# Fields by which a tower's config would name code, files or repos for the library.
SOURCE_FIELDS = ("auto_map", "backbone", "backbone_kwargs", "transformers_weights", "trust_remote_code")
SOURCE_FIELDS += ("use_pretrained_backbone",)
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST_IMAGE = 2**13
MOST_VIEWS = 1000


def check_image_statistics(mean, std) -> None:
    """Refuses a mean or deviation of RGB that would turn images into NaN or into other colors."""
    for name, values in (("image_mean", mean), ("image_std", std)):
        valid = isinstance(values, list | tuple) and len(values) == 3
        valid = valid and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not valid or (name == "image_std" and min(values) <= 0):
            above = " above 0" if name == "image_std" else ""
            raise ValueError(f"{name}={values} must be three finite numbers{above}, one per color.")


def check_views(views) -> None:
    """Refuses views that are not names of cameras, each once."""
    if isinstance(views, str) or not all(isinstance(view, str) for view in views):
        raise ValueError(f"views={views!r} must be a list of names of cameras.")
    if len(views) > MOST_VIEWS:
        raise ValueError(f"views names {len(views)} cameras; expected at most {MOST_VIEWS}.")
    if not views or len(set(views)) != len(views):
        raise ValueError(f"views={list(views)} must name at least one camera, each once.")


def check_binary_entries(name: str, entries, size_name: str, size: int | None) -> None:
    """Refuses binary entries beyond an action or a state of `size` entries, if it is known and has any."""
    if len(set(entries)) < len(entries):
        raise ValueError(f"{name}={list(entries)} must name each entry once.")
    if any(not 0 <= entry < (size or math.inf) for entry in entries):
        raise ValueError(f"{name}={list(entries)} exceeds {size_name}={size}.")


@contextmanager
def explain_config_errors(source) -> Iterator[None]:
    """One line where classes of the library stumble over a config, such as one of 0 heads."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"No model can be made from the config.json{source}: {type(error).__name__}: "
            f"{str(error)[:200]}. Copy or download it again."
        ) from error


def refuse_sources(fields: dict, prefix: str = "") -> None:
    """Refuses fields by which a JSON file would name code, files or repos for the library to open."""
    for name, value in fields.items():
        if name in SOURCE_FIELDS and value:
            raise ValueError(
                f"{prefix}{name}={value!r} names code or weights that would be opened: leave it out."
            )
        if isinstance(value, dict):
            refuse_sources(value, f"{prefix}{name}.")


def _refuse_misspelled(what: str, given: Iterable[str], kind: type[PreTrainedConfig]) -> None:
    """Refuses names close to a field's, whose default would be trained; the library keeps all others."""
    known = set(kind.__annotations__)
    for name in given:
        if name in known or name == "embodiment" or hasattr(PreTrainedConfig, name):  # LeRobot's
            continue
        if near := get_close_matches(name, known, 1, MISSPELLED):
            raise ValueError(f"{what} has no field {name!r}: did you mean {near[0]!r}?")


def _check_sizes(prefix: str, fields) -> None:
    """Refuses whole numbers that no model has, in fields of a config and in what they hold."""
    if isinstance(fields, PreTrainedConfig):
        return  # made already
    for name, value in fields.items() if isinstance(fields, dict) else enumerate(fields or ()):
        if isinstance(value, int) and value > LARGEST_SIZE:
            raise ValueError(f"{prefix}{name}={value} is more than any model has ({LARGEST_SIZE} at most).")
        if isinstance(value, dict | list | tuple):
            _check_sizes(f"{prefix}{name}.", value)


@strict
class ForesightConfig(PreTrainedConfig):
    r"""Configuration of [`ForesightModel`] and [`ForesightForActionPrediction`].

    The defaults are the size of the 3D Foresight paper: a CLIP ViT-B/32 text tower and a MAE ViT-B/16 vision
    tower, both frozen, under a 12-layer GPT of width 384.

    Args:
        text_config (`CLIPTextConfig` or `dict`, *optional*): Text tower; built as
            `CLIPTextModelWithProjection`.
        vision_config (`PreTrainedConfig` or `dict`, *optional*): Vision tower: a `ViTConfig` (MAE weights
            load into it), a `TimmWrapperConfig` (any timm ViT, or a convolutional network whose last feature
            map serves as patches), or any other config that `AutoModel` builds into an image encoder.
        towers (`list[str]`): Towers that are part of the model, of `text` and `vision`. Without one,
            `text_features` or `vision_features` must be given in place of its input.
        freeze_text, freeze_vision (`bool`): Keep the tower fixed and in evaluation mode.
        views (`list[str]`): Camera names in token order; the first one is the flow view.
        image_size (`int`): Side in pixels of the square images that enter the vision tower.
        patch_size (`int`): Side in pixels of the patches that the image and depth decoders predict.
        image_mean, image_std (`list[float]`): Per-channel normalization of RGB in [0, 1]. Future RGB targets
            are taken from the normalized images.
        history_length (`int`): T, frames in the window.
        future_shift (`int`): S, frames between an observation and its future target.
        future_targets (`str`): `"window"` takes future targets inside the window only (GR-MG); `"lookahead"`
            asks the loader for S more frames after it.
        depth_form (`str`): `"normalized"`: current and future depth normalized per patch, of unknown scale
            (paper); `"metric"`: the mean and deviation of log depth of every patch as well, and so depth in
            meters (`predicted_depth` and `predicted_future_depth` of the output).
        chunk_size (`int`): K, actions predicted per frame.
        flow_length (`int`): L, steps of each point trajectory; step 0 is the current frame.
        flow_grid (`list[int]`): Rows and columns of the grid of flow points; P is their product.
        num_flow_queries (`int`): Learned vectors in the FLOW query.
        flow_form (`str`): `"absolute"`: x, y and z of every step, with one squared error (paper);
            `"displacement"`: the depth at the start and the displacement since as two outputs, each with an
            error in units of its size. The flow of the output is absolute either way. The second learns
            motion, the first mostly the depth at the start; it wants a smaller `flow_loss_weight`.
        flow_xy_residual (`bool`): In the absolute form, predict x, y as offsets from the start.
        flow_scales (`list[float]`): In the displacement form, typical sizes of what is unknown: depth at the
            start (meters), displacement within `flow_length` steps (image fractions and meters).
        objectives (`list[str]`): Any of `action`, `depth` (current depth), `future` (future RGB-D) or
            `future_rgb` (without depth), `flow` (3D flow) or `flow_2d` (x and y only), and `progress`. A head
            that is off has no parameters and no tokens.
        auxiliary_heads (`bool`): False leaves out everything that the action does not need: a policy that
            acts but does not train. Give it to `from_pretrained`.
        goal_image (`bool`): Whether a goal image may stand before the first frame.
        goal_dropout (`float`): Share of training samples whose goal image is hidden, so that the policy also
            acts without one. In [0, 1); only meaningful with `goal_image`.
        hidden_size (`int`): d, width of the transformer.
        num_hidden_layers, num_attention_heads, intermediate_size (`int`): Shape of the transformer.
        hidden_act (`str`): Activation of the transformer's feed-forward part (GR-MG: ReLU).
        embd_pdrop, attention_dropout, resid_pdrop (`float`): Dropout on embedded tokens, attention weights
            and both residual branches.
        layer_norm_eps (`float`): Epsilon of every LayerNorm outside the two towers.
        initializer_range (`float`): Standard deviation of the transformer's initial weights.
        embedding_initializer_range (`float`): Standard deviation of initial queries, timesteps, latents and
            other learned tokens. GR-MG's 1 suits pretrained towers; a fresh tower learns much faster with
            0.02, when these constants do not hide its features.
        within_frame (`str`): `"causal"`: tokens of one image see earlier ones only (GR-MG); `"full"`: all of
            them.
        vision_sees_state (`bool`): Whether language and image tokens see proprioception (GR-MG).
        future_sees_state (`bool`): Whether future queries see proprioception (GR-MG: yes, paper: no).
        action_sees_flow (`bool`): Whether the action query sees the flow queries of its frame.
        num_latents (`int`): r, latents per image after the perceiver resampler. One image is r + 1 tokens.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_ff_mult (`int`): Shape of the
            resampler.
        decoder_depth, decoder_heads (`int`): Blocks and heads of the image, depth and flow decoders.
        action_head (`str`): `"cvae"`: chunks decoded from a query and a style (GR-MG, ACT); `"linear"`: one
            action per frame through three linear maps without activations (GR-1).
        action_dim (`int`): A, size of one action.
        binary_action_indices (`list[int]`): Entries of the action that are 0/1 (gripper); learned with BCE.
        state_dim (`int`): Size of the proprioceptive state; 0 for none.
        binary_state_indices (`list[int]`): Entries of the state that are 0/1; enter one-hot.
        embodiments (`dict[str, dict[str, list[int]]]`, *optional*): Robots that share the policy, by name:
            for `action` and for `state` the places that their entries, in order, take in the model's. The
            other places are zero for this robot and no loss counts them. By default there is one robot,
            which has them all.
        action_hidden_size (`int`): Width of the action encoder and decoder and of the progress decoder.
        action_encoder_hidden_size (`int`, *optional*): Width of the action encoder, if it differs.
        action_encoder_depth, action_decoder_depth, progress_decoder_depth (`int`): Their numbers of blocks.
        action_num_heads (`int`): Their attention heads.
        latent_dim (`int`): Size of the action CVAE's latent.
        action_loss (`str`): `"smooth_l1"` (beta 1, as published) or `"l1"`.
        action_loss_weight, gripper_loss_weight, depth_loss_weight, future_loss_weight, flow_loss_weight,
        kl_loss_weight, progress_loss_weight (`float`): Loss weights; alpha, beta, gamma, delta of the paper
            are the gripper, depth, future and flow weights.
        depth_scale_loss_weight, future_depth_scale_loss_weight (`float`): Loss weights of what `depth_form`
            `"metric"` adds. Large ones cost accuracy within patches: the decoder is shared.
        supervised_share (`float`): Share of each view's images whose depth and future are decoded and
            supervised in a training step, drawn at random: these decoders are most of a step. In (0, 1];
            evaluation decodes all images.
        fps (`float`, *optional*): Control steps per second of the training data.
        action_codec (`str`): What an action means: `"recorded"` commands as stored, or `"local_delta"`, the
            scaled change of the measured pose in the gripper's own frame (CALVIN, GR-MG).
        state_representation (`str`): `"absolute"`: normalized by dataset statistics; `"relative"`: entries 0
            to 5 are a pose (x, y, z in meters, roll, pitch, yaw in radians) relative to the window's first.

    Raises:
        StrictDataclassClassValidationError: If fields contradict each other; the message names them. (The
            library wraps every `ValueError` of a config's checks in this one, which is not a `ValueError`.)
    """

    model_type = "foresight"
    sub_configs = {"text_config": CLIPTextConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    towers: list[str] | tuple[str, ...] = ("text", "vision")
    freeze_text: bool = True
    freeze_vision: bool = True

    views: list[str] | tuple[str, ...] = ("main", "wrist")
    image_size: int = 224
    patch_size: int = 16
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    history_length: int = 10
    future_shift: int = 3
    future_targets: str = "window"
    depth_form: str = "normalized"
    chunk_size: int = 5
    flow_length: int = 6
    flow_grid: list[int] | tuple[int, ...] = (14, 14)
    num_flow_queries: int = 10
    flow_xy_residual: bool = True
    flow_form: str = "absolute"
    flow_scales: list[float] | tuple[float, ...] = (0.3, 0.03)
    objectives: list[str] | tuple[str, ...] = _FORESIGHT
    auxiliary_heads: bool = True
    goal_image: bool = False
    goal_dropout: int | float = 0.1

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    hidden_act: str = "relu"
    embd_pdrop: int | float = 0.1
    attention_dropout: int | float = 0.1
    resid_pdrop: int | float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_initializer_range: float = 1.0

    within_frame: str = "causal"
    vision_sees_state: bool = True
    future_sees_state: bool = False
    action_sees_flow: bool = True

    num_latents: int = 9
    resampler_depth: int = 3
    resampler_heads: int = 4
    resampler_head_dim: int = 128
    resampler_ff_mult: int = 4

    decoder_depth: int = 2
    decoder_heads: int = 16

    action_head: str = "cvae"
    action_dim: int = 7
    binary_action_indices: list[int] | tuple[int, ...] = (6,)
    state_dim: int = 7
    binary_state_indices: list[int] | tuple[int, ...] = (6,)
    embodiments: dict[str, dict[str, list[int]]] | None = None
    action_hidden_size: int = 128
    action_encoder_hidden_size: int | None = None
    action_encoder_depth: int = 4
    action_decoder_depth: int = 4
    progress_decoder_depth: int = 2
    action_num_heads: int = 8
    latent_dim: int = 32

    action_loss: str = "smooth_l1"
    action_loss_weight: int | float = 1.0
    gripper_loss_weight: int | float = 0.01
    depth_loss_weight: int | float = 0.05
    future_loss_weight: int | float = 0.1
    flow_loss_weight: int | float = 0.1
    kl_loss_weight: int | float = 1.0
    progress_loss_weight: int | float = 1.0
    depth_scale_loss_weight: int | float = 0.01
    future_depth_scale_loss_weight: int | float = 0.01
    supervised_share: int | float = 1.0

    fps: int | float | None = None
    action_codec: str = "recorded"
    state_representation: str = "absolute"

    def __post_init__(self, **kwargs):
        _refuse_misspelled("ForesightConfig", kwargs, ForesightConfig)
        _check_sizes("", {"num_labels": kwargs.get("num_labels")})  # a label is made for each of them
        refuse_sources({name: kwargs.get(name) for name in SOURCE_FIELDS if name != "auto_map"})
        for prefix, fields in (
            ("", self),
            ("text_config.", self.text_config),
            ("vision_config.", self.vision_config),
        ):
            fields = fields if isinstance(fields, dict) else {"dtype": getattr(fields, "dtype", None)}
            _check_sizes(prefix, fields)
            if fields.get("dtype") not in (None, *DTYPES) and isinstance(fields["dtype"], str):
                raise ValueError(f"{prefix}dtype={fields['dtype']!r} is unknown; choose one of {DTYPES}.")
        if self.text_config is None:
            self.text_config = CLIPTextConfig(projection_dim=512, eos_token_id=49407, bos_token_id=49406)
        elif isinstance(self.text_config, dict):
            kind = self.text_config.get("model_type", CLIPTextConfig.model_type)
            if kind != CLIPTextConfig.model_type:
                raise ValueError(
                    f"text_config.model_type={kind!r} is not that of CLIP's text tower "
                    f"({CLIPTextConfig.model_type!r}), the only one that is supported."
                )
            _refuse_misspelled("text_config", self.text_config, CLIPTextConfig)
            self.text_config = CLIPTextConfig(**self.text_config)
        if self.vision_config is None:
            # The MAE ViT-B/16 of GR-MG: its LayerNorm epsilon is 1e-6 where `ViTConfig` has 1e-12.
            self.vision_config = ViTConfig(image_size=self.image_size, patch_size=16, layer_norm_eps=1e-6)
        elif isinstance(self.vision_config, dict):
            fields = dict(self.vision_config)
            kind = fields.pop("model_type", "vit")
            if str(kind) not in CONFIG_MAPPING:  # JSON may hold a list
                raise ValueError(
                    f"vision_config.model_type={kind!r} is unknown to the installed transformers."
                )
            config_class = CONFIG_MAPPING[kind]
            _refuse_misspelled("vision_config", fields, config_class)
            # A saved TimmWrapperConfig restores its labels in `from_dict`, which fails on one without any.
            saved = "label_names" in fields
            self.vision_config = config_class.from_dict(fields) if saved else config_class(**fields)
        # JSON gives lists back; a config equals itself after saving and loading.
        for name, value in list(vars(self).items()):
            if isinstance(value, tuple):
                setattr(self, name, list(value))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ForesightConfig":
        """The config of a variant of the method (a name in `PRESETS`), at the paper's size unless overridden.

        `foresight_3d` is the paper's; `foresight_3d_displacement` has a form of flow that learns motion in
        depth. All except `gr1` and the pretrainings have states and actions in CALVIN's form;
        `state_representation="absolute"` and `action_codec="recorded"` suit any other robot.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {list(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in `transformers`, but refuses another model's config and overrides that contradict it."""
        kind = config_dict.get("model_type")
        if kind != cls.model_type:
            raise ValueError(
                f"Expected the config.json of a {cls.model_type!r} model, got "
                + (f"that of a {kind!r} model." if kind else "none with a model_type: is the file missing?")
            )
        with explain_config_errors(""):
            loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with the keywords it did not use
        config.validate()
        return loaded

    def has(self, objective: str) -> bool:
        """Whether the head of `objective` exists; `future` and `flow` stand for their smaller forms too."""
        if objective != "action" and not self.auxiliary_heads:
            return False
        return objective in self.objectives or objective in (FAMILIES.get(o) for o in self.objectives)

    @property
    def has_flow_query(self) -> bool:
        """Whether there are FLOW tokens: for the flow decoder, or because the action query reads them."""
        wanted = {"flow", "flow_2d"} & set(self.objectives)
        return bool(wanted) and (self.auxiliary_heads or (self.has("action") and self.action_sees_flow))

    @property
    def has_depth_decoder(self) -> bool:
        """Whether current or future depth is predicted."""
        return self.auxiliary_heads and bool({"depth", "future"} & set(self.objectives))

    @property
    def has_style(self) -> bool:
        """Whether actions have the CVAE's encoder, which training needs."""
        return self.has("action") and self.action_head == "cvae" and self.auxiliary_heads

    @property
    def flow_dim(self) -> int:
        """Coordinates of a flow point: 3 (x, y, z) or 2 (x, y)."""
        return 2 if "flow_2d" in self.objectives else 3

    @property
    def num_flow_points(self) -> int:
        """P, points per frame of the flow head."""
        return self.flow_grid[0] * self.flow_grid[1]

    @property
    def continuous_action_indices(self) -> list[int]:
        """Entries of the action that are regressed."""
        return [i for i in range(self.action_dim) if i not in set(self.binary_action_indices)]

    @property
    def continuous_state_indices(self) -> list[int]:
        """Entries of the state that enter as numbers."""
        return [i for i in range(self.state_dim) if i not in set(self.binary_state_indices)]

    def robot_entries(self, kind: str) -> list[list[bool]]:
        """Which entries of the `action` or `state` each robot has; robots in the order of their names."""
        places = range(getattr(self, f"{kind}_dim"))
        robots = [set(self.embodiments[name][kind]) for name in sorted(self.embodiments)]
        return [[place in robot for place in places] for robot in robots]

    def check_tokenizer(self, tokenizer) -> None:
        """Refuses a tokenizer of another text tower, with which every instruction would be the same.

        CLIP reads a text at its end-of-text id. Where that is missing it reads the first token, which all
        texts share.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The processor's. Nothing is checked without a text tower.

        Raises:
            ValueError: If it has more tokens than the tower, or ends no text as the tower expects it.
        """
        if "text" not in self.towers or tokenizer.init_kwargs.get("is_placeholder"):
            return
        text = self.text_config
        ids, end = tokenizer("open the drawer")["input_ids"], text.eos_token_id
        # The library takes 2, which old configs of CLIP have, as the largest id of a text.
        ends = end == 2 or end in ids
        if len(tokenizer) > text.vocab_size or max(ids, default=0) >= text.vocab_size or not ends:
            raise ValueError(
                f"The tokenizer does not belong to the text tower: it has {len(tokenizer)} tokens and gives "
                f"{ids} for 'open the drawer'; text_config has vocab_size={text.vocab_size} and "
                f"eos_token_id={end}. Take the tokenizer of the tower's checkpoint."
            )

    def for_robot(self, name: str | None) -> "ForesightConfig":
        """The config with `action_dim` and `state_dim` of one robot, which is what a simulator asks about.

        Raises:
            ValueError: If the policy has several robots, and none of this name.
        """
        if self.embodiments and name not in self.embodiments:
            raise ValueError(f"embodiment={name!r} is not one of {sorted(self.embodiments)}: name one.")
        robot = copy.copy(self)
        if self.embodiments:
            robot.action_dim, robot.state_dim = (
                len(self.embodiments[name][kind]) for kind in ("action", "state")
            )
        return robot

    def validate_towers(self):
        """Checks that the vision tower takes images of this size."""
        size = getattr(self.vision_config, "image_size", self.image_size)
        if self.vision_config.model_type == "vit" and size not in (self.image_size, [self.image_size] * 2):
            raise ValueError(
                f"vision_config.image_size={size}, but image_size={self.image_size}: set both to the size "
                "that the tower was trained with."
            )

    def validate_sources(self):
        """Checks that nothing in the config is looked up in a file or on the Hub when the model is made."""
        for name in self.sub_configs:
            refuse_sources(getattr(self, name).to_dict(), f"{name}.")
        kernels = self._attn_implementation  # the towers' own choice is not read
        for name in kernels.values() if isinstance(kernels, dict) else [kernels]:
            if name is not None and not re.fullmatch(r"\w+", name):
                raise ValueError(
                    f"attn_implementation={name!r} names a kernel of the Hub: use 'sdpa' or 'eager'."
                )
        if self.vision_config.model_type != "timm_wrapper":
            return
        architecture, arguments = self.vision_config.architecture, self.vision_config.model_args or {}
        if not re.fullmatch(r"[\w.]+", architecture):
            raise ValueError(
                f"vision_config.architecture={architecture!r} names a source; give the name of a timm model, "
                "as in timm.list_models()."
            )
        if unknown := [name for name in arguments if name not in TIMM_ARGUMENTS]:
            raise ValueError(
                f"vision_config.model_args has {unknown}; a config may hold {list(TIMM_ARGUMENTS)}."
            )

    def validate_choices(self):
        """Checks fields that name one of several options, and lists of names."""
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(options)}.")
        for prefix, part in (("", self), *((f"{name}.", getattr(self, name)) for name in self.sub_configs)):
            activation = getattr(part, "hidden_act", None)
            if isinstance(activation, str) and activation not in ACT2FN:
                raise ValueError(
                    f"{prefix}hidden_act={activation[:40]!r} is unknown; choose from {[*ACT2FN]}."
                )
        unknown = [o for o in self.objectives if o not in OBJECTIVES]
        if unknown or not self.objectives:
            raise ValueError(f"objectives has {unknown or 'no entry'}; choose from {list(OBJECTIVES)}.")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives={list(self.objectives)} must name each objective once.")
        for smaller, whole in FAMILIES.items():
            if smaller in self.objectives and whole in self.objectives:
                raise ValueError(f"objectives has both {whole!r} and {smaller!r}: choose one of them.")
        if not self.auxiliary_heads and "action" not in self.objectives:
            raise ValueError("auxiliary_heads=False leaves nothing of a model without objective 'action'.")
        if unknown := [tower for tower in self.towers if tower not in ("text", "vision")]:
            raise ValueError(f"towers has {unknown}; choose from ['text', 'vision'].")
        if not 0 <= self.goal_dropout < 1:
            raise ValueError(f"goal_dropout={self.goal_dropout} must be at least 0 and below 1.")
        if not 0 < self.supervised_share <= 1:
            raise ValueError(f"supervised_share={self.supervised_share} must be above 0 and at most 1.")
        check_views(self.views)

    def validate_numbers(self):
        """Checks that every number is one, and in its range."""
        numbers = {name: getattr(self, name) for name in ForesightConfig.__annotations__}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        _check_sizes("", numbers)
        for name, value in numbers.items():
            share = name.endswith("dropout") or name.endswith("pdrop")
            least, most = int(name in POSITIVE), 1 if share else math.inf
            if not least <= value <= most or math.isinf(value):
                raise ValueError(f"{name}={value} must be at least {least}{' and at most 1' * share}.")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps={self.fps} must be above 0.")
        if self.image_size > LARGEST_IMAGE:
            raise ValueError(f"image_size={self.image_size} must be at most {LARGEST_IMAGE} pixels.")
        check_image_statistics(self.image_mean, self.image_std)

    def validate_sizes(self):
        """Checks that widths, heads, patches and lengths fit together."""
        divisible = [("image_size", "patch_size"), ("hidden_size", "num_attention_heads")]
        if any(self.has(o) for o in ("depth", "future", "flow")):
            divisible.append(("hidden_size", "decoder_heads"))
        if self.has("action") or self.has("progress"):
            divisible.append(("action_hidden_size", "action_num_heads"))
        if self.has_style and self.action_encoder_hidden_size is not None:
            divisible.append(("action_encoder_hidden_size", "action_num_heads"))
        for name, divisor in divisible:
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"{name}={getattr(self, name)} is not divisible by {divisor}={getattr(self, divisor)}."
                )
        if self.has("action") and self.action_head == "linear" and self.chunk_size != 1:
            raise ValueError(
                f"action_head='linear' predicts one action per frame, but chunk_size={self.chunk_size}."
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be divisible by 4 (2D sin-cos positions).")
        in_window = self.has("future") and self.future_targets == "window"
        if in_window and self.history_length <= self.future_shift:
            raise ValueError(
                f"history_length={self.history_length} leaves no target {self.future_shift} frames ahead "
                "inside the window: lengthen it, or set future_targets='lookahead'."
            )
        if self.flow_form == "displacement" and self.flow_length < 2:
            raise ValueError("flow_form='displacement' needs flow_length of at least 2: step 0 is the start.")
        if len(self.flow_scales) != 2 or not all(0 < scale < math.inf for scale in self.flow_scales):
            raise ValueError(f"flow_scales={self.flow_scales} must be two positive numbers.")
        if len(self.flow_grid) != 2 or min(self.flow_grid) < 1:
            raise ValueError(f"flow_grid={self.flow_grid} must be two positive numbers, rows and columns.")
        for name, size in (("binary_action_indices", "action_dim"), ("binary_state_indices", "state_dim")):
            check_binary_entries(name, getattr(self, name), size, getattr(self, size))

    def validate_embodiments(self):
        """Checks that every robot's entries have places in the model's actions and states."""
        for name, robot in (self.embodiments or {}).items():
            if not re.fullmatch(EMBODIMENT, name):
                raise ValueError(f"embodiments has {name!r}; names are letters, digits, - and _.")
            if set(robot) != {"action", "state"}:
                raise ValueError(f"embodiments.{name} has {sorted(robot)}; it must have action and state.")
            for kind, places in robot.items():
                size = getattr(self, f"{kind}_dim")
                if len(set(places)) < len(places) or any(not 0 <= place < size for place in places):
                    raise ValueError(
                        f"embodiments.{name}.{kind}={places} must be places from 0 to {size - 1}, each once, "
                        f"because {kind}_dim={size}."
                    )
            if self.state_representation == "relative" and robot["state"][:6] not in ([], [*range(6)]):
                raise ValueError(
                    f"state_representation='relative' needs the pose of {name} at the places 0 to 5, but "
                    f"embodiments.{name}.state={robot['state']}."
                )
            if self.action_codec == "local_delta" and robot["action"] not in ([], [*range(7)]):
                raise ValueError(
                    f"action_codec='local_delta' means 7 entries, but embodiments.{name}.action="
                    f"{robot['action']}."
                )

    def validate_poses(self):
        """Checks that poses are where the CALVIN forms of state and action expect them."""
        has_pose = self.state_dim >= 6 and not set(range(6)) & set(self.binary_state_indices)
        if self.state_representation == "relative" and self.state_dim and not has_pose:
            raise ValueError(
                f"state_representation='relative' needs a pose in entries 0 to 5 of the state, but state_dim="
                f"{self.state_dim} and binary_state_indices={self.binary_state_indices}."
            )
        fits = self.action_dim == 7 and list(self.binary_action_indices) == [6] and self.state_dim >= 7
        if self.action_codec == "local_delta" and "action" in self.objectives and not fits:
            raise ValueError(
                "action_codec='local_delta' means 7 entries, the pose's change and the binary gripper, made "
                f"from a state of at least 7; here action_dim={self.action_dim}, binary_action_indices="
                f"{self.binary_action_indices}, state_dim={self.state_dim}. Use 'recorded'."
            )
