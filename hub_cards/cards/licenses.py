"""The license of weights, from the licenses of what they were made of.

Weights carry on the terms of the pretrained towers inside them, of the model that a run started from, and of
the models that made the labels. This is to our knowledge, not legal advice; we ask for what is unknown.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download

from datasets_scripts.inspection.dataset_card import list_label_licenses
from datasets_scripts.licenses import (
    HUB_LICENSES,
    PERMISSIVE,
    RESEARCH,
    check_chosen_license,
    has_words,
    keeps_terms,
    read_card_license,
    read_license,
)
from training.config import RunConfig
from training.models.model_folder import read_run_config, read_summary
from training.run_record import portable_path

__all__ = ["derive_license", "find_previous_stage", "list_parts"]

# Pretrained towers; where the page of a tower on the Hub and the authors' release differ, the stricter.
TOWER_LICENSES = {
    "facebook/vit-mae-*": "cc-by-nc-4.0",
    "timm/vit_*.mae": "cc-by-nc-4.0",
    "openai/clip-*": "mit",
}


def list_parts(run: RunConfig | None, summary: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """What a run's weights were made of.

    Args:
        run (`RunConfig`, *optional*): The run's settings; towers and base are unknown without them.
        summary (`Mapping`): The run's `summary.json`.

    Returns:
        `list[dict]`: `what`, `name` and `license` of each part; an unknown license is `None`.
    """
    parts = []
    if run is None:
        parts.append({"what": "the run's settings (config.yaml)", "name": "not found", "license": None})
    elif run.init_from:
        license = _read_base_license(run.init_from, run.init_revision)
        stage = None if license else find_previous_stage(run)
        if stage:  # of the same training, without a card
            parts += list_parts(*stage)
        else:
            name = portable_path(run.init_from)
            parts.append({"what": "base model", "name": name, "license": license})
    else:
        for tower in ("text", "vision"):
            if name := getattr(run.towers, tower):
                known = (value for pattern, value in TOWER_LICENSES.items() if fnmatchcase(name, pattern))
                part = {"what": f"{tower} tower", "name": portable_path(name), "license": next(known, None)}
                parts.append(part)
    for dataset in summary["datasets"]:
        for name, license in list_label_licenses(dataset.get("labels", {})):
            what = f"labels of {dataset['name']}"
            parts.append({"what": what, "name": name, "license": read_license(license)})
        for column in dataset.get("unrecorded_labels", ()):
            parts.append({"what": f"labels of {dataset['name']}", "name": column, "license": None})
    return [part for i, part in enumerate(parts) if part not in parts[:i]]


def find_previous_stage(run: RunConfig) -> tuple[RunConfig, dict] | None:
    """Settings and summary of the run that made what a run started from, if they are beside it.

    Not if they are those of the run itself, whose export replaced what it started from.
    """
    summary = read_summary(run.init_from)
    stage = read_run_config(run.init_from) if summary else run
    return None if stage.init_from == run.init_from else (stage, summary)


def _read_base_license(source: str, revision: str | None) -> str | None:
    """What the card of a model says, in a folder or on the Hub; `None` without a card or a single license."""
    try:
        card = Path(source) / "README.md"
        if not Path(source).is_dir():
            card = hf_hub_download(source, "README.md", revision=revision)
        return read_card_license(ModelCard.load(card, ignore_metadata_errors=True).data)
    except Exception:  # the Hub's client, YAML and files raise their own types; all mean: not known
        return None


def derive_license(parts: Iterable[Mapping[str, Any]], chosen: str | None = None) -> dict[str, str]:
    """The license for a card's metadata.

    Args:
        parts (`Iterable[Mapping]`): From [`list_parts`].
        chosen (`str`, *optional*): The user's choice, where it is unknown or may be stricter.

    Returns:
        `dict`: `license`, and `license_name` if that is `other`.

    Raises:
        ValueError: If it is unknown and none is chosen, or the chosen one allows more than a part does;
            names the part.
    """
    parts = [{**part, "license": read_license(part["license"])} for part in parts]
    strict = [part for part in parts if part["license"] not in {None, *PERMISSIVE}]
    if chosen:
        chosen = check_chosen_license(chosen)
        for part in strict:
            if not keeps_terms(chosen, part["license"]):
                own = part["license"] if part["license"] in HUB_LICENSES else "other"
                raise ValueError(
                    f"--license {chosen} allows more than {_name_part(part)}, or other things: choose one "
                    f"that keeps its terms, for example {own}, or train without that part"
                )
        return {"license": chosen, **({"license_name": "see-the-card"} if chosen == "other" else {})}
    if unclear := [part for part in parts if part["license"] is None]:
        raise ValueError(
            f"the license of these weights is not known, because that of {_name_part(unclear[0])} is not: "
            "find it out and give --license, for example --license apache-2.0 or cc-by-nc-4.0"
        )
    kinds = {part["license"] for part in strict} or {"apache-2.0"}  # the project's own
    if len(kinds) == 1 and kinds <= HUB_LICENSES - {"other", "unknown"}:
        return {"license": kinds.pop()}
    if any(has_words(kind, RESEARCH) for kind in kinds):
        return {"license": "other", "license_name": "research-only"}
    raise ValueError(
        f"the license does not follow from {'; '.join(map(_name_part, strict))}: choose one that all of the "
        "parts allow, with --license"
    )


def _name_part(part: Mapping[str, Any]) -> str:
    return f"{part['what']}, {part['name']} ({part['license'] or 'license unknown'})"
