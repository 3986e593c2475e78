# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The action path as three graphs that run without this code: text, goal and step.

| graph | runs | reads | gives |
|---|---|---|---|
| text | once per instruction | token ids, or text features without a text tower | `language` |
| goal | once per goal image, in policies that take some | a camera image | `goal` |
| step | once per control step | images, state, `language`, `goal`, history | actions, new history |

Images are as cameras give them, states and actions in the dataset's units: resizing and normalization are in
the graphs. An instruction starts with a history of zeros; each step gives the history of the next one.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .base_model import EmbeddedInputs
from .configuration_foresight import ForesightConfig
from .modeling_foresight import ForesightForActionPrediction
from .processing_foresight import ForesightProcessor
from .streaming import place_frame

# In front of the names of the step's inputs that it gives itself, and then of those outputs.
HISTORY, NEW = "history_", "new_"
OPSETS = range(18, 24)  # torch.onnx writes none older; newer ones are not tested
MOST_ROBOTS, SIDES_PX = 4096, (4, 8192)  # bounds of axes without a fixed size


Specification = tuple[torch.dtype, tuple[int | str, ...]]


class ActionGraph(nn.Module):
    """A part of the action path; takes tensors in the order of `inputs` and returns a tuple.

    Args:
        model (`ForesightForActionPrediction`): The policy; copied.
        processor (`ForesightProcessor`): Its processor, for one robot.
        needs (`Callable[[str], bool]`): Whether the graph runs a part of the policy or of its trunk.

    Attributes:
        inputs (`dict[str, tuple]`): Name -> dtype and shape. Axes without a fixed size have a name.
        outputs (`dict[str, tuple]`): The same of what it returns.
    """

    inputs: dict[str, Specification]
    outputs: dict[str, Specification]

    def __init__(
        self,
        model: ForesightForActionPrediction,
        processor: ForesightProcessor,
        needs: Callable[[str], bool],
    ):
        super().__init__()
        self.policy, self.processor = copy.deepcopy(model), processor
        for module in (self.policy, self.policy.model):  # a torch.export file holds all weights there are
            for name, _ in list(module.named_children()):
                if not needs(name):
                    setattr(module, name, None)

    def example(self) -> tuple[Tensor, ...]:
        """Zeros that fit `inputs`. Two samples: PyTorch would take a batch of 1 for a fixed size."""
        sizes = {"batch": 2, "length": 5}
        return tuple(
            torch.zeros(
                [axis if isinstance(axis, int) else sizes.get(axis, 24) for axis in shape], dtype=dtype
            )
            for dtype, shape in self.inputs.values()
        )

    def open_axes(self, axes: Mapping) -> tuple:
        """What `axes` holds for each axis without a fixed size, in the nesting of `forward`'s arguments."""
        named = [
            {i: axes[axis] for i, axis in enumerate(shape) if isinstance(axis, str)}
            for _, shape in self.inputs.values()
        ]
        return (tuple(named),)  # of *tensors

    def normalize_image(self, pixels: Tensor) -> Tensor:
        """uint8 RGB `(B, h, w, 3)` -> `(B, 3, H, W)`."""
        return self.processor.normalize_images(pixels.movedim(-1, -3))


def image_specification(view: str) -> Specification:
    """uint8 RGB of a camera, of any size."""
    return torch.uint8, ("batch", f"{view}_height", f"{view}_width", 3)


def language_specification(config: ForesightConfig) -> Specification:
    """The token of an instruction."""
    return torch.float32, ("batch", config.hidden_size)


def goal_specification(config: ForesightConfig) -> Specification:
    """The tokens of a goal image."""
    return torch.float32, ("batch", config.num_latents + 1, config.hidden_size)


class TextGraph(ActionGraph):
    """An instruction -> its language token `(B, D)`."""

    def __init__(self, model, processor):
        super().__init__(model, processor, lambda part: part in ("model", "text_encoder", "embed_language"))
        self.outputs = {"language": language_specification(model.config)}
        if model.model.text_encoder is None:
            width = model.config.text_config.projection_dim
            self.inputs = {"text_features": (torch.float32, ("batch", width))}
        else:
            self.inputs = {"input_ids": (torch.int64, ("batch", "length"))}

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """Ids `(B, length)` without padding, or features of the text tower `(B, width)`."""
        (text,) = tensors
        trunk = self.policy.model
        return (trunk.embed_text(text if trunk.text_encoder is None else trunk.encode_text(text)),)


class GoalGraph(ActionGraph):
    """A goal image of the first view -> its tokens `(B, r + 1, D)`."""

    def __init__(self, model, processor):
        super().__init__(
            model, processor, lambda part: part in ("model", "vision_encoder", "resampler", "embed_goal")
        )
        self.inputs = {"goal_image": image_specification(processor.views[0])}
        self.outputs = {"goal": goal_specification(model.config)}

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """uint8 RGB `(B, h, w, 3)`."""
        (pixels,) = tensors
        trunk = self.policy.model
        return (trunk.embed_goal_image(*trunk.encode_images(self.normalize_image(pixels))),)


class StepGraph(ActionGraph):
    """One control step, as `ForesightStream.step_chunk` of robots that all act."""

    def __init__(self, model, processor):
        super().__init__(
            model, processor, lambda part: part not in ("text_encoder", "embed_language", "embed_goal")
        )
        config = model.config
        frames, views = config.history_length, len(config.views)
        tokens = (config.num_latents + 1, config.hidden_size)
        self.inputs = {f"image_{view}": image_specification(view) for view in config.views}
        self.inputs["view_mask"] = torch.bool, ("batch", views)
        own = config.for_robot(processor.embodiment)
        if own.state_dim:
            self.inputs["state"] = torch.float32, ("batch", own.state_dim)
        self.inputs["language"] = language_specification(config)
        if config.goal_image:
            self.inputs["goal"] = goal_specification(config)
            self.inputs["goal_mask"] = torch.bool, ("batch",)
        history = {"history_images": (torch.float32, ("batch", frames, views, *tokens))}
        # Not bool: ONNX Runtime selects between numbers only.
        history["history_views"] = torch.uint8, ("batch", frames, views)
        if own.state_dim:
            history["history_states"] = torch.float32, ("batch", frames, config.state_dim)
        history["history_count"] = torch.int64, ("batch",)
        self.inputs |= history
        self.outputs = {"actions": (torch.float32, ("batch", config.chunk_size, own.action_dim))}
        self.outputs |= {NEW + name: specification for name, specification in history.items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs in their order -> actions `(B, K, A)` in the dataset's units, and the new history."""
        given = dict(zip(self.inputs, tensors, strict=True))
        processor, trunk, count = self.processor, self.policy.model, given["history_count"]
        history_length, state, window = self.policy.config.history_length, given.get("state"), None
        pixels = [self.normalize_image(given[f"image_{view}"]) for view in processor.views]
        cls, patches = trunk.encode_images(torch.stack(pixels, dim=1))  # (B, V, C), (B, V, N, C)
        new = {
            "history_images": trunk.embed_images(cls[:, None], patches[:, None])[:, 0],
            "history_views": given["view_mask"].to(torch.uint8),
        }
        if state is not None:
            state = new["history_states"] = processor.place_entries("state", state)
        slot, slides = count.clamp(max=history_length - 1), count == history_length
        history = {name: place_frame(given[name], value, slot, slides) for name, value in new.items()}
        if state is not None:
            window = processor.normalize_state(history["history_states"])
        count = slot + 1
        embedded = EmbeddedInputs(
            language=given["language"],
            images=history["history_images"],
            frame_mask=torch.arange(history_length) < count[:, None],
            view_mask=history["history_views"].bool(),
            state=window,
            goal=given.get("goal"),
            goal_mask=given.get("goal_mask"),
        )
        chunk = processor.decode_actions(self.policy.decode_newest(embedded)[0], state=state)
        return chunk, *history.values(), count


def build_graphs(
    model: ForesightForActionPrediction, processor: ForesightProcessor
) -> dict[str, ActionGraph]:
    """The graphs of a policy by name.

    Args:
        model (`ForesightForActionPrediction`): On the CPU in float32, in evaluation mode; acts.
        processor (`ForesightProcessor`): Its processor, for one robot (`for_embodiment`).
    """
    model.model.plan_newest(model.config.history_length, model.device)
    kinds = {"text": TextGraph, "goal": GoalGraph, "step": StepGraph}
    if not model.config.goal_image:
        del kinds["goal"]
    return {name: kind(model, processor).eval() for name, kind in kinds.items()}


@torch.no_grad()
def trace_graph(graph: ActionGraph) -> torch.export.ExportedProgram:
    """The graph for any batch, images and instructions of any size.

    Raises:
        ValueError: If the model cannot run, or PyTorch cannot follow it.
    """
    example = graph.example()
    graph(*example)  # makes the constant tensors that the processor keeps, and finds what cannot run
    bounds = {"batch": (1, MOST_ROBOTS), "length": (2, graph.processor.max_text_length)}
    names = {axis for _, shape in graph.inputs.values() for axis in shape if isinstance(axis, str)}
    dims = {}
    for number, name in enumerate(sorted(names)):  # views may have names that are not identifiers
        low, high = bounds.get(name, SIDES_PX)
        dims[name] = torch.export.Dim(f"axis{number}", min=low, max=high)
    try:
        return torch.export.export(graph, example, dynamic_shapes=graph.open_axes(dims), strict=False)
    except Exception as error:  # whatever a tower of another library does
        reason = _find_reason(error)
        raise ValueError(f"PyTorch cannot export {type(graph).__name__} of this model: {reason}") from error


def write_onnx(program: torch.export.ExportedProgram, graph: ActionGraph, path: Path, opset: int) -> None:
    """Writes `path`; weights beyond 2 GB go into a file beside it.

    Raises:
        ValueError: If ONNX has no operator for a part of the model, in this `opset`.
    """
    names = {axis: axis for _, shape in graph.inputs.values() for axis in shape}
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.open_axes(names),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = _find_reason(error)
        raise ValueError(f"ONNX cannot express {type(graph).__name__} of this model: {reason}") from error
    written.save(path)


def _find_reason(error: BaseException) -> str:
    """One line: exporters add pages of advice to what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quantize_weights(path: Path) -> None:
    """Replaces an ONNX file by one whose matrix products have int8 weights.

    Activations are quantized as they come, so there is nothing to calibrate. Convolutions stay in float32:
    ONNX Runtime's integer ones are slower.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)


def describe_graph(graph: ActionGraph, file: str) -> dict:
    """File, inputs and outputs of a graph as plain JSON."""

    def describe(tensors: Mapping[str, Specification]) -> dict:
        return {
            name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            for name, (dtype, shape) in tensors.items()
        }

    return {"file": file, "inputs": describe(graph.inputs), "outputs": describe(graph.outputs)}
