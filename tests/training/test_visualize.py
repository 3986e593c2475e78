"""Pictures of what a checkpoint predicts: the right frames, honestly undone, for any set of objectives."""

import argparse
import dataclasses
import math
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.targets import depth_target, rgb_target
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from training.config import DataConfig, DatasetSource, RunConfig
from training.config_reading import save_config
from training.evaluation.figures import draw_moments, explain_figure, last_window
from training.evaluation.prediction_recording import record_predictions
from training.evaluation.predictions import _undo_depth, _undo_rgb, depth_limits, predict_windows
from training.visualize import main, open_episode
from training.windows import ForesightWindows, WindowConfig

pytest.importorskip("matplotlib")

EPISODES, FRAMES = 3, 10
STATE, ACTION = 3, 4


def small_config(**overrides):
    sizes = {
        "action_dim": ACTION,
        "binary_action_indices": (),
        "state_dim": STATE,
        "binary_state_indices": (),
    }
    return tiny_config(**{**sizes, **overrides})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    # Pictures in parquet: what is drawn can be compared with the formulas.
    root = tmp_path_factory.mktemp("visualize") / "dataset"
    return make_dataset(
        root, EPISODES, FRAMES, size=(40, 40), use_videos=False, state_dim=STATE, action_dim=ACTION
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ForesightForActionPrediction(small_config()).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


def windows_of(dataset, config, episode=1):
    return ForesightWindows(
        dataset.root,
        WindowConfig(
            history_length=config.history_length,
            future_shift=config.future_shift,
            lookahead=config.has("future"),
            chunk_size=config.chunk_size,
            flow_length=config.flow_length,
            flow_grid=config.flow_grid,
            objectives=list(config.objectives),
            episodes=[episode],
            frame_cache="off",
        ),
    )


def predict_moments(model, windows, chosen, view="main"):
    processor = tiny_processor(model.config)
    return [p.views[view] for p in predict_windows(model, processor, windows, chosen, [view])]


@pytest.mark.parametrize("future_targets", ["window", "lookahead"])
def test_every_picture_shows_the_frame_it_claims(dataset, future_targets):
    """The newest frame's future is shown where it was trained; otherwise what was predicted of this frame."""
    torch.manual_seed(0)
    model = ForesightForActionPrediction(small_config(future_targets=future_targets)).eval()
    windows = windows_of(dataset, model.config)
    chosen = [0, 2]
    for view in ("main", "wrist"):
        moments = predict_moments(model, windows, chosen, view)
        for moment, i in zip(moments, chosen, strict=True):
            newest = i + model.config.history_length - 1
            now = newest if future_targets == "lookahead" else newest - model.config.future_shift
            later = now + model.config.future_shift
            assert moment.frame == newest
            np.testing.assert_allclose(moment.now_rgb, dataset.image(1, now, view) / 255, atol=0.01)
            np.testing.assert_allclose(moment.camera, dataset.image(1, newest, view) / 255, atol=0.01)
            np.testing.assert_allclose(moment.future_rgb[0], dataset.image(1, later, view) / 255, atol=0.01)
            for picture, t in (
                (moment.depth[0], newest),
                (moment.now_depth, now),
                (moment.future_depth[0], later),
            ):
                truth = dataset.depth(1, t, view)
                np.testing.assert_allclose(picture, np.where(truth > 0, truth, np.nan), atol=2e-3)
            assert (moment.flow is None) == (view != "main")


def test_flow_truth_and_prediction_start_at_the_same_points(dataset, model):
    windows = windows_of(dataset, model.config)
    (moment,) = predict_moments(model, windows, [2])
    sample = windows[2]
    truth, predicted = moment.flow
    np.testing.assert_array_equal(truth.points, sample["track"][-1].numpy())
    np.testing.assert_array_equal(truth.moving, sample["track_moving"][-1].numpy())
    # A fresh flow head predicts that points stay where they start.
    starts = np.broadcast_to(sample["track_start"][-1].numpy(), predicted.points[..., :2].shape)
    np.testing.assert_allclose(predicted.points[..., :2], starts, atol=0.01)
    assert predicted.shown is truth.shown


def test_perfect_predictions_of_the_present_are_drawn_as_the_present():
    torch.manual_seed(0)
    patch, side = 8, 40
    pixels, depth = torch.randn(3, side, side), 0.5 + torch.rand(side, side)
    depth[:patch, :patch] = 0  # a patch without depth stays unknown
    undone = _undo_rgb(rgb_target(pixels, patch), pixels, patch)
    torch.testing.assert_close(undone, pixels, atol=1e-4, rtol=1e-4)
    undone = _undo_depth(depth_target(depth, patch)[0], depth, patch)
    assert np.isnan(undone[:patch, :patch]).all()
    known = depth.numpy() > 0
    np.testing.assert_allclose(undone[known], depth.numpy()[known], atol=1e-5)


def test_depth_in_meters_is_drawn_as_predicted_and_without_recorded_depth_too(dataset):
    model = ForesightForActionPrediction(small_config(objectives=["depth"], depth_form="metric")).eval()
    torch.nn.init.zeros_(model.depth_decoder.predict_scale.weight)
    model.depth_decoder.predict_scale.bias.data = torch.tensor([math.log(3), -20.0])  # flat patches 3 m away
    (moment,) = predict_moments(model, windows_of(dataset, model.config), [0])
    np.testing.assert_allclose(moment.depth[1], 3, rtol=1e-5)
    blind = dataclasses.replace(moment, depth=(None, moment.depth[1]))
    assert depth_limits([moment])[1] < 2 and depth_limits([blind])[0] == pytest.approx(3)
    assert "Depth is predicted in meters." in explain_figure(model.config, 10)


@pytest.mark.parametrize(
    ("objectives", "titles"),
    [
        (["action"], ["camera"]),
        (["depth"], ["camera", "depth", "depth"]),
        (["future"], ["camera", *["future image"] * 2, *["future depth"] * 2]),
        (["action", "flow"], ["camera", "3D flow", "3D flow"]),
        (["flow_2d"], ["camera", "2D flow", "2D flow"]),
        (["depth", "future_rgb"], ["camera", *["depth"] * 2, *["future image"] * 2]),
    ],
)
def test_objectives_that_are_off_have_no_columns(dataset, objectives, titles):
    model = ForesightForActionPrediction(small_config(objectives=objectives)).eval()
    windows = windows_of(dataset, model.config)
    moments = predict_moments(model, windows, [0, 2])
    figure = draw_moments(moments, "title", "caption")
    pictures = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title().split("\n")[0] for axis in pictures] == titles
    scales = [axis for axis in figure.axes if axis.get_ylabel() == "depth (m)"]
    assert len(scales) == any("depth" in title or title == "3D flow" for title in titles)
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel().startswith("frame")]
    assert labels == [f"frame {moment.frame}" for moment in moments]


def test_a_strided_run_is_drawn_with_its_stride_and_commands(model, dataset, tmp_path):
    folder = tmp_path / "run" / "model"
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    source = DatasetSource(str(dataset.root), frame_stride=2, strided_commands="sum")
    save_config(RunConfig(data=DataConfig(datasets=[source])), tmp_path / "run" / "training" / "config.yaml")
    arguments = argparse.Namespace(checkpoint=str(folder), dataset=str(dataset.root), episode=0, cameras="")
    windows, _ = open_episode(arguments, model.config)
    newest = 2 * (model.config.history_length - 1)
    wanted = sum(dataset.action(0, newest + step) for step in range(2))
    np.testing.assert_allclose(windows[0]["actions"][-1, 0], wanted, atol=1e-6)


def test_the_last_picture_of_a_strided_run_has_its_future(tmp_path):
    sizes = {"size": (40, 40), "use_videos": False, "state_dim": STATE, "action_dim": ACTION}
    data = make_dataset(tmp_path / "long", 1, 30, **sizes)
    config = small_config(future_targets="lookahead")
    wanted = WindowConfig(
        views=config.views,
        history_length=config.history_length,
        future_shift=config.future_shift,
        lookahead=True,
        frame_stride=2,
        strided_commands="last",
        objectives=["action"],
        frame_cache="off",
    )
    windows = ForesightWindows(data.root, wanted)
    last = last_window(windows, config)
    assert windows[last]["frame_mask"].all() and not windows[last + 1]["frame_mask"].all()


def test_a_dataset_of_another_robot_is_drawn_at_the_rate_of_the_policy(tmp_path, capsys, monkeypatch):
    """Other camera names, four times the frames, a first episode that is too short."""
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    sizes = {"size": (40, 40), "use_videos": False, "cameras": ("front",), "action_dim": ACTION}
    other = make_dataset(tmp_path / "other", 2, [8, 30], fps=80, state_dim=STATE, **sizes)
    model = ForesightForActionPrediction(small_config(fps=20)).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    options = ["--checkpoint", str(tmp_path / "model"), "--dataset", str(other.root)]
    assert main([*options, "--output", str(tmp_path / "drawn.png")]) == 0
    printed = capsys.readouterr().out
    assert "The view “main” looks through the camera “front”" in printed and "episode 1" in printed
    assert main([*options, "--episode", "0", "--output", str(tmp_path / "drawn.png")]) == 1
    assert "take longer episodes" in capsys.readouterr().err
    assert main([*options, "--cameras", "main=side", "--output", str(tmp_path / "drawn.png")]) == 1
    assert "a camera of the dataset (front, or none)" in capsys.readouterr().err


def test_the_command_draws_a_held_out_episode_and_a_film(checkpoint, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder / "model")
    (folder / "config.yaml").write_text(
        f"data:\n  datasets: [{{path: somewhere/{Path(dataset.root).name}}}]\n  val_fraction: 0.3\n"
    )
    options = ["--checkpoint", str(folder / "model"), "--dataset", str(dataset.root), "--moments", "1"]
    output = tmp_path / "pictures" / "foresight.png"
    assert main([*options, "--output", str(output), "--video", str(tmp_path / "film.mp4")]) == 0
    printed = capsys.readouterr().out
    assert "held-out episode" in printed
    with Image.open(output) as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("L")).std() > 10
    with av.open(str(tmp_path / "film.mp4")) as container:
        # Newest frames 4 to 8 of 0 to 9: the last one has no next action.
        assert sum(1 for _ in container.decode(video=0)) == 5


def recorded_places(path) -> set[str]:
    rerun = pytest.importorskip("rerun", reason="extra viz")
    chunks = rerun.recording.load_recording(path).chunks()
    return {chunk.entity_path for chunk in chunks if not chunk.is_static}


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [None, ["action", "progress"]])
def test_a_whole_episode_is_recorded_for_rerun_with_what_model_and_dataset_have(
    dataset, model, tmp_path, objectives
):
    if objectives:
        model = ForesightForActionPrediction(small_config(objectives=objectives)).eval()
    windows = windows_of(dataset, model.config)
    predictions = list(predict_windows(model, tiny_processor(model.config), windows, range(len(windows))))
    lens = {"fx": 40, "fy": 40, "cx": 20, "cy": 20, "width": 40, "height": 40}
    record_predictions(tmp_path / "all.rrd", predictions, "title", 20, {"main": lens, "wrist": None})
    sides = ("recorded", "predicted")
    expected = {"/main/camera", "/wrist/camera"}
    expected |= {f"/{name}/{side}" for name in ("actions", "progress") for side in sides}
    if not objectives:
        pairs = ("depth", "future_rgb", "future_depth")
        expected |= {f"/{v}/{pair}/{side}" for v in ("main", "wrist") for pair in pairs for side in sides}
        expected |= {f"/main/{place}/flow_{side}" for place in ("camera", "space") for side in sides}
    assert recorded_places(tmp_path / "all.rrd") == expected


@pytest.mark.slow
def test_a_dataset_without_labels_is_drawn_and_recorded_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    sizes = {"size": (40, 40), "use_videos": False, "state_dim": STATE, "action_dim": ACTION}
    bare = make_dataset(tmp_path / "bare", 1, 7, depth=False, tracks=False, **sizes)
    options = ["--checkpoint", str(checkpoint), "--dataset", str(bare.root), "--moments", "1"]
    options += ["--output", str(tmp_path / "x.png"), "--rerun", str(tmp_path / "x.rrd")]
    assert main(options) == 0
    places = recorded_places(tmp_path / "x.rrd")
    assert "/main/camera/flow_predicted" in places and "/main/camera/flow_recorded" not in places
    assert "/main/depth/recorded" not in places and "/main/future_rgb/predicted" in places


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "film.gif"], "--video is film.gif; its name must end in .mp4"),
        (["--rerun", "film.mp4"], "--rerun is film.mp4; its name must end in .rrd"),
        (["--view", "left"], "no view 'left'"),
        (["--moments", "0"], "--moments is 0"),
        (["--episode", "7"], "episodes 0 to 2"),
        (["--dataset", "nowhere/at/all"], "nowhere"),
        (["--checkpoint", "nowhere/at/all"], "nowhere"),
    ],
)
def test_user_mistakes_are_one_clear_message(checkpoint, dataset, tmp_path, capsys, options, message):
    given = [
        "--checkpoint",
        str(checkpoint),
        "--dataset",
        str(dataset.root),
        "--output",
        str(tmp_path / "x.png"),
    ]
    assert main([*given, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib_the_extra_is_named(checkpoint, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = [
        "--checkpoint",
        str(checkpoint),
        "--dataset",
        str(dataset.root),
        "--output",
        str(tmp_path / "x.png"),
    ]
    assert main(given) == 1
    assert "[viz]" in capsys.readouterr().err


def test_depth_colours_span_what_is_there(dataset, model):
    windows = windows_of(dataset, model.config)
    moments = predict_moments(model, windows, [0])
    near, far = depth_limits(moments)
    assert 0.4 < near < far < 2
    blind = dataclasses.replace(moments[0], depth=None, future_depth=None, flow=None)
    assert depth_limits([blind]) == (0.1, 1.0)
