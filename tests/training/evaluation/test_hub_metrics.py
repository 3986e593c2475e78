"""The `evaluate` metrics against figures worked out by hand."""

import doctest
import math
import re
import socket
import threading

import evaluate
import numpy as np
import pytest

from training.evaluation.metric_loader import HUB_METRICS, load_metric

NAN = float("nan")
ALL = ("flow_3d", "future_rgbd", "masked_depth", "robot_action", "success_rate", "task_chain")


@pytest.fixture(scope="module")
def metric():
    return {name: load_metric(name) for name in ALL}


def test_every_metric_loads_from_its_folder_and_says_what_it_is(metric):
    assert sorted(path.name for path in HUB_METRICS.iterdir() if path.name[0] not in "._") == list(ALL)
    for one in metric.values():
        for told in ("Args:", "Raises:", "Example:"):
            assert told in one.inputs_description


@pytest.mark.parametrize("name", ALL)
def test_the_example_of_a_metric_is_true_and_needs_no_network(name, monkeypatch):
    def connect(*_):
        raise AssertionError("a metric asks for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.chdir(HUB_METRICS.parents[2])
    told = evaluate.load(f"training/evaluation/hub_metrics/{name}").inputs_description
    example = doctest.DocTestParser().get_doctest(told, {}, name, None, None)
    assert doctest.DocTestRunner(verbose=False).run(example) == (0, len(example.examples))


def test_the_code_of_the_page_runs(monkeypatch, capsys):
    root = HUB_METRICS.parents[2]
    monkeypatch.chdir(root)
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "metrics.md").read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), "docs/metrics.md", "exec"), {})
    rate, chains, action = capsys.readouterr().out.splitlines()
    assert "'success_rate': 0.95" in rate and chains == "2.0" and float(action) == pytest.approx(0.05)


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no metric 'depth'; there are flow_3d, .*masked_depth"):
        load_metric("depth")


def test_depth_counts_only_pixels_that_are_known_in_both(metric):
    truth = [[[1.0, 2.0, 2.0, 5.0], [0.0, NAN, 4.0, 1.0]]]
    predicted = [[[1.1, 2.0, 3.0, 0.0], [9.0, 9.0, NAN, 1.6]]]
    figures = metric["masked_depth"].compute(predictions=predicted, references=truth)
    # errors 0.1, 0, 1, 0.6 of 1, 2, 2, 1 m; ratios 1.1, 1, 1.5, 1.6
    assert figures["abs_rel"] == pytest.approx((0.1 + 0 + 0.5 + 0.6) / 4, rel=1e-6)
    assert figures["rmse_m"] == pytest.approx(math.sqrt((0.01 + 1 + 0.36) / 4), rel=1e-6)
    assert [figures[f"delta_{k}"] for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    assert (figures["pixels"], figures["covered"]) == (4, pytest.approx(4 / 6))


def test_depth_maps_of_other_shapes_are_named(metric):
    with pytest.raises(ValueError, match=r"map 0: the prediction has shape \(1, 2\), its truth \(2, 1\)"):
        metric["masked_depth"].compute(predictions=[[[1.0, 1.0]]], references=[[[1.0], [1.0]]])


def test_flow_in_pixels_and_in_space_moving_and_still_apart(metric):
    truth = [
        [[0.5, 0.5, 1.0], [0.6, 0.5, 1.0]],  # moves by 10 px of 100
        [[0.2, 0.5, 2.0], [0.2, 0.5, 2.0]],  # stays
        [[0.2, 0.5, 2.0], [NAN, NAN, NAN]],  # is lost after the first step
    ]
    predicted = [
        [[0.5, 0.5, 1.0], [0.57, 0.52, 1.1]],
        [[0.2, 0.5, 2.0], [0.2, 0.5, 2.0]],
        [[0.2, 0.5, 2.1], [0.9, 0.9, 9.0]],
    ]
    figures = metric["flow_3d"].compute(
        predictions=predicted, references=truth, width=100, height=50, fx=100, fy=50, cx=50, cy=25
    )
    pixels = math.hypot(3, 1)
    assert figures["epe_px_moving"] == pytest.approx(pixels / 2, rel=1e-5)
    assert figures["epe_px_still"] == pytest.approx(0, abs=1e-5)
    assert figures["epe_px"] == pytest.approx(pixels / 5, rel=1e-5)  # five known steps
    assert figures["z_cm"] == pytest.approx((10 + 10) / 5, rel=1e-4)
    # in space: (0.1, 0, 1) against (0.077, 0.022, 1.1) m, and (-0.6, 0, 2) against (-0.63, 0, 2.1)
    moving = 100 * math.dist((0.1, 0, 1), (0.077, 0.022, 1.1))
    still = 100 * math.dist((-0.6, 0, 2), (-0.63, 0, 2.1))
    assert figures["epe_cm_moving"] == pytest.approx(moving / 2, rel=1e-4)
    assert figures["epe_cm_still"] == pytest.approx(still / 3, rel=1e-4)
    assert (figures["points"], figures["points_moving"]) == (3, 1)


def test_flow_of_two_coordinates_has_no_depth_error(metric):
    track = [[[0.5, 0.5], [0.6, 0.5]]]
    figures = metric["flow_3d"].compute(predictions=track, references=track, width=10, height=10)
    assert figures["epe_px"] == 0
    assert not {"z_cm", "epe_cm"} & figures.keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs width and height"),
        ({"width": 10, "height": 10, "fx": 5}, "fy, cx, cy are missing: give all four"),
        ({"width": 10, "height": 10, "fx": 0, "fy": 1, "cx": 5, "cy": 5}, "fx is 0; it must be above 0"),
    ],
)
def test_flow_needs_the_size_and_whole_intrinsics(metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric["flow_3d"].compute(predictions=[[[0.5, 0.5, 1.0]]], references=[[[0.5, 0.5, 1.0]]], **options)


def test_future_frames_with_and_without_depth(metric):
    truth = [[[[0.5, 0.5, 0.2, 2.0], [NAN, 0.0, 0.0, 0.0]]]]
    predicted = [[[[0.5, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]]]]
    figures = metric["future_rgbd"].compute(predictions=predicted, references=truth)
    assert figures["rgb_mae"] == pytest.approx(0.1, rel=1e-5)
    assert figures["rgb_mse"] == pytest.approx(0.03, rel=1e-5)
    assert figures["psnr_db"] == pytest.approx(15.2288, rel=1e-4)
    assert (figures["depth_abs_rel"], figures["depth_rmse_m"], figures["depth_covered"]) == (0.5, 1.0, 1.0)
    same = [[[[0.1, 0.2, 0.3]]]]
    figures = metric["future_rgbd"].compute(predictions=same, references=same)
    # No infinity: it would be no JSON.
    assert figures["rgb_mse"] == 0 and not {"psnr_db", "depth_abs_rel", "depth_covered"} & figures.keys()


def test_future_depth_that_is_not_predicted_shows_in_what_is_covered(metric):
    truth = [[[[0.5, 0.5, 0.5, meters] for meters in (1.0, 2.0, 4.0, 0.0)]]]
    holes = [[[[0.5, 0.5, 0.5, meters] for meters in (NAN, 1.0, 0.0, 3.0)]]]
    figures = metric["future_rgbd"].compute(predictions=holes, references=truth)
    assert (figures["depth_abs_rel"], figures["depth_covered"]) == (0.5, pytest.approx(1 / 3))


def test_bytes_are_no_colours_from_0_to_1(metric):
    with pytest.raises(ValueError, match="divide bytes by 255"):
        metric["future_rgbd"].compute(predictions=[[[[9.0, 9, 9]]]], references=[[[[255.0, 0, 0]]]])


def test_actions_per_dimension_grippers_apart_and_padding_left_out(metric):
    figures = metric["robot_action"].compute(
        predictions=[[0.0, 1.0, 2.0], [0.5, 0.2, 2.0], [9.0, 9.0, 9.0]],
        references=[[0.25, 1.0, 2.0], [0.0, 1.0, 3.0], [NAN, NAN, NAN]],
        binary_indices=[1],
    )
    assert figures["l1"] == pytest.approx([0.375, 0.5])
    assert figures["l1_mean"] == pytest.approx(0.4375)
    assert (figures["binary_accuracy"], figures["actions"]) == ([0.5], 2)
    with pytest.raises(ValueError, match=r"binary_indices has \[3\], but actions have 3"):
        metric["robot_action"].compute(predictions=[[0.0] * 3], references=[[0.0] * 3], binary_indices=[3])


def test_each_gripper_has_its_own_two_values(metric):
    figures = metric["robot_action"].compute(
        predictions=[[0.04, -1.0], [0.0, 1.0]],
        references=[[0.0, -1.0], [0.04, 1.0]],
        binary_indices=[0, 1],
        threshold=[0.02, 0.0],
    )
    assert figures["binary_accuracy"] == [0.0, 1.0]
    with pytest.raises(ValueError, match="threshold has 3 values for 2 binary_indices"):
        metric["robot_action"].compute(
            predictions=[[0.0, 1.0]], references=[[0.0, 1.0]], binary_indices=[0, 1], threshold=[0.0] * 3
        )


def test_success_has_wilsons_interval(metric):
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for successes, trials, interval in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        outcomes = [1] * successes + [0] * (trials - successes)
        figures = metric["success_rate"].compute(predictions=outcomes)
        assert figures["interval"] == pytest.approx(interval, abs=1e-4)
        assert figures["success_rate"] == successes / trials
    wide, narrow = (
        metric["success_rate"].compute(predictions=[1, 0], confidence=c)["interval"] for c in (0.99, 0.5)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_chains_count_successes_from_the_beginning(metric):
    figures = metric["task_chain"].compute(predictions=[5, 2, 0, 1])
    assert [figures[f"{k}_in_a_row"] for k in range(1, 6)] == [0.75, 0.5, 0.25, 0.25, 0.25]
    assert figures["avg_len"] == sum(figures[f"{k}_in_a_row"] for k in range(1, 6)) == 2.0
    assert figures["avg_len_se"] == pytest.approx(np.std([5, 2, 0, 1], ddof=1) / 2)
    assert figures["1_in_a_row_se"] == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    with pytest.raises(ValueError, match=r"chains of \[6.0\] successes, but a chain has 5"):
        metric["task_chain"].compute(predictions=[6])


@pytest.mark.parametrize(
    "name, nothing",
    [
        ("masked_depth", [[[0.0]]]),
        ("flow_3d", [[[NAN, NAN, NAN]]]),
        ("future_rgbd", [[[[NAN, NAN, NAN]]]]),
        ("robot_action", [[NAN]]),
    ],
)
def test_nothing_to_compare_is_an_error_and_no_nan(metric, name, nothing):
    options = {"width": 4, "height": 4} if name == "flow_3d" else {}
    with pytest.raises(ValueError, match="nothing to compare"):
        metric[name].compute(predictions=nothing, references=nothing, **options)


@pytest.mark.parametrize("name", ALL)
def test_a_loop_over_no_batches_is_an_error(metric, name):
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name}: nothing was added"):
            metric[name].compute()


@pytest.mark.parametrize("name", ["flow_3d", "future_rgbd", "masked_depth", "robot_action"])
def test_an_empty_batch_is_an_error(metric, name):
    options = {"width": 4, "height": 4} if name == "flow_3d" else {}
    with pytest.raises(ValueError, match="nothing to compare"):
        metric[name].compute(predictions=[], references=[], **options)


@pytest.mark.parametrize(
    "name, known",
    [
        ("flow_3d", [[[0.5, 0.5, 1.0]]]),
        ("future_rgbd", [[[[0.5, 0.5, 0.5]]]]),
        ("robot_action", [[1.0, 0.0]]),
    ],
)
def test_a_prediction_that_is_nan_is_an_error_and_no_figure(metric, name, known):
    options = {"width": 4, "height": 4} if name == "flow_3d" else {}
    broken = (np.array(known) * NAN).tolist()
    with pytest.raises(ValueError, match="not finite where the truth is known"):
        metric[name].compute(predictions=broken, references=known, **options)


@pytest.mark.parametrize("outcome", [0.9, -1, NAN])
def test_outcomes_that_cannot_be_are_refused(metric, outcome):
    with pytest.raises(ValueError, match="outcomes are whole numbers"):
        metric["success_rate"].compute(predictions=[1, outcome])
    with pytest.raises(ValueError, match="0 to 5 successes"):
        metric["task_chain"].compute(predictions=[1, outcome])


def test_no_episode_is_an_error(metric):
    with pytest.raises(ValueError, match="at least one"):
        metric["success_rate"].compute(predictions=[])
    with pytest.raises(ValueError, match="no chain"):
        metric["task_chain"].compute(predictions=[])


def test_batches_give_what_all_at_once_gives(metric):
    draw = np.random.default_rng(0)
    truth, predicted = draw.uniform(1, 2, (2, 7, 4, 6)).astype(np.float32)
    whole = metric["masked_depth"].compute(predictions=predicted, references=truth)
    for part in (slice(0, 3), slice(3, 7)):
        metric["masked_depth"].add_batch(predictions=predicted[part], references=truth[part])
    assert metric["masked_depth"].compute() == pytest.approx(whole)


def test_several_processes_share_one_result(tmp_path):
    # Processes meet by locks on files, which two instances in one process respect just as well.
    draw = np.random.default_rng(0)
    truth, predicted = draw.uniform(1, 2, (2, 6, 4, 5)).astype(np.float32)
    results = {}

    def process(rank):
        shared = {"num_process": 2, "process_id": rank, "experiment_id": "both", "cache_dir": str(tmp_path)}
        part = load_metric("masked_depth", **shared)
        part.add_batch(predictions=predicted[rank::2], references=truth[rank::2])
        results[rank] = part.compute()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = load_metric("masked_depth").compute(predictions=predicted, references=truth)
    assert results == {0: pytest.approx(whole), 1: None}


def test_metrics_of_different_things_combine_each_with_its_own_inputs_and_options():
    combined = evaluate.combine(
        {
            "depth": load_metric("masked_depth", "depth"),
            "flow": load_metric("flow_3d", "flow", width=100, height=50),
            "action": load_metric("robot_action", "action", binary_indices=[1], threshold=0.0),
            "chain": load_metric("task_chain", "chain", chain_length=2),
        },
        force_prefix=True,
    )
    for near in (0.5, 1.0):
        combined.add_batch(
            depth_predictions=[[[near]]],
            depth_references=[[[1.0]]],
            flow_predictions=[[[near, 0.5, 1.0]]],
            flow_references=[[[1.0, 0.5, 1.0]]],
            action_predictions=[[0.0, near]],
            action_references=[[near, -1.0]],
            chain_predictions=[int(near)],
        )
    figures = combined.compute()
    assert (figures["depth_abs_rel"], figures["flow_epe_px"], figures["action_l1"]) == (0.25, 25, [0.75])
    assert (figures["action_binary_accuracy"], figures["chain_avg_len"]) == ([0.0], 0.5)
    assert "chain_3_in_a_row" not in figures


def test_an_option_that_does_not_exist_is_refused(metric):
    with pytest.raises(TypeError, match="chain_size"):
        metric["task_chain"].compute(predictions=[1], chain_size=4)
    with pytest.raises(TypeError, match="robot_action has no option limit: binary_indices, threshold"):
        load_metric("robot_action", limit=0.0)


def test_metrics_combine():
    both = evaluate.combine([load_metric("success_rate"), load_metric("task_chain")])
    figures = both.compute(
        predictions=[5, 2, 0, 1]
    )  # the first instruction, with its interval, and the chain
    assert (figures["success_rate"], figures["avg_len"]) == (0.75, 2.0)
