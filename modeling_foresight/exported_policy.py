# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Runs the folders that `python -m modeling_foresight.export` writes, as a model with its stream.

For measuring them beside the model they came from. A robot needs none of this: `examples/run_onnx.py`.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .action_graphs import HISTORY, NEW
from .configuration_foresight import ForesightConfig
from .modeling_foresight import ForesightForActionPrediction
from .processing_foresight import ForesightProcessor
from .robot_stream import RobotStream

POLICY_FILE = "policy.json"
WRITERS, RUNNERS = ("onnx", "onnxscript", "onnxruntime"), ("onnxruntime",)


def require_packages(names: Sequence[str]) -> None:
    """Checks that these packages of the extra `export` are installed.

    Raises:
        ValueError: Names those that are missing, and the command that installs them.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}: pip install 'lerobot_policy_foresight[export]', or "
            f"pip install {' '.join(missing)}"
        )


class ExportedPolicy:
    """An exported policy on the CPU, with what evaluation asks of a model.

    Args:
        folder (`str` or `Path`): What `python -m modeling_foresight.export` wrote.

    Attributes:
        config (`ForesightConfig`): Of the policy, without auxiliary heads.
        facts (`dict`): What `policy.json` says.

    Raises:
        ValueError: If this is no such folder, or ONNX Runtime is missing.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / POLICY_FILE).is_file():
            raise ValueError(f"{folder} has no {POLICY_FILE}: it is not an exported policy.")
        self.facts = json.loads((self.folder / POLICY_FILE).read_text(encoding="utf-8"))
        if self.facts["format"] == "onnx":
            require_packages(RUNNERS)
        self.config = ForesightConfig.from_pretrained(self.folder)

    warn_without_goal = ForesightForActionPrediction.warn_without_goal

    def num_parameters(self) -> int:
        """Parameters that acting takes."""
        return self.facts["parameters"]

    def stream(self, processor: ForesightProcessor, **options) -> "ExportedStream":
        """Controls a robot; `options` are those of [`ExportedStream`]."""
        return ExportedStream(self, processor, **options)

    def load_graph(self, name: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """A function from the inputs of a graph to its outputs, with as many threads as PyTorch has now."""
        graph = self.facts["graphs"][name]
        path, outputs = self.folder / graph["file"], list(graph["outputs"])
        if self.facts["format"] == "torch-export":
            module = torch.export.load(path).module()

            def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
                return dict(zip(outputs, module(*(inputs[name] for name in graph["inputs"])), strict=True))

            return run
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run_onnx(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = session.run(outputs, {name: value.numpy() for name, value in inputs.items()})
            return {name: torch.from_numpy(value) for name, value in zip(outputs, given, strict=True)}

        return run_onnx


class ExportedStream(RobotStream):
    """Acts as a `ForesightStream`, through the graphs of an [`ExportedPolicy`].

    Args:
        policy (`ExportedPolicy`): What acts.
        processor (`ForesightProcessor`): Of the same folder: its tokenizer, and its names of views.
        num_envs (`int`, *optional*): As in `ForesightStream`.
        with_progress (`bool`): Refused, the progress head is an auxiliary one.
        embodiment (`str`, *optional*): The robot that the policy was exported for; any other is refused.
    """

    def __init__(
        self,
        policy: ExportedPolicy,
        processor: ForesightProcessor,
        num_envs: int | None = None,
        with_progress: bool = False,
        embodiment: str | None = None,
    ):
        if with_progress:
            raise ValueError("An exported policy predicts no progress: take the model it came from.")
        chosen, wanted = policy.facts["embodiment"], embodiment or processor.embodiment
        if chosen and wanted not in (None, chosen):
            raise ValueError(f"This policy was exported for {chosen}, not for {wanted}.")
        super().__init__(policy, processor, num_envs, chosen or embodiment)
        self.with_progress = False
        self._graphs = {name: policy.load_graph(name) for name in policy.facts["graphs"]}
        self._takes_text = "input_ids" in policy.facts["graphs"]["text"]["inputs"]
        with torch.inference_mode(False):  # what is made here is changed in any mode later
            self._kept = {  # what the step reads again: language, goal and history
                name: torch.zeros(self.num_envs, *spec["shape"][1:], dtype=getattr(torch, spec["dtype"]))
                for name, spec in policy.facts["graphs"]["step"]["inputs"].items()
                if name.startswith((HISTORY, "language", "goal"))
            }
            self._before = {name: value.clone() for name, value in self._kept.items()}

    def reset(
        self,
        instruction: str | Sequence[str] | None = None,
        envs: Sequence[int] | None = None,
        text_features: Tensor | None = None,
    ) -> None:
        """See `ForesightStream.reset`."""
        rows = self._select_robots(envs)
        texts, features = self._read_instruction(instruction, text_features, len(rows))
        if self._takes_text != (features is None):
            has, remedy = ("has a", "an instruction") if self._takes_text else ("has no", "text_features")
            raise ValueError(f"The exported policy {has} text tower: give {remedy}.")
        if texts is None:
            language = [self._graphs["text"]({"text_features": features.float()})["language"]]
        else:
            ids = {text: self.processor.tokenize([text])[0] for text in texts}
            found = {text: self._graphs["text"]({"input_ids": x})["language"] for text, x in ids.items()}
            language = [found[text] for text in texts]
        for kept in (self._kept, self._before):
            for value in kept.values():
                value[rows] = 0
        self._kept["language"][rows] = torch.cat(language)
        self._instructed[rows] = True

    def set_goal(self, image, envs: Sequence[int] | None = None) -> None:
        """See `ForesightStream.set_goal`."""
        rows = self._select_robots(envs)
        pixels = _channels_last(self._read_goal(image, len(rows)))
        self._kept["goal"][rows] = self._graphs["goal"]({"goal_image": pixels})["goal"]
        self._kept["goal_mask"][rows] = True

    def step_chunk(
        self,
        images: dict,
        state=None,
        envs: Sequence[int] | None = None,
        view_mask=None,
        again: bool = False,
    ) -> Tensor:
        """See `RobotStream.step_chunk`."""
        rows = self._select_robots(envs)
        self._require_instruction(rows)
        if "goal_mask" in self._kept and not self._kept["goal_mask"][rows].all():
            self.model.warn_without_goal()
        frames, present = self._read_observation(images, view_mask, len(rows))
        blank = torch.zeros(len(rows), 8, 8, 3, dtype=torch.uint8)
        inputs = {
            f"image_{view}": _channels_last(frames[view]) if view in frames else blank
            for view in self.processor.views
        }
        inputs["view_mask"] = present
        if self.state_dim and state is None:
            raise ValueError("An exported policy with a state needs it at every step.")
        state = None if state is None else self._read_state(state, len(rows))
        if self.state_dim:
            inputs["state"] = state
        self._instructed[rows] = False  # a step that fails ends the instruction
        for name, value in self._kept.items():
            if name.startswith(HISTORY):
                now = (self._before if again else self._kept)[name][rows]
                self._before[name][rows], inputs[name] = now, now
            else:
                inputs[name] = value[rows]
        given = self._graphs["step"](inputs)
        for name in self._kept:
            if name.startswith(HISTORY):
                self._kept[name][rows] = given[NEW + name]
        if not given["actions"].isfinite().all():
            raise ValueError("The actions would be NaN or infinite. Nothing is returned.")
        self._instructed[rows] = True
        return given["actions"][0] if self.single else given["actions"]


def _channels_last(frame: Tensor) -> Tensor:
    """uint8 `(robots, 3, h, w)` -> `(robots, h, w, 3)`, as cameras give it."""
    return frame.movedim(1, -1).contiguous()
