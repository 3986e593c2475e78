"""Writes the card (README.md) of an annotated or simulated dataset from its metadata; no figure is typed.

The card of the dataset it was made from stays below it, and its metadata stays where ours says nothing.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment, StrictUndefined

from datasets_scripts.columns import (
    POINTS_PREFIX,
    POINTS_VISIBLE_PREFIX,
    find_depth_key,
    is_label_key,
    points_key,
    points_visible_key,
)
from datasets_scripts.inspection.quality import FLAGS, MEASURES, summarise
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.dataset_folder import load_info
from datasets_scripts.storage.provenance import flagged_episodes, read_provenance

__all__ = ["build_card", "label_licences", "write_card"]

CARD_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
# Closes every card that the template makes; the path before it may change between versions.
OUR_CARD = "dataset_card.py` of `lerobot_policy_foresight`"
SOURCE_MARK = "<!-- below: the card of the dataset that was annotated -->"
FREE = {"apache-2.0", "mit", "bsd-3-clause", "not stated"}  # of label models; all others limit the use
LICENCE_KEYS = ("licence", "license")
NAMED_EPISODES = 12  # of a flag, before "and n more"
# The Hub's words for sizes, in rows.
SIZE_WORDS = (
    *((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")),
    *((1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (float("inf"), "1B<n<10B")),
)


def write_card(root: str | Path, repo_id: str | None = None, licence: str | None = None) -> None:
    """Writes `README.md` of a dataset; writing it again gives the same.

    Args:
        root (`str` or `Path`): Dataset folder with `meta/info.json` and `meta/foresight.json`.
        repo_id (`str`, *optional*): Hub id under which it will be found; a local folder if omitted.
        licence (`str`, *optional*): The Hub's name of its licence; by default what the card says that is
            there, and Apache-2.0 for what our simulation made. Those of label models that are not free for
            every use join it.

    Raises:
        ValueError: If the metadata is missing or damaged; names the file.
    """
    path = Path(root) / "README.md"
    text = str(build_card(root, repo_id, licence))
    with write_whole_file(path) as temporary:
        temporary.write_text(text)


def build_card(root: str | Path, repo_id: str | None = None, licence: str | None = None) -> DatasetCard:
    """The card as `write_card` writes it."""
    root = Path(root)
    info, provenance = load_info(root), read_provenance(root)
    old_data, old_text = _old_card(root / "README.md")
    annotation, episodes = provenance.get("annotation", {}), provenance.get("episodes", {})
    simulation = provenance.get("simulation", {})
    made_with = annotation.get("parameters", {})
    source = str(made_with.get("dataset", ""))
    flags = list(_flag_rows(provenance))
    cameras = _label_columns(info["features"], provenance.get("cameras", {}))
    labels = list(provenance.get("cameras", {}).items())
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    content = environment.from_string(CARD_TEMPLATE.read_text()).render(
        card_data=_build_metadata(
            info, old_data, source, _build_terms(old_data, provenance, licence)
        ).to_yaml(),
        name=source or repo_id or "dataset",
        added="3D point tracks" if made_with.get("depth") == "sensor" else "metric depth and 3D point tracks",
        chosen=_describe_chosen(annotation),
        info={"robot_type": None, **info},
        cameras=", ".join(f"`{camera}`" for camera in _rgb_cameras(info["features"])) or "none",
        columns=cameras,
        parameters=[
            *((f"simulation: {key}", value) for key, value in _flatten(simulation.get("parameters", {}))),
            *_list_parameters(
                {"versions": {**annotation.get("versions", {}), **simulation.get("versions", {})}}, labels
            ),
        ],
        is_simulated=bool(simulation),
        is_annotated=bool(annotation),
        tasks=sorted(Counter(facts["task"] for facts in episodes.values() if "task" in facts).items()),
        licences=label_licences(provenance.get("cameras", {})),
        quality=list(_quality_rows(episodes)),
        flagged=len(flagged_episodes(provenance)),
        flags=flags,
        skipped=annotation.get("skipped", []),
        repo_id=repo_id or ("local/annotated" if annotation else "local/dataset"),
        is_local=repo_id is None,
        place=repo_id or "DIR",
        example=[_build_example(column) for column in cameras],
        version=version("lerobot_policy_foresight"),
    )
    if old_text:
        content = f"{content}\n{SOURCE_MARK}\n\n{old_text}"
    return DatasetCard(content)


def _old_card(path: Path) -> tuple[dict, str]:
    """Metadata and text of the source's card, whether this is still it or ours around it."""
    if not path.is_file():
        return {}, ""
    content = path.read_text(errors="replace")
    head = re.match(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", content, re.DOTALL)
    try:
        data = yaml.safe_load(head.group(1)) if head else {}
    except yaml.YAMLError:
        head, data = None, {}  # all of it is text then
    text = content[head.end() :] if head else content
    if SOURCE_MARK in text:
        text = text.split(SOURCE_MARK, 1)[1]
    elif OUR_CARD in text:
        text = ""  # ours, and the source had none
    return data if isinstance(data, dict) else {}, text.strip() + "\n" if text.strip() else ""


def _build_terms(
    old: Mapping[str, Any], provenance: Mapping[str, Any], licence: str | None
) -> dict[str, Any]:
    """`license` of the metadata: the dataset's own, and that of each label model that limits its use."""
    own = [licence] if licence else _as_list(old.get("license"))
    if not own and "simulation" in provenance:
        own = ["apache-2.0"]
    if not own:
        return {}
    of_labels = {stated for _, stated in label_licences(provenance.get("cameras", {}))}
    limits = sorted({stated if stated.startswith("cc-") else "other" for stated in of_labels - FREE})
    terms = list(dict.fromkeys([*own, *limits]))
    return {"license": terms if len(terms) > 1 else terms[0]}


def _build_metadata(
    info: Mapping, old: Mapping[str, Any], source: str, terms: Mapping[str, Any]
) -> DatasetCardData:
    tags = dict.fromkeys([*_as_list(old.get("tags")), "LeRobot", "depth", "point-tracking", "foresight"])
    data = {
        "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}],
        **old,
        **terms,
        "tags": list(tags),
        "task_categories": list(dict.fromkeys([*_as_list(old.get("task_categories")), "robotics"])),
        "size_categories": [next(word for n, word in SIZE_WORDS if info["total_frames"] < n)],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        data["source_datasets"] = [source]
    return DatasetCardData(**data)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value] if value else []


def _rgb_cameras(features: Mapping[str, Mapping]) -> list[str]:
    return [
        key.removeprefix("observation.images.")
        for key, feature in features.items()
        if feature["dtype"] in ("image", "video") and not is_label_key(key, feature)
    ]


def _label_columns(features: Mapping[str, Mapping], cameras: Mapping[str, Mapping]) -> list[dict[str, str]]:
    """Rows of the table of columns."""
    rows = []
    for camera in _rgb_cameras(features):
        facts = cameras.get(camera, {})
        depth = find_depth_key(features, camera)
        if depth:
            meaning = "depth along the optical axis, unknown at its lowest and highest value"
            rows.append({"key": depth, "meaning": meaning, "source": _name_source(facts.get("depth"))})
        if points_key(camera) in features:
            n = features[points_visible_key(camera)]["shape"][0]
            tracks = _name_source(facts.get("tracks"))
            rows += [
                {"key": points_key(camera), "meaning": f"{n} points x (x, y, z in metres)", "source": tracks},
                {"key": points_visible_key(camera), "meaning": "whether each is seen", "source": tracks},
            ]
    return rows


def _name_source(facts: Mapping[str, Any] | None) -> str:
    source = (facts or {}).get("source", "sensor")
    return "the source dataset" if source == "sensor" else source


def _describe_chosen(annotation: Mapping[str, Any]) -> str:
    """Which episodes of the source these are."""
    chosen = annotation.get("source_episode")
    return f"it holds {len(chosen)} of its episodes, numbered anew" if chosen else ""


def _build_example(column: Mapping[str, str]) -> str:
    key = column["key"]
    if key.startswith(POINTS_VISIBLE_PREFIX):
        return f'seen = frame["{key}"]  # (points,) bool'
    if key.startswith(POINTS_PREFIX):
        return f'points = frame["{key}"].reshape(-1, 3)  # x / width, y / height, metres'
    return f'depth = frame["{key}"]  # (1, H, W) metres'


def _list_parameters(
    annotation: Mapping[str, Any], cameras: list[tuple[str, Mapping]]
) -> Iterator[tuple[str, str]]:
    """Rows of the table of parameters: those of each kind of label, said once if all cameras agree."""
    for kind in ("depth", "tracks"):
        by_text: dict[tuple[str, str], list[str]] = {}
        for camera, facts in cameras:
            for key, value in _flatten(facts.get(kind, {})):
                by_text.setdefault((key, value), []).append(camera)
        of_kind = [camera for camera, facts in cameras if kind in facts]
        for (key, value), named in by_text.items():
            where = "" if named == of_kind and len(named) > 1 else f" ({', '.join(named)})"
            yield f"{kind}{where}: {key}", value
    for name, number in annotation.get("versions", {}).items():
        yield f"version of {name}", str(number)


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
        yield path.replace("_", " "), text.replace("|", "\\|")


def label_licences(value: Any) -> list[tuple[str, str]]:
    """Names and licences, sorted, of all models in a part of the provenance that states a licence."""
    found = set()

    def search(value: Any, name: str) -> None:
        if isinstance(value, list):
            for inner in value:
                search(inner, name)
        if isinstance(value, Mapping):
            named = str(value.get("model") or value.get("name") or name)
            found.update((named, value[key]) for key in LICENCE_KEYS if isinstance(value.get(key), str))
            for key, inner in value.items():
                search(inner, key)

    search(value, "model")
    return sorted(found)


def _quality_rows(episodes: Mapping[str, Mapping]) -> Iterator[dict[str, str]]:
    for camera, measures in summarise(episodes).items():
        for key, wording, form, _ in MEASURES:
            if key in measures:
                numbers = {name: form.format(measures[key][name]) for name in ("median", "min", "max")}
                yield {"camera": camera, "measure": wording, **numbers}


def _flag_rows(provenance: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Flags in the order of `FLAGS`, with the episodes that have them."""
    episodes: dict[str, list[int]] = {}
    for episode, raised in sorted(flagged_episodes(provenance).items()):
        for flag in raised:
            episodes.setdefault(flag, []).append(episode)
    order = list(FLAGS)
    for flag in sorted(episodes, key=lambda flag: (order.index(flag.rpartition("/")[2]), flag)):
        named = episodes[flag][:NAMED_EPISODES]
        more = len(episodes[flag]) - len(named)
        text = ", ".join(map(str, named)) + (f" and {more} more" if more else "")
        yield {"flag": flag, "episodes": text, "meaning": FLAGS[flag.rpartition("/")[2]]}
