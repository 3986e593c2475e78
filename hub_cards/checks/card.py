"""Check a card: its figures were measured, and the Hub accepts its metadata."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, metadata_load

from datasets_scripts.inspection.dataset_card import OUR_CARD, SOURCE_MARK, as_list
from datasets_scripts.inspection.dataset_card import build_card as build_dataset_card
from datasets_scripts.licenses import HUB_LICENSES
from datasets_scripts.storage.dataset_folder import is_dataset_folder
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.cards.eval_results import build_result_files, read_result_files
from hub_cards.cards.measurements import has_measured_weights, read_measurements
from hub_cards.cards.model_card import build_card

__all__ = ["check_card"]

BUILD = "write it with hub_cards/build.py"
# In lower case, "todo" is Spanish for everything, and may be part of an instruction.
PLACEHOLDER = re.compile(
    r"\b(?:TODO|TBD|FIXME|XXX)\b|(?i:\[(?:more information needed|optional)\]|\bn/a\b)|(?<!\\)\{[{%]"
)
# First words of the tables that hold measurements; a card may have other tables too.
MEASURED = {"task", "prediction", "hardware", "changed", "on demonstrations"}
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def check_card(folder: Path) -> list[str]:
    """One line per problem of the card of a model, adapter or dataset."""
    path = folder / "README.md"
    if not path.is_file():
        return [f"README.md is missing, the card: {BUILD}"]
    is_dataset = is_dataset_folder(folder)
    try:
        card = (DatasetCard if is_dataset else ModelCard)(path.read_text())
        metadata = metadata_load(path) or {}  # as written; `card.data` repairs some of it
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        return [f"the Hub would reject the card's metadata ({' '.join(str(error).split())[:200]}): {BUILD}"]
    body = card.text.split(SOURCE_MARK)[0]  # what follows was written by somebody else
    if len(body.split()) < 30 or not re.search(r"^# \S", body, re.MULTILINE):
        return [f"README.md says nothing: {BUILD}"]
    problems = [*_check_metadata(metadata, is_dataset), *_check_text(folder, body)]
    problems += _check_dataset_card(folder, body) if is_dataset else _check_model_card(folder, card, body)
    return problems


def _check_metadata(metadata: Mapping[str, Any], is_dataset: bool) -> list[str]:
    """What the Hub would reject of the card's YAML block, as far as we know without asking it."""
    licenses = as_list(metadata.get("license"))
    problems = [] if licenses else [f"the card names no license: {BUILD}, with --license if it asks for one"]

    def check(key: str, values: list, fits: Callable[[Any], bool], expected: str) -> None:
        problems.extend(
            f"the Hub would reject {key}: {value!r} of the card, which must be {expected}: {BUILD}"
            for value in values
            if not fits(value)
        )

    expected = "one of the Hub's identifiers, such as apache-2.0, or other"
    check("license", licenses, lambda name: str(name) in HUB_LICENSES, expected)
    if not is_dataset:
        for key in ("base_model", "datasets"):
            ids = as_list(metadata.get(key))
            check(key, ids, lambda name: HUB_ID.fullmatch(str(name)), "ids of the Hub (owner/name)")
        check("pipeline_tag", [metadata.get("pipeline_tag")], "robotics".__eq__, "robotics")
    for key in ("tags", "task_categories", "size_categories"):
        check(key, [metadata.get(key, [])], _are_words, "a list of words")
    for key in ("library_name", "license_name"):
        check(key, [metadata.get(key, "")], lambda name: isinstance(name, str), "a word")
    return problems


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _check_text(folder: Path, body: str) -> Iterator[str]:
    """Placeholders, empty cells, and links to files that do not exist."""
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for found in dict.fromkeys(match.group() for match in PLACEHOLDER.finditer(prose)):
        yield f"README.md has a place that was never filled in ({found}): {BUILD}"
    for header, rows in _read_tables(prose).items():
        for row in rows:
            if not all(row):
                name = row[0] or header[0]
                yield f"README.md has an empty cell in the row of {name!r}: measure it, then {BUILD}"
    for target in re.findall(r"(?<!\\)\]\(([^)#\s]+)\)", prose):
        if "://" not in target and not (folder / target).exists():
            yield f"README.md shows {target}, which is missing: add the file, then {BUILD}"


def _check_model_card(folder: Path, card: ModelCard, body: str) -> list[str]:
    """Differences between the card and the one that the folder's measurements give."""
    known = (name for name in as_list(card.data.license) if isinstance(name, str) and name in HUB_LICENSES)
    try:
        measured = read_measurements(folder)
    except ValueError as error:
        return [f"the card's figures have no source: {error}"]
    try:
        fresh = build_card(folder, license=next(known, None))
    except ValueError as error:
        return [str(error)]
    evaluation, problems = measured["evaluation"], list(_compare_tables(body, fresh.text))
    if card.data.eval_results != fresh.data.eval_results:
        problems.append(f"the card's model-index differs from evaluation/: {BUILD}")
    if (written := read_result_files(folder)) != build_result_files(evaluation):
        what = "differs from evaluation/eval.json" if written else "is missing"
        problems.append(f".eval_results {what}: {BUILD}")
    try:
        for name, script in (("eval", "evaluate"), ("diagnostics", "diagnose")):
            figures = measured["evaluation" if name == "eval" else name]
            if figures and not has_measured_weights(figures, folder):
                problems.append(
                    f"evaluation/{name}.json measured other weights than those here: run "
                    f"training/{script}.py again"
                )
    except ValueError:
        pass  # damaged weights: the check of the model reports them
    if not evaluation and "Success in closed loop was" not in body and "does not act" not in body:
        problems.append(f"the card does not say that nothing was tried in closed loop: {BUILD}")
    return problems


def _check_dataset_card(folder: Path, body: str) -> list[str]:
    try:
        if read_provenance(folder):
            fresh = build_dataset_card(folder).text.split(SOURCE_MARK)[0]
            return list(_compare_tables(body, fresh))
    except ValueError as error:
        return [str(error)]
    if OUR_CARD in body:  # otherwise the card is somebody else's
        return ["the card's figures have no source: meta/foresight.json is missing: copy the folder again"]
    return []


def _compare_tables(body: str, fresh: str) -> Iterator[str]:
    """Rows that differ from what the measurements give; prose may be added freely."""
    there, measured = _read_tables(body), _read_tables(fresh)
    for header, rows in measured.items():
        known = there.get(header)
        if known is None:
            yield f"README.md lacks the table of {header[0] or rows[0][0]!r}: {BUILD}"
            continue
        for row in rows:
            if row not in known:
                yield f"README.md has other figures for {row[0]!r} than evaluation/ and config.json: {BUILD}"
        for row in known if any(header) else ():  # a table without a header may be anybody's
            if row[0] not in {one[0] for one in rows}:
                yield f"README.md has figures for {row[0]!r} that nothing in evaluation/ measured: {BUILD}"
    for header in there.keys() - measured.keys():
        if header[0] in MEASURED and measured:
            yield f"README.md has a table of {header[0]!r} that nothing in evaluation/ measured: {BUILD}"


def _read_tables(text: str) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Header of each Markdown table -> its rows; tables with the same header are joined."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for block in re.findall(r"(?:^\|.*(?:\n|\Z))+", text, re.MULTILINE):
        header, *rows = block.splitlines()
        if rows and re.fullmatch(r"[|:\- ]+", rows[0]):
            tables.setdefault(_split_cells(header), []).extend(map(_split_cells, rows[1:]))
    return tables


def _split_cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
