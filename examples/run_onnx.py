"""Acts with an exported policy through numpy and onnxruntime alone: no PyTorch, nothing of this project.

python -m modeling_foresight.export --checkpoint ORG/NAME --format onnx --output drawer-onnx
pip install numpy onnxruntime tokenizers pillow
python examples/run_onnx.py --policy drawer-onnx --instruction "Open a drawer" --images main.png
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


class Policy:
    """Controls one robot.

    Args:
        folder (`Path`): What `python -m modeling_foresight.export --format onnx` wrote.
        threads (`int`): Threads of ONNX Runtime; 1 is best for a small policy.
    """

    def __init__(self, folder: Path, threads: int = 1):
        self.facts = json.loads((folder / "policy.json").read_text())
        if self.facts["format"] != "onnx":
            raise ValueError(f"{folder} holds {self.facts['format']} files: export with --format onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.sessions = {
                name: onnxruntime.InferenceSession(folder / graph["file"], options)
                for name, graph in self.facts["graphs"].items()
            }
        except Exception as error:  # each library has its own
            raise ValueError(f"{folder} is damaged or lacks a file: export again ({error})") from error
        self.inputs = self.facts["graphs"]["step"]["inputs"]
        self.state_dim = self.inputs["state"]["shape"][1] if "state" in self.inputs else 0
        self.kept = {}

    def reset(self, instruction: str | None = None, text_features=None) -> None:
        """Starts an instruction: its text is encoded once, and the history and the goal are empty.

        A policy without a text tower takes the features `(width,)` of a text in place of the instruction.
        """
        ((name, tensor),) = self.facts["graphs"]["text"]["inputs"].items()
        if name == "input_ids" and instruction is not None and text_features is None:
            text = np.array([self.tokenizer.encode(instruction).ids])
        elif name == "text_features" and text_features is not None and instruction is None:
            text = read_numbers(text_features, name, tensor["shape"][1])
        else:
            wanted = "an instruction" if name == "input_ids" else "text_features, it has no text tower"
            raise ValueError(f"reset of this policy takes nothing but {wanted}")
        self.kept = {
            name: np.zeros([1, *tensor["shape"][1:]], tensor["dtype"])
            for name, tensor in self.inputs.items()
            if name.startswith(("history_", "goal"))
        }
        (self.kept["language"],) = self.sessions["text"].run(None, {name: text})

    def set_goal(self, image: np.ndarray) -> None:
        """Gives a goal image `(h, w, 3)` of the first view, to a policy that takes some."""
        if "goal" not in self.sessions:
            raise ValueError("this policy takes no goal images")
        pixels = read_image(image, self.facts["views"][0])
        (self.kept["goal"],) = self.sessions["goal"].run(None, {"goal_image": pixels})
        self.kept["goal_mask"] = np.array([True])

    def step(self, images: dict[str, np.ndarray], state=None) -> np.ndarray:
        """Camera name -> uint8 RGB `(h, w, 3)`, and the state -> actions `(K, A)` in the dataset's units.

        A camera that is left out is missing at this step.
        """
        views, blank = self.facts["views"], np.zeros((8, 8, 3), np.uint8)
        if not images or not set(images) <= set(views):
            raise ValueError(f"images has the views {list(images)}; the policy knows {views}")
        if "language" not in self.kept:
            raise ValueError("there is no instruction: call reset")
        inputs = {f"image_{view}": read_image(images.get(view, blank), view) for view in views}
        inputs["view_mask"] = np.array([[view in images for view in views]])
        numbers = read_numbers(state, "state", self.state_dim)
        if self.state_dim:
            inputs["state"] = numbers
        actions, *history = self.sessions["step"].run(None, {**inputs, **self.kept})
        if not np.isfinite(actions).all():
            raise ValueError("the actions are not finite: is the state in the dataset's units?")
        self.kept |= zip([name for name in self.inputs if name.startswith("history_")], history, strict=True)
        return actions[0]


def read_image(pixels: np.ndarray, view: str) -> np.ndarray:
    """One frame with a batch axis in front; nothing but uint8 RGB `(h, w, 3)`."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise ValueError(f"the image of {view!r} is {found}; expected one frame, uint8 RGB (h, w, 3)")
    return pixels[None]


def read_numbers(values, name: str, size: int) -> np.ndarray:
    """float32 `(1, size)`; refuses other sizes and what is not finite."""
    numbers = np.asarray([] if values is None else values, np.float32)
    if numbers.shape != (size,) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} has shape {numbers.shape}; expected {size} finite numbers at every call")
    return numbers[None]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of an exported policy")
    parser.add_argument("--instruction", default="Open a drawer", help="(%(default)s)")
    parser.add_argument("--images", nargs="*", type=Path, default=[], help="a picture of each view; or gray")
    parser.add_argument("--state", nargs="*", type=float, help="state of the robot (default: zeros)")
    parser.add_argument("--steps", type=int, default=3, help="control steps (%(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")

    policy = Policy(args.policy)
    views = policy.facts["views"]
    if len(args.images) > len(views):
        raise ValueError(f"--images names {len(args.images)} pictures; the policy has the views {views}")
    images = dict.fromkeys(views, np.full((96, 96, 3), 128, np.uint8))
    images |= {
        view: np.array(Image.open(path).convert("RGB"))
        for view, path in zip(views, args.images, strict=False)
    }
    state = args.state or [0.0] * policy.state_dim
    policy.reset(args.instruction)
    for _ in range(args.steps):  # your control loop: read cameras and state, act, wait
        begun = time.perf_counter()
        chunk = policy.step(images, state)
        print(f"{1000 * (time.perf_counter() - begun):.1f} ms:", *(f"{value:.4f}" for value in chunk[0]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
