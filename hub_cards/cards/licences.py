"""The licence of weights, from the licences of what they were made of.

Weights carry on the terms of the pretrained towers inside them, of the model that a run started from, and of
the models that made the labels. To our knowledge; it is no legal advice, and what is not known is asked for.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download

from datasets_scripts.inspection.dataset_card import label_licences
from training.checkpoint_folder import read_run_config, read_summary
from training.config import RunConfig
from training.run_facts import portable_path

__all__ = [
    "HUB_LICENCES",
    "OWN",
    "RESEARCH_ONLY",
    "read_base_licence",
    "derive_licence",
    "parts_of_run",
    "find_previous_stage",
]

OWN = "apache-2.0"  # of what the project itself adds
RESEARCH_ONLY = "other"  # the Hub's word for a licence that has none of its own there
# Pretrained towers; where the page of a tower on the Hub and the authors' release differ, the stricter.
TOWER_LICENCES = {
    "facebook/vit-mae-*": "cc-by-nc-4.0",
    "timm/vit_*.mae": "cc-by-nc-4.0",
    "openai/clip-*": "mit",
}
# https://huggingface.co/docs/hub/repositories-licenses, and those that the Hub has taken up since.
_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda
cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community
gemma unknown other
"""
HUB_LICENCES = frozenset(_NAMES.split())
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "unlicense"}
# Words of a licence that forbids commerce, and of one that forbids more.
RESEARCH = ("research",)
NONCOMMERCIAL = ("-nc", "noncommercial", "non-commercial", *RESEARCH)


def parts_of_run(run: RunConfig | None, summary: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """What a run's weights were made of.

    Args:
        run (`RunConfig`, *optional*): The run's settings; towers and base are unknown without them.
        summary (`Mapping`): The run's `summary.json`.

    Returns:
        `list[dict]`: `what`, `name` and `licence` of each part; a licence that is not known is `None`.
    """
    parts = []
    if run is None:
        parts.append({"what": "the run's settings (config.yaml)", "name": "not found", "licence": None})
    elif run.init_from:
        name, licence = portable_path(run.init_from), read_base_licence(run.init_from, run.init_revision)
        stage = None if licence else find_previous_stage(run)
        if stage:  # of the same training, without a card of its own
            parts += parts_of_run(*stage)
        else:
            parts.append({"what": "base model", "name": name, "licence": licence})
    else:
        for tower in ("text", "vision"):
            if name := getattr(run.towers, tower):
                known = (licence for pattern, licence in TOWER_LICENCES.items() if fnmatchcase(name, pattern))
                parts.append(
                    {"what": f"{tower} tower", "name": portable_path(name), "licence": next(known, None)}
                )
    for dataset in summary["datasets"]:
        for name, licence in label_licences(dataset.get("labels", {})):
            known = None if licence == "not stated" else licence
            parts.append({"what": f"labels of {dataset['name']}", "name": name, "licence": known})
    return [part for i, part in enumerate(parts) if part not in parts[:i]]


def find_previous_stage(run: RunConfig) -> tuple[RunConfig, dict] | None:
    """Settings and summary of the run that made what a run started from, if they lie beside it.

    Not if they are those of the run itself, whose export took the place of what it started from.
    """
    made = read_summary(run.init_from)
    stage = read_run_config(run.init_from) if made else run
    return None if stage.init_from == run.init_from else (stage, made)


def read_base_licence(source: str, revision: str | None = None) -> str | None:
    """What the card of a model says, in a folder or on the Hub; `None` if there is no card or no licence.

    Args:
        source (`str`): Folder or Hub id.
        revision (`str`, *optional*): Commit, branch or tag of a Hub id.
    """
    try:
        here = Path(source) / "README.md"
        place = here if Path(source).is_dir() else hf_hub_download(source, "README.md", revision=revision)
        data = ModelCard.load(place, ignore_metadata_errors=True).data
        licence = data.get("license_name", data.license) if data.license == RESEARCH_ONLY else data.license
    except Exception:  # the Hub's client, YAML and files raise types of their own; all mean: not known
        return None
    return licence if isinstance(licence, str) else None  # of several, which holds for the weights?


def derive_licence(parts: Iterable[Mapping[str, Any]], chosen: str | None = None) -> dict[str, str]:
    """The licence for a card's metadata.

    Args:
        parts (`Iterable[Mapping]`): As [`parts_of_run`] gives them.
        chosen (`str`, *optional*): The user's choice, where it is not known or may be stricter.

    Returns:
        `dict`: `license`, and `license_name` if that is `other`.

    Raises:
        ValueError: If it is not known and none is chosen, or the chosen one allows more than a part does;
            names the part.
    """
    parts = list(parts)
    strict = [part for part in parts if part["licence"] not in {None, *PERMISSIVE}]
    unclear = [part for part in parts if part["licence"] is None]
    kinds = {part["licence"] for part in strict}
    if chosen:
        if chosen not in HUB_LICENCES:
            raise ValueError(
                f"--license {chosen} is no name that the Hub knows: give one of "
                "https://huggingface.co/docs/hub/repositories-licenses, such as apache-2.0, or other"
            )
        for part in strict:
            limits = [words for words in (RESEARCH, NONCOMMERCIAL) if _has(part["licence"], words)]
            keeps = chosen == RESEARCH_ONLY or all(_has(chosen, words) for words in limits)
            if chosen in PERMISSIVE or not keeps:
                example = RESEARCH_ONLY if RESEARCH in limits else "cc-by-nc-4.0"
                raise ValueError(
                    f"--license {chosen} allows more than {_describe(part)}: choose one that does not, "
                    f"for example {example}, or train without that part"
                )
        named = {"license_name": "see-the-card"} if chosen == RESEARCH_ONLY else {}
        return {"license": chosen, **named}
    if unclear:
        raise ValueError(
            f"the licence of these weights is not known, because that of {_describe(unclear[0])} is not: "
            "find it out and give --license, for example --license apache-2.0 or cc-by-nc-4.0"
        )
    if not kinds:
        return {"license": OWN}
    if len(kinds) == 1 and kinds <= HUB_LICENCES - {RESEARCH_ONLY, "unknown"}:
        return {"license": kinds.pop()}
    if any("research" in kind for kind in kinds):
        return {"license": RESEARCH_ONLY, "license_name": "research-only"}
    raise ValueError(
        f"the licence does not follow from {'; '.join(map(_describe, strict))}: choose one that all of the "
        "parts allow, with --license"
    )


def _has(licence: str, words: Iterable[str]) -> bool:
    return any(word in licence for word in words)


def _describe(part: Mapping[str, Any]) -> str:
    return f"{part['what']}, {part['name']} ({part['licence'] or 'licence unknown'})"
