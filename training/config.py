"""Settings of a training run, read from a YAML file and the command line, checked before work starts."""

import contextlib
import dataclasses
import difflib
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import draccus
import yaml
from draccus.utils import ParsingError

from datasets_scripts.storage.atomic import write_whole_file
from modeling_foresight import ForesightConfig
from modeling_foresight.configuration_foresight import PRESETS

__all__ = [
    "DataConfig",
    "DatasetSource",
    "LoraOptions",
    "RunConfig",
    "TowerConfig",
    "TrainConfig",
    "check_fields",
    "load_config",
    "rename_setting",
    "save_config",
    "write_overrides",
]

LARGEST_CONFIG = 10_000  # values in a YAML file
RENAMED = {"standardise_tokens": "standardize_tokens"}  # of `train`; older run folders have the first
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
            raise ValueError(f"model.{name} is not a field of ForesightConfig{_suggest(name, model_fields)}")
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
        if len(train.betas) != 2:
            raise ValueError(f"train.betas is {train.betas}; AdamW takes two")
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
        if not self.lora.r and self.lora != LoraOptions():
            raise ValueError("options of lora are given without a rank: add --lora.r 16")
        changed = [name for name in self.model if not name.endswith(TRAINING_ONLY)]
        if self.lora.r and changed:
            raise ValueError(
                f"model.{changed[0]} cannot change with lora.r, because an adapter keeps its base: leave "
                "it out. Only what training alone uses can change, such as loss weights and dropout"
            )


def load_config(path: str | Path | None, overrides: list[str]) -> RunConfig:
    """Reads a run from YAML and command-line overrides.

    Args:
        path (`str` or `Path`, *optional*): YAML file; defaults alone if omitted.
        overrides (`list[str]`): `--key.sub value` or `--key.sub=value`; names and places stay as they are,
            other values are read as YAML. `--dataset` keeps how a single dataset of the file is read.

    Raises:
        ValueError: If the file cannot be read, a key is unknown or a value has the wrong type; names it.
    """
    values, given = _read_config(Path(path)) if path else {}, {}
    pairs = _parse_pairs(overrides)
    for key, other in [*OTHER_UNIT.items(), *((epochs, steps) for steps, epochs in OTHER_UNIT.items())]:
        if any(name == f"train.{key}" for name, _ in pairs):  # replaces the other unit in the file
            values.get("train", {}).pop(other, None)
    for key, value in pairs:
        if key == "dataset":
            key, value = "data.datasets", _replace_dataset(values, value)
        if key.startswith("model."):
            _set_nested(given, key.removeprefix("model."), value)
        else:
            _set_nested(values, key, value)
    if given:
        values["model"] = resolve_presets([values.get("model") or {}, given])
    _rename_settings(values)
    check_fields(RunConfig, values, "")
    try:
        return draccus.decode(RunConfig, values)
    except ParsingError as error:
        # draccus hides a dataclass's own ValueError behind a general sentence.
        raise ValueError(f"config {path or ''}: {error.__cause__ or error}") from None


def _replace_dataset(values: dict[str, Any], path: str) -> list[dict]:
    """`--dataset` in place of the datasets of the file: a single one keeps its cameras, stride and robot."""
    known = (values.get("data") or {}).get("datasets") or []
    if len(known) == 1 and isinstance(known[0], dict):
        return [{**known[0], "path": path}]
    return [{"path": path}]


def rename_setting(name: str) -> str:
    """Today's name of a setting, which may stand behind groups (`train/...`); run folders keep older ones."""
    groups, slash, last = name.rpartition("/")
    return groups + slash + RENAMED.get(last, last)


def _rename_settings(values: dict) -> None:
    """Gives the settings of `train` today's names, in place."""
    if isinstance(values.get("train"), dict):
        values["train"] = {rename_setting(name): value for name, value in values["train"].items()}


def _read_config(path: Path) -> dict:
    """Settings of a YAML file, whose names and types fit; an error names the file."""
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict | None):
            raise ValueError(f"it holds {reprlib.repr(values)} instead of settings by name")
        values = values or {}
        _rename_settings(values)
        check_fields(RunConfig, values, "")
    except FileNotFoundError:
        named = sorted(p.name for p in (Path(__file__).parent / "configs").glob("*.yaml"))
        raise ValueError(f"config {path} does not exist; training/configs has {', '.join(named)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path}: {error}") from None
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the last one would count, and the first vanish."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            problem = f"{max(keys, key=keys.count)} is given twice"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        return node


def _parse_yaml(text: str) -> Any:
    """A value in YAML, of bounded size: aliases of aliases can stand for billions of values."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    parts, count = [value], 0
    while parts:
        part, count = parts.pop(), count + 1
        if count > LARGEST_CONFIG:
            raise ValueError(f"its aliases stand for more than {LARGEST_CONFIG} values: write them out")
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return value


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved run as YAML; `load_config` reads it back."""
    with write_whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


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
                raise ValueError(f"model.preset={name!r} is unknown{_suggest(str(name), PRESETS)}")
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


def _set_nested(values: dict, key: str, value: Any) -> None:
    """Sets `a.b.c` in nested dicts."""
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--{key}: {parent} is a value, not a group")
    values[leaf] = value


def _parse_pairs(arguments: list[str]) -> list[tuple[str, Any]]:
    """`["--a.b", "1", "--c=x"]` -> `[("a.b", 1), ("c", "x")]`."""
    pairs, rest = [], iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"argument {argument!r}: expected --key.sub value")
        key, equals, value = argument[2:].partition("=")
        value = value if equals else next(rest, "--")
        if not equals and value.startswith("--"):
            raise ValueError(f"--{key} needs a value")
        pairs.append((key, _read_value(key, value)))
    return pairs


def write_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings by dotted name as overrides of [`load_config`], whatever characters their texts have."""
    return [
        f"--{key}={value if _is_text(key) and isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]


def _is_text(key: str) -> bool:
    return key == "dataset" or _type_of(key) in (str, str | None)


def _read_value(key: str, text: str) -> Any:
    """The value of an override. Text stays as it is: a folder may be called `2026_01_05` or `run #2`."""
    if _is_text(key):
        return None if _type_of(key) == str | None and text == "null" else text
    try:
        parsed = _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--{key} {text}: {error}") from None
    # YAML 1.1 reads 1e-3 as text.
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    return parsed


def _type_of(key: str) -> Any:
    """Type of a setting by its dotted name; `None` for fields of the model, and for what is unknown."""
    kind: Any = RunConfig
    for name in rename_setting(key.replace(".", "/")).split("/"):
        is_group = dataclasses.is_dataclass(kind)
        kind = {f.name: f.type for f in dataclasses.fields(kind)}.get(name) if is_group else None
    return kind


def check_fields(cls: type, values: dict, prefix: str) -> None:
    """Refuses unknown keys, with the closest known one, and values of another type; names the field."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    is_model = cls is ForesightConfig
    for name, value in values.items():
        if name not in fields:
            if is_model:  # a preset; other names are refused when it is resolved
                continue
            known = [*fields, "dataset"] if not prefix else fields
            raise ValueError(f"{prefix}{name} is unknown{_suggest(str(name), known)}")
        kind = ForesightConfig if (cls, name) == (RunConfig, "model") else fields[name].type
        if not _fits(value, kind, strict=is_model):
            told = str(kind) if typing.get_args(kind) else kind.__name__
            told = "a group of settings" if dataclasses.is_dataclass(kind) else told
            raise ValueError(f"{prefix}{name} is {reprlib.repr(value)}; it must be {told}, or left out")
        if dataclasses.is_dataclass(kind):
            check_fields(kind, value, f"{prefix}{name}.")
        elif typing.get_args(kind) == (DatasetSource,):
            for i, source in enumerate(value):
                check_fields(DatasetSource, source, f"{prefix}{name}.{i}.")


def _fits(value: Any, kind: Any, strict: bool) -> bool:
    """Whether a value of YAML is of a type; `strict` as transformers' configs, which convert no text."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part, strict) for part in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(part, arguments[0], strict) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(part, arguments[1], strict) for part in value.values())
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (int, float):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = value if strict else float(value)  # YAML 1.1 reads 1e-3 as text
            whole = kind is float or number == int(number)
            return whole and math.isfinite(number) and not isinstance(value, bool)
        return False
    if kind is str and not strict:  # a folder may be named 2026
        return value not in ("", None) and not isinstance(value, dict | list)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
