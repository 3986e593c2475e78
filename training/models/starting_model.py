"""The model and processor that a run starts from: a trained one, or a fresh one for the data."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from datasets_scripts.storage.hub.download import is_hub_id
from modeling_foresight import (
    ForesightConfig,
    ForesightForActionPrediction,
    ForesightProcessor,
)
from modeling_foresight.embodiments import find_still_entries
from modeling_foresight.processing_foresight import fit_small_tokenizer
from training.config import RunConfig
from training.models.model_folder import check_checkpoint
from training.run_data import RunData, learns_to_act, read_base
from training.windows import collate_windows

__all__ = ["build_model", "check_start", "pin_base", "standardize_tokens", "starting_config"]

# Fields by which trained weights would compute something else, or no longer fit, and whose weights these are:
# of the trunk, or of the heads of some objectives, which may be new.
KEPT = {
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps": None,
    "image_size image_mean image_std patch_size text_config vision_config": None,
    "num_latents resampler_depth resampler_heads resampler_head_dim resampler_ff_mult": None,
    "decoder_depth decoder_heads": ("depth", "future", "flow"),
    "action_hidden_size action_num_heads": ("action", "progress"),
    "flow_form flow_scales flow_xy_residual flow_length flow_grid num_flow_queries": ("flow",),
    "depth_form": ("depth", "future"),
}
# Fields of the config that describe a robot, not the model.
ROBOT = ("action_dim", "binary_action_indices", "state_dim", "binary_state_indices")


def starting_config(config: RunConfig) -> ForesightConfig:
    """The model's config as far as the data need it: that of `init_from`, changed by `model`, or the run's.

    Raises:
        ValueError: If `init_from` is an adapter.
    """
    if config.init_from:
        if find_adapter_config_file(config.init_from, revision=config.init_revision):
            raise ValueError(
                f"init_from={config.init_from} is an adapter, not a model: continue its run with --resume, "
                "or start from the merged model that --lora.merge true exports"
            )
        source = {"pretrained_model_name_or_path": config.init_from, "revision": config.init_revision}
        fields = config.model
        if learns_to_act(read_base(config), fields):
            defaults = ForesightConfig()  # a base without actions has no sizes of a robot; the data set them
            fields = {name: getattr(defaults, name) for name in ROBOT} | add_binary_entries(fields)
        return AutoConfig.from_pretrained(**source, **_keep_robots(config, fields))
    fields = add_binary_entries(config.model)
    for kind in ("action", "state"):  # the data set it; until then it holds the places that are named
        places = [
            place for robot in (fields.get("embodiments") or {}).values() for place in robot.get(kind, ())
        ]
        if places:
            fields = {f"{kind}_dim": 1 + max(places)} | fields
    return ForesightConfig(**fields)


def check_start(config: RunConfig) -> None:
    """Refuses, before data are read, a start that cannot be: base, tokenizer or towers.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if config.init_from:
        check_checkpoint(config.init_from, "init_from")
        wanted = starting_config(config)  # knows an adapter
        _check_base(config, read_base(config), wanted)
        return
    if config.towers.tokenizer != "small":
        _load_tokenizer(config)
    for tower in ("text", "vision"):
        place = getattr(config.towers, tower)
        if place and not Path(place).is_dir() and not is_hub_id(place):
            raise ValueError(f"towers.{tower}={place} is not a folder; give one, or a Hub id (owner/name)")


def _keep_robots(config: RunConfig, fields: dict) -> dict:
    """Fields of the config in which `embodiments` adds to those of the base, or replaces some."""
    if not fields.get("embodiments"):
        return fields
    return {**fields, "embodiments": (read_base(config).embodiments or {}) | fields["embodiments"]}


def add_binary_entries(fields: dict) -> dict:
    """Fields of the config, in which no entry of states and actions is binary unless it is named there."""
    if fields.get("action_codec") == "local_delta":  # whose entries are fixed
        return fields
    return {"binary_action_indices": [], "binary_state_indices": []} | fields


def add_robot_sizes(fields: dict, data: RunData) -> dict:
    """Fields of the config, with missing sizes of the robot taken from the dataset."""
    sizes = {"state_dim": data.train.state_dim, "embodiments": data.train.embodiments}
    if data.train.action_dim:
        sizes["action_dim"] = data.train.action_dim
    fields = {
        name: value for name, value in fields.items() if name != "embodiments"
    }  # they are in the data's
    return sizes | add_binary_entries(fields)


def build_model(config: RunConfig, data: RunData) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """The policy and its processor: from `init_from`, or fresh on the towers that the config names."""
    if config.model.get("fps") not in (None, data.fps):
        raise ValueError(
            f"model.fps is {config.model['fps']}, but the dataset gives {data.fps:g} steps per second: leave "
            "it out, or choose a frame_stride"
        )
    if config.init_from:
        if config.train.standardize_tokens:
            raise ValueError(
                "train.standardize_tokens is for models that start fresh; it would change what "
                f"{config.init_from} has learned: leave it out"
            )
        return load_base(config, data)
    fields = {name: value for name, value in config.model.items() if name != "fps"}
    tokenizer, fields = build_tokenizer(config, data, fields)
    model_config = ForesightConfig(
        **add_robot_sizes(fields, data), fps=data.fps, attn_implementation=config.train.attn_implementation
    )
    towers = {"text": config.towers.text, "vision": config.towers.vision}
    if any(towers.values()):
        try:
            model = ForesightForActionPrediction.from_encoder_checkpoints(model_config, **towers)
        except (OSError, ValueError) as error:
            told = ", ".join(f"towers.{name}={place}" for name, place in towers.items() if place)
            raise ValueError(f"{told} cannot be loaded: {error}") from error
    else:
        model = ForesightForActionPrediction(model_config)
    check_binary_entries(model.config, data)
    processor = ForesightProcessor.from_config(model.config, tokenizer, **dataset_statistics(data))
    if config.train.standardize_tokens:
        standardize_tokens(model, processor, data)
    return model, processor


def build_tokenizer(config: RunConfig, data: RunData, fields: dict) -> tuple[PreTrainedTokenizerBase, dict]:
    """The text tower's tokenizer, and the model's fields with the vocabulary of one that is trained here."""
    if config.towers.tokenizer != "small":
        return _load_tokenizer(config), fields
    tokenizer, text = fit_small_tokenizer(data.instructions, fields.get("text_config"))
    return tokenizer, {**fields, "text_config": text}


def _load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    name = config.towers.tokenizer
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"towers.tokenizer={name} cannot be loaded: {error}") from error


def load_base(config: RunConfig, data: RunData) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """The trained model of `init_from` and a processor for this run's data.

    Objectives and views that the base lacks start fresh, such as the actions after pretraining on video.

    Raises:
        ValueError: If the model was made for another size of action or state than the data have, or its
            statistics are asked for and do not fit.
    """
    source = {"pretrained_model_name_or_path": config.init_from, "revision": config.init_revision}
    base, wanted = read_base(config), starting_config(config)
    _check_base(config, base, wanted)
    options = {"attn_implementation": config.train.attn_implementation}
    if (base.objectives, base.views) == (wanted.objectives, wanted.views):
        fields = _keep_robots(config, config.model)
        model = AutoModel.from_pretrained(**source, dtype=torch.float32, **options, **fields)
    else:
        acts_now = learns_to_act(base, config.model)
        fields = add_robot_sizes(config.model, data) if acts_now else _keep_robots(config, config.model)
        trained = AutoModel.from_pretrained(**source, dtype=torch.float32)  # compares sizes with the weights
        model = AutoModel.from_config(AutoConfig.from_pretrained(**source, **fields), **options)
        fill_from(model, trained)
    for name in ("action", "state"):
        here, there = getattr(data.train, f"{name}_dim"), getattr(model.config, f"{name}_dim")
        if here and there and here != there and not (data.train.embodiments and here < there):
            raise ValueError(
                f"{config.init_from} was trained for {name}s of {there} entries, the dataset's have {here}: "
                f"choose a base that fits, or data.{name}_key={'null' if name == 'state' else '...'}"
            )
    model.config.fps, model.config.embodiments = data.fps, data.train.embodiments
    check_binary_entries(model.config, data)
    processor = AutoProcessor.from_pretrained(**source)
    if config.data.statistics == "dataset":
        known = {name: getattr(processor, name) for name in ("action_stats", "state_stats", "statistics")}
        stats = known | dataset_statistics(data, processor.statistics)
        processor = ForesightProcessor.from_config(model.config, processor.tokenizer, **stats)
    elif processor.embodiments != data.train.embodiments:
        raise ValueError(
            f"data.statistics=model: {config.init_from} has no statistics of the robots of this run "
            f"({', '.join(sorted(data.train.embodiments or {})) or 'one without a name'}): use "
            "data.statistics=dataset, or the embodiments that it knows "
            f"({', '.join(sorted(processor.embodiments or {})) or 'none'})"
        )
    else:
        for robot in dict.fromkeys(windows.config.embodiment for windows in data.train.datasets):
            _check_motion(config, data, processor, robot)
    return model, processor


def pin_base(config: RunConfig, model: ForesightConfig) -> RunConfig:
    """The settings with the commit of a base from the Hub, for later sessions: a branch may move."""
    commit = getattr(model, "_commit_hash", None)
    if config.init_from and commit:
        return dataclasses.replace(config, init_revision=commit)
    return config


def _check_kept(config: RunConfig, name: str, wanted: object, before: object) -> None:
    if isinstance(wanted, dict) and isinstance(before, dict):  # of a tower; the rest of it is the base's
        for part, value in wanted.items():
            _check_kept(config, f"{name}.{part}", value, before.get(part))
    elif wanted is not None and wanted != (list(before) if isinstance(before, tuple) else before):
        raise ValueError(
            f"model.{name} is {wanted}, but {config.init_from} was trained with {before}: leave it out. Loss "
            "weights, dropout, objectives and views can change, sizes cannot"
        )


def _check_base(config: RunConfig, base: ForesightConfig, wanted: ForesightConfig) -> None:
    """Refuses statistics that the base does not have, views in another order, and another architecture."""
    before = base.to_dict()
    for names, objectives in KEPT.items():
        is_trained = objectives is None or any(base.has(objective) for objective in objectives)
        for name in config.model.keys() & set(names.split()) if is_trained else ():
            _check_kept(config, name, config.model[name], before.get(name))
    if learns_to_act(base, config.model) and config.data.statistics == "model":
        raise ValueError(
            f"data.statistics=model: {config.init_from} was trained without actions and has no statistics of "
            "them: use data.statistics=dataset"
        )
    shared = min(len(base.views), len(wanted.views))
    if len(base.views) != len(wanted.views) and base.views[:shared] != wanted.views[:shared]:
        raise ValueError(
            f"{config.init_from} has the views {base.views}, model.views are {wanted.views}: views are added "
            "and left out at the end"
        )


def fill_from(model: ForesightForActionPrediction, base: ForesightForActionPrediction) -> None:
    """Copies the weights of `base` into a model with other parts, and prints which start fresh.

    Raises:
        ValueError: If parts that both have differ in size.
    """
    ours, theirs = model.state_dict(), base.state_dict()
    shared = [name for name in theirs if name in ours]
    if wrong := [name for name in shared if ours[name].shape != theirs[name].shape]:
        raise ValueError(
            f"init_from={base.name_or_path} has {wrong[0]} of size {tuple(theirs[wrong[0]].shape)}, this run "
            f"{tuple(ours[wrong[0]].shape)}: objectives and views can change, sizes cannot"
        )
    model.load_state_dict({name: theirs[name] for name in shared}, strict=False)
    for what, names in (("starts fresh", ours.keys() - theirs), ("is left out", theirs.keys() - ours)):
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in names})
        if parts:
            PartialState().print(f"beside the weights of {base.name_or_path} {what}: {', '.join(parts)}")


def _check_motion(
    config: RunConfig, data: RunData, processor: ForesightProcessor, robot: str | None = None
) -> None:
    """Refuses statistics of the base if entries of the action move in the data that never did in its own."""
    there = processor.statistics[robot].get("action") if robot else processor.action_stats
    here = data.statistics("action", robot) if data.train.action_dim else None
    if there is None or here is None:
        return
    places = processor.embodiments[robot]["action"] if robot else np.arange(len(here["std"]))
    binary = np.isin(places, processor.binary_action_indices)
    was_still, is_still = (
        np.where(binary, np.equal(stats["min"], stats["max"]), find_still_entries(stats))
        for stats in (there, here)
    )
    if entries := np.flatnonzero(was_still & ~is_still).tolist():
        raise ValueError(
            f"data.statistics=model: entries {entries} of the action move in the dataset, but never did in "
            f"what {config.init_from} was trained on. They would be kept still: use data.statistics=dataset"
        )


def dataset_statistics(data: RunData, known: dict | None = None) -> dict[str, dict]:
    """`action_stats` and `state_stats`, as far as the data have actions and states; or `statistics` by robot.

    Of robots that the data do not have, those in `known` stay.
    """
    if data.train.embodiments:
        robots = {windows.config.embodiment for windows in data.train.datasets}
        return {"statistics": (known or {}) | {name: robot_statistics(data, name) for name in robots}}
    return {
        f"{name}_stats": data.statistics(name)
        for name in ("action", "state")
        if getattr(data.train, f"{name}_dim")
    }


def robot_statistics(data: RunData, robot: str | None) -> dict[str, dict]:
    """`action` and `state` statistics of one robot, as far as it has them."""
    found = {kind: data.statistics(kind, robot) for kind in ("action", "state")}
    return {kind: stats for kind, stats in found.items() if stats is not None}


def check_binary_entries(config: ForesightConfig, data: RunData) -> None:
    """Refuses named robots that have an entry of many values at a place that is binary for another robot.

    A robot without a name chose its own binary entries, which may be a gripper's width; then it warns.

    Raises:
        ValueError: Names robot, entry and remedy.
    """
    for robot in {windows.config.embodiment: None for windows in data.train.datasets}:
        for kind, stats in robot_statistics(data, robot).items():
            binary = getattr(config, f"binary_{kind}_indices")
            # The variance of two values a and b is (b - mean)(mean - a); others between them make it less.
            most = (stats["max"] - stats["mean"]) * (stats["mean"] - stats["min"])
            places = range(len(most)) if robot is None else config.embodiments[robot][kind]
            for entry, place in enumerate(places):
                if place not in binary or np.isclose(stats["std"][entry] ** 2, most[entry], rtol=1e-3):
                    continue
                if robot is None:
                    warnings.warn(
                        f"entry {entry} of the {kind} has more than two values, but binary_{kind}_indices="
                        f"{list(binary)} names it: of each, only the side of the middle is learned",
                        stacklevel=2,
                    )
                else:
                    raise ValueError(
                        f"entry {entry} of the {kind} of {robot} has more than two values, but takes place "
                        f"{place} of the model's, which binary_{kind}_indices={list(binary)} names: give its "
                        f"entries other places, model.embodiments: {{{robot}: {{{kind}: [...], ...}}}}"
                    )


@torch.no_grad()
def standardize_tokens(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    data: RunData,
    windows: int = 256,
) -> None:
    """Scales and shifts each view's projections in place: outputs get mean 0 and deviation 1 over images.

    In a scene that hardly changes, what all images share is four to fifty times as large as what differs,
    and the LayerNorm after the projections preserves that ratio: a fresh tower then needs hundreds to
    thousands of steps until actions depend on its images. LSUV (Mishkin & Matas 2016) is the same idea for
    every layer.

    The images are those of up to `windows` windows of `data`, mixed as in training, and the same in
    every process.
    """
    count = min(windows, len(data.train))
    chosen = next(iter(data.sampler(count, steps=1)))
    raw = collate_windows([data.train[i] for i in sorted(chosen)])
    batch = processor.prepare_batch(raw, history_length=model.config.history_length)
    policy = model.model
    cls, patches = policy.encode_images(batch["pixel_values"])
    latents = policy.resample_patches(patches)
    for view, projection in enumerate(policy.embed_views):
        shown = batch["view_mask"][..., view]
        present = batch["frame_mask"] & (shown if shown.ndim == 2 else shown[:, None])
        if not present.any():
            continue
        for linear, features in ((projection.latents, latents), (projection.cls, cls)):
            tokens = linear(features[:, :, view][present]).flatten(0, -2)
            std, mean = torch.std_mean(tokens, dim=0)
            std = std.clamp_min(1e-3 * tokens.square().mean().sqrt())
            linear.weight /= std[:, None]
            linear.bias.copy_((linear.bias - mean) / std)
