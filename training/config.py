"""Settings of a training run, checked before work starts; `config_reading.py` reads them."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from modeling_foresight import ForesightConfig
from modeling_foresight.configuration_foresight import EMBODIMENT, PRESETS

__all__ = [
    "DataConfig",
    "DatasetSource",
    "LoraOptions",
    "RunConfig",
    "TowerConfig",
    "TrainConfig",
    "resolve_presets",
    "suggest",
]

OTHER_UNIT = {"steps": "epochs", "warmup_steps": "warmup_epochs"}
# Fields of the model that only training uses; an adapter leaves all others as its base has them.
TRAINING_ONLY = ("_loss_weight", "_pdrop", "attention_dropout", "action_loss", "supervised_share")
TRAINING_ONLY += ("embodiments",)  # an adapter's folder has its own


@dataclasses.dataclass
class DatasetSource:
    """One dataset of the mixture.

    Args:
        path (`str`): Folder or Hub id of a LeRobot v3 dataset.
        cameras (`dict`): Dataset camera of each view of the model (`front` of `observation.images.front`, or
            a whole column's name); a view that is not listed uses the camera of the same name, `null` says
            that this dataset has no such view.
        frame_stride (`int`): Dataset frames per step of the window.
        strided_commands (`str`): How the recorded commands of one step combine; see `WindowConfig`.
        embodiment (`str`, *optional*): Name of the robot. Datasets of one name are normalized together, and
            by the name its actions are asked for later; all datasets of a run have one, or none has.
    """

    path: str
    cameras: dict[str, str | None] = dataclasses.field(default_factory=dict)
    frame_stride: int = 1
    strided_commands: str = "refuse"
    embodiment: str | None = None


@dataclasses.dataclass
class DataConfig:
    """The datasets and how windows are made from them; `WindowConfig` explains most fields.

    Args:
        datasets (`list[DatasetSource]`): The mixture; `--dataset DIR_OR_REPO` stands for a single one.
        mixture (`str` or `list[float]`): `natural`, `sqrt`, or one weight per dataset.
        val_fraction (`float`): Share of each dataset's episodes kept for validation.
        validation (`str`, *optional*): Folder or Hub id of a dataset for validation alone, read as the first
            of `datasets` is. These are then trained on in whole: `val_fraction` becomes 0. For episodes that
            overlap, as CALVIN's, which cannot be split.
        random_shift (`float`): Largest random shift as a fraction of the image side.
        p_moving, occluded_weight (`float`): Choice and weight of flow points.
        state_key (`str`, *optional*), action_key (`str`): Columns.
        statistics (`str`): With `init_from`, whose numbers states and actions are normalized by: those of the
            `dataset` trained on, right for another robot and the safe choice, or those the `model` came with,
            which its heads know: for small datasets of a robot and task space it has seen.
        skip_flagged (`bool`): Leave out episodes whose labels have a flag, in training and in validation.
        missing_targets (`bool`): Train what the columns allow instead of refusing a dataset that lacks some.
        frame_cache (`str`): `auto`, `off` or a folder for decoded frames.
        streaming (`bool`): Download files when their windows come, and delete them afterwards, instead of
            all before the first step. Paths may then also be URLs (`s3://bucket/folder`, `hf://buckets/...`).
        streaming_disk_gb (`float`): GB (10^9 bytes) that streamed files may take in `$FORESIGHT_CACHE`; the
            more, the better windows are shuffled.
        num_workers (`int`): Loader processes per training process; 0 reads windows in the training process.
        baseline_windows (`int`): Training windows, evenly spread, from which the trivial predictors of the
            final measurement are computed.
    """

    datasets: list[DatasetSource] = dataclasses.field(default_factory=list)
    # The list comes first: draccus takes the first type that fits, and everything fits a string.
    mixture: list[float] | str = "natural"
    val_fraction: float = 0.1
    validation: str | None = None
    random_shift: float = 0.05
    p_moving: float = 0.5
    occluded_weight: float = 1.0
    state_key: str | None = "observation.state"
    action_key: str = "action"
    statistics: str = "dataset"
    skip_flagged: bool = False
    missing_targets: bool = False
    frame_cache: str = "auto"
    streaming: bool = False
    streaming_disk_gb: float = 32.0
    num_workers: int = 0
    baseline_windows: int = 2000


@dataclasses.dataclass
class TowerConfig:
    """Where the text and vision towers come from.

    Args:
        tokenizer (`str`): Folder or Hub id of the text tower's tokenizer; `small` trains a byte-level one on
            the dataset's instructions (nothing is downloaded).
        text, vision (`str`, *optional*): Folder or Hub id of weights of CLIP and of an image encoder; a tower
            without weights starts fresh.
    """

    tokenizer: str = "small"
    text: str | None = None
    vision: str | None = None


@dataclasses.dataclass
class TrainConfig:
    """Optimization and bookkeeping.

    Args:
        steps (`int`, *optional*): Optimizer steps; 1000 if `epochs` is not given either.
        epochs (`float`, *optional*): Instead of `steps`: passes over as many windows as all datasets have
            together, drawn as `data.mixture` says. What is given on the command line replaces the other one
            in the YAML file.
        batch_size (`int`): Windows per optimizer step, over all processes and accumulation steps.
        gradient_accumulation_steps (`int`): Parts into which that batch is cut; losses are means over the
            whole batch, however it is cut.
        learning_rate (`float`): Peak.
        min_learning_rate_ratio (`float`): The cosine ends at this share of the peak.
        warmup_steps (`int`, *optional*): Linear warm-up; 100 if `warmup_epochs` is not given either.
        warmup_epochs (`float`, *optional*): Instead of `warmup_steps`, with `epochs`.
        betas (`list[float]`), weight_decay (`float`): AdamW.
        max_grad_norm (`float`): Gradients are clipped to this global norm; 0 clips nothing.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights with this decay
            (0.999), which validation and the exported model then use.
        export_ema (`bool`): Whether they do. Without it the average stays in the checkpoints.
        mixed_precision (`str`): `no` or `bf16`; a CPU without kernels for bf16 uses `no` either way.
        attn_implementation (`str`): `sdpa`, `eager` or, on a GPU, `flex_attention`. On CPUs eager is faster
            with bf16.
        gradient_checkpointing (`bool`): Trade time for memory in the transformer.
        standardize_tokens (`bool`): Start a fresh model with image tokens in which differences between images
            stand out (`standardize_tokens`): actions depend on fresh towers much sooner.
        log_every, val_every, checkpoint_every (`int`): Steps between log lines, validations and checkpoints;
            0 for the last two means only at the end.
        picture_every (`int`): Steps between pictures of predictions on a validation episode, in
            OUTPUT/pictures and in the tracker; 0 for none.
        max_hours (`float`, *optional*): Save and stop with exit code 0 after this time, for clusters that end
            jobs; `--resume` continues.
        val_windows (`int`): Validation windows used during training, 0 for all; the final measurement uses
            all.
        keep_checkpoints (`int`): Older checkpoints are deleted.
        tracker (`str`, *optional*): Any tracker of Accelerate: `trackio`, `wandb`, `tensorboard`...
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.01
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    export_ema: bool = True
    mixed_precision: str = "no"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    standardize_tokens: bool = False
    log_every: int = 50
    val_every: int = 500
    checkpoint_every: int = 500
    picture_every: int = 0
    max_hours: float | None = None
    val_windows: int = 256
    keep_checkpoints: int = 2
    tracker: str | None = None

    def __post_init__(self):
        for (steps, epochs), default in zip(OTHER_UNIT.items(), (1000, 100), strict=True):
            if getattr(self, epochs) is None:
                if getattr(self, steps) is None:
                    setattr(self, steps, default)
            elif getattr(self, steps) is not None:
                raise ValueError(
                    f"train.{steps} is {getattr(self, steps)} and train.{epochs} is "
                    f"{getattr(self, epochs):g}: give one of them, and null for the other"
                )
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"train.epochs is {self.epochs:g}; it must be above 0")
        if self.warmup_epochs is not None:
            if self.epochs is None:
                raise ValueError("train.warmup_epochs belongs to train.epochs; give train.warmup_steps")
            if not 0 <= self.warmup_epochs <= self.epochs:
                raise ValueError(
                    f"train.warmup_epochs is {self.warmup_epochs:g}; it must be from 0 to train.epochs, "
                    f"{self.epochs:g}"
                )


@dataclasses.dataclass
class LoraOptions:
    """An adapter on `init_from` instead of training all of it; see `modeling_foresight/lora.py` for defaults.

    Args:
        r (`int`): Rank; 0 trains the model itself.
        alpha (`float`, *optional*): The adapter counts `alpha / r`; `r` by default.
        dropout (`float`): On the adapter's input.
        target_modules (`str` or `list[str]`, *optional*): Layers that are adapted: a pattern for whole
            names, or ends of names.
        modules_to_save (`list[str]`, *optional*): Ends of names of modules that are trained in full.
        merge (`bool`): Export the merged model too, as `EXPORT-merged`.
    """

    r: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None  # in this order, as data.mixture
    modules_to_save: list[str] | None = None
    merge: bool = False


@dataclasses.dataclass
class RunConfig:
    """One training run.

    Args:
        output (`str`): Run folder: resolved config, log, checkpoints, summary.
        export (`str`, *optional*): Folder of the finished model and processor; `OUTPUT/model` by default.
        seed (`int`): Seed of weights, data order, augmentation, dropout and noise.
        init_from (`str`, *optional*): Folder or Hub id of a trained 3D Foresight model to start from. Its
            config, towers and tokenizer are used. `model` may change loss weights, dropout, objectives and
            views; what it lacks of those starts fresh, such as actions after pretraining on video.
        init_revision (`str`, *optional*): Commit, branch or tag of `init_from` on the Hub.
        model (`dict`): Fields of `ForesightConfig`; `preset: grmg` stands for those of a variant (see
            `python -m modeling_foresight`). Sizes of state and action and the vocabulary of a `small`
            tokenizer are filled in from the data.
        towers, data, train, lora: See [`TowerConfig`], [`DataConfig`], [`TrainConfig`], [`LoraOptions`].
    """

    output: str = "outputs/training"
    export: str | None = None
    seed: int = 0
    init_from: str | None = None
    init_revision: str | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    towers: TowerConfig = dataclasses.field(default_factory=TowerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)

    def __post_init__(self):
        self.export = self.export or str(Path(self.output) / "model")
        self.model = resolve_presets([self.model])
        model_fields = {field.name for field in dataclasses.fields(ForesightConfig)}
        # A config class of transformers takes any name, so a typo would go unnoticed.
        for name in self.model.keys() - model_fields:
            raise ValueError(f"model.{name} is not a field of ForesightConfig{suggest(name, model_fields)}")
        _check_towers(self.model, has_base=self.init_from is not None)
        if self.data.validation:
            self.data.val_fraction = 0.0
        train, positive = self.train, ("steps", "batch_size", "gradient_accumulation_steps")
        least = dict.fromkeys((*positive, "keep_checkpoints", "log_every"), 1)
        least |= dict.fromkeys(("val_every", "checkpoint_every", "picture_every", "warmup_steps"), 0)
        least |= dict.fromkeys(
            ("learning_rate", "weight_decay", "max_grad_norm", "min_learning_rate_ratio", "val_windows"), 0
        )
        least |= dict.fromkeys(("ema_decay", "max_hours"), 0)
        data = {"num_workers": 0, "baseline_windows": 1, "p_moving": 0, "occluded_weight": 0}
        for group, bounds in {"train": least, "data": data}.items():
            for name, bound in bounds.items():
                value = getattr(getattr(self, group), name)
                if value is not None and value < bound:
                    raise ValueError(f"{group}.{name} is {value}; it must be at least {bound}")
        for name, share in (
            ("train.min_learning_rate_ratio", train.min_learning_rate_ratio),
            ("data.p_moving", self.data.p_moving),
        ):
            if share > 1:
                raise ValueError(f"{name} is {share}; it is a share and must be at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1")
        if train.ema_decay is not None and train.ema_decay >= 1:
            raise ValueError(f"train.ema_decay is {train.ema_decay}; it must be below 1, such as 0.999")
        if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
            raise ValueError(f"train.betas is {train.betas}; AdamW takes two, from 0 to below 1")
        if train.batch_size % train.gradient_accumulation_steps:
            raise ValueError(
                f"train.batch_size={train.batch_size} cannot be cut into "
                f"train.gradient_accumulation_steps={train.gradient_accumulation_steps} equal parts"
            )
        if train.mixed_precision == "False":  # YAML takes a bare `no` for false
            train.mixed_precision = "no"
        if train.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"train.mixed_precision is {train.mixed_precision!r}; use 'no' or 'bf16'")
        self._check_mixture()
        if self.data.streaming_disk_gb <= 0:
            raise ValueError(f"data.streaming_disk_gb is {self.data.streaming_disk_gb}; it must be above 0")
        if self.data.streaming and self.data.frame_cache not in ("auto", "off", "False"):
            raise ValueError(
                f"data.frame_cache={self.data.frame_cache} would hold all decoded frames, and data.streaming "
                "is for datasets larger than the disk: leave one of them out"
            )
        if self.data.statistics not in ("dataset", "model"):
            raise ValueError(f"data.statistics is {self.data.statistics!r}; use 'dataset' or 'model'")
        self._check_start()

    def _check_mixture(self):
        """Refuses weights that no mixture can have, and a mixture in which only some robots have names."""
        sources, weights = self.data.datasets, self.data.mixture
        if isinstance(weights, list):
            if sources and len(weights) != len(sources):
                raise ValueError(
                    f"data.mixture has {len(weights)} weights for {len(sources)} datasets; give one for each"
                )
            if not all(weight > 0 for weight in weights):
                raise ValueError(
                    f"data.mixture is {weights}; every weight must be above 0: leave a dataset without "
                    "weight out of data.datasets"
                )
        elif weights not in ("natural", "sqrt"):
            raise ValueError(f"data.mixture is {weights!r}; use natural, sqrt, or a weight per dataset")
        unnamed = [source.path for source in sources if source.embodiment is None]
        if unnamed and len(unnamed) < len(sources):
            raise ValueError(
                f"data.datasets: {unnamed[0]} has no embodiment, but others have: name the robot of each"
            )
        for source in sources:
            if source.embodiment is not None and not re.fullmatch(EMBODIMENT, source.embodiment):
                raise ValueError(
                    f"data.datasets: the embodiment {source.embodiment!r} of {source.path} must be letters, "
                    "digits, - and _"
                )

    def _check_start(self):
        """Refuses settings that have no effect without `init_from` or LoRA."""
        if not self.init_from:
            if self.lora.r:
                raise ValueError("lora.r adapts a trained model: name it with --init_from FOLDER_OR_HUB_ID")
            if self.init_revision:
                raise ValueError("init_revision belongs to init_from, which is not given")
            if self.data.statistics == "model":
                raise ValueError("data.statistics=model needs a model with statistics: give --init_from")
        if self.lora.r < 0 or not 0 <= self.lora.dropout < 1:
            raise ValueError(
                f"lora.r={self.lora.r}, lora.dropout={self.lora.dropout}: r must be at least 1 (0 for no "
                "adapter), dropout in [0, 1)"
            )
        if self.lora.alpha is not None and self.lora.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.lora.alpha}; it must be above 0, or left out for lora.r")
        if not self.lora.r and self.lora != LoraOptions():
            raise ValueError("options of lora are given without a rank: add --lora.r 16")
        changed = [name for name in self.model if not name.endswith(TRAINING_ONLY)]
        if self.lora.r and changed:
            raise ValueError(
                f"model.{changed[0]} cannot change with lora.r, because an adapter keeps its base: leave "
                "it out. Only what training alone uses can change, such as loss weights and dropout"
            )


def _check_towers(model: dict[str, Any], has_base: bool) -> None:
    """Refuses fields that a tower's config does not have; transformers would ignore them."""
    default = None if has_base else "vit"  # the tower of a base is known once that is loaded
    for group, kind in (("text_config", "clip_text_model"), ("vision_config", default)):
        given = model.get(group) or {}
        kind = given.get("model_type", kind)
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            own = CONFIG_MAPPING[kind].__annotations__
            # What the library's base class knows, such as `dtype`, is an attribute too.
            for name in given.keys() - own.keys() - set(dir(CONFIG_MAPPING[kind])):
                raise ValueError(f"model.{group}.{name} is unknown{suggest(name, own)}")


def resolve_presets(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's fields from layers of settings, weakest first, with `preset` replaced by its fields.

    The layers are the fields in the YAML file and those on the command line. Only the last preset counts. It
    beats the fields of earlier layers; fields of the same layer beat it.

    Raises:
        ValueError: If the preset is unknown.
    """
    fields: dict[str, Any] = {}
    last = max((i for i, layer in enumerate(layers) if layer.get("preset") is not None), default=None)
    for i, layer in enumerate(layers):
        if i == last:
            name = layer["preset"]
            if str(name) not in PRESETS:
                raise ValueError(f"model.preset={name!r} is unknown{suggest(str(name), PRESETS)}")
            fields |= {key: list(v) if isinstance(v, tuple) else v for key, v in PRESETS[name].items()}
        _merge(fields, {name: value for name, value in layer.items() if name != "preset"})
    return fields


def _merge(fields: dict, layer: dict) -> None:
    """Adds a layer to `fields` in place; groups such as `text_config` are merged field by field."""
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _merge(fields[name], value)
        else:
            fields[name] = value


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
