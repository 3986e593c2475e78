# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
r"""Converts GR-MG policy checkpoints to ours, and back.

    python -m modeling_foresight.grmg.convert policy.ckpt --config train.json --output grmg_calvin
    python -m modeling_foresight.grmg.convert grmg_calvin --to-grmg --output grmg_again

See docs/grmg_checkpoints.md.
"""

import argparse
import sys

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from ..configuration_foresight import PRESETS
from .conversion import to_foresight, to_grmg
from .reading import read_settings

OPTIONS = ("preset", "text_tower", "vision_tower", "tokenizer")  # without --to-grmg


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_foresight.grmg.convert",
        description="GR-MG policy checkpoints -> a folder for from_pretrained; --to-grmg goes back.",
        epilog="Example: python -m modeling_foresight.grmg.convert pretrained.pt "
        "--config pretrain.json --preset foresight_3d --output start",
    )
    add = parser.add_argument
    add("checkpoint", help="GR-MG's .pt, .ckpt or safetensors; with --to-grmg one of our folders")
    add("--config", help="GR-MG's train or pretrain json; may add vision_stand_in, text_stand_in")
    add("--output", required=True, help="folder to make")
    add("--preset", choices=[name for name in PRESETS if name != "gr1"], help="start this variant")
    add("--text-tower", help="folder of a CLIP checkpoint, or a file of its weights in OpenAI's names")
    add("--vision-tower", help="folder of a MAE or ViT checkpoint, or MAE's own file")
    add("--tokenizer", help="folder of CLIP's tokenizer; by default that of --text-tower")
    add("--allow-pickle", action="store_true", help="unpickle any object of a file that you trust")
    add("--to-grmg", action="store_true", help="from our folder to GR-MG's names")
    add("--base", help="with --to-grmg: GR-MG file that supplies CLIP's image side")
    args = parser.parse_args(arguments)
    for name in OPTIONS if args.to_grmg else ("base",):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes {'without' if args.to_grmg else 'with'} --to-grmg")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_options(arguments)
    logging.disable_progress_bar()
    try:
        settings = None if args.config is None else read_settings(args.config)
        if args.to_grmg:
            report = to_grmg(args.checkpoint, args.output, settings, args.base, args.allow_pickle)
        else:
            options = {name: getattr(args, name) for name in (*OPTIONS, "allow_pickle")}
            report = to_foresight(args.checkpoint, settings, args.output, **options)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
