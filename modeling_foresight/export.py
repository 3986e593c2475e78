# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Write the action path of a policy for machines without this code: ONNX or torch.export."""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers.utils import find_adapter_config_file

from .action_graphs import OPSETS, build_graphs, describe_graph, quantize_weights, trace_graph, write_onnx
from .configuration_foresight import ForesightConfig
from .embodiments import make_table
from .exported_policy import POLICY_FILE, WRITERS, ExportedPolicy, require_packages
from .modeling_foresight import ForesightForActionPrediction
from .processing_foresight import ForesightProcessor

EXAMPLE = """examples:
  python -m modeling_foresight.export --checkpoint outputs/quickstart/model --format onnx --output drawer-onnx
  python -m modeling_foresight.export --checkpoint ORG/NAME --format torch-export --output drawer-pt2

The folder holds one file per graph (text.onnx, step.onnx), policy.json with their inputs and outputs, and
tokenizer.json. examples/run_onnx.py acts with it through numpy and onnxruntime alone."""

FILE_ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
MERGE_FIRST = (
    "it is an adapter. Give a merged model: training/train.py exports one with --lora.merge true; an adapter "
    "of lerobot-train becomes one with python -m lerobot_policy_foresight ADAPTER --merge FOLDER, and one of "
    "plain peft with PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
)
MOST_DIFFERENCE = 1e-4  # of an action's entry, in deviations of that entry in the data


def build_export_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_foresight.export",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model, or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument("--format", required=True, choices=list(FILE_ENDINGS))
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--embodiment", help="name of the robot, of a checkpoint for several")
    parser.add_argument("--opset", type=int, help=f"opset of ONNX, {OPSETS[0]} (default) to {OPSETS[-1]}")
    parser.add_argument("--int8", action="store_true", help="ONNX: int8 weights in matrix products")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what cannot end well, before anything is loaded.

    Raises:
        ValueError: Names the argument and the remedy.
    """
    if args.output.exists():
        raise ValueError(f"--output {args.output} exists: delete it, or choose another one")
    if args.format != "onnx":
        for name, given in (("--opset", args.opset is not None), ("--int8", args.int8)):
            if given:
                raise ValueError(f"{name} belongs to --format onnx")
    elif args.opset is not None and args.opset not in OPSETS:
        raise ValueError(f"--opset {args.opset} is not supported: choose {OPSETS[0]} to {OPSETS[-1]}")
    if args.format == "onnx":
        require_packages(WRITERS)
    folder = Path(args.checkpoint)
    if (folder / POLICY_FILE).is_file():
        raise ValueError(f"--checkpoint {folder} is an exported policy: give the model it came from")
    adapter = folder.is_dir() and find_adapter_config_file(args.checkpoint)  # refused where it is loaded
    if folder.is_dir() and not adapter and not (folder / "config.json").is_file():
        raise ValueError(f"--checkpoint {folder} has no config.json: give the folder of a trained model")


def load_policy(
    source: str, revision: str | None, embodiment: str | None
) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """Model without auxiliary heads, in float32 on the CPU, and the processor of one robot.

    Raises:
        ValueError: If it cannot be loaded, has no action head, or there are several robots; says why.
    """
    try:
        if find_adapter_config_file(source, revision=revision):
            raise ValueError(MERGE_FIRST)
        objectives = ForesightConfig.from_pretrained(source, revision=revision).objectives
        if "action" not in objectives:
            raise ValueError(f"it has no action head, its objectives are {list(objectives)}")
        model = ForesightForActionPrediction.from_pretrained(
            source, revision=revision, auxiliary_heads=False, dtype=torch.float32
        )
        processor = ForesightProcessor.from_pretrained(source, revision=revision)
        if "text" in model.config.towers:
            processor.tokenize(["open the drawer"])  # a converted policy may have no tokenizer yet
    except Exception as error:  # hub, tokenizer and config libraries raise their own types
        raise ValueError(f"--checkpoint {source} cannot be used: {' '.join(str(error).split())}") from error
    # Otherwise the outputs of a torch.export file ask for gradients.
    return model.eval().requires_grad_(False), processor.for_embodiment(embodiment)


def write_policy(
    folder: Path,
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    form: str,
    opset: int = OPSETS[0],
    int8: bool = False,
) -> None:
    """Writes everything into an empty folder.

    Args:
        folder (`Path`): Where to.
        model (`ForesightForActionPrediction`): As [`load_policy`] gives it.
        processor (`ForesightProcessor`): Its processor, for one robot.
        form (`str`): `"onnx"` or `"torch-export"`.
        opset (`int`): Of ONNX.
        int8 (`bool`): Quantize the weights of the step, of ONNX.
    """
    described = {}
    for name, graph in build_graphs(model, processor).items():
        program, path = trace_graph(graph), folder / f"{name}{FILE_ENDINGS[form]}"
        if form == "torch-export":
            torch.export.save(program, path)
        else:
            write_onnx(program, graph, path, opset)
            if int8 and name == "step":  # the others run once per instruction
                quantize_weights(path)
        described[name] = describe_graph(graph, path.name)
    config = model.config
    facts = {
        "format": form,
        "opset": opset if form == "onnx" else None,
        "int8": int8,
        "embodiment": processor.embodiment,
        "views": list(config.views),
        "fps": config.fps,
        "parameters": model.num_parameters(),
        "graphs": described,
    }
    (folder / POLICY_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Of `tokenizers` alone, which knows no calling options: cuts long instructions, adds no padding.
    tokenizer = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(processor.max_text_length)
    tokenizer.save(str(folder / "tokenizer.json"))


def compare_actions(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    folder: Path,
    steps: int,
    robots: int = 2,
) -> float:
    """Largest difference between the actions of a model and of its export.

    Both see the same random images and states, from the start of an instruction.

    Returns:
        `float`: In deviations of the entry that differs, because entries may be meters beside degrees; in
        the actions' units without statistics. What float32 rounds away of an entry is not counted.
    """
    rng, streams, config = np.random.default_rng(0), [], model.config
    for policy in (model, ExportedPolicy(folder)):
        stream = policy.stream(processor, num_envs=robots)
        if "text" in config.towers:
            stream.reset("open the drawer")
        else:
            stream.reset(text_features=torch.ones(robots, config.text_config.projection_dim))
        streams.append(stream)
    size, table = streams[0].state_dim, processor.own_statistics("state") or {"mean": 0.0, "std": 1.0}
    statistics, difference = processor.own_statistics("action"), 0.0
    unit = 1.0 if statistics is None else torch.tensor(make_table(statistics).divisor)
    for step in range(steps):
        images = {v: rng.integers(0, 256, (robots, 60, 80, 3), dtype=np.uint8) for v in processor.views}
        state = np.add(table["mean"], np.multiply(table["std"], rng.normal(size=(robots, size))))
        if config.goal_image and step == 1:
            for stream in streams:
                stream.set_goal(images[processor.views[0]])
        ours, theirs = (stream.step_chunk(images, state if size else None) for stream in streams)
        rounding = 4 * torch.finfo(torch.float32).eps * ours.abs()
        excess = ((ours - theirs).abs() - rounding).clamp(min=0) / unit
        difference = np.maximum(difference, excess.max().item())  # NaN stays
    return float(difference)


def export_policy(args: argparse.Namespace) -> str:
    """Writes `args.output`, which appears only when its actions were compared; returns what to print.

    Raises:
        ValueError: If something does not fit, cannot be exported, or acts otherwise than the model.
    """
    check_arguments(args)
    model, processor = load_policy(args.checkpoint, args.revision, args.embodiment)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f".{args.output.name}-") as temporary:
        folder = Path(temporary) / "policy"
        folder.mkdir()
        with warnings.catch_warnings():  # of the exporters, about themselves
            warnings.simplefilter("ignore")
            write_policy(folder, model, processor, args.format, args.opset or OPSETS[0], args.int8)
            steps = model.config.history_length + 2
            difference = compare_actions(model, processor, folder, steps)
        if not args.int8 and not difference <= MOST_DIFFERENCE:
            raise ValueError(
                f"the exported actions differ by {difference:.1e} deviations of an entry from the model's: "
                "not written"
            )
        folder.rename(args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir()) / 1e6
    return (
        f"wrote {args.output} ({size:.1f} MB); over {steps} steps its actions differ by at most "
        f"{difference:.1e} deviations of an entry from the model's"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = build_export_parser().parse_args(arguments)
    try:
        print(export_policy(args))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
