"""Tries an installation of the model alone: its size, its import, and every shipped policy in control.

python -I scripts/try_model.py hub_cards/models
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TRANSFORMERS = "from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin"


def import_seconds(statement: str) -> float:
    """The least of three processes, without the interpreter's start and end."""
    timed = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    command = [sys.executable, "-I", "-c", timed]
    return min(float(subprocess.check_output(command, text=True)) for _ in range(3))


def is_of_pytorch(name: str) -> bool:
    """Whether a distribution is PyTorch or comes with it."""
    return name == "torch" or name.startswith(("triton", "nvidia", "cuda"))


def main(models: Path) -> None:
    """Prints what it finds; raises if something does not work."""
    sizes = {True: 0, False: 0}
    for package in importlib.metadata.distributions():
        files = [Path(file.locate()) for file in package.files or []]
        sizes[is_of_pytorch(package.metadata["Name"])] += sum(f.stat().st_size for f in files if f.is_file())
    print(f"{sizes[False] / 1e6:.0f} MB beside {sizes[True] / 1e6:.0f} MB of PyTorch")
    for name in ("lerobot", "accelerate", "peft", "datasets"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed: not the model alone"

    ours, theirs = import_seconds("import modeling_foresight"), import_seconds(TRANSFORMERS)
    print(f"import of the model: {ours:.1f} s; of what it needs of transformers: {theirs:.1f} s")

    from transformers import AutoModel, AutoProcessor

    import modeling_foresight  # noqa: F401 - registers the model

    for folder in sorted(models.iterdir()):
        started = time.monotonic()
        model = AutoModel.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        loaded = time.monotonic() - started
        if not model.config.has("action"):
            print(f"{folder.name}: loaded in {loaded:.1f} s, predicts no actions")
            continue
        stream = model.stream(processor)
        stream.reset("Open a drawer")
        side = model.config.image_size
        images = {view: np.zeros((side, side, 3), np.uint8) for view in model.config.views}
        actions = stream.step_chunk(images, state=np.zeros(model.config.state_dim))
        assert actions.isfinite().all()
        print(f"{folder.name}: loaded in {loaded:.1f} s, acts: {tuple(actions.shape)}")

    command = [sys.executable, "-m", "training.train", "--help"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode, refused.stdout
    assert "pip install 'lerobot_policy_foresight[train]'" in refused.stderr, refused.stderr
    print(refused.stderr.splitlines()[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
