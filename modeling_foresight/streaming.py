# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Control step by step: only new images are encoded, everything that can be kept is kept.

The original implementation encodes the whole window of T frames for every action. Here the tokens of past
images, the instruction and the goal are kept. The transformer runs over the whole window again, because the
timestep and the relative state of every frame change when the window slides (a key/value cache would not be
exact). The action is the one that `ForesightForActionPrediction.predict_action` gives, up to rounding.
"""

from collections.abc import Callable, Sequence
from types import FunctionType

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .base_model import EmbeddedInputs
from .tokens import Kind

# What a processor and its model must agree on.
SHARED = ("views", "image_size", "binary_action_indices", "action_codec", "state_representation")
SHARED += ("embodiments",)


class ForesightStream:
    """Controls one robot, or several side by side, with one policy.

    ```python
    stream = ForesightStream(model, processor)  # or model.stream(processor)
    stream.reset("open the drawer")
    while not done:
        action = stream.step({"main": main_rgb, "wrist": wrist_rgb}, state)  # (A,)
    ```

    Args:
        model (`ForesightForActionPrediction`): In evaluation mode; `auxiliary_heads=False` is enough.
        processor (`ForesightProcessor`): Its processor.
        num_envs (`int`, *optional*): Number of robots. All inputs and outputs then have this batch axis in
            front; by default there is one robot and no such axis.
        compile (`bool`): Compile the step with `torch.compile(fullgraph=True)`. The first step is slow, and
            so is one with a new camera.
        cuda_graph (`bool`): Record the step as a CUDA graph and replay it: no launch overhead. CUDA only.
        with_progress (`bool`): Predict the completed share of the instruction as well, see `progress`.
        embodiment (`str`, *optional*): The robot, of a policy for several: all of a stream are alike, so that
            states and actions have one size. Robots of another kind have a stream of their own.

    Attributes:
        state_dim (`int`): Entries of the robot's state; 0 if it has none.
        progress (`torch.Tensor`): float32 `(num_envs,)` on the CPU, of the last step `with_progress`.
    """

    def __init__(
        self,
        model: PreTrainedModel,  # not its own class: the policy imports this file
        processor: ProcessorMixin,
        num_envs: int | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        with_progress: bool = False,
        embodiment: str | None = None,
    ):
        if hasattr(model, "get_base_model"):  # peft's wrapper; the adapter is inside
            model = model.get_base_model()
        config, device = model.config, model.device
        model.require_heads(with_progress)
        if model.training:
            raise ValueError("The model is in training mode, where dropout acts: call model.eval() first.")
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a model on a CUDA device; this one is on {device}.")
        for name in SHARED:
            theirs, ours = getattr(processor, name), getattr(config, name)
            if theirs != ours:
                raise ValueError(
                    f"The processor has {name}={theirs!r}, the model {ours!r}: load both from one folder."
                )
        if num_envs is not None and num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be at least 1.")
        self.model, self.with_progress = model, with_progress
        self.processor = processor.for_embodiment(embodiment)
        self.state_dim = config.for_robot(self.processor.embodiment).state_dim
        self.single, self.num_envs = num_envs is None, num_envs or 1
        self.static, self.cuda_graph = compile or cuda_graph, cuda_graph
        self._compiled = _compile_copy(type(self)._advance) if compile else None
        self._graph: tuple | None = None  # views, static inputs, graph, outputs
        self._views: frozenset[int] = frozenset()  # cameras that a compiled or recorded step has
        # Building a layout is Python that no compiler should see.
        queries = (Kind.ACTION, Kind.PROGRESS) if with_progress else (Kind.ACTION,)
        model.model.plan_newest(config.history_length, device, queries)
        with torch.inference_mode(False):  # what is made here is changed in any mode later
            self._make_buffers()

    def _make_buffers(self) -> None:
        config, robots = self.model.config, self.num_envs
        frames, views = config.history_length, len(config.views)
        # On the device: tokens of the last T images of every view, instruction and goal.
        place = {"dtype": self.model.dtype, "device": self.model.device}
        tokens = (config.num_latents + 1, config.hidden_size)
        self._images = torch.zeros(robots, frames, views, *tokens, **place)
        self._language = torch.zeros(robots, config.hidden_size, **place)
        self._goal = torch.zeros(robots, *tokens, **place) if config.goal_image else None
        # On the host: what is small, and decides shapes and masks.
        self._goal_mask = torch.zeros(robots, dtype=torch.bool)
        self._seen = torch.zeros(robots, frames, views, dtype=torch.bool)
        self._states = torch.zeros(robots, frames, config.state_dim)
        self._with_state = torch.zeros(robots, dtype=torch.bool)
        self._count = torch.zeros(robots, dtype=torch.int64)  # frames in the window
        self._instructed = torch.zeros(robots, dtype=torch.bool)
        self.progress = torch.zeros(robots)

    @torch.no_grad()
    def reset(
        self,
        instruction: str | Sequence[str] | None = None,
        envs: Sequence[int] | None = None,
        text_features: Tensor | None = None,
    ) -> None:
        """Starts an instruction: forgets all frames and the goal.

        Args:
            instruction (`str` or `Sequence[str]`, *optional*): For all these robots, or one each.
            envs (`Sequence[int]`, *optional*): Robots that start; all by default. The others continue.
            text_features (`torch.Tensor`, *optional*): `(len(envs), text width)` in place of `instruction`,
                for a model without a text tower.
        """
        rows = self._select_robots(envs)
        if (instruction is None) == (text_features is None):
            raise ValueError("Give an instruction, or text_features in its place.")
        device = self.model.device
        if text_features is None:
            texts = [instruction] * len(rows) if isinstance(instruction, str) else list(instruction)
            if len(texts) != len(rows):
                raise ValueError(f"There are {len(texts)} instructions for {len(rows)} robots.")
            text_features = self.model.model.encode_text(*self.processor.tokenize(texts, device))
        width = self.model.config.text_config.projection_dim
        if text_features.shape != (len(rows), width):
            raise ValueError(
                f"text_features has shape {tuple(text_features.shape)}; expected {(len(rows), width)}."
            )
        if (self.model.dtype, device) != (self._images.dtype, self._images.device):
            raise ValueError("The model was moved or cast after this stream was made: make a new one.")
        if self._graph is not None and self._weights != self._weight_addresses():
            self._graph = None  # an adapter was merged, for example: the graph reads the old addresses
        language = self.model.model.embed_text(text_features.to(device))
        self._language[rows] = language.to(self._language.dtype)  # autocast gives another one
        self._count[rows] = 0
        # What is masked must still be finite: a NaN of the last episode would come back as 0 * NaN.
        for buffer in (self._images, self._states, self._seen, self._goal_mask, self._goal):
            if buffer is not None:
                buffer[rows] = 0
        self._instructed[rows] = True

    @torch.no_grad()
    def set_goal(self, image, envs: Sequence[int] | None = None) -> None:
        """Gives the robots a goal image of the first view, from the next step on.

        Args:
            image (array or tensor): uint8 RGB `(H, W, 3)` or `(3, H, W)`, with an axis for the robots if
                there are several.
            envs (`Sequence[int]`, *optional*): Robots that it is for; all by default.
        """
        if self._goal is None:
            raise ValueError("The model takes no goal images (config.goal_image is false).")
        rows = self._select_robots(envs)
        pixels = self._read_frame(image, self.processor.views[0], len(rows))
        goal = self.model.model.embed_goal_image(*self.model.model.encode_images(pixels))
        self._goal[rows] = goal.to(self._goal.dtype)
        self._goal_mask[rows] = True

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

    @torch.no_grad()
    def step_chunk(
        self,
        images: dict,
        state=None,
        envs: Sequence[int] | None = None,
        view_mask=None,
        again: bool = False,
    ) -> Tensor:
        """As [`step`], but returns the whole chunk: `(K, A)`, or `(robots, K, A)`.

        With `again` the observation replaces the newest one: the robots have not acted since.
        """
        rows = self._select_robots(envs)
        if not self._instructed[rows].all():
            raise ValueError(
                f"Robots {rows[~self._instructed[rows]].tolist()} have no instruction: call reset."
            )
        if not self._goal_mask[rows].all():
            self.model.warn_without_goal()
        pixels, views, present = self._read_observation(images, view_mask, rows)
        state = self._read_state(state, rows)
        self._instructed[rows] = False  # a step that fails ends the instruction

        history = self.model.config.history_length
        count = self._count[rows]
        stays = (count > 0) & again
        slides = (count == history) & ~stays
        slot = torch.where(stays, count - 1, count.clamp(max=history - 1))
        for buffer, new in ((self._seen, present), (self._states, state)):
            buffer[rows] = place_frame(buffer[rows], new, slot, slides)
        self._count[rows] = slot + 1

        everyone = torch.arange(self.num_envs)
        if self.static and not torch.equal(rows, everyone):  # robots that wait keep their place in the batch
            spread = [
                x.new_full((self.num_envs, *x.shape[1:]), fill).index_copy(0, rows.to(x.device), x)
                for x, fill in ((pixels, 0), (slot, -1), (slides, False))
            ]
            actions, progress = self._predict(spread[0], views, *spread[1:], everyone)
            actions, progress = actions[rows], None if progress is None else progress[rows]
        else:
            actions, progress = self._predict(pixels, views, slot, slides, rows)
        chunk = self.processor.decode_actions(actions, state=state if state.shape[-1] else None)
        if not all(x is None or x.isfinite().all() for x in (actions, chunk, progress)):
            raise ValueError(self.model.explain_broken_actions(self._named_inputs(rows)))
        if self.with_progress:
            self.progress[rows] = progress
        self._instructed[rows] = True
        return chunk[0] if self.single else chunk

    def _named_inputs(self, rows: Tensor) -> dict[str, Tensor | None]:
        """What these robots' actions depend on, by the names that users give them."""
        state = self.processor.normalize_state(self._states[rows]) if self._states.shape[-1] else None
        goal = None if self._goal is None else self._goal[rows]
        shown = {"images": self._images[rows], "goal": goal}
        return {"state": state, "the instruction's features": self._language[rows], **shown}

    def _predict(self, pixels: Tensor, views: tuple[int, ...], slot: Tensor, slides: Tensor, rows: Tensor):
        """Actions and progress of these robots, on the CPU."""
        whole = torch.equal(rows, torch.arange(self.num_envs))
        kept = {"images": self._images, "language": self._language, "goal": self._goal}
        if not whole:
            kept = {name: None if value is None else value[rows] for name, value in kept.items()}
        inputs = {
            "pixels": pixels,
            "slot": slot,
            "slides": slides,
            "frame_mask": torch.arange(self._states.shape[1]) < self._count[rows, None],
            "view_mask": self._seen[rows],
            "state_mask": self._with_state[rows],
            "goal_mask": self._goal_mask[rows],
            # Relative states are relative to the oldest frame in the window: they change at every step.
            "state": self.processor.normalize_state(self._states[rows]) if self._states.shape[-1] else None,
        }
        inputs = {name: None if x is None else x.to(self.model.device) for name, x in inputs.items()}
        if self.cuda_graph:
            actions, progress = self._replay(inputs, views, kept)
        else:
            actions, progress = self._run(inputs, kept, views)
        if not whole:
            self._images[rows] = kept["images"]
        return actions.cpu(), None if progress is None else progress.cpu()

    def _advance(
        self, pixels: Tensor, views: tuple[int, ...], slot: Tensor, slides: Tensor, images: Tensor, **window
    ) -> tuple[Tensor, Tensor | None]:
        """The step on the device: what is compiled or recorded. No shape depends on what the window holds.

        Encodes the new images `(B, v, 3, H, W)` of `views`, writes their tokens into `images` in place, at
        frame `slot` (`(B,)`; -1 for a robot that waits), after moving the window where it `slides`. `window`
        has the other fields of `EmbeddedInputs`.
        """
        model = self.model.model
        cls, patches = model.encode_images(pixels)
        tokens = model.embed_images(cls[:, None], patches[:, None], views)  # (B, 1, v, r + 1, D)
        missing = torch.zeros_like(images[:, 0, 0])
        every = range(images.shape[2])
        new = torch.stack([tokens[:, 0, views.index(v)] if v in views else missing for v in every], dim=1)
        images.copy_(place_frame(images, new, slot, slides))
        return self.model.decode_newest(EmbeddedInputs(images=images, **window), self.with_progress)

    def _run(self, inputs: dict, kept: dict, views: tuple[int, ...]):
        return (self._compiled or type(self)._advance)(self, **inputs, **kept, views=views)

    def _replay(self, inputs: dict, views: tuple[int, ...], kept: dict):
        """Replays the step's CUDA graph; records it at the first call and when a camera is new."""
        with torch.cuda.device(self.model.device):
            if self._graph is None or self._graph[0] != views:
                self._graph = (views, *self._record(inputs, views, kept))
                self._weights = self._weight_addresses()
            _, static, graph, outputs = self._graph
            for name, value in inputs.items():
                if value is not None:
                    static[name].copy_(value)
            graph.replay()
        return outputs

    def _weight_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.parameters()]

    def _record(self, inputs: dict, views: tuple[int, ...], kept: dict):
        with torch.inference_mode(False):
            static = {name: None if value is None else value.clone() for name, value in inputs.items()}
            before = self._images.clone()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries and kernels must be ready before recording
                    self._run(static, kept, views)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as cameras, may use the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self._run(static, kept, views)
        finally:
            self._images.copy_(before)
        return static, graph, outputs

    # ------------------------------------------------------------------ reading what the robots send

    def _select_robots(self, envs: Sequence[int] | None) -> Tensor:
        """Numbers of the robots, int64."""
        if envs is None:
            return torch.arange(self.num_envs)
        rows = torch.as_tensor(np.asarray(envs))
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

    def _read_frame(self, image, view: str, robots: int) -> Tensor:
        """One image of each robot -> `(robots, 3, H, W)` on the device; refuses several frames."""
        pixels = self.processor.read_images(image, view, self.single)  # (robots, 1, 3, h, w)
        if pixels.shape[:2] != (robots, 1):
            raise ValueError(
                f"The image of {view!r} holds {pixels.shape[1]} frames of {pixels.shape[0]} robots; a step "
                f"takes one new frame of each of {robots}. Whole windows go to model.predict_action."
            )
        return self.processor.normalize_images(pixels[:, 0].to(self.model.device))

    def _read_observation(self, images: dict, view_mask, rows: Tensor):
        """Pixels `(robots, v, 3, H, W)` on the device, the v views, and which of all exist `(robots, V)`."""
        names = self.processor.views
        if not isinstance(images, dict) or not images or any(view not in names for view in images):
            given = list(images) if isinstance(images, dict) else type(images).__name__
            raise ValueError(f"images has the views {given}; the model knows {names}. Give a dict.")
        given = [v for v, name in enumerate(names) if name in images]
        views = given
        if self.static:  # a camera that fails stays in the graph, as zeros; every set would need its own
            self._views |= set(given)
            views = sorted(self._views)
        blank = (len(rows), 3, self.processor.image_size, self.processor.image_size)
        pixels = [
            self._read_frame(images[names[v]], names[v], len(rows))
            if v in given
            else torch.zeros(blank, device=self.model.device)
            for v in views
        ]
        present = torch.tensor([v in given for v in range(len(names))]).expand(len(rows), -1)
        if view_mask is not None:
            view_mask = torch.as_tensor(np.asarray(view_mask), dtype=torch.bool)
            view_mask = view_mask[None] if self.single and view_mask.ndim == 1 else view_mask
            if view_mask.shape != present.shape:
                raise ValueError(
                    f"view_mask has shape {tuple(view_mask.shape)}; expected {tuple(present.shape)}."
                )
            present = present & view_mask
        # In one layout: resized images may come channels last, for which the step would compile again.
        return torch.stack(pixels, dim=1).contiguous(), tuple(views), present

    def _read_state(self, state, rows: Tensor) -> Tensor:
        """float32 `(robots, state_dim)`, zeros where there is none."""
        shape, given, running = (len(rows), self.state_dim), state is not None, self._count[rows] > 0
        if (self._with_state[rows] != given)[running].any():
            raise ValueError(
                "A state must come with every step of an instruction, or with none: reset to change that."
            )
        if not given:
            if self.processor.action_codec == "local_delta":
                raise ValueError(
                    "Actions are changes of the measured pose (local_delta): give the state at each step."
                )
            self._with_state[rows] = False
            return torch.zeros(len(rows), self._states.shape[-1])
        state = torch.as_tensor(state).to("cpu", torch.float32)
        state = state[None] if self.single and state.ndim == 1 else state
        if state.shape != shape:
            raise ValueError(f"state has shape {tuple(state.shape)}; expected {shape}.")
        if not state.isfinite().all():
            raise ValueError("state holds NaN or infinity.")
        self._with_state[rows] = True
        return self.processor.place_entries("state", state)


def place_frame(window: Tensor, new: Tensor, slot: Tensor, slides: Tensor) -> Tensor:
    """Windows `(B, T, ...)`, moved by one frame where they slide, with `new` `(B, ...)` at their `slot`.

    Args:
        window (`torch.Tensor`): `(B, T, ...)`, oldest frame first.
        new (`torch.Tensor`): `(B, ...)`.
        slot (`torch.Tensor`): int64 `(B,)`; -1 keeps a window as it is.
        slides (`torch.Tensor`): bool `(B,)`: the oldest frame leaves.
    """
    rest = (None,) * (window.ndim - 2)
    here = torch.arange(window.shape[1], device=window.device) == slot[:, None]  # (B, T)
    moved = torch.where(slides[:, None][(..., *rest)], window.roll(-1, dims=1), window)
    return torch.where(here[(..., *rest)], new[:, None], moved)


def _compile_copy(function: Callable) -> Callable:
    """Compiles a copy of a function: variants are counted per code object, and every stream has some."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return torch.compile(copy, fullgraph=True, dynamic=False)
