"""Write a page about the labels of a whole dataset: figures, distributions, pictures, where to look first.

Figures that `annotate.py` or an earlier `--write-flags` recorded are taken from the dataset's provenance;
some episodes are read from disk for what needs pixels and points.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets_scripts.inspection.label_pictures import (
    draw_distributions,
    draw_labels,
    draw_motion,
    encode_picture,
)
from datasets_scripts.inspection.labeled_episode import (
    CHUNK,
    LabeledDataset,
    LabeledEpisode,
    measure_episode,
    read_task,
)
from datasets_scripts.inspection.quality import (
    FLAGS,
    MEASURES,
    collect_figures,
    find_flags,
    merge_facts,
    summarize_figures,
)
from datasets_scripts.inspection.template_rendering import render_template
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.episode_job import work_on_all
from datasets_scripts.storage.even_spread import spread_evenly
from datasets_scripts.storage.provenance import PROVENANCE_PATH, write_provenance

__all__ = ["Survey", "rank_episodes", "survey_labels", "write_flags", "write_report"]

REPORT_TEMPLATE = Path(__file__).with_name("report_template.html")
SAMPLED_EPISODES = 32
SAMPLED_CHUNKS = 32  # of an episode, 32 frames each
LISTED_EPISODES = 12  # to look at first
PICTURED_EPISODES = 4  # of those
ORDINARY_EPISODES = 2  # pictured besides
MOMENTS = 5
STANDS_OUT = 3.0  # deviations from the median
PARALLEL_FRAMES = 4000  # from which on other processes are worth the time they take to start
# `--write-flags` saves after so many episodes, and at most so often.
SAVE_EVERY, MOST_SAVES = 100, 50


@dataclass
class Survey:
    """What is known of a dataset's labels.

    Attributes:
        episodes (`dict[str, dict]`): Facts by episode as in the provenance, those just read included.
        sampled (`list[int]`): Episodes that were read.
        depth_counts (`dict[str, np.ndarray]`): By camera, pixels between `quality.DEPTH_EDGES_M`.
        points (`dict[str, np.ndarray]`): By camera, `(3, n)` as `draw_distributions` wants it.
    """

    episodes: dict[str, dict]
    sampled: list[int]
    depth_counts: dict[str, np.ndarray]
    points: dict[str, np.ndarray]


_dataset: LabeledDataset | None = None


def _open_dataset(name: str) -> None:
    """Opens the dataset once per process."""
    global _dataset
    _dataset = LabeledDataset(name)


def _measure_one(number: int) -> dict[str, Any]:
    """Figures of an episode and what distributions are made of."""
    found = measure_episode(LabeledEpisode(_dataset, number), SAMPLED_CHUNKS)
    points = {}
    for camera, tracks in ((name, measures.tracks) for name, measures in found.items()):
        if tracks is not None:
            moving = np.full(len(tracks.real), np.nan) if tracks.moving is None else tracks.moving
            points[camera] = np.stack([tracks.motion_px, tracks.shares, moving])[:, tracks.real]
    return {
        "episode": number,
        "facts": {camera: measures.figures() for camera, measures in found.items()},
        "depth": {camera: measures.depth.counts for camera, measures in found.items() if measures.depth},
        "points": points,
    }


def _read_episodes(dataset: LabeledDataset, chosen: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """Results of `_measure_one` as they come."""
    rows = dataset.rows
    lengths = (rows.episode_stops - rows.episode_starts)[list(chosen)]
    if lengths.clip(max=SAMPLED_CHUNKS * CHUNK).sum() < PARALLEL_FRAMES:
        workers = 1
    jobs = [(episode,) for episode in chosen]
    done = work_on_all(_measure_one, jobs, workers, functools.partial(_open_dataset, rows.name))
    yield from tqdm(done, total=len(chosen), unit="episode", desc="reading labels")


def survey_labels(dataset: LabeledDataset, chosen: Sequence[int] | None = None, workers: int = 1) -> Survey:
    """Reads some episodes of a dataset (32, evenly spread, by default); adds what is recorded of the others.

    Args:
        dataset (`LabeledDataset`): The dataset.
        chosen (`Sequence[int]`, *optional*): Episodes to read.
        workers (`int`): Processes.
    """
    if chosen is None:
        chosen = spread_evenly(dataset.rows.n_episodes, SAMPLED_EPISODES)
    survey = Survey(dict(dataset.provenance.get("episodes", {})), list(chosen), {}, {})
    parts: dict[str, list[np.ndarray]] = {}
    for one in sorted(_read_episodes(dataset, chosen, workers), key=lambda one: one["episode"]):
        episode = str(one["episode"])
        survey.episodes[episode] = merge_facts(survey.episodes.get(episode, {}), one["facts"])
        for camera, counts in one["depth"].items():
            survey.depth_counts[camera] = survey.depth_counts.get(camera, 0) + counts
        for camera, points in one["points"].items():
            parts.setdefault(camera, []).append(points)
    survey.points = {camera: np.hstack(points) for camera, points in parts.items()}
    survey.episodes = {e: {**facts, "flags": find_flags(facts)} for e, facts in survey.episodes.items()}
    return survey


def write_flags(dataset: LabeledDataset, workers: int = 1) -> dict[int, list[str]]:
    """Records figures and flags of all episodes in the provenance; resumes after an interruption.

    Episodes that have figures are not read again. Flags are written together at the end, so that an
    interrupted run leaves none.

    Args:
        dataset (`LabeledDataset`): A local dataset.
        workers (`int`): Processes.

    Returns:
        `dict[int, list[str]]`: Flags by episode, without those that have none.

    Raises:
        ValueError: If the dataset is in the Hub's cache, which we do not change.
    """
    rows = dataset.rows
    if not Path(rows.name).is_dir():
        raise ValueError(f"flags are written into a folder, and {rows.name} is on the Hub: download it first")
    episodes = dataset.provenance["episodes"] = dict(dataset.provenance.get("episodes", {}))
    missing = [e for e in range(rows.n_episodes) if not _is_measured(dataset, episodes.get(str(e), {}))]
    save_every = max(SAVE_EVERY, len(missing) // MOST_SAVES)
    for count, one in enumerate(_read_episodes(dataset, missing, workers), 1):
        episode = str(one["episode"])
        episodes[episode] = merge_facts(episodes.get(episode, {}), one["facts"])
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


def _save(dataset: LabeledDataset) -> None:
    content = {key: value for key, value in dataset.provenance.items() if key != "version"}
    order = sorted(content["episodes"], key=int)
    write_provenance(dataset.rows.root, content | {"episodes": {e: content["episodes"][e] for e in order}})


def _is_measured(dataset: LabeledDataset, facts: Mapping[str, Any]) -> bool:
    """Whether all labels of an episode have figures; one that could not be read has none."""
    if not any(dataset.labels.values()):  # then reading it tells whether its files are whole
        return facts.get("flags") == []
    return all(
        not facts.get(camera, {}).get("problem")
        and ("depth" not in kinds or "valid_share" in facts.get(camera, {}).get("depth", {}))
        and ("tracks" not in kinds or "motion_px" in facts.get(camera, {}))
        for camera, kinds in dataset.labels.items()
    )


def rank_episodes(episodes: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, list[str]]]:
    """Episodes to look at first, and why: those with flags, the most severe first, then what stands out.

    Args:
        episodes (`Mapping`): Facts by episode.

    Returns:
        `list[tuple[int, list[str]]]`: Episode and reasons; without those that are like the others.
    """
    reasons = {int(episode): list(facts.get("flags", [])) for episode, facts in episodes.items()}
    gravity = list(FLAGS)
    worst_flag = {
        episode: min((gravity.index(flag.rpartition("/")[2]) for flag in flags), default=len(gravity))
        for episode, flags in reasons.items()
    }
    largest = dict.fromkeys(reasons, 0.0)
    for (camera, key), values in collect_figures(episodes).items():
        wording, form, large_is_bad = MEASURES[key]
        if large_is_bad is None:
            continue
        found = np.array(list(values.values()))
        middle = float(np.median(found))
        deviation = 1.4826 * float(np.median(np.abs(found - middle)))
        # A tenth of the value at least: among equal episodes the smallest difference would stand out.
        scale = max(deviation, 0.1 * abs(middle), 1e-3) * (1 if large_is_bad else -1)
        for episode, value in values.items():
            if (away := (value - middle) / scale) > STANDS_OUT:
                text = f"{camera}: {wording} {form.format(value)} (median {form.format(middle)})"
                reasons[episode].append(text)
                largest[episode] = max(largest[episode], away)
    ranked = sorted((worst_flag[e], -largest[e], e) for e in reasons if reasons[e])
    return [(episode, reasons[episode]) for *_, episode in ranked]


def write_report(path: Path, dataset: LabeledDataset, survey: Survey) -> None:
    """Writes the page about what `survey_labels` found in a dataset: one HTML file, pictures inside.

    Raises:
        RuntimeError: If matplotlib is missing; says what to install.
    """
    rows, first = dataset.rows, rank_episodes(survey.episodes)
    words = [{flag.rpartition("/")[2] for flag in facts["flags"]} for facts in survey.episodes.values()]
    reasons = dict(first)
    pictured = tqdm(_choose_pictured(survey, list(reasons)), desc="drawing")
    page = render_template(
        REPORT_TEMPLATE,
        name=Path(rows.name).name if Path(rows.name).is_dir() else rows.name,
        rows=rows,
        survey=survey,
        first=[(episode, read_task(rows, episode), why) for episode, why in first[:LISTED_EPISODES]],
        more=max(0, len(first) - LISTED_EPISODES),
        flagged=sum(map(bool, words)),
        flag_rows=[(word, sum(word in each for each in words), meaning) for word, meaning in FLAGS.items()],
        cameras=list(_build_sections(dataset, survey)),
        pictured=[_draw_pictures(LabeledEpisode(dataset, e), reasons.get(e)) for e in pictured],
        provenance_path=PROVENANCE_PATH.as_posix(),
    )
    with write_whole_file(path) as temporary:
        temporary.write_text(page)


def _choose_pictured(survey: Survey, first: list[int]) -> list[int]:
    """The worst episodes, and some that are like the others."""
    ordinary = [episode for episode in survey.sampled if episode not in first]
    others = [ordinary[i] for i in spread_evenly(len(ordinary), ORDINARY_EPISODES)]
    return first[:PICTURED_EPISODES] + others or survey.sampled[:1]


def _build_sections(dataset: LabeledDataset, survey: Survey) -> Iterator[dict[str, Any]]:
    """Table and distributions of every camera."""
    rows = summarize_figures(survey.episodes)
    for camera, kinds in dataset.labels.items():
        known = dataset.provenance.get("cameras", {}).get(camera, {})
        facts = [each.get(camera, {}) for each in survey.episodes.values()]
        errors = [error for each in facts if (error := each.get("depth", {}).get("error")) is not None]
        points = survey.points.get(camera, np.zeros((3, 0)))
        figure = draw_distributions(survey.depth_counts.get(camera), points, errors)
        yield {
            "name": camera,
            "sources": {kind: known.get(kind, {}).get("source", "not recorded") for kind in kinds},
            "rows": [row for row in rows if row["camera"] == camera],
            "figure": figure and encode_picture(figure),
            "moves": sum(bool(each.get("moving_camera")) for each in facts),
        }


def _draw_pictures(episode: LabeledEpisode, reasons: list[str] | None) -> dict[str, Any]:
    """Contact sheet and paths of the points of an episode, or why there are none."""
    shown = {"number": episode.number, "task": episode.task, "length": episode.length, "reasons": reasons}
    try:
        sheet = encode_picture(draw_labels(episode, MOMENTS))
        motions = [
            (camera.name, encode_picture(draw_motion(episode, camera)))
            for camera in episode.cameras
            if camera.points is not None and camera.visible.any()
        ]
    except ValueError as error:
        return shown | {"sheet": None, "motions": [], "error": episode.rows.strip_folder(error)}
    return shown | {"sheet": sheet, "motions": motions, "error": None}
