"""Write the card (README.md) of an annotated or simulated dataset from its metadata.

The card of the source dataset stays below it, and its metadata stays where ours says nothing.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from datasets_scripts.columns import find_depth_key, list_cameras, points_key, points_visible_key
from datasets_scripts.command_line import list_some
from datasets_scripts.inspection.quality import FLAGS, summarize_figures
from datasets_scripts.inspection.template_rendering import render_template
from datasets_scripts.licenses import (
    HUB_LICENSES,
    PERMISSIVE,
    check_chosen_license,
    name_license,
    read_license,
)
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.dataset_folder import load_info
from datasets_scripts.storage.provenance import flagged_episodes, read_provenance, scripted_in

__all__ = ["as_list", "build_card", "list_label_licenses", "write_card"]

CARD_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
# Closes every card that the template makes; the path before it may change between versions.
OUR_CARD = "dataset_card.py` of `lerobot_policy_foresight`"
SOURCE_MARK = "<!-- below: the card of the dataset that was annotated -->"
LICENSE_KEYS = ("license", "licence")  # "licence" stands in datasets of before the first release
NAMED_EPISODES = 12  # of a flag, before "and n more"
# The Hub's words for sizes, by the number of digits of the rows: up to 3, 4, 5, ...
SIZE_WORDS = ["n<1K", *map("<n<".join, pairwise(("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")))]


def write_card(root: str | Path, repo_id: str | None = None, license: str | None = None) -> None:
    """Writes `README.md` of a dataset; writing it again gives the same.

    Args:
        root (`str` or `Path`): Dataset folder with `meta/info.json` and `meta/foresight.json`.
        repo_id (`str`, *optional*): Hub id under which it will be found; a local folder if omitted.
        license (`str`, *optional*): The Hub's name of its license; by default that of the card that exists,
            and Apache-2.0 for what our simulation made. Those of label models that are not free for every use
            are added.

    Raises:
        ValueError: If the metadata is missing or damaged, or the Hub has no such license; names it.
    """
    text = str(build_card(root, repo_id, license))
    with write_whole_file(Path(root) / "README.md") as temporary:
        temporary.write_text(text)


def build_card(root: str | Path, repo_id: str | None = None, license: str | None = None) -> DatasetCard:
    """The card as `write_card` writes it."""
    root = Path(root)
    info, provenance = load_info(root), read_provenance(root)
    old_data, old_text = _read_source_card(root / "README.md")
    annotation, simulation = provenance.get("annotation", {}), provenance.get("simulation", {})
    episodes, cameras = provenance.get("episodes", {}), provenance.get("cameras", {})
    source = str(annotation.get("parameters", {}).get("dataset", ""))
    terms = _build_terms(old_data, provenance, license)
    versions = {**annotation.get("versions", {}), **simulation.get("versions", {})}
    content = render_template(
        CARD_TEMPLATE,
        card_data=_build_metadata(info, old_data, source, terms).to_yaml(),
        name=source or repo_id or "dataset",
        info={"robot_type": None, **info},
        annotation=annotation,
        simulation=simulation,
        simulator=scripted_in(provenance) or "simulation",
        cameras=list_cameras(info["features"]),
        columns=list(_list_label_columns(info["features"], cameras)),
        parameters=[
            *((f"simulation: {key}", value) for key, value in _flatten(simulation.get("parameters", {}))),
            *_list_label_parameters(cameras),
            *((f"version of {name}", number) for name, number in versions.items()),
        ],
        tasks=sorted(Counter(facts["task"] for facts in episodes.values() if "task" in facts).items()),
        licenses=list_label_licenses(cameras),
        figures=summarize_figures(episodes),
        flagged=len(flagged_episodes(provenance)),
        flags=list(_list_flags(provenance)),
        repo_id=repo_id,
        version=version("lerobot_policy_foresight"),
    )
    if old_text:
        content = f"{content}\n{SOURCE_MARK}\n\n{old_text}"
    return DatasetCard(content)


def _read_source_card(path: Path) -> tuple[dict, str]:
    """Metadata and text of the source's card, whether this is still it or ours around it."""
    if not path.is_file():
        return {}, ""
    text = path.read_text(errors="replace")
    try:
        card = DatasetCard(text, ignore_metadata_errors=True)
        card.data.to_yaml()  # not all that can be read can be written
        data, text = card.data.to_dict(), card.text
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        data = {}  # all of it is text then
    for key in data.keys() & {"license", "tags", "task_categories"}:  # ours are added to these
        data[key] = [value for value in as_list(data[key]) if isinstance(value, str)] or None
    if SOURCE_MARK in text:
        text = text.split(SOURCE_MARK, 1)[1]
    elif OUR_CARD in text:
        text = ""  # ours, and the source had none
    return data, text.strip() + "\n" if text.strip() else ""


def _build_terms(
    old: Mapping[str, Any], provenance: Mapping[str, Any], license: str | None
) -> dict[str, Any]:
    """`license` of the metadata: the dataset's, and that of each label model that limits its use."""
    stated = [check_chosen_license(license)] if license else as_list(old.get("license"))
    terms = [name_license(each) for each in stated]
    if not terms and "simulation" in provenance:
        terms = ["apache-2.0"]
    limits = {_limit(stated) for _, stated in list_label_licenses(provenance.get("cameras", {}))} - PERMISSIVE
    if limits and not terms:
        terms = ["unknown"]  # the dataset's, beside those of its labels
    terms = list(dict.fromkeys([*terms, *sorted(limits)]))
    return {"license": terms if len(terms) > 1 else terms[0]} if terms else {}


def _limit(stated: str) -> str:
    """The Hub's word for the license of labels."""
    name = read_license(stated) or "unknown"
    return name if name in HUB_LICENSES else "other"


def _build_metadata(
    info: Mapping, old: Mapping[str, Any], source: str, terms: Mapping[str, Any]
) -> DatasetCardData:
    tags = dict.fromkeys([*as_list(old.get("tags")), "LeRobot", "depth", "point-tracking", "foresight"])
    data = {
        "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}],
        # Columns and episodes are not the source's, and the Hub's viewer would miss those that it lists.
        **{name: value for name, value in old.items() if name != "dataset_info"},
        **terms,
        "tags": list(tags),
        "task_categories": list(dict.fromkeys([*as_list(old.get("task_categories")), "robotics"])),
        "size_categories": [SIZE_WORDS[min(max(len(str(info["total_frames"])) - 3, 0), len(SIZE_WORDS) - 1)]],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        data["source_datasets"] = [source]
    return DatasetCardData(**data)


def as_list(value: Any) -> list:
    """A value of a card's metadata that may be a list, as a list."""
    return value if isinstance(value, list) else [value] if value else []


def _list_label_columns(
    features: Mapping[str, Mapping], cameras: Mapping[str, Mapping]
) -> Iterator[dict[str, Any]]:
    """Label columns: `key`, `kind`, number of points `n`, and the source of the labels."""
    for camera in list_cameras(features):
        depth, tracks = (
            cameras.get(camera, {}).get(kind, {}).get("source", "sensor") for kind in ("depth", "tracks")
        )
        if key := find_depth_key(features, camera):
            yield {"kind": "depth", "key": key, "source": depth}
        if points_key(camera) in features:
            n = features[points_visible_key(camera)]["shape"][0]
            yield {"kind": "points", "key": points_key(camera), "n": n, "source": tracks}
            yield {"kind": "visible", "key": points_visible_key(camera), "source": tracks}


def _list_label_parameters(cameras: Mapping[str, Mapping]) -> Iterator[tuple[str, str]]:
    """Parameters of each kind of label; those that all cameras share are listed once."""
    for kind in ("depth", "tracks"):
        by_text: dict[tuple[str, str], list[str]] = {}
        for camera, facts in cameras.items():
            for parameter in _flatten(facts.get(kind, {})):
                by_text.setdefault(parameter, []).append(camera)
        with_kind = [camera for camera, facts in cameras.items() if kind in facts]
        for (key, value), named in by_text.items():
            where = "" if named == with_kind and len(named) > 1 else f" ({', '.join(named)})"
            yield f"{kind}{where}: {key}", value


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `("a b", "1")`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path} {key}".strip())
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value, 1):
            yield from _flatten(inner, f"{path} {number}".strip())
    elif value is not None:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield path.replace("_", " "), text


def list_label_licenses(value: Any) -> list[tuple[str, str]]:
    """Names and licenses, sorted, of all models in a part of the provenance that states a license.

    A license has the Hub's name if it has one, otherwise the text that was recorded.
    """
    found = set()

    def search(value: Any, name: str) -> None:
        if isinstance(value, list):
            for inner in value:
                search(inner, name)
        if isinstance(value, Mapping):
            named = str(value.get("model") or value.get("name") or name)
            stated = [license for key in LICENSE_KEYS for license in as_list(value.get(key))]
            found.update((named, name_license(license)) for license in stated if isinstance(license, str))
            for key, inner in value.items():
                search(inner, key)

    search(value, "model")
    return sorted(found)


def _list_flags(provenance: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Flags in the order of `FLAGS`, with the episodes that have them."""
    episodes: dict[str, list[int]] = {}
    for episode, raised in sorted(flagged_episodes(provenance).items()):
        for flag in raised:
            episodes.setdefault(flag, []).append(episode)
    order = {word: place for place, word in enumerate(FLAGS)}
    for flag in sorted(episodes, key=lambda flag: (order.get(flag.rpartition("/")[2], len(order)), flag)):
        text = list_some(episodes[flag], NAMED_EPISODES)
        yield {"flag": flag, "episodes": text, "meaning": FLAGS.get(flag.rpartition("/")[2], "")}
