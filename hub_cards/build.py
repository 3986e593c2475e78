"""Write the card of a model, an adapter or a dataset from its measurements, or say which one is missing.

Every figure of a card is read from a file that a measuring script wrote. These files are copied into the
folder (`evaluation/`), with results for machines (`.eval_results/`), so that `check.py` can compare.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.dataset_folder import is_dataset_folder
from datasets_scripts.storage.provenance import read_provenance

EXAMPLE = """examples:
  python hub_cards/build.py outputs/quickstart                 # a run: fills outputs/quickstart/model
  python hub_cards/build.py outputs/quickstart/model --repo-id YOU/POLICY    # again, with its address
  python hub_cards/build.py outputs/quickstart --kind dataset"""


@entry_point()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    run = "run with model/, eval.json and pictures (train.py's --output, or a folder with that as training/)"
    add("folder", type=Path, help=f"{run}, or a model, adapter or dataset")
    kinds = ("model", "adapter", "dataset")
    add(
        "--kind",
        choices=kinds,
        help="what to write a card for (default: what the folder holds); dataset of a run: its dataset/",
    )
    add("--repo-id", help="Hub id that the card's example loads from (default: model/ beside the card)")
    add("--license", help="the Hub's name of the license, if it does not follow from towers and labels")
    add(
        "--seed-eval",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="eval.json of the same training with another seed, for another column (repeatable; "
        "eval-*.json of the run are found)",
    )
    add("--base", type=Path, help="folder with a card that holds the model the run started from, to be named")
    add("--open-loop", action="store_true", help="write a card for a policy that was never tried")
    add("--sample", action="store_true", help="write sample.safetensors again (publish.py writes the first)")
    args = parser.parse_args(arguments)
    is_dataset = args.kind == "dataset" or is_dataset_folder(args.folder)
    written = _build_dataset(args) if is_dataset else _build_model(args)
    print("wrote " + " and ".join(map(str, written)))


def _build_dataset(args: argparse.Namespace) -> list[Path]:
    from datasets_scripts.inspection.dataset_card import write_card

    folder = args.folder if is_dataset_folder(args.folder) else args.folder / "dataset"
    if not read_provenance(folder):
        raise ValueError(
            f"{folder} has no meta/foresight.json, which says how its labels were made: annotate or simulate "
            "it with datasets_scripts/. LeRobot writes the card of a dataset without labels"
        )
    write_card(folder, args.repo_id, args.license)
    return [folder / "README.md"]


def _build_model(args: argparse.Namespace) -> list[Path]:
    # Imported here because they load transformers: --help answers at once.
    from hub_cards.cards.eval_results import write_result_files
    from hub_cards.cards.latency_measurement import LATENCY, measure_latency
    from hub_cards.cards.measurements import collect_measurements, read_measurements
    from hub_cards.cards.model_card import build_card
    from hub_cards.checks.sample import write_sample

    is_run = not any((args.folder / f"{name}config.json").is_file() for name in ("", "adapter_"))
    model = args.folder / "model" if is_run else args.folder
    if is_run:
        try:
            collect_measurements(args.folder, args.seed_eval, args.open_loop, args.base)
        except KeyError as error:
            raise ValueError(
                f"a figure is missing from what {args.folder} measured: {error}; it was written by another "
                "version: run training and evaluation again"
            ) from error
    elif args.seed_eval or args.open_loop or args.base:
        raise ValueError("--seed-eval, --open-loop and --base are for a run's folder, which holds model/")
    measurements = read_measurements(model)
    is_adapter = measurements["kind"] == "adapter"
    if args.kind and (args.kind == "adapter") != is_adapter:
        raise ValueError(f"{model} holds {'an adapter' if is_adapter else 'a model'}, not --kind {args.kind}")
    source = args.repo_id or ("model" if is_run else None)
    build_card(model, source, args.license)  # refuses an unknown license before the model runs for minutes
    if "action" in measurements["config"]["objectives"] and not (model / LATENCY).is_file():
        measure_latency(model)
    text = str(build_card(model, source, args.license))
    write_result_files(model, measurements["evaluation"])
    if args.sample:
        write_sample(model)
    cards = [place / "README.md" for place in dict.fromkeys([args.folder, model])]
    for card in cards:
        with write_whole_file(card) as temporary:
            temporary.write_text(text)
    return cards


if __name__ == "__main__":
    sys.exit(main())
