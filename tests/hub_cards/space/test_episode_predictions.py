"""The Space's logic: an episode is predicted once, shown moment by moment, and what is missing is said."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from datasets_scripts.storage.provenance import read_provenance, write_provenance
from modeling_foresight import ForesightForActionPrediction
from tests.synthetic import make_dataset
from tests.tiny import TASKS, tiny_config, tiny_processor
from training.config import DataConfig, DatasetSource, RunConfig
from training.config_reading import save_config
from training.models.model_folder import load_checkpoint

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
from hub_cards.space import episode_predictions as episode_module
from hub_cards.space.episode_predictions import (
    Choice,
    name_episodes,
    open_dataset,
    predict_episode,
)
from hub_cards.space.moment_pictures import color_depth, place_ticks, render_moment
from hub_cards.space.plots import CLOUDS, draw_actions, draw_scene

EPISODES, FRAMES = 2, 11
STATE, ACTION = 3, 4
UNITS = {"arm_a": 5.0, "arm_b": 500.0}  # robots and the mean of their actions
WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("space") / "dataset"
    return make_dataset(
        root, EPISODES, FRAMES, size=(HEIGHT, WIDTH), use_videos=False, state_dim=STATE, action_dim=ACTION
    )


@pytest.fixture(scope="module")
def bare_dataset(tmp_path_factory):
    """One camera of another name, no labels, no state, actions of another size; a file per episode."""
    return make_dataset(
        tmp_path_factory.mktemp("space") / "bare",
        EPISODES,
        FRAMES,
        cameras=("front",),
        depth=False,
        tracks=False,
        state_key=None,
        action_dim=ACTION + 2,
        file_per_episode=True,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    torch.manual_seed(0)
    config = tiny_config(
        action_dim=ACTION,
        binary_action_indices=(3,),
        state_dim=STATE,
        binary_state_indices=(),
        future_targets="lookahead",
    )
    model = ForesightForActionPrediction(config).eval()
    model.save_pretrained(folder)
    stats = {"mean": [1.0] * ACTION, "std": [2.0] * ACTION, "min": [-1.0] * ACTION, "max": [1.0] * ACTION}
    tiny_processor(config, action_stats=stats).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def view(checkpoint, dataset):
    return predict_episode(Choice(checkpoint, str(dataset.root), episode=1))


def pictures(text: str) -> list[str]:
    return re.findall(r'<img src="(data:image/webp;base64,[^"]+)"', text)


def test_every_window_of_the_episode_is_a_moment_with_its_recorded_and_predicted_actions(view, dataset):
    history, chunk = view.config.history_length, view.config.chunk_size
    assert [p.frame for p in view.predictions] == list(range(history - 1, FRAMES - 1))
    for prediction in view.predictions:
        recorded, predicted = prediction.actions
        frames = range(prediction.frame, prediction.frame + chunk)
        truth = [dataset.action(1, t) if t < FRAMES else np.full(ACTION, np.nan) for t in frames]
        np.testing.assert_allclose(recorded, truth, atol=1e-6)
        assert predicted.shape == (chunk, ACTION)
        assert set(predicted[:, 3]) <= {-1.0, 1.0}  # binary entries in the dataset's two values


def test_predicted_actions_are_those_that_the_policy_gives_in_control(view, checkpoint, dataset):
    model, processor = load_checkpoint(checkpoint)
    stream = model.stream(processor)
    stream.reset(dataset.task(1))
    for t in range(model.config.history_length):
        images = {camera: dataset.image(1, t, camera) for camera in dataset.sizes}
        chunk = stream.step_chunk(images, dataset.state(1, t))
    np.testing.assert_allclose(view.predictions[0].actions[1], chunk.numpy(), atol=1e-4)


def test_a_policy_of_half_the_rate_sees_every_other_frame(checkpoint, dataset, tmp_path):
    slow = shutil.copytree(checkpoint, tmp_path / "slow")
    config = json.loads((slow / "config.json").read_text())
    (slow / "config.json").write_text(json.dumps(config | {"fps": 10}))  # the dataset has 20
    view = predict_episode(Choice(str(slow), str(dataset.root), episode=1))
    frame, (recorded, _) = view.predictions[0].frame, view.predictions[0].actions
    assert frame == 2 * (config["history_length"] - 1)
    np.testing.assert_allclose(
        recorded[0], dataset.action(1, frame + 1), atol=1e-6
    )  # the newest of two commands


@pytest.mark.parametrize("known", [True, False])
def test_of_several_robots_that_of_the_dataset_acts(dataset, tmp_path, known):
    robots = {
        name: {
            "action": [i * ACTION + j for j in range(ACTION)],
            "state": [i * STATE + j for j in range(STATE)],
        }
        for i, name in enumerate(("arm_a", "arm_b"))
    }
    sizes = {"action_dim": 2 * ACTION, "state_dim": 2 * STATE, "binary_state_indices": ()}
    config = tiny_config(embodiments=robots, binary_action_indices=(), **sizes)
    limits = {"std": [1e-3] * ACTION, "min": [-9.0] * ACTION, "max": [999.0] * ACTION}
    statistics = {name: {"action": limits | {"mean": [mean] * ACTION}} for name, mean in UNITS.items()}
    folder = tmp_path / "run" / "model"
    ForesightForActionPrediction(config).eval().save_pretrained(folder)
    tiny_processor(config, statistics=statistics).save_pretrained(folder)
    path = str(dataset.root) if known else "another"
    source = DatasetSource(path, embodiment="arm_b")
    save_config(RunConfig(data=DataConfig(datasets=[source])), tmp_path / "run" / "config.yaml")
    view = predict_episode(Choice(str(folder), str(dataset.root)))
    assert np.abs(view.predictions[0].actions[1]).mean() == pytest.approx(500 if known else 5, rel=0.1)
    guessed = [note for note in view.notes if "arm_a, arm_b; which one this is, is not recorded" in note]
    assert len(guessed) == (not known)


def test_scrubbing_changes_every_picture(view):
    first, second = (pictures(render_moment(view, number)) for number in (0, 1))
    # main: camera, depth, image and depth to come, flow; wrist: no flow; all but the camera twice
    assert len(first) == len(second) == 9 + 7
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_at_the_end_of_the_episode_only_the_recorded_future_is_missing(view):
    text = render_moment(view, len(view.predictions) - 1)
    assert text.count("the episode is over by then") == 4  # image and depth of two views
    assert len(pictures(text)) == 9 + 7 - 4


def test_other_words_change_what_is_predicted_and_not_what_was_recorded(view, checkpoint, dataset):
    same, other = (
        predict_episode(Choice(checkpoint, str(dataset.root), 1, words))
        for words in (dataset.task(1), TASKS[1])
    )
    for usual, ours, theirs in zip(view.predictions, same.predictions, other.predictions, strict=True):
        np.testing.assert_array_equal(usual.actions[1], ours.actions[1])
        np.testing.assert_array_equal(usual.actions[0], theirs.actions[0])
        assert not np.array_equal(usual.actions[1], theirs.actions[1])  # fresh weights listen a little
    names = [trace.name for trace in draw_actions(other, 0, usual=view).data[:4]]
    assert names == ["recorded", "predicted, recorded words", "predicted", "chunk predicted now"]


def test_the_plot_of_actions_has_a_row_per_entry_and_stands_at_the_moment(view):
    figure = draw_actions(view, 2)
    assert len(figure.data) == 3 * ACTION
    frames = [prediction.frame for prediction in view.predictions]
    np.testing.assert_array_equal(figure.data[0].x, frames)
    np.testing.assert_allclose(figure.data[0].y, [p.actions[0][0, 0] for p in view.predictions])
    assert figure.data[2].x[0] == figure.layout.shapes[0].x0 == frames[2]


def test_the_scene_is_in_metres_by_the_camera_s_intrinsics(checkpoint, tmp_path):
    root = tmp_path / "dataset"
    facts = make_dataset(
        root, 1, FRAMES, size=(HEIGHT, WIDTH), use_videos=False, state_dim=STATE, action_dim=ACTION
    )
    provenance = read_provenance(root)
    k = {"fx": 80.0, "fy": 70.0, "cx": 30.0, "cy": 25.0, "width": WIDTH, "height": HEIGHT}
    provenance["cameras"]["main"]["intrinsics"] = k
    write_provenance(root, provenance)
    view = predict_episode(Choice(checkpoint, str(root)))
    scene = draw_scene(view, 0, "now")
    t = view.predictions[0].frame
    x, y, z = facts.points(0, t)[facts.moving(0) & facts.visible(0, t)].T
    expected = np.stack([(x * WIDTH - k["cx"]) / k["fx"] * z, z, -(y * HEIGHT - k["cy"]) / k["fy"] * z], 1)
    trails = {trace.name: np.stack([trace.x, trace.y, trace.z], 1) for trace in scene.data if trace.name}
    starts = trails["recorded flow"][:: view.config.flow_length + 1]
    assert len(starts)
    distances = np.linalg.norm(starts[:, None] - expected, axis=-1).min(1)
    assert distances.max() < 2e-3  # half precision on disk
    assert not scene.layout.annotations[0].text


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_scene_without_known_intrinsics_says_what_it_assumes(view, cloud):
    figure = draw_scene(view, 0, cloud)
    assert figure.data[0].mode == "markers" and len(figure.data[0].x) > 500
    assert "53° assumed" in figure.layout.annotations[0].text


def test_what_a_dataset_lacks_is_said_and_the_rest_is_shown(checkpoint, bare_dataset):
    for video in bare_dataset.root.glob("videos/*/*/file-000.mp4"):
        video.rename(video.with_suffix(".away"))  # another episode's videos are not needed
    view = predict_episode(Choice(checkpoint, str(bare_dataset.root), episode=1))
    notes = " ".join(view.notes)
    for said in (
        "“main” looks through the camera “front”",
        "no camera for the view “wrist”",
        "state of 3 numbers; the dataset's is missing",
        "actions of 4 numbers; the dataset's have 6 entries",
        "No depth was recorded for main",
        "No 3D tracks were recorded for main",
    ):
        assert said in notes
    text = render_moment(view, 0)
    assert len(pictures(text)) == 4  # camera, image to come recorded and predicted, predicted flow
    assert text.count("no depth recorded") == 4 and text.count("no tracks recorded") == 1
    assert [trace.name for trace in draw_actions(view, 0).data[:2]] == ["predicted", "chunk predicted now"]
    assert "no depth was recorded" in draw_scene(view, 0, "now").layout.annotations[0].text


def test_an_episode_is_predicted_once_and_the_oldest_is_forgotten(checkpoint, dataset, monkeypatch):
    predicted = []
    monkeypatch.setattr(episode_module, "_views", episode_module.OrderedDict())
    monkeypatch.setattr(episode_module, "_predict", lambda choice, report: predicted.append(choice))
    choices = [Choice(checkpoint, "data", number) for number in range(episode_module.KEPT_EPISODES + 1)]
    for choice in (choices[0], choices[0], *choices[1:], choices[-1], choices[0]):
        predict_episode(choice)
    assert predicted == [*choices, choices[0]]


def test_a_long_episode_is_thinned_evenly(checkpoint, dataset, monkeypatch):
    monkeypatch.setattr(episode_module, "MAX_MOMENTS", 3)
    shares = []
    view = predict_episode(
        Choice(checkpoint, str(dataset.root), episode=0, instruction=TASKS[0]), shares.append
    )
    frames = [prediction.frame for prediction in view.predictions]
    assert frames == [4, 6, 8]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "no checkpoint is named"),
        ({"checkpoint": "no such thing"}, "checkpoint no such thing is not a folder"),
        ({"checkpoint": "nobody/nothing"}, "checkpoint nobody/nothing cannot be loaded"),
        ({"dataset": " "}, "no dataset is named"),
        ({"dataset": "no/such/thing"}, "dataset no/such/thing is neither a folder nor a Hub id"),
        ({"dataset": "nobody/nothing"}, "nobody/nothing is not in the cache"),
        ({"episode": 7}, "no episode 7: choose 0 to 1"),
        ({"cameras": "main=left"}, "(main, wrist) and a camera of the dataset (main, wrist, or none)"),
        ({"cameras": "left"}, "'left' should be VIEW=CAMERA"),
        ({"cameras": "main=none,wrist=none"}, "at least one view needs a camera"),
    ],
)
def test_what_does_not_exist_is_named_in_one_sentence(checkpoint, dataset, changes, message):
    choice = Choice(**{"checkpoint": checkpoint, "dataset": str(dataset.root), **changes})
    with pytest.raises((ValueError, RuntimeError)) as raised:
        predict_episode(choice)
    assert message in str(raised.value)


def test_episodes_are_called_by_number_task_and_length(dataset):
    choices = name_episodes(open_dataset(str(dataset.root)))
    assert choices == [(f"{e}: {dataset.task(e)} ({FRAMES} frames)", e) for e in range(EPISODES)]


def test_depth_has_the_colors_of_the_other_pictures_and_unknown_is_grey():
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    depth = np.array([[0.5, 1.0], [2.0, np.nan]])
    colored = color_depth(depth, (0.5, 2.0))
    expected = colormaps["turbo_r"](LogNorm(0.5, 2.0)(depth[:1]))[..., :3]
    np.testing.assert_allclose(colored[:1], expected, atol=0.01)
    np.testing.assert_allclose(colored[1, 1], 0.6)


def test_the_scale_names_round_metres_where_their_colors_are():
    ticks = place_ticks((0.5, 2.0))
    assert [tick["label"] for tick in ticks] == ["0.5", "1", "2"]
    assert [tick["share"] for tick in ticks] == pytest.approx([0, 0.5, 1])
    assert len(place_ticks((1.1, 1.3))) == 2
