# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Control step by step: only new images are encoded, everything that can be kept is kept.

The original implementation encodes the whole window of T frames for every action. Here the tokens of past
images, the instruction and the goal are kept. The transformer runs over the whole window again, because the
timestep and the relative state of every frame change when the window slides (a key/value cache would not be
exact). The action is the one that `ForesightForActionPrediction.predict_action` gives, up to rounding.
"""

from collections.abc import Callable, Sequence
from types import FunctionType

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .base_model import EmbeddedInputs
from .robot_stream import RobotStream
from .tokens import Kind


class ForesightStream(RobotStream):
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
        self._refuse_training(model)
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a model on a CUDA device; this one is on {device}.")
        super().__init__(model, processor, num_envs, embodiment)
        self.with_progress = with_progress
        self.static, self.cuda_graph = compile or cuda_graph, cuda_graph
        self._compiled = _compile_copy(type(self)._advance) if compile else None
        self._graph: tuple | None = None  # views, static inputs, graph, outputs
        self._views: frozenset[int] = frozenset()  # cameras that a compiled or recorded step has
        # Building a layout is Python that no compiler should see.
        queries = (Kind.ACTION, Kind.PROGRESS) if with_progress else (Kind.ACTION,)
        model.model.plan_newest(config.history_length, device, queries)
        with torch.inference_mode(False):  # what is made here is changed in any mode later
            self._make_buffers()

    @staticmethod
    def _refuse_training(model: PreTrainedModel) -> None:
        if model.training:
            raise ValueError("The model is in training mode, where dropout acts: call model.eval() first.")

    @property
    def is_outdated(self) -> bool:
        """Whether the model was moved or cast after this stream was made: then a new one is needed."""
        return (self.model.dtype, self.model.device) != (self._images.dtype, self._images.device)

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

        Raises:
            ValueError: If an instruction does not fit, or the model was moved, cast or set to training.
        """
        self._refuse_training(self.model)
        rows = self._select_robots(envs)
        texts, features = self._read_instruction(instruction, text_features, len(rows))
        device = self.model.device
        if features is None:
            features = self.model.model.encode_text(*self.processor.tokenize(texts, device))
        if self.is_outdated:
            raise ValueError("The model was moved or cast after this stream was made: make a new one.")
        if self._graph is not None and self._weights != self._weight_addresses():
            self._graph = None  # an adapter was merged, for example: the graph reads the old addresses
        language = self.model.model.embed_text(features.to(device))
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
        rows = self._select_robots(envs)
        pixels = self._normalize_frame(self._read_goal(image, len(rows)))
        goal = self.model.model.embed_goal_image(*self.model.model.encode_images(pixels))
        self._goal[rows] = goal.to(self._goal.dtype)
        self._goal_mask[rows] = True

    @torch.no_grad()
    def step_chunk(
        self,
        images: dict,
        state=None,
        envs: Sequence[int] | None = None,
        view_mask=None,
        again: bool = False,
    ) -> Tensor:
        """See `RobotStream.step_chunk`."""
        self._refuse_training(self.model)
        rows = self._select_robots(envs)
        self._require_instruction(rows)
        if not self._goal_mask[rows].all():
            self.model.warn_without_goal()
        frames, present = self._read_observation(images, view_mask, len(rows))
        state = self._place_state(state, rows)
        pixels, views = self._normalize_frames(frames, len(rows))
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
            self.progress = self.progress.index_copy(0, rows, progress.float())  # earlier ones stay as read
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

    def _normalize_frame(self, frame: Tensor) -> Tensor:
        """uint8 `(robots, 3, h, w)` -> `(robots, 3, H, W)` on the device."""
        return self.processor.normalize_images(frame.to(self.model.device))

    def _normalize_frames(self, frames: dict[str, Tensor], robots: int) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels `(robots, v, 3, H, W)` on the device, and the numbers of these views."""
        names, device = self.processor.views, self.model.device
        views = [v for v, name in enumerate(names) if name in frames]
        if self.static:  # a camera that fails stays in the graph, as zeros; every set would need its own
            self._views |= set(views)
            views = sorted(self._views)
        blank = (robots, 3, self.processor.image_size, self.processor.image_size)
        pixels = [
            self._normalize_frame(frames[names[v]])
            if names[v] in frames
            else torch.zeros(blank, device=device)
            for v in views
        ]
        # In one layout: resized images may come channels last, for which the step would compile again.
        return torch.stack(pixels, dim=1).contiguous(), tuple(views)

    def _place_state(self, state, rows: Tensor) -> Tensor:
        """float32 `(robots, the model's entries)`, zeros where there is no state."""
        given, running = state is not None, self._count[rows] > 0
        if (self._with_state[rows] != given)[running].any():
            raise ValueError(
                "A state must come with every step of an instruction, or with none: reset to change that."
            )
        if not given and self.processor.action_codec == "local_delta":
            raise ValueError(
                "Actions are changes of the measured pose (local_delta): give the state at each step."
            )
        read = self._read_state(state, len(rows)) if given else None
        self._with_state[rows] = given
        if read is None:
            return torch.zeros(len(rows), self._states.shape[-1])
        return self.processor.place_entries("state", read)


def place_frame(window: Tensor, new: Tensor, slot: Tensor, slides: Tensor) -> Tensor:
    """Windows `(B, T, ...)`, moved by one frame where they slide, with `new` `(B, ...)` at their `slot`.

    Args:
        window (`torch.Tensor`): `(B, T, ...)`, oldest frame first.
        new (`torch.Tensor`): `(B, ...)`.
        slot (`torch.Tensor`): int64 `(B,)`; -1 leaves a window unchanged.
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
