"""Train 3D Foresight: `accelerate launch -m training.train --config training/configs/quickstart.yaml`."""

import argparse
import sys

from huggingface_hub.errors import StrictDataclassError

from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.hub.download import HubError
from training.config_reading import load_config
from training.loop import dry_run, train

EXAMPLE = """any field of training/config.py can be set: --train.steps 2000 --model.hidden_size 192
example:
  accelerate launch training/train.py --config training/configs/quickstart.yaml \\
      --dataset outputs/quickstart/dataset --output outputs/my-run --resume
with LoRA:
  accelerate launch training/train.py --config training/configs/lora_custom.yaml \\
      --init_from outputs/quickstart/model --lora.r 16 --dataset DIR --output outputs/my-adapter"""


RUN_FLAGS = {
    "dataset": "LeRobot v3 dataset with depth and track columns: folder or Hub id",
    "output": "run folder",
    "export": "folder of the finished model (default: OUTPUT/model)",
    "seed": "seed of everything random",
}


# Any other RuntimeError is one of PyTorch, in one of many processes: its traceback is needed.
@entry_point(errors=(ValueError, OSError, HubError, StrictDataclassError))
def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLE,
    )
    parser.add_argument("--config", help="YAML file of the run, for example training/configs/quickstart.yaml")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    parser.add_argument(
        "--dry-run", action="store_true", help="take three steps, print shapes, memory and time, keep nothing"
    )
    parser.add_argument("--skip-flagged", action="store_true", help="leave out episodes with flagged labels")
    for name, text in RUN_FLAGS.items():
        parser.add_argument(f"--{name}", help=text)
    named, overrides = parser.parse_known_args()
    for name in RUN_FLAGS:
        if getattr(named, name) is not None:
            overrides += [f"--{name}={getattr(named, name)}"]
    if named.skip_flagged:
        overrides += ["--data.skip_flagged", "true"]
    config = load_config(named.config, overrides)
    return dry_run(config) if named.dry_run else train(config, named.resume)


if __name__ == "__main__":
    sys.exit(main())
