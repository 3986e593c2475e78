r"""Converts GR-MG's goal generator (goal_gen.ckpt) to a diffusers pipeline.

    python -m goal_images.convert_grmg goal_gen.ckpt --base INSTRUCT_PIX2PIX --text-encoder T5_BASE \
        --output outputs/goal_generator

See docs/goal_images.md.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from torch import Tensor

from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.atomic import write_json, write_whole_folder
from goal_images.generator import SAMPLING_FILE, Sampling, load_pipeline
from modeling_foresight.grmg.reading import read_payload

MAX_TOKENS = 77  # of a prompt, as in GR-MG's training
SHOWN = 5  # names in a message


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m goal_images.convert_grmg",
        description="GR-MG's goal_gen.ckpt -> a pipeline's folder for --goal_generator.",
        epilog="Example: python -m goal_images.convert_grmg goal_gen.ckpt --output outputs/goal_generator",
    )
    add = parser.add_argument
    add("checkpoint", help="GR-MG's goal_gen.ckpt")
    add("--output", required=True, type=Path, help="folder to make")
    add(
        "--base",
        default="timbrooks/instruct-pix2pix",
        help="InstructPix2Pix pipeline that GR-MG started from, folder or Hub id: its autoencoder and noise "
        "schedule are used (default: %(default)s)",
    )
    add(
        "--text-encoder",
        default="google-t5/t5-base",
        help="GR-MG's T5 encoder and tokenizer in place of CLIP's, folder or Hub id (default: %(default)s)",
    )
    add("--allow-pickle", action="store_true", help="unpickle any object of a file that you trust")
    return parser.parse_args(arguments)


def read_unet(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """`unet_ema` of GR-MG's file; raises a `ValueError` for any other file."""
    payload = read_payload(path, allow_pickle)
    weights = payload.get("state_dict", payload) if isinstance(payload, dict) else None
    unet = weights.get("unet_ema") if isinstance(weights, dict) else None
    if not isinstance(unet, dict) or not all(isinstance(value, Tensor) for value in unet.values()):
        found = sorted(weights)[:SHOWN] if isinstance(weights, dict) else type(payload).__name__
        raise ValueError(
            f"{path} has no unet_ema, so it is not GR-MG's goal_gen.ckpt; it holds {found}. Its policy is "
            "converted by python -m modeling_foresight.grmg.convert"
        )
    return {name: value.float() for name, value in unet.items()}


def check_unet(path: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor], base: str) -> None:
    """Refuses weights that are not exactly those of the base's U-Net; names what differs."""
    shapes = [name for name in theirs.keys() & ours.keys() if theirs[name].shape != ours[name].shape]
    broken = [name for name, value in theirs.items() if not value.isfinite().all()]
    faults = {
        "missing": sorted(ours.keys() - theirs.keys()),
        "unknown": sorted(theirs.keys() - ours.keys()),
        "of another shape": sorted(shapes),
        "not finite": sorted(broken),
    }
    if wrong := [f"{len(names)} {how}, such as {names[:SHOWN]}" for how, names in faults.items() if names]:
        raise ValueError(f"{path} does not fit the U-Net of --base {base}: {'; '.join(wrong)}")


def load_text_encoder(source: str):
    """T5 encoder and tokenizer, set up so that diffusers uses them as GR-MG did."""
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        encoder = T5EncoderModel.from_pretrained(source, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers, tokenizers and the Hub raise their own types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--text-encoder {source} cannot be loaded: {reason}") from error
    # The pipeline hides padding from the encoder only if its config says so.
    encoder.config.use_attention_mask, tokenizer.model_max_length = True, MAX_TOKENS
    return encoder, tokenizer


def convert(checkpoint: Path, base: str, text_encoder: str, output: Path, allow_pickle: bool = False) -> None:
    """Writes the pipeline's folder.

    Raises:
        ValueError: If a part is missing, damaged, or does not fit the others; names it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: delete it, or choose another --output")
    weights = read_unet(checkpoint, allow_pickle)
    pipeline = load_pipeline(base)
    check_unet(checkpoint, weights, pipeline.unet.state_dict(), base)
    encoder, tokenizer = load_text_encoder(text_encoder)
    if encoder.config.d_model != (width := pipeline.unet.config.cross_attention_dim):
        raise ValueError(
            f"--text-encoder {text_encoder} gives {encoder.config.d_model} features, the U-Net reads {width}"
        )
    pipeline.unet.load_state_dict(weights)
    pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    with write_whole_folder(output) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_json(folder / SAMPLING_FILE, dataclasses.asdict(Sampling()))


@entry_point()
def main(arguments: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    args = parse_options(arguments)
    convert(Path(args.checkpoint), args.base, args.text_encoder, args.output, args.allow_pickle)
    print(f"written: {args.output}; --goal_generator takes it")


if __name__ == "__main__":
    sys.exit(main())
