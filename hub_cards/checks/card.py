"""Whether a card may be published: figures that were measured, and metadata that the Hub takes."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard, metadata_load

from datasets_scripts.inspection.dataset_card import SOURCE_MARK
from datasets_scripts.inspection.dataset_card import build_card as build_dataset_card
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.cards.card import build_card, read_evidence
from hub_cards.cards.evidence import same_weights
from hub_cards.cards.licences import HUB_LICENCES, derive_licence
from hub_cards.cards.results import eval_results, read_eval_results

__all__ = ["check_card", "check_metadata"]

BUILD = "write it with hub_cards/build.py"
# In small letters "todo" is Spanish for everything, as an instruction may have it.
PLACEHOLDER = re.compile(
    r"\b(?:TODO|TBD|FIXME|XXX)\b|(?i:\[(?:more information needed|optional)\]|\bn/a\b)|\{\{|\{%"
)
# First words of the tables that hold measurements; a card may have tables of its own beside them.
MEASURED = {"task", "prediction", "hardware"}
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def check_card(folder: Path) -> list[str]:
    """One line per problem of the card of a model, adapter or dataset."""
    path = folder / "README.md"
    if not path.is_file():
        return [f"README.md is missing, the card: {BUILD}"]
    is_dataset = (folder / "meta" / "info.json").is_file()
    try:
        text = path.read_text()
        card = (DatasetCard if is_dataset else ModelCard)(text)
        metadata = metadata_load(path) or {}  # as it stands there; `card.data` repairs some of it
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        return [f"the Hub would reject the card's metadata ({' '.join(str(error).split())[:200]}): {BUILD}"]
    body = card.text.split(SOURCE_MARK)[0]  # below it stands what another wrote
    if len(body.split()) < 30 or not re.search(r"^# \S", body, re.MULTILINE):
        return [f"README.md says nothing: {BUILD}"]
    problems = check_metadata(metadata, "dataset" if is_dataset else "model")
    problems += _check_text(folder, body)
    problems += _check_dataset(folder, body) if is_dataset else _check_model(folder, card, body)
    return problems


def check_metadata(metadata: Mapping[str, Any], repo_type: str) -> list[str]:
    """What the Hub would reject, as far as it can be told without asking it.

    Args:
        metadata (`Mapping`): The YAML block of the card.
        repo_type (`str`): `model` or `dataset`.
    """
    problems = []

    def wrong(key: str, value: Any, wanted: str) -> None:
        problems.append(f"the Hub would reject {key}: {value!r} of the card, which must be {wanted}: {BUILD}")

    if not metadata.get("license"):
        problems.append(f"the card names no licence: {BUILD}, with --license if it asks for one")
    for licence in _as_list(metadata.get("license")):
        if not isinstance(licence, str) or licence not in HUB_LICENCES:
            wrong("license", licence, "one of the Hub's identifiers, such as apache-2.0, or other")
    for key in ("base_model", "datasets") if repo_type == "model" else ():
        for name in _as_list(metadata.get(key)):
            if not isinstance(name, str) or not HUB_ID.fullmatch(name):
                wrong(key, name, "ids of the Hub (owner/name)")
    for key in ("tags", "task_categories", "size_categories"):
        value = metadata.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            wrong(key, value, "a list of words")
    for key in ("library_name", "pipeline_tag", "license_name"):
        if metadata.get(key) is not None and not isinstance(metadata[key], str):
            wrong(key, metadata[key], "a word")
    if repo_type == "model" and metadata.get("pipeline_tag") != "robotics":
        wrong("pipeline_tag", metadata.get("pipeline_tag"), "robotics")
    try:
        models = metadata.get("model-index") or []
        kinds = [result["dataset"]["type"] for model in models for result in model["results"]]
    except (TypeError, KeyError):
        wrong("model-index", metadata["model-index"], "a list of models, each with results on a dataset")
    else:
        for kind in kinds:
            if not HUB_ID.fullmatch(str(kind)):
                wrong("model-index: dataset type", kind, "an id")
    return problems


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value] if value is not None else []


def _check_text(folder: Path, body: str) -> Iterator[str]:
    """Places that were left open, and pictures that are not there."""
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for found in dict.fromkeys(match.group() for match in PLACEHOLDER.finditer(prose)):
        yield f"README.md has a place that was never filled in ({found}): {BUILD}"
    for header, rows in _tables(prose).items():
        for row in rows:
            if any(not cell for cell in row):
                name = row[0] or header[0]
                yield f"README.md has an empty cell in the row of {name!r}: measure it, then {BUILD}"
    for target in re.findall(r"\]\(([^)#\s]+)\)", prose):
        if "://" not in target and not (folder / target).exists():
            yield f"README.md shows {target}, which is not there: put it there, then {BUILD}"


def _check_model(folder: Path, card: ModelCard, body: str) -> list[str]:
    """The card beside the one that the folder's files give."""
    try:
        evidence = read_evidence(folder)
    except ValueError as error:
        return [f"the card's figures have no source: {error}"]
    of_the_hub = (one for one in _as_list(card.data.license) if isinstance(one, str) and one in HUB_LICENCES)
    licence = next(of_the_hub, None)  # of any other, check_metadata tells
    problems = []
    try:
        derive_licence(evidence["summary"].get("licences", ()), licence)
        fresh = build_card(folder, licence=licence)
    except ValueError as error:
        return [str(error)]
    problems += _differences(body, fresh.text)
    if _results(card) != _results(fresh):
        problems.append(f"the card's model-index differs from evaluation/: {BUILD}")
    expected = eval_results(evidence["evaluation"]) if evidence["evaluation"] else []
    try:
        written = read_eval_results(folder)
    except ValueError:
        written = None
    if written != expected:
        what = "is missing" if written == [] else "differs from evaluation/eval.json"
        problems.append(f".eval_results {what}: {BUILD}")
    try:
        known = evidence["evaluation"] is None or same_weights(evidence["evaluation"], folder)
    except ValueError:
        known = True  # damaged weights, which is for loading to say
    if not known:
        problems.append(
            "evaluation/eval.json measured other weights than those here: run training/evaluate.py again"
        )
    if (
        evidence["evaluation"] is None
        and "Success in closed loop was" not in body
        and "does not act" not in body
    ):
        problems.append(f"the card does not say that nothing was tried in closed loop: {BUILD}")
    return problems


def _check_dataset(folder: Path, body: str) -> list[str]:
    try:
        if not read_provenance(folder):
            if "datasets_scripts/inspection/dataset_card.py" in body:
                return [
                    "the card's figures have no source: meta/foresight.json is missing: copy the folder again"
                ]
            return []  # nothing that we made; the card is somebody's own
        return list(_differences(body, build_dataset_card(folder).text.split(SOURCE_MARK)[0]))
    except ValueError as error:
        return [str(error)]


def _results(card: RepoCard) -> list[tuple]:
    return [
        (result.dataset_name, result.metric_name, result.metric_value)
        for result in card.data.eval_results or []
    ]


def _differences(body: str, fresh: str) -> Iterator[str]:
    """Rows of tables that are others than the measurements give; prose may be added as one likes."""
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
    """Header of each Markdown table -> its rows; tables of one header are joined."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    header: tuple[str, ...] | None = None
    lines = [*text.splitlines(), ""]
    for line, after in zip(lines, lines[1:], strict=False):
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = _cells(line) if re.fullmatch(r"[|:\- ]+", after) else None
            if header is not None:
                tables.setdefault(header, [])
        elif not re.fullmatch(r"[|:\- ]+", line):
            tables[header].append(_cells(line))
    return tables


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
