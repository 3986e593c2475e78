"""Whether a card may be published: its figures were measured, and the Hub accepts its metadata."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, metadata_load

from datasets_scripts.inspection.dataset_card import OUR_CARD, SOURCE_MARK
from datasets_scripts.inspection.dataset_card import build_card as build_dataset_card
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.cards.eval_results import eval_results, read_eval_results
from hub_cards.cards.licences import HUB_LICENCES
from hub_cards.cards.measurements import has_measured_weights, read_measurements
from hub_cards.cards.model_card import build_card

__all__ = ["check_card", "check_metadata"]

BUILD = "write it with hub_cards/build.py"
# In lower case, "todo" is Spanish for everything, and may be part of an instruction.
PLACEHOLDER = re.compile(
    r"\b(?:TODO|TBD|FIXME|XXX)\b|(?i:\[(?:more information needed|optional)\]|\bn/a\b)|\{\{|\{%"
)
# First words of the tables that hold measurements; a card may have other tables too.
MEASURED = {"task", "prediction", "hardware"}
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def check_card(folder: Path) -> list[str]:
    """One line per problem of the card of a model, adapter or dataset."""
    path = folder / "README.md"
    if not path.is_file():
        return [f"README.md is missing, the card: {BUILD}"]
    is_dataset = (folder / "meta" / "info.json").is_file()
    try:
        card = (DatasetCard if is_dataset else ModelCard)(path.read_text())
        metadata = metadata_load(path) or {}  # as written; `card.data` repairs some of it
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        return [f"the Hub would reject the card's metadata ({' '.join(str(error).split())[:200]}): {BUILD}"]
    body = card.text.split(SOURCE_MARK)[0]  # what follows was written by somebody else
    if len(body.split()) < 30 or not re.search(r"^# \S", body, re.MULTILINE):
        return [f"README.md says nothing: {BUILD}"]
    problems = check_metadata(metadata, "dataset" if is_dataset else "model")
    problems += _check_text(folder, body)
    problems += _check_dataset_card(folder, body) if is_dataset else _check_model_card(folder, card, body)
    return problems


def check_metadata(metadata: Mapping[str, Any], repo_type: str) -> list[str]:
    """What the Hub would reject, as far as we know without asking it.

    Args:
        metadata (`Mapping`): The YAML block of the card.
        repo_type (`str`): `model` or `dataset`.
    """
    problems, wrong = [], []
    licences = _as_list(metadata.get("license"))
    if not licences:
        problems.append(f"the card names no licence: {BUILD}, with --license if it asks for one")
    expected = "one of the Hub's identifiers, such as apache-2.0, or other"
    wrong += [("license", name, expected) for name in licences if str(name) not in HUB_LICENCES]
    if repo_type == "model":
        for key in ("base_model", "datasets"):
            names = _as_list(metadata.get(key))
            wrong += [(key, name, "ids of the Hub (owner/name)") for name in names if not _is_hub_id(name)]
        if metadata.get("pipeline_tag") != "robotics":
            wrong.append(("pipeline_tag", metadata.get("pipeline_tag"), "robotics"))
    for key in ("tags", "task_categories", "size_categories"):
        value = metadata.get(key, [])
        if not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
            wrong.append((key, value, "a list of words"))
    for key in ("library_name", "license_name"):
        if not isinstance(metadata.get(key, ""), str):
            wrong.append((key, metadata[key], "a word"))
    try:
        models = metadata.get("model-index") or []
        kinds = [result["dataset"]["type"] for model in models for result in model["results"]]
        wrong += [("model-index: dataset type", kind, "an id") for kind in kinds if not _is_hub_id(kind)]
    except (TypeError, KeyError):
        expected = "a list of models, each with results on a dataset"
        wrong.append(("model-index", metadata["model-index"], expected))
    return problems + [
        f"the Hub would reject {key}: {value!r} of the card, which must be {expected}: {BUILD}"
        for key, value, expected in wrong
    ]


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value] if value is not None else []


def _is_hub_id(name: Any) -> bool:
    return HUB_ID.fullmatch(str(name)) is not None


def _check_text(folder: Path, body: str) -> Iterator[str]:
    """Placeholders, empty cells, and links to files that do not exist."""
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for found in dict.fromkeys(match.group() for match in PLACEHOLDER.finditer(prose)):
        yield f"README.md has a place that was never filled in ({found}): {BUILD}"
    for header, rows in _tables(prose).items():
        for row in rows:
            if not all(row):
                name = row[0] or header[0]
                yield f"README.md has an empty cell in the row of {name!r}: measure it, then {BUILD}"
    for target in re.findall(r"\]\(([^)#\s]+)\)", prose):
        if "://" not in target and not (folder / target).exists():
            yield f"README.md shows {target}, which is not there: put it there, then {BUILD}"


def _check_model_card(folder: Path, card: ModelCard, body: str) -> list[str]:
    """Differences between the card and the one that the folder's measurements give."""
    known = (name for name in _as_list(card.data.license) if isinstance(name, str) and name in HUB_LICENCES)
    try:
        evaluation = read_measurements(folder)["evaluation"]
    except ValueError as error:
        return [f"the card's figures have no source: {error}"]
    try:
        fresh = build_card(folder, licence=next(known, None))
    except ValueError as error:
        return [str(error)]
    problems = list(_differing_tables(body, fresh.text))
    if _results(card) != _results(fresh):
        problems.append(f"the card's model-index differs from evaluation/: {BUILD}")
    try:
        written = read_eval_results(folder)
    except ValueError:
        written = None
    if written != (eval_results(evaluation) if evaluation else []):
        what = "is missing" if written == [] else "differs from evaluation/eval.json"
        problems.append(f".eval_results {what}: {BUILD}")
    try:
        if evaluation and not has_measured_weights(evaluation, folder):
            problems.append(
                "evaluation/eval.json measured other weights than those here: run training/evaluate.py again"
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
            return list(_differing_tables(body, fresh))
    except ValueError as error:
        return [str(error)]
    if OUR_CARD in body:  # otherwise the card is somebody else's
        return ["the card's figures have no source: meta/foresight.json is missing: copy the folder again"]
    return []


def _results(card: ModelCard) -> list[tuple]:
    results = card.data.eval_results or []
    return [(result.dataset_name, result.metric_name, result.metric_value) for result in results]


def _differing_tables(body: str, fresh: str) -> Iterator[str]:
    """Rows that differ from what the measurements give; prose may be added freely."""
    there, measured = _tables(body), _tables(fresh)
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


def _tables(text: str) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Header of each Markdown table -> its rows; tables with the same header are joined."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for block in re.findall(r"(?:^\|.*(?:\n|\Z))+", text, re.MULTILINE):
        header, *rows = block.splitlines()
        if rows and re.fullmatch(r"[|:\- ]+", rows[0]):
            tables.setdefault(_cells(header), []).extend(map(_cells, rows[1:]))
    return tables


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
