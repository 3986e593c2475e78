# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Reads what robots send to a stream and refuses what does not fit: the same for every way to act."""

import abc
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from transformers import ProcessorMixin

from .configuration_foresight import PROCESSOR_FIELDS
from .inputs import as_tensor, as_texts


class RobotStream(abc.ABC):
    """Controls one robot, or several side by side.

    Args:
        model: The policy, which has a `config`.
        processor (`ForesightProcessor`): Its processor.
        num_envs (`int`, *optional*): Number of robots; by default one, without a batch axis.
        embodiment (`str`, *optional*): The robot, of a policy for several.

    Raises:
        ValueError: If they do not fit each other; names what differs.
    """

    def __init__(self, model, processor: ProcessorMixin, num_envs: int | None, embodiment: str | None):
        if not hasattr(processor, PROCESSOR_FIELDS[0]):
            raise ValueError(f"The processor is a {type(processor).__name__}: give the ForesightProcessor.")
        for name in PROCESSOR_FIELDS:
            theirs, ours = getattr(processor, name), getattr(model.config, name)
            if theirs != ours:
                raise ValueError(
                    f"The processor has {name}={theirs!r}, the model {ours!r}: load both from one folder."
                )
        is_count = isinstance(num_envs, Integral) and not isinstance(num_envs, bool) and num_envs >= 1
        if num_envs is not None and not is_count:
            raise ValueError(f"num_envs={num_envs!r} must be a whole number of at least 1.")
        model.config.check_tokenizer(processor.tokenizer)
        self.model, self.processor = model, processor.for_embodiment(embodiment)
        self.state_dim = model.config.for_robot(self.processor.embodiment).state_dim
        self.single, self.num_envs = num_envs is None, num_envs or 1
        with torch.inference_mode(False):  # what is made here is changed in any mode later
            self._instructed = torch.zeros(self.num_envs, dtype=torch.bool)

    def step(self, images: dict, state=None, envs: Sequence[int] | None = None, view_mask=None) -> Tensor:
        """Reads one observation of every robot and returns its next action.

        Args:
            images (`dict[str, array]`): View name -> uint8 RGB `(H, W, 3)` or `(3, H, W)`, with an axis for
                the robots if there are several. A view that is left out is missing at this step.
            state (`array`, *optional*): `(state_dim,)` or `(robots, state_dim)` in the dataset's units;
                left out for the whole instruction if there is none.
            envs (`Sequence[int]`, *optional*): Robots that observe and act, in the order of the inputs; all
                by default. The others are unchanged.
            view_mask (`array`, *optional*): Boolean `(robots, V)`: false where a robot lacks a camera.

        Returns:
            `torch.Tensor`: float32 `(A,)`, or `(robots, A)`, in the dataset's units, on the CPU.

        Raises:
            ValueError: If an input does not fit or is not finite, or the action would not be; names it.
        """
        return self.step_chunk(images, state, envs, view_mask)[..., 0, :]

    @abc.abstractmethod
    def step_chunk(
        self,
        images: dict,
        state=None,
        envs: Sequence[int] | None = None,
        view_mask=None,
        again: bool = False,
    ) -> Tensor:
        """Reads one observation of every robot and returns its next chunk of actions.

        Args:
            images, state, envs, view_mask: As of [`step`].
            again (`bool`): Whether the observation replaces the newest one: the robots have not acted since.

        Returns:
            `torch.Tensor`: float32 `(K, A)`, or `(robots, K, A)`, in the dataset's units, on the CPU.

        Raises:
            ValueError: As [`step`].
        """

    def _select_robots(self, envs: Sequence[int] | None) -> Tensor:
        """Numbers of the robots, int64."""
        if envs is None:
            return torch.arange(self.num_envs)
        rows = as_tensor(envs, "envs").cpu()
        if rows.dtype == torch.bool and rows.shape == (self.num_envs,):
            rows = rows.nonzero()[:, 0]
        if rows.ndim != 1 or rows.dtype == torch.bool or (rows.is_floating_point() and len(rows)):
            raise ValueError(
                f"envs={envs} must be numbers of robots, or one boolean for each of the {self.num_envs}."
            )
        rows = rows.to(torch.int64)
        if len(rows) != len(rows.unique()) or len(rows) == 0 or rows.min() < 0 or rows.max() >= self.num_envs:
            raise ValueError(
                f"envs={rows.tolist()} must name robots of 0 to {self.num_envs - 1}, each at most once."
            )
        return rows

    def _require_instruction(self, rows: Tensor) -> None:
        """Refuses robots that nothing was told, or whose last step failed."""
        if not self._instructed[rows].all():
            raise ValueError(
                f"Robots {rows[~self._instructed[rows]].tolist()} have no instruction: call reset."
            )

    def _read_instruction(
        self, instruction, text_features, robots: int
    ) -> tuple[list[str] | None, Tensor | None]:
        """An instruction of each robot, or features `(robots, text width)` in their place."""
        if (instruction is None) == (text_features is None):
            raise ValueError("Give an instruction, or text_features in its place.")
        if text_features is None:
            texts = as_texts(instruction) * (robots if isinstance(instruction, str) else 1)
            if len(texts) != robots:
                raise ValueError(f"There are {len(texts)} instructions for {robots} robots.")
            return texts, None
        shape = (robots, self.model.config.text_config.projection_dim)
        features = as_tensor(text_features, "text_features")
        if features.shape != shape:
            raise ValueError(f"text_features has shape {tuple(features.shape)}; expected {shape}.")
        return None, features

    def _read_goal(self, image, robots: int) -> Tensor:
        """A goal image of each robot -> uint8 `(robots, 3, h, w)`, of a policy that takes some."""
        if not self.model.config.goal_image:
            raise ValueError("The model takes no goal images (config.goal_image is false).")
        return self._read_frame(image, self.processor.views[0], robots)

    def _read_frame(self, image, view: str, robots: int) -> Tensor:
        """One image of each robot -> uint8 `(robots, 3, h, w)`; refuses several frames."""
        pixels = self.processor.read_images(image, view, self.single)  # (robots, 1, 3, h, w)
        if pixels.shape[:2] != (robots, 1):
            raise ValueError(
                f"The image of {view!r} holds {pixels.shape[1]} frames of {pixels.shape[0]} robots; a step "
                f"takes one new frame of each of {robots}. Whole windows go to model.predict_action."
            )
        return pixels[:, 0]

    def _read_observation(self, images: dict, view_mask, robots: int) -> tuple[dict[str, Tensor], Tensor]:
        """Frames uint8 `(robots, 3, h, w)` of the given views, and which of all exist `(robots, V)`."""
        names = self.processor.views
        if not isinstance(images, dict) or not images or any(view not in names for view in images):
            given = list(images) if isinstance(images, dict) else type(images).__name__
            raise ValueError(f"images has the views {given}; the model knows {names}. Give a dict.")
        frames = {view: self._read_frame(image, view, robots) for view, image in images.items()}
        present = torch.tensor([view in images for view in names]).expand(robots, -1)
        if view_mask is not None:
            view_mask = as_tensor(view_mask, "view_mask").to("cpu", torch.bool)
            view_mask = view_mask[None] if self.single and view_mask.ndim == 1 else view_mask
            if view_mask.shape != present.shape:
                raise ValueError(
                    f"view_mask has shape {tuple(view_mask.shape)}; expected {tuple(present.shape)}."
                )
            present = present & view_mask
        return frames, present

    def _read_state(self, state, robots: int) -> Tensor:
        """float32 `(robots, state_dim)`, in the dataset's units."""
        state, shape = as_tensor(state, "state").to("cpu", torch.float32), (robots, self.state_dim)
        state = state[None] if self.single and state.ndim == 1 else state
        if state.shape != shape:
            raise ValueError(f"state has shape {tuple(state.shape)}; expected {shape}.")
        if not state.isfinite().all():
            raise ValueError("state holds NaN or infinity.")
        return state
