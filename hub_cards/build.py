"""Writes the card of a model, an adapter or a dataset from its measurements, or says which one is missing.

Every figure of a card is read from a file that the script which measured it has written; none is typed. The
files go into the folder too (`evaluation/`), and so do results for machines (`.eval_results/`): it can be
published as it is, and `hub_cards/check.py` can compare.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.latency import PLACE as LATENCY

# What loads transformers is imported where it is needed, so that --help answers at once.
__all__ = ["main"]

EXAMPLE = """examples:
  python hub_cards/build.py outputs/quickstart                 # a run: fills outputs/quickstart/model
  python hub_cards/build.py outputs/quickstart/model --repo-id YOU/POLICY    # the card anew, with its address
  python hub_cards/build.py outputs/quickstart --kind dataset"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="run with model/, eval.json and pictures: train.py's --output, or a folder with that as "
        "training/; or a model, adapter or dataset itself",
    )
    parser.add_argument(
        "--kind",
        choices=("model", "adapter", "dataset"),
        help="default: what the folder holds; dataset of a run: its dataset/",
    )
    parser.add_argument(
        "--repo-id", help="Hub id the card's example loads from (default: the folder model/ beside the card)"
    )
    parser.add_argument(
        "--license", help="the Hub's name of the licence, where it does not follow from towers and labels"
    )
    parser.add_argument(
        "--seed-eval",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="eval.json of the same training with another seed, for a column of its own (repeatable; "
        "eval-*.json of the run are found)",
    )
    parser.add_argument(
        "--open-loop", action="store_true", help="a policy that was never tried gets a card that says so"
    )
    args = parser.parse_args(arguments)
    try:
        written = _build_dataset(args) if _is_dataset(args) else _build_model(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("wrote " + " and ".join(map(str, written)))
    return 0


def _is_dataset(args: argparse.Namespace) -> bool:
    return args.kind == "dataset" or (args.folder / "meta" / "info.json").is_file()


def _build_dataset(args: argparse.Namespace) -> list[Path]:
    from datasets_scripts.inspection.dataset_card import write_card

    own = (args.folder / "meta" / "info.json").is_file()
    folder = args.folder if own else args.folder / "dataset"
    if not read_provenance(folder):
        raise ValueError(
            f"{folder} has no meta/foresight.json, so it is not known how its labels were made: annotate or "
            "simulate it with datasets_scripts/. LeRobot writes the card of a dataset without labels"
        )
    write_card(folder, args.repo_id, args.license)
    return [folder / "README.md"]


def _build_model(args: argparse.Namespace) -> list[Path]:
    from hub_cards.cards.card import build_card, read_evidence
    from hub_cards.cards.evidence import collect
    from hub_cards.cards.results import write_eval_results

    places = [args.folder]
    is_run = not any((args.folder / f"{name}config.json").is_file() for name in ("", "adapter_"))
    if is_run:
        try:
            collect(args.folder, args.seed_eval, args.open_loop)
        except KeyError as error:
            raise ValueError(
                f"a figure is missing from what {args.folder} measured: {error}; it was written by another "
                "version: run training and evaluation again"
            ) from error
        places.append(args.folder / "model")
    elif args.seed_eval or args.open_loop:
        raise ValueError("--seed-eval and --open-loop are for a run's folder, the one that holds model/")
    model = places[-1]
    evidence = read_evidence(model)
    is_adapter = evidence["kind"] == "adapter"
    if args.kind and (args.kind == "adapter") != is_adapter:
        raise ValueError(f"{model} holds {'an adapter' if is_adapter else 'a model'}, not --kind {args.kind}")
    # Before the model runs: a licence that is not known shall not cost minutes.
    source = args.repo_id or ("model" if is_run else None)
    build_card(model, source, args.license)
    _measure_what_is_missing(model, evidence)
    text = str(build_card(model, source, args.license))
    write_eval_results(model, evidence["evaluation"])
    for place in places:
        with write_whole_file(place / "README.md") as temporary:
            temporary.write_text(text)
    return [place / "README.md" for place in places]


def _measure_what_is_missing(model: Path, evidence: dict) -> None:
    """What needs no data and takes seconds: the control step's time."""
    if "action" in evidence["config"]["objectives"] and not (model / LATENCY).is_file():
        from hub_cards.latency import measure_latency

        measure_latency(model)


if __name__ == "__main__":
    sys.exit(main())
