"""Open-loop errors: equal to the losses, blind to what is masked, beside honest trivial predictors."""

import copy
import json
import math

import pytest
import torch

from datasets_scripts.storage.settings_changes import flatten
from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.base_model import ForesightOutput
from modeling_foresight.targets import depth_target
from tests.tiny import TASKS, tiny_config, tiny_processor
from training.evaluation.open_loop import (
    evaluate_open_loop,
    fit_baselines,
    flow_errors,
    format_open_loop,
    measure_losses,
)

BATCH, HEIGHT, WIDTH = 3, 30, 60
BINARY_ACTION = 2


@pytest.fixture(scope="module")
def config():
    return tiny_config(future_targets="lookahead")


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    return ForesightForActionPrediction(config).eval()


@pytest.fixture(scope="module")
def processor(config):
    stats = {
        "mean": [1.0 + i for i in range(config.action_dim)],
        "std": [0.5 + i for i in range(config.action_dim)],
        "min": [-5.0] * config.action_dim,
        "max": [5.0] * config.action_dim,
    }
    return tiny_processor(config, action_stats=stats)


def raw_batch(config, seed=0, batch=BATCH):
    """Windows as the loader gives them; everything real, valid and supervised."""
    draw = torch.Generator().manual_seed(seed)
    frames, later, points = config.history_length, config.future_shift, config.num_flow_points

    def rand(*shape):
        return torch.rand(batch, *shape, generator=draw)

    actions = 4 * rand(frames, config.chunk_size, config.action_dim) - 2
    actions[..., BINARY_ACTION] = actions[..., BINARY_ACTION].sign() * 5
    return {
        "images": {
            view: torch.randint(
                0, 256, (batch, frames + later, 3, HEIGHT, WIDTH), generator=draw, dtype=torch.uint8
            )
            for view in config.views
        },
        "depth": {view: 0.5 + rand(frames + later, HEIGHT, WIDTH) for view in config.views},
        "view_mask": torch.ones(batch, len(config.views), dtype=torch.bool),
        "frame_mask": torch.ones(batch, frames + later, dtype=torch.bool),
        "state": rand(frames, config.state_dim),
        "actions": actions,
        "action_mask": torch.ones(batch, frames, config.chunk_size, dtype=torch.bool),
        "track_start": rand(frames, points, 2),
        "track": rand(frames, config.flow_length, points, 3),
        "track_weight": torch.ones(batch, frames, config.flow_length, points),
        "track_moving": rand(frames, points) > 0.5,
        "progress": rand(frames),
        "task": [TASKS[i % len(TASKS)] for i in range(batch)],
    }


def test_errors_add_up_to_the_losses_of_the_model(config, model, processor):
    raw = raw_batch(config)
    raw["track_weight"][:, :, 3:, ::2] = 0.1
    raw["depth"]["wrist"][:, 1, :7] = 0
    metrics = evaluate_open_loop(model, processor, [raw])
    losses = metrics["losses"]
    depth = sum(group["model"]["mse"] for group in metrics["depth"].values())
    assert depth == pytest.approx(losses["depth"], rel=1e-5)
    flow = metrics["flow"]["all"]["model"]
    assert (2 * flow["xy_rmse"] ** 2 + flow["z_rmse_m"] ** 2) / 3 == pytest.approx(losses["flow"], rel=1e-5)
    raw = raw_batch(config)  # all depth valid: the mean over channels is exact
    metrics = evaluate_open_loop(model, processor, [raw])
    future = sum(
        (3 * metrics["future_rgb"][view]["model"]["mse"] + metrics["future_depth"][view]["model"]["mse"]) / 4
        for view in config.views
    )
    assert future == pytest.approx(metrics["losses"]["future"], rel=1e-5)


def test_losses_of_several_batches_are_one_mean_over_all_their_elements(config, model, processor):
    raws = [raw_batch(config, seed) for seed in (1, 2)]
    raws[0]["track_weight"][:] = 0
    raws[0]["track_weight"][0, 0, 0, 0] = 1  # a lone supervised point weighs as much as any other
    raws[0]["frame_mask"][1:, 2:] = False
    raws[1]["view_mask"][0, 1] = False
    whole = {
        name: {view: torch.cat([raw[name][view] for raw in raws]) for view in config.views}
        if isinstance(raws[0][name], dict)
        else raws[0][name] + raws[1][name]
        if name == "task"
        else torch.cat([raw[name] for raw in raws])
        for name in raws[0]
    }
    with torch.no_grad():
        output = model(**processor.prepare_batch(whole))
    measured = measure_losses(model, processor, raws)
    assert measured == pytest.approx({name: loss.item() for name, loss in output.losses.items()}, rel=1e-4)
    losses = evaluate_open_loop(model, processor, raws)["losses"]
    assert losses == pytest.approx({**measured, "total": output.loss.item()}, rel=1e-4)


@pytest.mark.parametrize("future_targets", ["window", "lookahead"])
def test_future_errors_follow_the_models_rule_for_targets(future_targets, processor):
    config = tiny_config(future_targets=future_targets, objectives=["future"])
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config)
    raw = raw_batch(config)
    raw["frame_mask"][0, 4:] = False
    raw["frame_mask"][1, 6:] = False
    if future_targets == "window":
        for group in ("images", "depth"):
            raw[group] = {view: x[:, : config.history_length] for view, x in raw[group].items()}
        raw["frame_mask"] = raw["frame_mask"][:, : config.history_length]
    metrics = evaluate_open_loop(model, processor, [raw])
    future = sum(
        (3 * metrics["future_rgb"][view]["model"]["mse"] + metrics["future_depth"][view]["model"]["mse"]) / 4
        for view in config.views
    )
    assert future == pytest.approx(metrics["losses"]["future"], rel=1e-5)


def test_depth_in_meters_has_relative_errors_beside_the_mean_of_each_pixel_and_of_each_patch(processor):
    config = tiny_config(objectives=["depth", "future"], depth_form="metric", future_targets="lookahead")
    torch.manual_seed(0)
    model, raws = ForesightForActionPrediction(config).eval(), [raw_batch(config, seed) for seed in (1, 2)]
    raws[1]["depth"]["main"][0] = 0  # an invalid picture
    baselines = fit_baselines(raws, processor, config)
    metrics = evaluate_open_loop(model, processor, raws[1:], baselines)
    batches = [processor.prepare_batch(raw) for raw in raws]
    with torch.no_grad():
        output = model(**batches[1])
    frames = config.history_length
    seen = [batch["depth"][:, :, 0] for batch in batches]  # (B, T, 40, 40)
    both = torch.cat([seen[0], seen[1][1:]]).flatten(0, 1)
    of_patches = both.view(-1, 5, 8, 5, 8).mean((0, 2, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    ahead = torch.cat([batches[1]["depth"], batches[1]["lookahead_depth"]], 1)[1:, config.future_shift :, 0]
    for section, predictor, predicted, truth in (
        ("metric_depth", "model", output.predicted_depth[1:, :, 0], seen[1][1:]),
        ("metric_future_depth", "model", output.predicted_future_depth[1:, :, 0], ahead[:, :frames]),
        ("metric_depth", "mean", both.mean(0), seen[1][1:]),
        ("metric_depth", "node_mean", of_patches, seen[1][1:]),
    ):
        errors = metrics[section]["main"][predictor]
        close = (predicted < 1.25 * truth) & (truth < 1.25 * predicted)
        assert errors["abs_rel"] == pytest.approx(((predicted - truth).abs() / truth).mean().item(), rel=1e-4)
        assert errors["delta1"] == pytest.approx(close.float().mean().item(), abs=1e-4)


def test_what_is_masked_counts_nowhere(config, model, processor):
    clean = raw_batch(config, batch=2)
    clean["frame_mask"][0, 3:] = False
    clean["view_mask"][1, 1] = False
    clean["action_mask"][:, :, -1] = False
    clean["track_weight"][:, :, -1] = 0
    dirty = copy.deepcopy(clean)
    for view in config.views:
        dirty["images"][view][0, 3:] = 255
        dirty["depth"][view][0, 3:] = math.nan
    dirty["images"]["wrist"][1] = 0
    dirty["depth"]["wrist"][1] = 77.0
    dirty["actions"][:, :, -1] = math.inf
    dirty["actions"][0, 3:] = math.nan
    dirty["track"][:, :, -1] = math.nan
    dirty["track"][0, 3:] = 1e9
    dirty["progress"][0, 3:] = math.nan
    for raw in (clean, dirty):  # what the network itself is given for masked steps is not the matter here
        raw["state"][0, 3:] = 0
    results = []
    for raw in (clean, dirty):
        baselines = fit_baselines([raw], processor, config)
        metrics = evaluate_open_loop(model, processor, [raw], baselines)
        metrics.pop("losses")  # the KL term of GR-MG looks at padded frames too
        results.append(flatten(metrics))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert math.isfinite(value)
        assert results[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_baselines_are_the_means_over_all_batches(config, processor):
    raws = [raw_batch(config, seed) for seed in (1, 2)]
    raws[1]["frame_mask"][0, 2:] = False
    baselines = fit_baselines(iter(raws), processor, config)
    displacement, z, count = 0.0, 0.0, 0.0
    total, seen = 0.0, 0.0
    for raw in raws:
        real = raw["frame_mask"][:, : config.history_length]
        for b, t in real.nonzero().tolist():
            origin = torch.cat([raw["track_start"][b, t], raw["track"][b, t, 0, :, 2:]], -1)
            displacement = displacement + raw["track"][b, t] - origin
            z, count = z + raw["track"][b, t, 0, :, 2], count + 1
            depth = processor.resize_depth(raw["depth"]["wrist"][b, t])
            target, valid = depth_target(depth, config.patch_size)
            total, seen = total + target * valid, seen + valid.float()
    torch.testing.assert_close(baselines["flow_displacement"], displacement / count)
    torch.testing.assert_close(baselines["flow_start_z"], z / count)
    torch.testing.assert_close(baselines["depth"][1], total / seen, atol=1e-5, rtol=1e-4)
    assert baselines["actions"].shape == (config.chunk_size, config.action_dim)
    assert baselines["progress"].shape == ()


def test_the_mean_displacement_of_z_is_that_of_points_whose_depth_is_known_now(processor):
    """Two windows: a point that comes 0.2 m nearer, and one at another depth without a label now."""
    config = tiny_config(objectives=["flow"], flow_grid=(1, 1), flow_length=2, history_length=1)
    raw = raw_batch(config, batch=2)
    raw["track_weight"][:] = 1
    raw["track"][0, 0, :, 0, 2] = torch.tensor([1.0, 0.8])
    raw["track"][1, 0, :, 0, 2] = torch.tensor([float("nan"), 3.0])
    raw["track_weight"][1, 0, 0] = 0
    baselines = fit_baselines([raw], processor, config)
    assert baselines["flow_displacement"][:, 0, 2].tolist() == pytest.approx([0.0, -0.2])
    assert baselines["flow_start_z"].tolist() == pytest.approx([1.0])
    assert baselines["flow_displacement"][:, 0, :2].isfinite().all()


def test_the_training_mean_is_the_best_constant(config, model, processor):
    raws = [raw_batch(config, seed) for seed in (1, 2)]
    baselines = fit_baselines(raws, processor, config)
    best = evaluate_open_loop(model, processor, raws, baselines)
    for name in ("depth", "future_rgb", "future_depth"):
        shifted = evaluate_open_loop(model, processor, raws, {**baselines, name: baselines[name] + 0.1})
        for view in config.views:
            worse = shifted[name][view]["mean"]["mse"] - best[name][view]["mean"]["mse"]
            assert worse == pytest.approx(0.01, abs=1e-4)


def test_a_world_that_stands_still_is_predicted_by_repeating_it(config, model, processor):
    raw = raw_batch(config)
    for group in ("images", "depth"):
        for view in config.views:
            raw[group][view][:] = raw[group][view][:, :1].clone()
    raw["track"][..., :2] = raw["track_start"][:, :, None]
    raw["track"][..., 2] = raw["track"][:, :, :1, :, 2].clone()
    metrics = evaluate_open_loop(model, processor, [raw])
    for view in config.views:
        assert metrics["future_rgb"][view]["current"]["mse"] == pytest.approx(0, abs=1e-9)
        assert metrics["future_depth"][view]["current"]["mse"] == pytest.approx(0, abs=1e-9)
    assert metrics["flow"]["all"]["stay_put"]["xy_px"] == pytest.approx(0, abs=1e-6)
    assert metrics["flow"]["all"]["stay_put"]["z_m"] == pytest.approx(0, abs=1e-6)


def test_points_that_stay_put_keep_the_depth_that_is_labelled_now(config, model, processor):
    raw = raw_batch(config)
    raw["track"][..., 2] = 1.0
    raw["track"][:, :, 1:, :, 2] = 1.2
    steps = config.flow_length
    figures = evaluate_open_loop(model, processor, [raw])["flow"]["all"]["stay_put"]
    assert figures["z_m"] == pytest.approx(0.2 * (steps - 1) / steps, rel=1e-4)
    raw["track_weight"][:, :, 0, ::2] = 0  # not known now: neither predictor is asked for their depth
    raw["track"][:, :, 0, ::2, 2] = float("nan")
    again = evaluate_open_loop(model, processor, [raw])["flow"]["all"]["stay_put"]
    assert again["z_m"] == pytest.approx(figures["z_m"], rel=1e-4)


def test_flow_is_measured_in_pixels_of_the_recording_and_for_moving_points_apart(config, model, processor):
    raw = raw_batch(config)
    start = raw["track_start"][:, :, None].expand_as(raw["track"][..., :2])
    raw["track"][..., :2] = start
    shift = torch.tensor([3 / WIDTH, 4 / HEIGHT])
    raw["track"][..., :2] += shift * raw["track_moving"][:, :, None, :, None]
    metrics = evaluate_open_loop(model, processor, [raw])
    moving = metrics["flow"]["moving"]["stay_put"]
    assert (moving["x_px"], moving["y_px"], moving["xy_px"]) == pytest.approx((3, 4, 5), rel=1e-5)
    assert moving["xy_rmse"] == pytest.approx(float((shift**2).mean().sqrt()), rel=1e-5)
    share = raw["track_moving"].float().mean().item()
    assert metrics["flow"]["all"]["stay_put"]["xy_px"] == pytest.approx(5 * share, rel=1e-5)
    raw["track_moving"][:] = False
    assert "moving" not in evaluate_open_loop(model, processor, [raw])["flow"]


def test_the_depth_at_the_start_and_the_displacement_since_have_errors_apart(processor):
    """One frame of one point that moves and one that does not, predicted by hand."""
    config = tiny_config(objectives=["flow"], flow_grid=(1, 2), flow_length=3, history_length=1)
    raw = raw_batch(config, batch=1)
    raw["track_start"][0, 0] = torch.tensor([[0.5, 0.5], [0.25, 0.5]])
    raw["track"][0, 0, :, 0] = torch.tensor([[0.5, 0.5, 1.0], [0.6, 0.5, 0.9], [0.7, 0.4, 0.7]])
    raw["track"][0, 0, :, 1] = torch.tensor([0.25, 0.5, 2.0])
    raw["track_moving"][0, 0] = torch.tensor([True, False])

    predicted = raw["track"] + torch.tensor([0.0, 0.0, 0.3])  # 0.3 m too far away, from the start on
    predicted[0, 0, 1:, 0] += torch.tensor([0.01, -0.02, 0.1])  # and a wrong displacement of the first

    class Known(ForesightForActionPrediction):
        def forward(self, **batch):
            return ForesightOutput(flow=predicted)

    means = {"flow_displacement": torch.zeros(3, 2, 3), "flow_start_z": torch.tensor([1.5, 1.5])}
    flow = evaluate_open_loop(Known(config), processor, [raw], means)["flow"]
    displacement = [f"displacement_{axis}" for axis in ("x_px", "y_px", "z_m")]

    def errors(group, predictor):
        return [flow[group][predictor].get(name) for name in ("start_z_m", *displacement)]

    assert errors("moving", "model") == pytest.approx([0.3, 0.01 * WIDTH, 0.02 * HEIGHT, 0.1], rel=1e-4)
    # (0.1 + 0.2) / 2 of the width, (0 + 0.1) / 2 of the height, (0.1 + 0.3) / 2 meters
    assert errors("moving", "stay_put")[1:] == pytest.approx([0.15 * WIDTH, 0.05 * HEIGHT, 0.2], rel=1e-4)
    assert errors("moving", "stay_put")[0] is None  # it is told where points start
    assert errors("moving", "mean") == pytest.approx([0.5, 0.15 * WIDTH, 0.05 * HEIGHT, 0.2], rel=1e-4)
    assert errors("still", "model") == pytest.approx([0.3, 0, 0, 0], abs=1e-5)
    assert errors("all", "model") == pytest.approx([0.3, 0.005 * WIDTH, 0.01 * HEIGHT, 0.05], rel=1e-4)
    raw["track_weight"][0, 0, 0, 0] = 0  # where the point starts is not known: no displacement either
    flow = evaluate_open_loop(Known(config), processor, [raw], means)["flow"]
    assert not {"start_z_m", *displacement} & set(flow["moving"]["model"])


def test_action_errors_are_in_the_units_of_the_dataset(config, model, processor):
    raw = raw_batch(config)
    metrics = evaluate_open_loop(model, processor, [raw], fit_baselines([raw], processor, config))
    with torch.no_grad():
        predicted = model(**processor.prepare_batch(raw)).actions
    error = (processor.decode_actions(predicted) - raw["actions"]).abs()
    chunk, first = (metrics["actions"][name]["model"] for name in ("chunk", "first"))
    assert chunk["l1"] == pytest.approx(error.mean((0, 1, 2)).tolist(), rel=1e-4)
    assert first["l1"] == pytest.approx(error[:, :, 0].mean((0, 1)).tolist(), rel=1e-4)
    assert chunk["l1_mean"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert set(metrics["actions"]["chunk"]) == {"model", "mean"}


@pytest.mark.parametrize("objective", ["action", "depth", "future", "future_rgb", "flow", "progress"])
def test_a_model_with_one_objective_has_only_its_errors(objective, processor):
    config = tiny_config(objectives=[objective])
    raw = raw_batch(config)
    metrics = evaluate_open_loop(
        ForesightForActionPrediction(config), processor, [raw], fit_baselines([raw], processor, config)
    )
    expected = {"action": {"actions"}, "future": {"future_rgb", "future_depth"}}.get(objective, {objective})
    assert set(metrics) - {"windows", "losses"} == expected


def test_2d_flow_has_errors_in_the_image_only_and_they_add_up_to_its_loss(processor):
    config = tiny_config(objectives=["flow_2d"])
    raw = raw_batch(config)
    raw["track_weight"][:, :, 3:, ::2] = 0.1
    raw["track"][..., 2] = math.nan  # nobody looks at z
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config)
    baselines = fit_baselines([raw], processor, config)
    assert set(baselines) == {"flow_displacement"}
    metrics = evaluate_open_loop(model, processor, [raw], baselines)
    flow = metrics["flow"]["all"]
    assert set(flow) == {"model", "stay_put", "mean"}
    for errors in flow.values():
        in_image = {"x_px", "y_px", "xy_px", "xy_rmse", "displacement_x_px", "displacement_y_px"}
        assert set(errors) == in_image
        assert all(math.isfinite(error) for error in errors.values())
    assert flow["model"]["xy_rmse"] ** 2 == pytest.approx(metrics["losses"]["flow"], rel=1e-5)
    with torch.no_grad():
        batch = processor.prepare_batch(raw)
        logged = flow_errors(config, model.eval()(**batch).flow, raw, batch)
    assert set(logged) == {"flow_x_px", "flow_y_px", "stay_put_x_px", "stay_put_y_px"}
    moving = metrics["flow"]["moving"]["model"]
    assert logged["flow_x_px"] == pytest.approx(moving["displacement_x_px"], rel=1e-4)


def test_future_rgb_has_no_depth_errors_even_if_current_depth_is_predicted(processor):
    config = tiny_config(objectives=["depth", "future_rgb"], future_targets="lookahead")
    raw = raw_batch(config)
    baselines = fit_baselines([raw], processor, config)
    metrics = evaluate_open_loop(ForesightForActionPrediction(config), processor, [raw], baselines)
    assert set(metrics) - {"windows", "losses"} == {"depth", "future_rgb"}
    future = sum(group["model"]["mse"] for group in metrics["future_rgb"].values())
    assert future == pytest.approx(metrics["losses"]["future"], rel=1e-5)


def test_cameras_that_come_and_go_count_where_they_are(config, model, processor):
    raw = raw_batch(config)
    draw = torch.Generator().manual_seed(4)
    raw["view_mask"] = torch.rand(BATCH, config.history_length, 2, generator=draw) > 0.4
    metrics = evaluate_open_loop(model, processor, [raw], fit_baselines([raw], processor, config))
    depth = sum(group["model"]["mse"] for group in metrics["depth"].values())
    assert depth == pytest.approx(metrics["losses"]["depth"], rel=1e-5)
    future = sum(
        (3 * metrics["future_rgb"][view]["model"]["mse"] + metrics["future_depth"][view]["model"]["mse"]) / 4
        for view in config.views
    )
    assert future == pytest.approx(metrics["losses"]["future"], rel=1e-5)


def test_local_delta_actions_are_compared_as_the_raw_batch_holds_them():
    config = tiny_config(action_codec="local_delta", binary_action_indices=(6,), objectives=["action"])
    processor = tiny_processor(config)
    raw = raw_batch(config)
    raw["actions"][..., 6] = (raw["actions"][..., 0] > 0).float()
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval()
    metrics = evaluate_open_loop(model, processor, [raw], fit_baselines([raw], processor, config))
    with torch.no_grad():
        predicted = model(**processor.prepare_batch(raw)).actions
    predicted[..., 6] = (predicted[..., 6] > 0).float()
    error = (predicted - raw["actions"]).abs().mean((0, 1, 2))
    assert metrics["actions"]["chunk"]["model"]["l1"] == pytest.approx(error.tolist(), rel=1e-4)


def test_a_dataset_without_labels_still_gives_the_other_errors(config, model, processor):
    raw = raw_batch(config)
    for name in ("depth", "track", "track_start", "track_weight", "track_moving", "actions", "progress"):
        raw.pop(name)
    metrics = evaluate_open_loop(model, processor, [raw], fit_baselines([raw], processor, config))
    assert set(metrics) == {"windows", "losses", "future_rgb"}


def test_the_model_is_left_in_the_mode_it_was_in(config, processor):
    model = ForesightForActionPrediction(config).train()
    evaluate_open_loop(model, processor, [raw_batch(config)])
    assert model.training


def test_no_windows_is_an_error(model, processor):
    with pytest.raises(ValueError, match="no windows"):
        evaluate_open_loop(model, processor, [])


def test_results_are_plain_numbers_and_can_be_read(config, model, processor):
    raw = raw_batch(config)
    metrics = evaluate_open_loop(model, processor, [raw, raw], fit_baselines([raw], processor, config))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["windows"] == 2 * BATCH
    flat = flatten(metrics, "val/")
    assert flat["val/flow/moving/stay_put/xy_px"] == metrics["flow"]["moving"]["stay_put"]["xy_px"]
    assert "flow moving: x_px" in format_open_loop(metrics)


def test_the_training_log_shows_flow_errors_beside_staying_put(config, model, processor):
    raw = raw_batch(config)
    raw["track_weight"][0] = 0
    batch = processor.prepare_batch(raw)
    with torch.no_grad():
        flow = model(**batch).flow
    logged = flow_errors(config, flow, raw, batch)
    moving = evaluate_open_loop(model, processor, [raw])["flow"]["moving"]
    for predictor, prefix in (("model", "flow"), ("stay_put", "stay_put")):
        for axis in ("x_px", "y_px", "z_m"):
            error = moving[predictor][f"displacement_{axis}"]
            assert logged[f"{prefix}_{axis}"] == pytest.approx(error, rel=1e-4)
    assert logged["flow_start_z_m"] == pytest.approx(moving["model"]["start_z_m"], rel=1e-4)
    batch["track_weight"][:] = 0
    assert flow_errors(config, flow, raw, batch) == {}
