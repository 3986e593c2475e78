"""Makes a GR-MG checkpoint one of transformers, and starts 3D Foresight from it.

python examples/convert_grmg.py --checkpoint epoch=47-step=83712.ckpt --config train.json

Without a checkpoint, a miniature one of random weights is made, so that every step can be seen.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoModel

from modeling_foresight import ForesightConfig, ForesightForActionPrediction
from modeling_foresight.grmg.conversion import to_foresight, to_grmg


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help=".pt, .ckpt or .safetensors (default: a made-up one)")
    parser.add_argument(
        "--config", type=Path, help="the json in GR-MG's policy/config that it was trained with"
    )
    parser.add_argument("--tokenizer", help="folder of CLIP's tokenizer, which GR-MG's files do not hold")
    parser.add_argument("--output", type=Path, default=Path("outputs/grmg"), help="folder to make")
    args = parser.parse_args()
    if args.output.exists():
        raise ValueError(f"{args.output} exists: delete it, or choose another --output")
    if args.checkpoint is None:
        args.checkpoint, args.config = make_miniature(args.output / "made-up")
    settings = json.loads(args.config.read_text()) if args.config else None

    # The same policy, number for number: preset `grmg`.
    report = to_foresight(args.checkpoint, settings, args.output / "policy", tokenizer=args.tokenizer)
    print(report)
    policy = AutoModel.from_pretrained(args.output / "policy")
    print(
        f"{type(policy).__name__}: {policy.num_parameters():,} parameters, {list(policy.config.objectives)}"
    )

    # 3D Foresight on its weights; what GR-MG lacks starts fresh. Train it: train.py --init_from .../start
    report = to_foresight(args.checkpoint, settings, args.output / "start", preset="foresight_3d")
    print("fresh in 3D Foresight:", ", ".join(report.fresh))


def make_miniature(folder: Path) -> tuple[Path, Path]:
    """A policy of random weights in GR-MG's names, and its json."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    sizes |= {
        "resampler_depth": 1,
        "history_length": 5,
        "chunk_size": 2,
        "num_latents": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    config = ForesightConfig.from_preset("grmg", **sizes, towers=[])
    ForesightForActionPrediction(config).save_pretrained(folder / "ours")
    to_grmg(folder / "ours", folder / "grmg")
    return folder / "grmg" / "model.safetensors", folder / "grmg" / "config.json"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
