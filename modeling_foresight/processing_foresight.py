# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""From camera images, text and robot state to a model batch, and from predicted actions to robot commands.

The schemas of both batches, [`RawBatch`] and [`ForesightBatch`], are in `inputs.py`.
"""

import copy
import json
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import AUDIO_TOKENIZER_NAME, PROCESSOR_NAME, cached_file

from .action_codec import POSE_SIZE, gripper_is_open, relative_state, to_simulator_action
from .checkpoint_sizes import SOURCE_OPTIONS
from .configuration_foresight import (
    CHOICES,
    LARGEST_IMAGE,
    PROCESSOR_FIELDS,
    check_binary_entries,
    check_image_statistics,
    check_views,
)
from .embodiments import (
    UNCHANGED_ENTRY,
    EntryTable,
    as_plain_numbers,
    check_statistics,
    keep_statistics,
    make_table,
    place_entries,
    place_tables,
)
from .inputs import RawBatch, as_tensor, as_texts

CALL_OPTIONS = ("return_tensors",)  # of the library's processors; this one gives tensors in any case
MOST_TOKENS = 2**16
UNCHANGED = ("state_mask", "goal_mask", "action_mask", "track_start", "track", "track_weight", "progress")
MAX_CHARACTERS = 10_000  # of an instruction; a megabyte takes seconds to split, and 77 tokens are read


class ForesightProcessor(ProcessorMixin):
    """Prepares images, instructions, states and targets, and decodes actions to the dataset's units.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the text tower.
        views (`list[str]`): Camera names in the model's order; the first is the flow view.
        image_size (`int`): Side of the model's square images in pixels.
        image_mean, image_std (`list[float]`): Normalization of RGB in [0, 1].
        binary_action_indices, binary_state_indices (`list[int]`): Entries that are one of two values; they
            become 0 for the lower and 1 for the higher one.
        action_stats, state_stats (`dict[str, list[float]]`, *optional*): `mean`, `std`, `min`, `max` per
            entry, as in a LeRobot dataset's `meta/stats.json`. Without them numbers pass unchanged, and
            binary entries above one half become 1, others 0.
        max_text_length (`int`): Longer instructions are cut (CLIP takes 77 tokens).
        action_codec (`str`): What an action of the model means: `"recorded"` commands as stored, normalized;
            or `"local_delta"`, scaled motions in the gripper's own frame (`action_codec.py`), 7 numbers with
            the gripper last, never normalized by statistics.
        state_representation (`str`): `"absolute"`: all entries normalized by statistics; or `"relative"`: the
            pose in entries 0..5 is seen from the window's first frame, the other entries as before.
        embodiments (`dict`, *optional*): As in [`ForesightConfig`]: which places the entries of each robot
            take in the model's `action` and `state`.
        statistics (`dict[str, dict]`, *optional*): For each of the `embodiments` its own `action` and `state`
            statistics, in the form and the place of `action_stats` and `state_stats`.
        action_dim, state_dim (`int`, *optional*): Sizes of the model's; only with `embodiments`.
        embodiment (`str`, *optional*): The robot that this processor is for, see [`for_embodiment`].
    """

    def __init__(
        self,
        tokenizer=None,
        views=("main", "wrist"),
        image_size: int = 224,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        binary_action_indices=(),
        binary_state_indices=(),
        action_stats: dict | None = None,
        state_stats: dict | None = None,
        max_text_length: int = 77,
        action_codec: str = "recorded",
        state_representation: str = "absolute",
        embodiments: dict | None = None,
        statistics: dict | None = None,
        action_dim: int | None = None,
        state_dim: int | None = None,
        embodiment: str | None = None,
        **kwargs,
    ):
        _check_options(action_codec, state_representation, image_size, max_text_length)
        check_image_statistics(image_mean, image_std)
        check_views(views)
        action_stats, state_stats = as_plain_numbers(action_stats), as_plain_numbers(state_stats)
        statistics = statistics and {
            name: {kind: as_plain_numbers(stats) for kind, stats in robot.items()}
            for name, robot in statistics.items()
        }
        for kind, stats, binary, size in (
            ("action", action_stats, binary_action_indices, action_dim),
            ("state", state_stats, binary_state_indices, state_dim),
        ):
            check_statistics(kind, stats)
            size = len(stats["mean"]) if stats else size
            check_binary_entries(f"binary_{kind}_indices", binary, f"the size of the {kind}", size)
        self.views = list(views)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.binary_action_indices = list(binary_action_indices)
        self.binary_state_indices = list(binary_state_indices)
        self.action_stats = action_stats
        self.state_stats = state_stats
        self.max_text_length = max_text_length
        self.action_codec = action_codec
        self.state_representation = state_representation
        self.embodiments, self.statistics = embodiments, statistics
        self.action_dim, self.state_dim, self.embodiment = action_dim, state_dim, None
        sizes = {"action": action_dim, "state": state_dim}
        self._tables = place_tables(embodiments or {}, statistics or {}, sizes)
        if embodiment is not None:
            self.embodiment = self.choose_embodiment(embodiment)
        super().__init__(tokenizer, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in `transformers`, which here would load any model that an `audio_tokenizer` names."""
        options = {name: kwargs[name] for name in SOURCE_OPTIONS if kwargs.get(name) is not None}
        options["_raise_exceptions_for_missing_entries"] = False
        file = cached_file(pretrained_model_name_or_path, PROCESSOR_NAME, **options)
        named = file is not None and "audio_tokenizer" in json.loads(Path(file).read_text(encoding="utf-8"))
        if named or cached_file(pretrained_model_name_or_path, AUDIO_TOKENIZER_NAME, **options):
            raise ValueError(
                f"The processor of {pretrained_model_name_or_path} names an audio_tokenizer, a model that "
                f"would be loaded from anywhere: delete it from {PROCESSOR_NAME}, and {AUDIO_TOKENIZER_NAME}."
            )
        return super().get_processor_dict(pretrained_model_name_or_path, **kwargs)

    def for_embodiment(self, embodiment: str | None) -> "ForesightProcessor":
        """This processor for one robot: its states and actions have the robot's entries alone.

        Raises:
            ValueError: If there is no such embodiment, or it is left open which one; names those there are.
        """
        if not self.embodiments and embodiment is None:
            return self
        robot = copy.copy(self)  # the tokenizer is shared
        robot.embodiment = self.choose_embodiment(embodiment)
        return robot

    def choose_embodiment(self, embodiment: str | None = None) -> str | None:
        """The robot that is meant: the given one, the chosen one, or the only one; `None` without any.

        Raises:
            ValueError: If there is no such embodiment, or it is left open which one; names those there are.
        """
        known = sorted(self.embodiments or {})
        embodiment = embodiment or self.embodiment or (known[0] if len(known) == 1 else None)
        if embodiment in known or (embodiment is None and not known):
            return embodiment
        if not known:
            raise ValueError(f"embodiment={embodiment!r}, but this policy has one robot without a name.")
        chosen = "none is chosen" if embodiment is None else f"embodiment={embodiment!r} is not one of them"
        raise ValueError(f"This policy has the embodiments {', '.join(known)}, and {chosen}: name one.")

    @classmethod
    def from_config(
        cls, config, tokenizer, action_stats=None, state_stats=None, statistics=None
    ) -> "ForesightProcessor":
        """The processor that fits a [`ForesightConfig`].

        Args:
            config (`ForesightConfig`): Views, image size, binary entries, forms of action and state, robots.
            tokenizer (`PreTrainedTokenizerBase`): See [`build_small_tokenizer`], or CLIP's own.
            action_stats, state_stats (`dict`, *optional*): Dataset statistics. `local_delta` actions are
                not normalized, so theirs are left out.
            statistics (`dict`, *optional*): The same as `action` and `state` by embodiment, of a config with
                several.

        Raises:
            ValueError: If statistics are not finite or have another size than the config's action or state,
                or the tokenizer is not that of the text tower.
        """
        if tokenizer is not None:
            config.check_tokenizer(tokenizer)
        kept = keep_statistics(config, {"action": action_stats, "state": state_stats})
        stats = {f"{name}_stats": values for name, values in kept.items()}
        if config.embodiments:
            robots = sorted(config.embodiments)
            by_robot = {
                name: keep_statistics(config, (statistics or {}).get(name, {}), name) for name in robots
            }
            stats = {"statistics": by_robot, "action_dim": config.action_dim, "state_dim": config.state_dim}
        shared = {name: getattr(config, name) for name in PROCESSOR_FIELDS}
        length = config.text_config.max_position_embeddings
        return cls(tokenizer, max_text_length=length, **shared, **stats)

    def __call__(
        self,
        images=None,
        text=None,
        state=None,
        frame_mask=None,
        goal_image=None,
        device=None,
        embodiment=None,
        **targets,
    ) -> BatchFeature:
        """A [`ForesightBatch`] of one observation or a window, of one robot or several.

        Args:
            images (`dict[str, array]`): View name -> uint8 RGB, channels first or last, as array, tensor or
                PIL image: `(H, W, 3)` for one observation, `(T, H, W, 3)` for a window.
            text (`str` or `list[str]`): Instruction. With a list, one per sample, all other inputs have a
                batch axis in front. Without a text tower it is not read, only `text_features` are.
            state (`array`, *optional*): `(state_dim,)` or `(T, state_dim)`, in the dataset's units.
            frame_mask (`array`, *optional*): `(T,)`: real frames; padding is at the end.
            goal_image (`array`, *optional*): uint8 RGB of the first view, `(H, W, 3)`.
            device (`torch.device`, *optional*): Where the batch goes.
            embodiment (`str`, *optional*): The robot of all samples, if the policy has several.
            **targets: Other keys of [`RawBatch`], with a batch axis; `actions` with the robot's own entries.

        Raises:
            TypeError: If an argument is not known; the message names the one closest to it.
            ValueError: As [`prepare_batch`], or if images or text are missing.
        """
        for name in targets:
            if name not in RawBatch.__annotations__ and name not in CALL_OPTIONS:
                near = get_close_matches(name, ["goal_image", *RawBatch.__annotations__], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {list(RawBatch.__annotations__)}."
                raise TypeError(f"ForesightProcessor takes no argument {name!r}: {hint}")
        if not isinstance(images, dict) or not images or text is None:
            raise ValueError(f"Give images as a dict from view name ({self.views}) to pixels, and a text.")
        single = isinstance(text, str)
        raw = {"task": as_texts(text), **{name: _read_target(name, x) for name, x in targets.items()}}
        if (embodiment := self.choose_embodiment(embodiment)) is not None:
            raw["embodiment"] = [embodiment] * len(raw["task"])
        raw["images"] = {view: self.read_images(pixels, view, single) for view, pixels in images.items()}
        frames = next(iter(raw["images"].values())).shape[1]
        if state is not None:
            state = as_tensor(state, "state").to(torch.float32)
            state = self.place_entries("state", state[None] if single else state, embodiment)
            raw["state"] = state[:, None] if state.ndim == 2 else state
        if raw.get("actions") is not None:
            raw["actions"] = self.place_entries("action", raw["actions"], embodiment)
        if frame_mask is not None:
            frame_mask = as_tensor(frame_mask, "frame_mask").bool()
            raw["frame_mask"] = frame_mask[None] if single else frame_mask
        if goal_image is not None:
            raw["goal_image"] = self.read_images(goal_image, self.views[0], single)[:, 0]
        return self.prepare_batch(raw, device=device, history_length=frames)

    def prepare_batch(self, raw: dict, device=None, history_length: int | None = None) -> BatchFeature:
        """[`RawBatch`] -> [`ForesightBatch`], on `device`.

        Images travel to the device as uint8 and are resized and normalized there.

        Args:
            raw (`dict`): A raw batch; unknown keys are left out.
            device (`torch.device`, *optional*): Where the batch goes.
            history_length (`int`, *optional*): T. Frames beyond it are lookahead. By default T is taken from
                `state`, `actions`, `progress` or `track`; without them all frames belong to the window.

        Raises:
            ValueError: If a view is unknown, no view is there, or sizes do not fit; the message names them.
        """
        batch, all_frames = self._check_views(raw)
        if len(raw["task"]) != batch:
            raise ValueError(
                f"There are {len(raw['task'])} instructions for {batch} samples; expected one each."
            )
        timed = [raw[key] for key in ("state", "actions", "progress", "track") if raw.get(key) is not None]
        frames = history_length or (timed[0].shape[1] if timed else all_frames)
        result = {key: _send(raw[key], device) for key in UNCHANGED if raw.get(key) is not None}
        present = torch.tensor([view in raw["images"] for view in self.views]).repeat(batch, 1)
        if raw.get("view_mask") is not None:
            given, asked = raw["view_mask"].bool(), (batch, len(self.views))
            if given.shape not in (asked, (batch, frames, len(self.views))):  # others would be broadcast
                raise ValueError(
                    f"view_mask has shape {tuple(given.shape)}; expected {asked}, or {frames} frames between."
                )
            present = (present if given.ndim == 2 else present[:, None]) & given.to(present.device)
        result["view_mask"] = _send(present, device)

        frame_mask = raw.get("frame_mask")
        frame_mask = torch.ones(batch, all_frames, dtype=torch.bool) if frame_mask is None else frame_mask
        if tuple(frame_mask.shape) != (batch, all_frames):
            raise ValueError(
                f"frame_mask has shape {tuple(frame_mask.shape)}; images ask for {(batch, all_frames)}."
            )
        if frame_mask.device.type == "cpu":  # a step would wait for the answer of a GPU
            _check_padding(frame_mask[:, :frames].bool())
        frame_mask = _send(frame_mask, device)
        pixels = self._stack_views(raw["images"], self.normalize_images, (3,), device)
        result["pixel_values"], result["frame_mask"] = pixels[:, :frames], frame_mask[:, :frames]
        later = all_frames > frames
        if later:
            result["lookahead_pixel_values"] = pixels[:, frames:]
            result["lookahead_mask"] = frame_mask[:, frames:]
        if raw.get("depth"):
            depth = self._stack_views(raw["depth"], self.resize_depth, (), device)
            result["depth"] = depth[:, :frames]
            if later:
                result["lookahead_depth"] = depth[:, frames:]
        if raw.get("goal_image") is not None:
            result["goal_pixel_values"] = self.normalize_images(_send(raw["goal_image"], device))
        robots = raw.get("embodiment")
        if self.embodiments:
            robots = robots or [self.choose_embodiment()] * batch
            numbers = [list(self._tables).index(self.choose_embodiment(robot)) for robot in robots]
            result["embodiment"] = _send(torch.tensor(numbers), device)
        if raw.get("state") is not None:
            state = self._pad_entries("state", _send(raw["state"], device))
            result["state"] = self.normalize_state(state, robots)
        if raw.get("actions") is not None:
            actions = self._pad_entries("action", _send(raw["actions"], device))
            actions = self.normalize_actions(actions, robots)
            if "action_mask" in result:  # not by a product, which would keep NaN
                actions = torch.where(result["action_mask"][..., None] > 0, actions, 0.0)
            result["actions"] = actions
        if raw.get("text_features") is not None:
            result["text_features"] = _send(raw["text_features"], device)
        else:
            result["input_ids"], result["attention_mask"] = self.tokenize(raw["task"], device)
        return BatchFeature(result)

    def _check_views(self, raw: dict) -> tuple[int, int]:
        """Batch and frames of images and depth; refuses views that are unknown or differ in them."""
        counts = {}
        for kind in ("images", "depth"):
            views = raw.get(kind) or {}
            if unknown := [view for view in views if view not in self.views]:
                raise ValueError(f"{kind} has the views {unknown}; the model knows {self.views}.")
            counts |= {f"{kind}[{view!r}]": tuple(pixels.shape[:2]) for view, pixels in views.items()}
            if kind == "images" and not counts:
                raise ValueError(f"images has no view; the model knows {self.views}.")
        for view, depth in (raw.get("depth") or {}).items():
            if not depth.is_floating_point():
                raise ValueError(f"depth[{view!r}] has dtype {depth.dtype}; expected meters, a float.")
        if len(set(counts.values())) > 1:
            raise ValueError(f"The views differ in (batch, frames): {counts}.")
        return next(iter(counts.values()))

    def _pad_entries(self, kind: str, values: Tensor) -> Tensor:
        """Zeros at the places beyond those of the robots in `values` `(..., A)`, as mixtures give them."""
        if not self.embodiments:
            return values
        size = getattr(self, f"{kind}_dim")
        used = 1 + max((place for robot in self.embodiments.values() for place in robot[kind]), default=-1)
        if values.shape[-1] not in (size, used):
            raise ValueError(
                f"{kind} has {values.shape[-1]} entries (shape {tuple(values.shape)}); this policy for "
                f"several robots has {size}: place_batch puts those of one robot at their places."
            )
        return F.pad(values, (0, size - values.shape[-1]))

    def tokenize(self, texts: list[str], device=None) -> tuple[Tensor, Tensor]:
        """Instructions -> `input_ids` and `attention_mask`, int64 `(B, length)`; cuts long ones and warns."""
        if self.tokenizer.init_kwargs.get("is_placeholder"):
            raise ValueError(
                "This processor has no tokenizer yet: set processor.tokenizer to the text tower's (for "
                "GR-MG CLIP's, openai/clip-vit-base-patch32), or convert the checkpoint with --tokenizer."
            )
        texts = as_texts(texts)
        if (longest := max(map(len, texts), default=0)) > MAX_CHARACTERS:
            raise ValueError(
                f"An instruction has {longest} characters ('{max(texts, key=len)[:40]}...'); the limit is "
                f"{MAX_CHARACTERS}: use fewer words."
            )
        text = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_text_length, return_tensors="pt"
        )
        if text["input_ids"].shape[1] == self.max_text_length:
            self._warn_about_cut_texts(texts)
        return _send(text["input_ids"], device), _send(text["attention_mask"], device)

    def _warn_about_cut_texts(self, texts: list[str]) -> None:
        for text, tokens in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(tokens) > self.max_text_length:
                warnings.warn(
                    f"The instruction '{text[:60]}...' has {len(tokens)} tokens, but the text tower reads "
                    f"{self.max_text_length} and never sees its end: use fewer words.",
                    stacklevel=3,
                )

    def normalize_images(self, images: Tensor) -> Tensor:
        """uint8 RGB `(..., 3, h, w)` -> float32 `(..., 3, image_size, image_size)`, normalized.

        Bicubic resize without antialiasing and without clamping, as the released GR-MG weights expect.
        """
        if images.dtype != torch.uint8 or images.ndim < 4 or images.shape[-3] != 3:
            raise ValueError(
                f"Images have dtype {images.dtype} and shape {tuple(images.shape)}; expected uint8 RGB in "
                "0..255 of shape (..., 3, height, width)."
            )
        lead = images.shape[:-3]
        # In place: of a batch of windows every further copy is tens of megabytes, slower than the arithmetic.
        images = images.flatten(0, -4).float().div_(255)
        if torch.compiler.is_exporting() or images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=(self.image_size,) * 2, mode="bicubic", align_corners=False)
        mean, std = (_cached_tensor(tuple(x), images.device) for x in (self.image_mean, self.image_std))
        return images.sub_(mean[:, None, None]).div_(std[:, None, None]).unflatten(0, lead)

    def resize_depth(self, depth: Tensor) -> Tensor:
        """Meters `(..., h, w)` -> float32 `(..., image_size, image_size)`, see [`resize_depth`]."""
        return resize_depth(depth, (self.image_size, self.image_size))

    def place_entries(self, kind: str, values: Tensor, embodiment: str | None = None) -> Tensor:
        """A robot's own entries `(..., n)` of `action` or `state` at the places of the model's, others zero.

        Unchanged without `embodiments`.
        """
        name = self.choose_embodiment(embodiment)
        if name is None:
            return values
        places = self.embodiments[name][kind]
        if values.shape[-1] != len(places):
            raise ValueError(
                f"{kind} has {values.shape[-1]} entries (shape {tuple(values.shape)}); the embodiment {name} "
                f"has {len(places)}."
            )
        return place_entries(values, places, getattr(self, f"{kind}_dim"))

    def place_batch(self, raw: dict, embodiment: str | None = None) -> dict:
        """A raw batch of one robot with its own entries as [`prepare_batch`] takes it."""
        if (name := self.choose_embodiment(embodiment)) is None:
            return raw
        placed = {**raw, "embodiment": [name] * len(raw["task"])}
        for key, kind in (("state", "state"), ("actions", "action")):
            if raw.get(key) is not None:
                placed[key] = self.place_entries(kind, raw[key], name)
        return placed

    def own_statistics(self, kind: str) -> dict | None:
        """Statistics of `action` or `state` of the robot that this processor is for, if there are any."""
        name = self.choose_embodiment()
        return getattr(self, f"{kind}_stats") if name is None else (self.statistics or {})[name].get(kind)

    def own_binary_entries(self, kind: str) -> list[int]:
        """Binary entries of `action` or `state` of the robot that this processor is for."""
        binary, name = getattr(self, f"binary_{kind}_indices"), self.choose_embodiment()
        if name is None:
            return binary
        return [entry for entry, place in enumerate(self.embodiments[name][kind]) if place in binary]

    def take_entries(self, kind: str, values: Tensor, embodiment: str | None = None) -> Tensor:
        """Inverse of [`place_entries`]: a robot's own entries `(..., n)` of the model's."""
        name = self.choose_embodiment(embodiment)
        return values if name is None else values[..., self.embodiments[name][kind]]

    def normalize_actions(self, actions: Tensor, embodiment: str | Sequence[str] | None = None) -> Tensor:
        """Dataset units `(..., A)` -> zero mean, unit deviation; binary entries become 0 or 1.

        `local_delta` actions are unchanged: they are scaled already and their gripper is 0 or 1. With
        `embodiments` the entries are at the places of the model's, and places that the robot lacks are zero;
        `embodiment` is the robot of all, or one for each of the first axis.
        """
        if self.action_codec == "local_delta":
            return actions.float()
        table = self._read_statistics("action", actions, embodiment)
        return _normalize(actions, table, self.binary_action_indices)

    def denormalize_actions(self, actions: Tensor, embodiment: str | Sequence[str] | None = None) -> Tensor:
        """Inverse of [`normalize_actions`], for comparing predictions with a raw batch's `actions`.

        Args:
            actions (`torch.Tensor`): `(..., A)` as the model predicts them; logits at binary entries.
            embodiment (`str` or `Sequence[str]`, *optional*): As in [`normalize_actions`].

        Returns:
            `torch.Tensor`: float32 `(..., A)`; binary entries are the lower or, for a probability above one
            half, the higher of the dataset's two values (0 or 1 without statistics and for `local_delta`).
            Entries that never varied in the dataset keep their value.
        """
        actions = actions.float()
        # The only place where logits are read: a logit above 0 is a probability above one half.
        binary, is_high = _entry_mask(self.binary_action_indices, actions), actions > 0
        table = self._read_statistics("action", actions, embodiment)
        if table is None or self.action_codec == "local_delta":
            return torch.where(binary, is_high.float(), actions)
        moving = torch.where(table.still, table.mean, actions * table.divisor + table.mean)
        return torch.where(binary, torch.where(is_high, table.high, table.low), moving)

    def normalize_state(self, state: Tensor, embodiment: str | Sequence[str] | None = None) -> Tensor:
        """Dataset units -> zero mean, unit deviation; binary entries become 0 or 1.

        Args:
            state (`torch.Tensor`): `(..., state_dim)`. For `relative` states whole windows `(..., T,
                state_dim)`, oldest first: entries 0..5 become `action_codec.relative_state`, meters and
                radians from frame 0, without statistics. Padded frames are masked later.
            embodiment (`str` or `Sequence[str]`, *optional*): As in [`normalize_actions`].
        """
        state = state.float()
        table = self._read_statistics("state", state, embodiment)
        result = _normalize(state, table, self.binary_state_indices)
        if self.state_representation == "absolute":
            return result
        if table is None:  # as after the conversion of a GR-MG checkpoint
            binary = _entry_mask(self.binary_state_indices, state)
            result = torch.where(binary, gripper_is_open(state).float(), result)
        return torch.cat([relative_state(state)[..., :POSE_SIZE], result[..., POSE_SIZE:]], dim=-1)

    def decode_actions(
        self, actions: Tensor, state: Tensor | None = None, embodiment: str | None = None
    ) -> Tensor:
        """Predictions of `ForesightForActionPrediction.predict_action` -> robot commands.

        Args:
            actions (`torch.Tensor`): `(..., A)` as the model predicts them; logits at binary entries. For
                `local_delta` chunks `(..., K, 7)`.
            state (`torch.Tensor`, *optional*): `(..., state_dim)` *current* state in the dataset's units, not
                normalized; `local_delta` needs it, other codecs ignore it.
            embodiment (`str`, *optional*): The robot of all, if the policy has several.

        Returns:
            `torch.Tensor`: float32, the same shape, or with a robot's own entries alone. `recorded`: as
            [`denormalize_actions`]. `local_delta`: CALVIN's relative actions
            (`action_codec.to_simulator_action`).
        """
        decoded = self.take_entries("action", self.denormalize_actions(actions, embodiment), embodiment)
        if self.action_codec == "recorded":
            return decoded
        if state is None:
            raise ValueError(
                "local_delta actions are motions in the gripper's own frame: pass the current state "
                "(..., state_dim) in the dataset's units, decode_actions(actions, state)."
            )
        return to_simulator_action(decoded, as_tensor(state, "state").to(decoded.device).float())

    def _read_statistics(
        self, kind: str, like: Tensor, embodiment: str | Sequence[str] | None = None
    ) -> EntryTable | None:
        """Tensors that broadcast to `like` `(..., A)`, on its device; `None` without statistics."""
        if self.embodiments and not isinstance(
            embodiment, str | None
        ):  # one robot for each of the first axis
            each = [self._read_statistics(kind, like, robot) for robot in embodiment]
            lead = (len(each), *[1] * (like.ndim - 2), -1)
            return EntryTable(*(torch.stack(values).view(lead) for values in zip(*each, strict=True)))
        if self.embodiments:
            table = self._tables[self.choose_embodiment(embodiment)][kind]
        elif (stats := getattr(self, f"{kind}_stats")) is not None:
            table = make_table(stats)
        else:
            return None
        if like.shape[-1] != len(table.mean):
            raise ValueError(
                f"{kind} has {like.shape[-1]} entries (shape {tuple(like.shape)}); expected "
                f"{len(table.mean)} as in the processor's statistics."
            )
        *numbers, still = table
        tensors = (_cached_tensor(values, like.device) for values in numbers)
        return EntryTable(*tensors, _cached_tensor(still, like.device, torch.bool))

    def _stack_views(self, views: dict[str, Tensor], prepare, channels: tuple[int, ...], device) -> Tensor:
        """Views `(B, frames, ...)` of any size -> `(B, frames, V, ..., H, W)`; absent ones are zeros."""
        shape = (*next(iter(views.values())).shape[:2], *channels, self.image_size, self.image_size)
        stacked = [
            prepare(_send(views[view], device)) if view in views else torch.zeros(shape, device=device)
            for view in self.views
        ]
        return torch.stack(stacked, dim=2)

    def read_images(self, pixels, view: str, single: bool) -> Tensor:
        """Images of one view as array, tensor or PIL image -> uint8 `(B, T, 3, h, w)`; see [`__call__`]."""
        if pixels is None:
            raise ValueError(f"images[{view!r}] is None: leave a missing view out.")
        pixels = as_tensor(pixels, f"images[{view!r}] (uint8 RGB, all of one size, none missing)")
        if pixels.dtype != torch.uint8:
            raise ValueError(f"images[{view!r}] has dtype {pixels.dtype}; expected uint8 RGB in 0..255.")
        pixels = pixels[None] if single else pixels
        pixels = pixels[:, None] if pixels.ndim == 4 else pixels
        if pixels.ndim != 5 or 3 not in (pixels.shape[-1], pixels.shape[-3]) or not pixels.numel():
            raise ValueError(
                f"images[{view!r}] has shape {tuple(pixels.shape)} (with batch and time axes); expected "
                "(batch, time, height, width, 3) or (batch, time, 3, height, width), the batch axis only if "
                "text is a list."
            )
        return pixels if pixels.shape[-3] == 3 else pixels.movedim(-1, -3)


def _check_options(action_codec, state_representation, image_size, max_text_length) -> None:
    """Refuses unknown forms of action and state, and sizes that are no sizes."""
    for name, given in (("action_codec", action_codec), ("state_representation", state_representation)):
        if given not in CHOICES[name]:
            raise ValueError(f"{name}={given!r} is unknown; choose one of {list(CHOICES[name])}.")
    for name, number, most in (
        ("image_size", image_size, LARGEST_IMAGE),
        ("max_text_length", max_text_length, MOST_TOKENS),
    ):
        if type(number) is not int or not 1 <= number <= most:
            raise ValueError(f"{name}={number!r} must be a whole number from 1 to {most}.")


def resize_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Meters `(..., h, w)` -> float32 `(..., *size)`, by nearest neighbor: edges stay true."""
    if tuple(depth.shape[-2:]) == tuple(size):
        return depth.float()
    flat = depth.float().reshape(-1, 1, *depth.shape[-2:])
    return F.interpolate(flat, size=size, mode="nearest-exact").reshape(*depth.shape[:-2], *size)


def _read_target(name: str, values):
    """An entry of a raw batch as tensors; depth has one per view."""
    if values is None or name in ("task", *CALL_OPTIONS):
        return values
    if isinstance(values, dict):
        return {view: as_tensor(value, f"{name}[{view!r}]") for view, value in values.items()}
    return as_tensor(values, name)


def _send(values: Tensor, device) -> Tensor:
    # A copy to a GPU need not be waited for; a copy from one must.
    return values.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


@lru_cache(maxsize=1024)
def _cached_tensor(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that is copied to its device once. `dtype`: to the cache (0.0, 1.0) equals (False, True)."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def _check_padding(real: Tensor) -> None:
    """Refuses windows `(B, T)` that begin with padding, as LeRobot's do, or have some between frames."""
    if not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError(
            f"frame_mask is {real.int().tolist()}; each window begins with a real frame, the oldest, and has "
            "its padding at the end."
        )


def _entry_mask(indices: list[int], like: Tensor) -> Tensor:
    """Boolean `(A,)`, true at `indices`."""
    return _cached_tensor(tuple(i in indices for i in range(like.shape[-1])), like.device, torch.bool)


def _normalize(values: Tensor, table: EntryTable | None, binary: list[int]) -> Tensor:
    values, table = values.float(), table or UNCHANGED_ENTRY
    is_high = values > (table.low + table.high) / 2
    return torch.where(_entry_mask(binary, values), is_high.float(), (values - table.mean) / table.divisor)


def build_small_tokenizer(
    texts: list[str], vocab_size: int = 512, max_length: int = 77
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a dataset's instructions: nothing to download, no unknown words.

    Words of the instructions become single tokens; other text falls back to smaller pieces, down to bytes.
    Start and end of text are marked as CLIP does.

    Args:
        texts (`list[str]`): Instructions of the dataset.
        vocab_size (`int`): At most this many tokens; 259 of them are bytes and special tokens.
        max_length (`int`): Longest instruction in tokens.
    """
    # The end-of-text id must not be 2, which transformers' CLIP treats as a legacy case.
    special = ["<|startoftext|>", "<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    start, end = (tokenizer.token_to_id(token) for token in special[:2])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], start), (special[1], end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        model_max_length=max_length,
    )


def fit_small_tokenizer(texts: list[str], text_config: dict | None) -> tuple[PreTrainedTokenizerFast, dict]:
    """[`build_small_tokenizer`] for a text tower, and the tower's config with its vocabulary."""
    given = text_config or {}
    tokenizer = build_small_tokenizer(texts, max_length=given.get("max_position_embeddings", 77))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tokenizer, {**given, "vocab_size": len(tokenizer), **special}
