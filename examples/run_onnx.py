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
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / graph["file"], options)
            for name, graph in self.facts["graphs"].items()
        }
        self.inputs = self.facts["graphs"]["step"]["inputs"]

    def reset(self, instruction: str) -> None:
        """Starts an instruction: its text is encoded once, and the history and the goal are empty."""
        self.kept = {
            name: np.zeros([1, *tensor["shape"][1:]], tensor["dtype"])
            for name, tensor in self.inputs.items()
            if name.startswith(("history_", "goal"))
        }
        ids = np.array([self.tokenizer.encode(instruction).ids])
        (self.kept["language"],) = self.sessions["text"].run(None, {"input_ids": ids})

    def set_goal(self, image: np.ndarray) -> None:
        """Gives a goal image `(h, w, 3)` of the first view, to a policy that takes some."""
        (self.kept["goal"],) = self.sessions["goal"].run(None, {"goal_image": image[None]})
        self.kept["goal_mask"] = np.array([True])

    def step(self, images: dict[str, np.ndarray], state=None) -> np.ndarray:
        """Camera name -> uint8 RGB `(h, w, 3)`, and the state -> actions `(K, A)` in the dataset's units.

        A camera that is left out is missing at this step.
        """
        blank = np.zeros((8, 8, 3), np.uint8)
        inputs = {f"image_{view}": images.get(view, blank)[None] for view in self.facts["views"]}
        inputs["view_mask"] = np.array([[view in images for view in self.facts["views"]]])
        if "state" in self.inputs:
            inputs["state"] = np.asarray(state, np.float32).reshape(1, self.inputs["state"]["shape"][1])
        actions, *history = self.sessions["step"].run(None, {**inputs, **self.kept})
        if not np.isfinite(actions).all():
            raise ValueError("the actions are not finite: is the state in the dataset's units?")
        self.kept |= zip([name for name in self.inputs if name.startswith("history_")], history, strict=True)
        return actions[0]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of an exported policy")
    parser.add_argument("--instruction", default="Open a drawer", help="(%(default)s)")
    parser.add_argument("--images", nargs="*", type=Path, default=[], help="a picture of each view; or gray")
    parser.add_argument("--state", nargs="*", type=float, help="of the robot (default: zeros)")
    parser.add_argument("--steps", type=int, default=3, help="control steps (%(default)s)")
    args = parser.parse_args()

    policy = Policy(args.policy)
    views = policy.facts["views"]
    images = dict.fromkeys(views, np.full((96, 96, 3), 128, np.uint8))
    images |= {
        view: np.array(Image.open(path).convert("RGB"))
        for view, path in zip(views, args.images, strict=False)
    }
    size = policy.inputs["state"]["shape"][1] if "state" in policy.inputs else 0
    state = args.state or [0.0] * size
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
