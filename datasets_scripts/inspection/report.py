"""A page about the labels of a whole dataset: figures, distributions, pictures, and where to look first.

Figures that `annotate.py` or an earlier `--write-flags` has recorded are taken from `meta/foresight.json` for
every episode; a sample of episodes is read from disk for what only pixels and points can tell.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from tqdm import tqdm

from datasets_scripts.inspection.label_pictures import draw_distributions, draw_episode, draw_motion, to_page
from datasets_scripts.inspection.labelled_episode import CHUNK, LabelledDataset, LabelledEpisode, measure
from datasets_scripts.inspection.quality import FLAGS, MEASURES, TrackMeter, find_flags, flatten, summarise
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.episode_job import work_on_all
from datasets_scripts.storage.provenance import PROVENANCE_PATH, write_provenance

__all__ = ["Survey", "survey_labels", "worst_first", "write_flags", "write_report"]

REPORT_TEMPLATE = Path(__file__).with_name("report_template.html")
SAMPLED_EPISODES = 32
SAMPLED_CHUNKS = 32  # of an episode, 32 frames each
LISTED_EPISODES = 12  # to look at first
PICTURED_EPISODES = 4  # of those
ORDINARY_EPISODES = 2  # pictured besides
MOMENTS = 5
STANDS_OUT = 3.0  # deviations from the median
PARALLEL_FRAMES = 4000  # from which on other processes are worth the time they take to start
SAVES, SAVE_EVERY = 50, 100  # so often at the most, and after so many episodes, `--write-flags` saves


@dataclass
class Points:
    """All points of a camera in the episodes read, `(n,)` each, as `draw_distributions` wants them."""

    motion_px: list[np.ndarray] = field(default_factory=list)
    shares: list[np.ndarray] = field(default_factory=list)
    moving: list[np.ndarray] = field(default_factory=list)


@dataclass
class Survey:
    """What is known of a dataset's labels.

    Attributes:
        episodes (`dict[str, dict]`): Facts by episode as in `meta/foresight.json`, those just read included.
        sampled (`list[int]`): Episodes that were read.
        depth_counts (`dict[str, np.ndarray]`): By camera, pixels between `quality.DEPTH_EDGES_M`.
        points (`dict[str, Points]`): By camera.
    """

    episodes: dict[str, dict]
    sampled: list[int]
    depth_counts: dict[str, np.ndarray]
    points: dict[str, Points]


_dataset: LabelledDataset | None = None


def _open_dataset(name: str) -> None:
    """Opens the dataset once per process."""
    global _dataset
    _dataset = LabelledDataset(name)


def _measure_one(number: int) -> dict[str, Any]:
    """Facts of an episode and what distributions are made of."""
    found = measure(LabelledEpisode(_dataset, number), SAMPLED_CHUNKS)
    tracks = {camera: own.tracks for camera, own in found.items() if own.tracks is not None}
    return {
        "episode": number,
        "facts": {camera: own.figures() for camera, own in found.items()},
        "depth": {camera: own.depth.counts for camera, own in found.items() if own.depth is not None},
        "points": {
            camera: (own.motion_px[own.real], own.shares[own.real], _read_moving(own))
            for camera, own in tracks.items()
        },
    }


def _read_moving(own: TrackMeter) -> np.ndarray:
    """Of the points that are seen: 1 for those that move, NaN where that is not recorded."""
    unknown = np.full(int(own.real.sum()), np.nan)
    return unknown if own.moving is None else own.moving[own.real].astype(float)


def _read_episodes(dataset: LabelledDataset, chosen: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """Results of `_measure_one` as they come."""
    rows = dataset.rows
    lengths = (rows.episode_stops - rows.episode_starts)[list(chosen)]
    if lengths.clip(max=SAMPLED_CHUNKS * CHUNK).sum() < PARALLEL_FRAMES:
        workers = 1
    jobs = [(episode,) for episode in chosen]
    done = work_on_all(_measure_one, jobs, workers, functools.partial(_open_dataset, rows.name))
    yield from tqdm(done, total=len(chosen), unit="episode", desc="reading labels")


def _merge_facts(earlier: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of an episode with newer ones of its cameras; what the source of depth said of it is kept."""
    facts = dict(earlier)
    for camera, known in measured.items():
        old = {key: value for key, value in facts.get(camera, {}).items() if key != "problem"}
        depth = {"depth": old.get("depth", {}) | known["depth"]} if "depth" in known else {}
        if new := {**old, **known, **depth}:
            facts[camera] = new
    return facts


def survey_labels(dataset: LabelledDataset, chosen: Sequence[int] | None = None, workers: int = 1) -> Survey:
    """Reads a sample of a dataset's episodes.

    Args:
        dataset (`LabelledDataset`): The dataset.
        chosen (`Sequence[int]`, *optional*): Episodes to read; 32, evenly spread, if omitted.
        workers (`int`): Processes.

    Returns:
        `Survey`: Of these, and what is recorded of the others.
    """
    total = dataset.rows.n_episodes
    if chosen is None:
        spread = np.linspace(0, total - 1, min(SAMPLED_EPISODES, total)).round().astype(int)
        chosen = np.unique(spread).tolist()
    survey = Survey(dict(dataset.provenance.get("episodes", {})), list(chosen), {}, {})
    for one in sorted(_read_episodes(dataset, chosen, workers), key=lambda one: one["episode"]):
        episode = str(one["episode"])
        survey.episodes[episode] = _merge_facts(survey.episodes.get(episode, {}), one["facts"])
        for camera, counts in one["depth"].items():
            survey.depth_counts[camera] = survey.depth_counts.get(camera, 0) + counts
        for camera, (motion_px, shares, moving) in one["points"].items():
            points = survey.points.setdefault(camera, Points())
            points.motion_px.append(motion_px), points.shares.append(shares), points.moving.append(moving)
    survey.episodes = {e: {**facts, "flags": find_flags(facts)} for e, facts in survey.episodes.items()}
    return survey


def write_flags(dataset: LabelledDataset, workers: int = 1) -> dict[int, list[str]]:
    """Records figures and flags of all episodes in `meta/foresight.json`; goes on where it was interrupted.

    Episodes that have figures are not read again. Flags come last and all at once, so that half of them
    cannot be taken for all.

    Args:
        dataset (`LabelledDataset`): A local dataset.
        workers (`int`): Processes.

    Returns:
        `dict[int, list[str]]`: Flags by episode, without those that have none.

    Raises:
        ValueError: If the dataset is in the cache of the Hub, which is not ours to change.
    """
    rows = dataset.rows
    if not Path(rows.name).is_dir():
        raise ValueError(f"flags are written into a folder, and {rows.name} is on the Hub: download it first")
    episodes = dataset.provenance.setdefault("episodes", {})
    missing = [e for e in range(rows.n_episodes) if not _is_measured(dataset, episodes.get(str(e), {}))]
    save_every = max(SAVE_EVERY, len(missing) // SAVES)
    for count, one in enumerate(_read_episodes(dataset, missing, workers), 1):
        episode = str(one["episode"])
        episodes[episode] = _merge_facts(episodes.get(episode, {}), one["facts"])
        if count % save_every == 0:
            _save(dataset)
    raised = {}
    for episode in range(rows.n_episodes):
        facts = episodes.setdefault(str(episode), {})
        facts["flags"] = find_flags(facts)
        if facts["flags"]:
            raised[episode] = facts["flags"]
    _save(dataset)
    return raised


def _save(dataset: LabelledDataset) -> None:
    content = {key: value for key, value in dataset.provenance.items() if key != "version"}
    order = sorted(content["episodes"], key=int)
    write_provenance(dataset.rows.root, content | {"episodes": {e: content["episodes"][e] for e in order}})


def _is_measured(dataset: LabelledDataset, facts: Mapping[str, Any]) -> bool:
    """Whether all labels of an episode have figures; one that could not be read has none."""
    labels = dataset.labels()
    if not any(labels.values()):  # then reading it tells whether its files are whole
        return facts.get("flags") == []
    return all(
        not facts.get(camera, {}).get("problem")
        and ("depth" not in kinds or "valid_share" in facts.get(camera, {}).get("depth", {}))
        and ("tracks" not in kinds or "motion_px" in facts.get(camera, {}))
        for camera, kinds in labels.items()
    )


def worst_first(episodes: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, list[str]]]:
    """Episodes to look at first, and why: those with flags by the gravity of these, then what stands out.

    Args:
        episodes (`Mapping`): Facts by episode.

    Returns:
        `list[tuple[int, list[str]]]`: Episode and reasons; without those that are like the others.
    """
    spread = _measure_spreads(episodes)
    gravity, ranked = list(FLAGS), []
    for episode, facts in episodes.items():
        reasons, largest = list(facts.get("flags", [])), 0.0
        worst = min((gravity.index(flag.rpartition("/")[2]) for flag in reasons), default=len(gravity))
        for camera, known in facts.items():
            for key, value in flatten(known).items() if isinstance(known, Mapping) else ():
                wording, form, middle, scale, sign = spread[camera, key]
                away = sign * (value - middle) / scale
                if away > STANDS_OUT:
                    reasons.append(f"{camera}: {wording} {form.format(value)} (median {form.format(middle)})")
                    largest = max(largest, away)
        if reasons:
            ranked.append((worst, -largest, int(episode), reasons))
    return [(episode, reasons) for *_, episode, reasons in sorted(ranked)]


def _measure_spreads(episodes: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], tuple]:
    """By camera and measure: wording, format, median, robust deviation, and which direction is bad."""
    values: dict[tuple[str, str], list[float]] = {}
    for facts in episodes.values():
        for camera, known in facts.items():
            for key, value in flatten(known).items() if isinstance(known, Mapping) else ():
                values.setdefault((camera, key), []).append(value)
    result = {}
    for key, wording, form, large_is_bad in MEASURES:
        for (camera, name), found in values.items():
            if name == key:
                middle = float(np.median(found))
                deviation = 1.4826 * float(np.median(np.abs(np.array(found) - middle)))
                # A tenth of the value at least: among equal episodes the smallest difference would stand out.
                scale = max(deviation, 0.1 * abs(middle), 1e-3)
                sign = {True: 1, False: -1, None: 0}[large_is_bad]
                result[camera, key] = wording, form, middle, scale, sign
    return result


def write_report(path: Path, dataset: LabelledDataset, survey: Survey) -> None:
    """Writes the page: one HTML file, pictures inside.

    Args:
        path (`Path`): File to write; it appears only when it is whole.
        dataset (`LabelledDataset`): The dataset.
        survey (`Survey`): What `survey_labels` found in it.

    Raises:
        RuntimeError: If matplotlib is missing; says what to install.
    """
    rows = dataset.rows
    first = worst_first(survey.episodes)
    flagged = {int(e): facts["flags"] for e, facts in survey.episodes.items() if facts.get("flags")}
    counts = {
        word: len([e for e in flagged if any(flag.endswith("/" + word) for flag in flagged[e])])
        for word in FLAGS
    }
    pictured = _choose_pictured(survey, [episode for episode, _ in first])
    reasons = dict(first)
    drawn = [
        _draw_pictures(LabelledEpisode(dataset, e), reasons.get(e)) for e in tqdm(pictured, desc="drawing")
    ]
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(REPORT_TEMPLATE.read_text()).render(
        name=Path(rows.name).name if Path(rows.name).is_dir() else rows.name,
        episodes=rows.n_episodes,
        frames=len(rows),
        fps=rows.fps,
        tasks=len(rows.tasks),
        sampled=survey.sampled,
        recorded=len(survey.episodes),
        first=[(episode, _read_task(dataset, episode), why) for episode, why in first[:LISTED_EPISODES]],
        more=max(0, len(first) - LISTED_EPISODES),
        flagged=len(flagged),
        flag_rows=[(word, counts[word], meaning) for word, meaning in FLAGS.items()],
        cameras=list(_camera_sections(dataset, survey)),
        pictured=drawn,
        provenance_path=PROVENANCE_PATH.as_posix(),
    )
    with write_whole_file(path) as temporary:
        temporary.write_text(page)


def _choose_pictured(survey: Survey, first: list[int]) -> list[int]:
    """The worst episodes, and some that are like the others."""
    ordinary = [episode for episode in survey.sampled if episode not in first]
    spread = np.linspace(0, len(ordinary) - 1, min(ORDINARY_EPISODES, len(ordinary))).round().astype(int)
    chosen = first[:PICTURED_EPISODES] + [ordinary[i] for i in np.unique(spread)]
    return chosen or survey.sampled[:1]


def _read_task(dataset: LabelledDataset, episode: int) -> str:
    start = int(dataset.rows.episode_starts[episode])
    return dataset.rows.tasks[int(dataset.rows.column("task_index").read(range(start, start + 1))[0])]


def _camera_sections(dataset: LabelledDataset, survey: Survey) -> Iterator[dict[str, Any]]:
    """Table and distributions of every camera."""
    summary = summarise(survey.episodes)
    for camera, kinds in dataset.labels().items():
        known = dataset.provenance.get("cameras", {}).get(camera, {})
        sources = {kind: known.get(kind, {}).get("source", "not recorded") for kind in kinds}
        points = survey.points.get(camera, Points())
        joined = [
            np.concatenate(parts) if parts else np.zeros(0)
            for parts in (points.motion_px, points.shares, points.moving)
        ]
        errors = [
            facts[camera]["depth"]["error"]
            for facts in survey.episodes.values()
            if facts.get(camera, {}).get("depth", {}).get("error") is not None
        ]
        figure = draw_distributions(survey.depth_counts.get(camera), *joined, errors)
        rows = [
            (wording, *(form.format(row[name]) for name in ("median", "min", "max")), row["worst"])
            for key, wording, form, _ in MEASURES
            if (row := summary.get(camera, {}).get(key))
        ]
        moving_cameras = [facts.get(camera, {}).get("moving_camera") for facts in survey.episodes.values()]
        yield {
            "name": camera,
            "sources": sources,
            "rows": rows,
            "figure": figure and to_page(figure),
            "moves": sum(map(bool, moving_cameras)),
        }


def _draw_pictures(episode: LabelledEpisode, reasons: list[str] | None) -> dict[str, Any]:
    """Contact sheet and ways of the points of an episode, or why there are none."""
    shown = {"number": episode.number, "task": episode.task, "length": episode.length, "reasons": reasons}
    try:
        sheet = to_page(draw_episode(episode, MOMENTS))
        motions = [
            (camera.name, to_page(draw_motion(episode, camera)))
            for camera in episode.cameras
            if camera.points is not None and camera.visible.any()
        ]
    except ValueError as error:
        return shown | {"sheet": None, "motions": [], "error": episode.rows.remove_folder(error)}
    return shown | {"sheet": sheet, "motions": motions, "error": None}
