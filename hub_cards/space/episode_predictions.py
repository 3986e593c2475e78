"""Everything that a checkpoint predicts in an episode, predicted once and kept.

Checkpoint and dataset may differ. Cameras are matched by name, then in order; a state or an action of another
size is not used. Notes list the differences.
"""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from datasets_scripts.columns import find_depth_key, points_key
from datasets_scripts.inspection.labeled_episode import read_task
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import find_intrinsics, read_provenance
from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from training.evaluation.predictions import Prediction, depth_limits, predict_windows
from training.models.model_folder import load_checkpoint, read_run_config
from training.policy_data import NEAR_RATE, find_source, fit_windows, frames_per_step
from training.windows import ForesightWindows
from training.windows.columns import column_width

__all__ = ["Choice", "EpisodeView", "name_episodes", "open_dataset", "predict_episode"]

MAX_MOMENTS = 120  # of a longer episode every second, third, ... frame is predicted
KEPT_EPISODES = 4
BATCH = 8  # windows per forward pass


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is shown.

    Attributes:
        checkpoint (`str`): Folder or Hub id of a model or adapter.
        dataset (`str`): Folder or Hub id of a LeRobot dataset.
        episode (`int`): Number of the episode.
        instruction (`str`): The model's instruction; empty for the recorded one.
        cameras (`str`): Such as `main=front, wrist=none`; empty to match them by name and order.
    """

    checkpoint: str
    dataset: str
    episode: int = 0
    instruction: str = ""
    cameras: str = ""


@dataclasses.dataclass(frozen=True)
class EpisodeView:
    """An episode with everything predicted; M moments.

    Attributes:
        choice (`Choice`): What is shown.
        predictions (`list[Prediction]`): One per moment.
        config (`ForesightConfig`): The model's.
        task (`str`): Recorded instruction.
        cameras (`dict[str, str | None]`): Dataset camera of every view.
        fps (`float`): Of the dataset's frames.
        stride (`int`): Frames of the dataset per step of the model.
        action_names (`list[str]`): One per entry.
        limits_m (`dict[str, tuple[float, float]]`): Range of the depth colors by view.
        intrinsics (`dict[str, float]`, *optional*): Of the first view: fx, fy, cx, cy, width, height, px.
        notes (`list[str]`): What checkpoint and dataset do not share.
    """

    choice: Choice
    predictions: list[Prediction]
    config: ForesightConfig
    task: str
    cameras: dict[str, str | None]
    fps: float
    stride: int
    action_names: list[str]
    limits_m: dict[str, tuple[float, float]]
    intrinsics: dict[str, float] | None
    notes: list[str]


@functools.lru_cache(maxsize=2)
def _load(checkpoint: str) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """Model and processor; the last two are kept."""
    if not checkpoint.strip():
        raise ValueError("no checkpoint is named: give a folder, or a Hub id such as owner/name")
    return load_checkpoint(checkpoint.strip())


@functools.lru_cache(maxsize=4)
def open_dataset(dataset: str) -> DatasetRows:
    """A dataset without its videos, which are fetched episode by episode."""
    if not dataset.strip():
        raise ValueError("no dataset is named: give a folder, or a Hub id such as lerobot/pusht")
    return DatasetRows(dataset.strip(), stream=True)


def name_episodes(rows: DatasetRows) -> list[tuple[str, int]]:
    """Title and number of every episode; of those that a policy acted, with the outcome."""
    lengths = rows.episode_stops - rows.episode_starts
    known = read_provenance(rows.root).get("episodes", {})
    titles = []
    for e, length in enumerate(lengths):
        outcome = known.get(str(e), {}).get("outcome", {})
        told = f": {_describe_outcome(outcome)}" if outcome else ""
        titles.append((f"{e}: {read_task(rows, e)}{told} ({length} frames)", e))
    return titles


def _describe_outcome(outcome: Mapping) -> str:
    """The outcome of a policy's episode, of `training/evaluate.py --record`."""
    if outcome.get("success"):
        return "the policy succeeded"
    return f"the policy failed at step {outcome['failed_at']}" if "failed_at" in outcome else "it failed"


_views: OrderedDict[Choice, EpisodeView] = OrderedDict()
_one_at_a_time = threading.Lock()


def predict_episode(choice: Choice, report: Callable[[float], None] | None = None) -> EpisodeView:
    """Everything that a checkpoint predicts in an episode; the last few are kept.

    `report` is called with the share that is done.

    Raises:
        ValueError: If the checkpoint, the dataset, the episode or the cameras cannot be used; says why.
        HubError: If the Hub cannot be reached.
    """
    with _one_at_a_time:  # visitors of a page ask for the same
        if choice not in _views:
            view = _predict(choice, report)
            _views[choice] = view
            while len(_views) > KEPT_EPISODES:
                _views.popitem(last=False)
        _views.move_to_end(choice)
        return _views[choice]


def _predict(choice: Choice, report: Callable[[float], None] | None) -> EpisodeView:
    model, processor = _load(choice.checkpoint)
    rows = open_dataset(choice.dataset)
    processor, told = _choose_robot(choice.checkpoint, processor, rows)
    config = model.config.for_robot(processor.embodiment)
    if not 0 <= choice.episode < rows.n_episodes:
        raise ValueError(
            f"dataset {rows.name} has no episode {choice.episode}: choose 0 to {rows.n_episodes - 1}"
        )
    wanted, notes = _configure_windows(choice, model.config, rows, processor.embodiment)
    notes = [*told, *notes]
    windows = ForesightWindows(rows, wanted)
    chosen = range(0, len(windows), -(-len(windows) // MAX_MOMENTS))
    options = {"instruction": choice.instruction or None, "batch_size": BATCH}
    predictions = []
    for prediction in predict_windows(model, processor, windows, chosen, **options):
        predictions.append(prediction)
        if report:
            report(len(predictions) / len(chosen))
    provenance = read_provenance(rows.root)
    flow_camera = wanted.cameras[config.views[0]]
    if outcome := provenance.get("episodes", {}).get(str(choice.episode), {}).get("outcome"):
        done = _describe_outcome(outcome)
        notes.append(f"Recorded is what a policy did here, not a demonstration: {done}.")
    return EpisodeView(
        choice=choice,
        predictions=predictions,
        config=config,
        task=windows[0]["task"],
        cameras=wanted.cameras,
        fps=rows.fps,
        stride=wanted.frame_stride,
        action_names=_name_actions(rows.features.get(wanted.action_key, {}), config),
        limits_m={v: depth_limits([p.views[v] for p in predictions]) for v in predictions[0].views},
        intrinsics=flow_camera and find_intrinsics(provenance, rows.features, flow_camera),
        notes=notes,
    )


def _configure_windows(choice: Choice, model: ForesightConfig, rows: DatasetRows, robot: str | None):
    """Windows of the episode with all that model and dataset share; notes on what they do not."""
    exact = frames_per_step(model, rows)
    stride = max(1, round(exact))
    wanted, notes = fit_windows(
        choice.checkpoint,
        model,
        rows,
        cameras=choice.cameras,
        embodiment=robot,
        episodes=[choice.episode],
        frame_stride=stride,
        lookahead=model.has("future"),
        p_moving=1.0,  # show what moves
        skip_flagged=False,  # the episode was asked for
        frame_cache="off",
    )
    if abs(exact / stride - 1) > NEAR_RATE:
        notes.append(
            f"The policy acts {model.fps:g} times per second; shown are {rows.fps / stride:g} frames of one."
        )
    return wanted, [*notes, *_note_labels(model, rows, wanted.cameras)]


def _choose_robot(checkpoint: str, processor: ForesightProcessor, rows: DatasetRows):
    """The processor for the robot of a dataset, and a note where that is guessed from the action's size."""
    robots, source = processor.embodiments or {}, find_source(checkpoint, rows)
    if source is not None and source.embodiment in robots:
        return processor.for_embodiment(source.embodiment), []
    action_key = read_run_config(checkpoint).data.action_key
    width = column_width(rows.features, action_key if action_key in rows.features else None)
    fitting = [name for name in sorted(robots) if len(robots[name]["action"]) == width]
    chosen = next(iter([*fitting, *sorted(robots)]), None)
    notes = [
        f"The policy knows the robots {', '.join(sorted(robots))}; which one this is, is not recorded. It "
        f"acts as {chosen}, whose units may be others."
    ]
    return processor.for_embodiment(chosen), notes if len(robots) > 1 else []


def _note_labels(config: ForesightConfig, rows: DatasetRows, cameras: Mapping) -> Iterator[str]:
    """Labels that the model could be compared with and the dataset lacks."""
    blind = [view for view, camera in cameras.items() if camera and not find_depth_key(rows.features, camera)]
    if blind and config.has_depth_decoder:
        yield (
            f"No depth was recorded for {' and '.join(blind)}: "
            + (
                "what the model predicts, in meters, stands alone."
                if config.depth_form == "metric"
                else "the model predicts it normalized per patch, and the scale is unknown."
            )
        )
    flow_camera = cameras[config.views[0]]
    if config.has("flow") and flow_camera and points_key(flow_camera) not in rows.features:
        yield (
            f"No 3D tracks were recorded for {config.views[0]}: predicted flow starts on a grid, and points "
            "that should move more than 1 % of the picture are drawn as moving."
        )


def _name_actions(feature: Mapping, config: ForesightConfig) -> list[str]:
    """Names of the action's entries, as far as the dataset has them; LeRobot's form of them varies."""
    names = feature.get("names") or []
    if isinstance(names, Mapping):
        (names, *_) = names.values() or ([],)
    if len(names) == config.action_dim and config.action_codec == "recorded":
        return [str(name) for name in names]
    return [f"action {i}" for i in range(config.action_dim)]
