"""Run an ablation cell by cell, or write the tables of a finished one.

Running the same command again resumes what was interrupted; finished cells are never run again.
"""

# No import of PyTorch at the top: every simulator process imports the command again.
import sys
from pathlib import Path

from experiments.driver import build_parser, results_places, run_command

EXAMPLE = """example:
  python -m experiments.ablation --plan experiments/plans/ablation.yaml --workers 2
  python -m experiments.ablation --plan experiments/plans/ablation.yaml --tables"""


def write_tables(plan, folder: Path, results_file: Path) -> None:
    """Writes the results as JSON, and as Markdown beside the cells; prints the latter."""
    from datasets_scripts.storage.atomic import write_json, write_whole_file
    from experiments.cells import read_rows
    from experiments.tables import build_results, format_results

    results = build_results(plan, read_rows(plan, folder), folder)
    write_json(results_file, results)
    text = format_results(results)
    with write_whole_file(folder / "tables.md") as temporary:
        temporary.write_text(text)
    print(f"{text}\nresults: {results_file}, tables: {folder / 'tables.md'}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser("ablation", __doc__, EXAMPLE).parse_args(arguments)
    folder, results_file = results_places(args, "ablation")
    return run_command(
        "experiments.ablation",
        args,
        folder,
        run=not args.tables,
        finish=lambda plan: write_tables(plan, folder, results_file),
    )


if __name__ == "__main__":
    sys.exit(main())
