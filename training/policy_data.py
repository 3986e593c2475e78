"""Recorded data for a trained policy: whether it has seen a dataset, what it was kept from, windows that fit.

A dataset may have other cameras than the policy, another frame rate, states or actions of another size.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from datasets_scripts.columns import list_cameras
from datasets_scripts.command_line import split_names
from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.dataset_rows import DatasetRows, dataset_name
from datasets_scripts.storage.streaming.streamed_rows import StreamedRows
from modeling_foresight import ForesightConfig
from training.config import DatasetSource, RunConfig
from training.models.model_folder import DATASETS, read_run_config, read_summary, run_folder
from training.run_data import (
    RunData,
    dataset_identity,
    is_same_dataset,
    open_dataset,
    split_rows,
    window_config,
)
from training.windows import WindowConfig
from training.windows.columns import column_width

__all__ = [
    "find_held_out",
    "find_source",
    "fit_windows",
    "frames_per_step",
    "held_out_data",
    "is_trained_on",
    "match_cameras",
]

NEAR_RATE = 0.01  # share by which a frame rate may miss a multiple of the policy's


def is_trained_on(checkpoint: str | Path, rows: DatasetRows) -> bool | None:
    """Whether a policy was trained on a dataset or a copy of it; `None` if that cannot be told.

    It cannot where the run's datasets are not known by their digest, and where one of the same name differs:
    it may have grown, or be another one.
    """
    known, own = _known_datasets(checkpoint), dataset_identity(_as_read(read_run_config(checkpoint), rows))
    if any(is_same_dataset(one, own) for one in known):
        return True
    of_this_name = [one for one in known if dataset_name(one["name"]) == own["name"]]
    if any("digest" not in one for one in of_this_name):
        return True  # of a run that wrote no digests
    whole = known and all("digest" in one for one in known) and not of_this_name
    return False if whole else None


def _as_read(run: RunConfig, rows: DatasetRows) -> DatasetRows:
    """The dataset as a run opens it: digest and split of a streamed one are its own."""
    if run.data.streaming == isinstance(rows, StreamedRows):
        return rows
    return open_dataset(rows.name, run, rows.commit)


def _known_datasets(checkpoint: str | Path) -> list[dict]:
    """What a checkpoint was trained on, `name` and, as far as it is known, `digest`."""
    run, card = run_folder(checkpoint), Path(checkpoint) / "evaluation" / "training.json"
    if run and (run / DATASETS).is_file():
        return _trained_on(run)
    if run and not read_summary(checkpoint):
        return [{"name": source.path} for source in read_run_config(checkpoint).data.datasets]
    summary = read_summary(checkpoint) or (read_json(card) if card.is_file() else {})
    return [one for one in summary.get("datasets", ()) if one.get("train_episodes", 1)]


def _trained_on(run: Path) -> list[dict]:
    """What a run folder tells of its datasets, without the one for validation alone."""
    return [one for one in read_json(run / DATASETS, kind=list) if not one.get("validation")]


def find_source(checkpoint: str | Path, rows: DatasetRows) -> DatasetSource | None:
    """How the run of a checkpoint reads a dataset that it was trained on; `None` if that is not known."""
    run, folder = read_run_config(checkpoint), run_folder(checkpoint)
    sources = run.data.datasets
    known = _trained_on(folder) if folder and (folder / DATASETS).is_file() else []
    if len(known) == len(sources):
        own, pairs = dataset_identity(_as_read(run, rows)), zip(known, sources, strict=True)
        return next((source for one, source in pairs if is_same_dataset(one, own)), None)
    name = dataset_name(rows.name)
    return next((source for source in sources if dataset_name(source.path) == name), None)


def find_held_out(checkpoint: str | Path, model: ForesightConfig, rows: DatasetRows) -> list[int] | None:
    """Episodes of a dataset that its run held out; `None` if the dataset is not known as one of the run."""
    run, source = read_run_config(checkpoint), find_source(checkpoint, rows)
    if source is None:
        return None
    rows, wanted = _as_read(run, rows), dataclasses.replace(window_config(model, run), cameras=source.cameras)
    return split_rows(rows, wanted, run)[1] if rows.n_episodes > 1 else []  # a single one is trained on


def held_out_data(checkpoint: str, config: ForesightConfig, dataset: str) -> RunData:
    """A dataset, split as the run split it that made a checkpoint: `val` are the episodes it held out.

    The run's settings are looked up beside the checkpoint, whose config is given.

    Raises:
        ValueError: If it is unknown which episodes the run held out, or it held out none.
    """
    run = read_run_config(checkpoint)
    if run.data.validation:
        raise ValueError(
            f"the run that made {checkpoint} held out no episodes: its summary.json has the errors on "
            f"{Path(run.data.validation).name}"
        )
    rows = open_dataset(dataset, run)
    source = find_source(checkpoint, rows)
    if source is None:
        raise ValueError(
            f"{Path(rows.name).name} is not among the data of the run that made {Path(checkpoint).name}, or "
            "that run's config.yaml is not beside it: which episodes it held out is unknown"
        )
    run.data.datasets = [dataclasses.replace(source, path=dataset)]
    data = RunData(run, config, [rows])
    if data.val is None:
        raise ValueError(f"the run that made {checkpoint} held out no episodes (data.val_fraction is 0)")
    return data


def fit_windows(
    checkpoint: str | Path,
    model: ForesightConfig,
    rows: DatasetRows,
    cameras: str = "",
    embodiment: str | None = None,
    **changes,
) -> tuple[WindowConfig, list[str]]:
    """Unaugmented windows of all that a policy and a dataset share, and notes on what they do not.

    A dataset of the policy's run is read as the run reads it.

    Args:
        checkpoint (`str` or `Path`): The policy; its run's settings are used if they are beside it.
        model (`ForesightConfig`): Its config.
        rows (`DatasetRows`): The dataset.
        cameras (`str`): See [`match_cameras`].
        embodiment (`str`, *optional*): The robot, of a policy for several.
        changes: Other fields of the `WindowConfig`, or other values.

    Raises:
        ValueError: If the cameras do not exist, or the frame rate is not a multiple of the policy's.
    """
    run, source = read_run_config(checkpoint), find_source(checkpoint, rows)
    if source is None or cameras:
        matched = match_cameras(model.views, rows.features, cameras)
    else:
        matched = {view: source.cameras.get(view, view) for view in model.views}
    own = {"cameras": matched, "embodiment": embodiment, "missing_targets": True}
    if source is not None:
        own |= {"frame_stride": source.frame_stride, "strided_commands": source.strided_commands}
    else:
        # What one step commands; where the run's data needed no choice, the newest command is taken.
        choices = [s.strided_commands for s in run.data.datasets if s.strided_commands != "refuse"]
        own["strided_commands"] = choices[0] if choices else "last"
        if "frame_stride" not in changes:
            own["frame_stride"] = _choose_stride(model, rows)
    wanted = dataclasses.replace(window_config(model, run).for_evaluation(), **own | changes)
    differing, notes = _compare_sizes(model.for_robot(embodiment), wanted, rows)
    seen = _note_cameras(matched) if source is None or cameras else ()
    return dataclasses.replace(wanted, **differing), [*seen, *notes]


def frames_per_step(model: ForesightConfig, rows: DatasetRows) -> float:
    """Frames of a dataset per control step of a policy; 1 if the policy's rate is unknown."""
    return rows.fps / model.fps if model.fps else 1.0


def _choose_stride(model: ForesightConfig, rows: DatasetRows) -> int:
    exact = frames_per_step(model, rows)
    stride = max(1, round(exact))
    if abs(exact / stride - 1) > NEAR_RATE:
        raise ValueError(
            f"dataset {rows.name} has {rows.fps:g} frames per second, which is not a multiple of the "
            f"policy's {model.fps:g} control steps per second: record or resample it at such a rate"
        )
    return stride


def match_cameras(views: Sequence[str], features: Mapping[str, dict], given: str = "") -> dict:
    """Which camera of a dataset each view of a model looks through.

    Args:
        views (`Sequence[str]`): The model's.
        features (`Mapping`): LeRobot features.
        given (`str`): Such as `main=front, wrist=none`; views that it leaves out are matched by name, and
            then in the dataset's order.

    Returns:
        `dict[str, str | None]`: Camera by view; `None` where no camera is left.

    Raises:
        ValueError: If the dataset has no cameras, or a view or camera does not exist; lists those that do.
    """
    known = list_cameras(features)
    if not known:
        raise ValueError("the dataset has no cameras, and nothing can be predicted without one")
    matched: dict[str, str | None] = {}
    for part in split_names(given):
        view, _, camera = (piece.strip() for piece in part.partition("="))
        if view not in views or (camera not in known and camera != "none"):
            raise ValueError(
                f"cameras: '{part}' should be VIEW=CAMERA, with a view of the checkpoint "
                f"({', '.join(views)}) and a camera of the dataset ({', '.join(known)}, or none)"
            )
        matched[view] = None if camera == "none" else camera
    unused = [camera for camera in known if camera not in matched.values()]
    open_views = [view for view in views if view not in matched]
    for view in sorted(open_views, key=lambda view: view not in unused):  # equal names first
        camera = view if view in unused else next(iter(unused), None)
        matched[view] = camera
        if camera:
            unused.remove(camera)
    if not any(matched.values()):
        raise ValueError("cameras: at least one view needs a camera")
    return {view: matched[view] for view in views}


def _note_cameras(cameras: Mapping[str, str | None]) -> Iterator[str]:
    for view, camera in cameras.items():
        if camera is None:
            yield f"The dataset has no camera for the view “{view}”."
        elif camera != view:
            yield f"The view “{view}” looks through the camera “{camera}”."


def _compare_sizes(model: ForesightConfig, wanted: WindowConfig, rows: DatasetRows) -> tuple[dict, list[str]]:
    """Settings that leave out state or actions whose size differs in model and dataset; notes on them."""
    changes, notes = {}, []

    def size(key: str | None) -> int:
        return column_width(rows.features, key if key in rows.features else None)

    state = size(wanted.state_key)
    if model.state_dim and state != model.state_dim:
        has = f"has {state} entries" if state else "is missing"
        notes.append(
            f"The checkpoint reads a state of {model.state_dim} numbers; the dataset's {has}: it predicts "
            "without a state."
        )
        changes["state_key"] = None
    actions = size(wanted.action_key)
    if model.has("action") and model.action_codec == "recorded" and actions != model.action_dim:
        has = f"have {actions} entries" if actions else "are missing"
        notes.append(
            f"The checkpoint predicts actions of {model.action_dim} numbers; the dataset's {has}: there is "
            "nothing to compare with."
        )
        changes["objectives"] = [name for name in wanted.objectives if name != "action"]
    return changes, notes
