import dataclasses
import json
import pickle
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader

from datasets_scripts.columns import clean_depth, points_key, points_visible_key
from datasets_scripts.storage.provenance import read_provenance, write_provenance
from modeling_foresight.action_codec import to_simulator_action
from tests.synthetic import make_dataset
from training.windows import (
    ConcatWindows,
    ForesightWindows,
    WindowConfig,
    WindowSampler,
    collate_windows,
    split_episodes,
    warn_of_differences,
)
from training.windows.flow_targets import FlowSampling, build_flow_targets

LENGTHS = [12, 9, 14]
T, S, K, L, GRID = 3, 2, 4, 5, (4, 6)
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Videos, depth videos, tracks."""
    sizes = {"main": (HEIGHT, WIDTH), "wrist": (32, 40)}
    return make_dataset(tmp_path_factory.mktemp("video") / "ds", frames=LENGTHS, cameras=sizes, state_dim=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures inside parquet files: every value is exact. No wrist depth, no tracks, no state."""
    root = tmp_path_factory.mktemp("pictures") / "ds"
    return make_dataset(
        root,
        frames=[8, 7],
        size=(24, 32),
        use_videos=False,
        depth=("main",),
        tracks=False,
        state_key=None,
        tasks=("push the cube",),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def config(cache="off", **changes):
    base = {
        "history_length": T,
        "future_shift": S,
        "lookahead": True,
        "chunk_size": K,
        "flow_length": L,
        "flow_grid": GRID,
        "frame_cache": cache,
    }
    return WindowConfig(**{**base, **changes})


def copy_of(facts, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(facts.root, root)
    return root


def assert_same(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


# -------------------------------------------------------------------- values


def test_windows_are_all_t_frames_of_one_episode_without_its_last_frame(facts, cache):
    windows = ForesightWindows(facts.root, config(cache))
    expected = [
        (e, start + T - 1)
        for e, (first, length) in enumerate(zip(facts.starts, LENGTHS, strict=True))
        for start in range(first, first + length - T)
    ]
    assert len(windows) == len(expected) == sum(LENGTHS) - 3 * T
    got = [(int(w["episode_index"]), int(w["index"])) for w in (windows[i] for i in range(len(windows)))]
    assert got == expected


def test_every_value_equals_its_formula_in_a_dataset_of_pictures(pictures):
    windows = ForesightWindows(
        pictures.root, config("off", objectives=["action", "depth"], missing_targets=True)
    )
    i = 0
    for e, length in enumerate(pictures.lengths):
        for start in range(length - T):
            window = windows[i]
            i += 1
            for t in range(T + S):
                real = start + t < length
                assert bool(window["frame_mask"][t]) == real
                for view in ("main", "wrist"):
                    image = window["images"][view][t].permute(1, 2, 0).numpy()
                    expected = pictures.image(e, start + t, view) if real else 0 * image
                    np.testing.assert_array_equal(image, expected)
                depth = window["depth"]["main"][t].numpy()
                np.testing.assert_array_equal(
                    depth, pictures.depth(e, start + t, "main") if real else 0 * depth
                )
            for t in range(T):
                for k in range(K):
                    exists = start + t + k < length
                    expected = pictures.action(e, start + t + k) if exists else np.zeros(4)
                    assert bool(window["action_mask"][t, k]) == exists
                    np.testing.assert_array_equal(window["actions"][t, k], expected)
                assert window["progress"][t] == pytest.approx((start + t) / (length - 1))
            assert window["task"] == "push the cube" and "wrist" not in window["depth"]
            assert "state" not in window and window["view_mask"].all()
    assert i == len(windows)


def test_cache_on_demand_and_stock_reader_agree(facts, cache):
    cached = ForesightWindows(facts.root, config(cache))
    on_demand = ForesightWindows(facts.root, config("off"))
    frames, fps = [t / 20 for t in range(1 - T, S + 1)], 20
    points = [t / fps for t in range(1 - T, L)]
    cameras = [f"observation.{kind}.{camera}" for kind in ("images", "depth") for camera in ("main", "wrist")]
    stock = LeRobotDataset(
        "local/synthetic",
        root=facts.root,
        delta_timestamps={
            **dict.fromkeys(cameras, frames),
            points_key("main"): points,
            points_visible_key("main"): points,
            "action": [t / fps for t in range(1 - T, K)],
            "observation.state": [t / fps for t in range(1 - T, 1)],
        },
        return_uint8=True,
        depth_output_unit="m",
    )
    for i in range(0, len(cached), 4):
        window = cached[i]
        assert_same(window, on_demand[i])
        item = stock[int(window["index"])]
        assert window["task"] == item["task"]
        for camera in ("main", "wrist"):
            real = ~item[f"observation.images.{camera}_is_pad"]
            assert torch.equal(window["frame_mask"], real)
            assert torch.equal(window["images"][camera][real], item[f"observation.images.{camera}"][real])
            depth = clean_depth(item[f"observation.depth.{camera}"][real].squeeze(1), 4.0)
            torch.testing.assert_close(window["depth"][camera][real], depth, rtol=0, atol=1e-6)
        assert torch.equal(window["state"], item["observation.state"])
        for t in range(T):
            mask = ~item["action_is_pad"][t : t + K]
            assert torch.equal(window["action_mask"][t], mask)
            assert torch.equal(window["actions"][t], item["action"][t : t + K] * mask[:, None])
        exists = ~item[f"{points_key('main')}_is_pad"]
        targets = build_flow_targets(
            item[points_key("main")][exists].reshape(-1, facts.n_points, 3).numpy(),
            item[points_visible_key("main")][exists].numpy(),
            facts.moving(int(item["episode_index"])),
            FlowSampling(T, L, GRID),
            generator_after_two_shifts(i),
        )
        for key, value in targets.items():
            np.testing.assert_array_equal(window[key].numpy(), value, err_msg=key)


def generator_after_two_shifts(i, draw=0):
    """The generator of a window at the point where flow points are chosen."""
    rng = np.random.default_rng((0, i, draw))
    for _ in range(2):
        rng.integers(0, (1, 1))
    return rng


def test_depth_video_reads_as_metres_with_invalid_pixels_at_zero(facts, cache):
    window = ForesightWindows(facts.root, config(cache))[0]
    for t in range(T):
        expected = facts.depth(0, t, "main")
        np.testing.assert_allclose(window["depth"]["main"][t].numpy(), expected, atol=1e-3)
        assert not window["depth"]["main"][t, -3:, -3:].any()


def test_flow_weight_ends_with_the_episode(facts, cache):
    windows = ForesightWindows(facts.root, config(cache))
    window = windows[LENGTHS[0] - T - 1]  # the last window of episode 0
    newest = int(window["index"])
    assert newest == LENGTHS[0] - 2
    for t in range(T):
        for k in range(L):
            inside = newest - (T - 1) + t + k <= LENGTHS[0] - 1
            assert bool(window["track_weight"][t, k].any()) == inside


STRIDED = {"objectives": ["action"], "frame_stride": 2, "history_length": 2, "lookahead": True}


def strided_commands(pictures, frame: int) -> np.ndarray:
    """The two commands `(2, 4)` of a step of two frames, or none where the episode of 8 frames ends."""
    return np.stack([pictures.action(0, frame), pictures.action(0, frame + 1)]) if frame + 1 < 8 else None


def test_frame_stride_multiplies_every_offset(pictures):
    windows = ForesightWindows(pictures.root, config("off", strided_commands="last", **STRIDED))
    window = windows[1]  # frames 1 and 3, then 5 and 7
    assert [int(windows[i]["index"]) for i in range(5)] == [2, 3, 4, 5, 6]
    for t, frame in enumerate([1, 3, 5, 7]):
        image = window["images"]["main"][t].permute(1, 2, 0)
        np.testing.assert_array_equal(image, pictures.image(0, frame, "main"))


@pytest.mark.parametrize("how", ["sum", "last"])
def test_an_action_combines_all_commands_of_its_step(pictures, how):
    settings = config("off", strided_commands=how, binary_action_indices=[3], **STRIDED)
    windows = ForesightWindows(pictures.root, settings)
    window, actions = windows[1], []
    for t, frame in enumerate([1, 3]):
        for k in range(K):
            commands = strided_commands(pictures, frame + 2 * k)
            assert bool(window["action_mask"][t, k]) == (commands is not None)
            expected = np.zeros(4, np.float32) if commands is None else commands[-1].copy()
            if commands is not None and how == "sum":
                expected[:3] = commands.sum(0)[:3]  # the gripper, entry 3, is not a motion
            np.testing.assert_allclose(window["actions"][t, k], expected, rtol=1e-6)
    for episode, frames in enumerate([8, 7]):
        for frame in range(frames - 1):
            pair = np.stack([pictures.action(episode, frame), pictures.action(episode, frame + 1)])
            actions.append([*(pair.sum(0) if how == "sum" else pair[1])[:3], pair[1][3]])
    np.testing.assert_allclose(windows.statistics["action"]["mean"], np.mean(actions, 0), rtol=1e-5)
    np.testing.assert_allclose(windows.statistics["action"]["std"], np.std(actions, 0), rtol=1e-5)


def test_recorded_commands_of_a_longer_step_are_refused_until_their_kind_is_named(pictures, calvin):
    with pytest.raises(ValueError, match="frame_stride=2 .*strided_commands to 'sum' .*or to 'last'"):
        ForesightWindows(pictures.root, config("off", **STRIDED))
    no_actions = {**STRIDED, "objectives": ["progress"]}
    assert len(ForesightWindows(pictures.root, config("off", **no_actions))) > 0
    local = {**STRIDED, "action_codec": "local_delta"}
    assert len(ForesightWindows(calvin.root, config("off", views=["main"], **local))) > 0


def test_a_window_of_an_episode_that_is_too_short_is_masked_at_its_end(pictures, facts, cache):
    short = LENGTHS[1]  # of 10 frames of history
    windows = ForesightWindows(facts.root, config(cache, history_length=10))
    window = windows.read(1, LENGTHS[0], np.random.default_rng(0))
    whole = windows[0]
    assert {key: value.shape for key, value in window.items() if hasattr(value, "shape")} == {
        key: value.shape for key, value in whole.items() if hasattr(value, "shape")
    }
    assert window["frame_mask"].tolist() == [i < short for i in range(len(whole["frame_mask"]))]
    assert not window["track_weight"][short:].any() and not window["action_mask"][short:].any()
    assert window["track_weight"][0].any() and window["state"][short - 1].any()
    assert int(window["index"]) == LENGTHS[0] + short - 1


def test_a_mixture_without_any_target_is_refused_before_it_is_trained_on(pictures, cache):
    settings = config("off", objectives=["depth", "flow"], missing_targets=True)
    assert ConcatWindows([ForesightWindows(pictures.root, settings)])  # the main camera has depth
    settings = config("off", objectives=["flow", "action"], missing_targets=True, action_key="none")
    windows = ForesightWindows(pictures.root, settings)
    with pytest.raises(ValueError, match=r"nothing to train.*flow .no observation.points.main.*no none"):
        ConcatWindows([windows])


def test_goal_is_a_later_frame_of_the_same_episode(pictures):
    windows = ForesightWindows(pictures.root, config("off", objectives=["action"], goal_image=True))
    seen = set()
    for draw in range(40):
        window = windows[1, draw]
        assert bool(window["goal_mask"])
        matches = [
            t
            for t in range(8)
            if np.array_equal(window["goal_image"].permute(1, 2, 0), pictures.image(0, t, "main"))
        ]
        seen.add(matches[0])
    assert seen == {4, 5, 6, 7}  # window 1 ends at frame 3, the episode at 7


def test_chosen_episodes_only(facts, cache):
    windows = ForesightWindows(facts.root, config(cache, episodes=[2]))
    assert len(windows) == LENGTHS[2] - T
    assert {int(windows[i]["episode_index"]) for i in range(len(windows))} == {2}
    actions = np.stack([facts.action(2, t) for t in range(LENGTHS[2])])
    np.testing.assert_allclose(windows.statistics["action"]["mean"], actions.mean(0), rtol=1e-5)


# -------------------------------------------------------------------- CALVIN's form and smaller objectives


def add_flags(root, flags: dict[str, list[str]]) -> None:
    """Puts flags into the provenance of a copy, as `inspect_dataset.py --write-flags` does."""
    provenance = read_provenance(root)
    provenance["episodes"] = dict(provenance["episodes"])
    for episode, facts in provenance["episodes"].items():
        facts["flags"] = flags.get(episode, [])
    write_provenance(root, provenance)


def test_flagged_episodes_are_left_out_if_a_camera_in_use_has_the_flag(facts, cache, tmp_path):
    root = copy_of(facts, tmp_path)
    add_flags(root, {"0": ["main/no-motion"], "2": ["wrist/depth-sparse"]})
    windows = ForesightWindows(root, config(cache, skip_flagged=True))
    assert list(windows.episodes) == [1] and windows.flagged == [0, 2]
    assert len(windows) == LENGTHS[1] - T
    one_view = ForesightWindows(root, config(cache, skip_flagged=True, views=["main"]))
    assert list(one_view.episodes) == [1, 2] and one_view.flagged == [0]
    assert ForesightWindows(root, config(cache)).flagged == []


def test_skipping_all_or_without_flags_is_refused(facts, cache, tmp_path):
    with pytest.raises(ValueError, match="no flags to skip episodes by.*--write-flags"):
        ForesightWindows(facts.root, config(cache, skip_flagged=True))
    assert ForesightWindows(facts.root, config(cache, skip_flagged=True, missing_targets=True)).flagged == []
    root = copy_of(facts, tmp_path)
    add_flags(root, {"1": ["main/no-motion"]})
    with pytest.raises(ValueError, match="the 1 episodes chosen all have a flag, such as 1"):
        ForesightWindows(root, config(cache, skip_flagged=True, episodes=[1]))


@pytest.fixture(scope="module")
def calvin(tmp_path_factory):
    """States that are poses and a gripper; neither depth nor an action column that would suit."""
    root = tmp_path_factory.mktemp("calvin") / "ds"
    return make_dataset(
        root, frames=[11, 9], size=(24, 32), use_videos=False, depth=False, state_dim=8, poses=True
    )


def pose_matrix(state):
    """4 x 4 matrix of a pose, by scipy."""
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    matrix = np.eye(4)
    matrix[:3, :3] = rotation.from_euler("xyz", state[3:6].astype(np.float64)).as_matrix()
    matrix[:3, 3] = state[:3]
    return matrix


@pytest.mark.parametrize("stride", [1, 2])
def test_local_deltas_lead_from_one_measured_pose_to_the_next(calvin, stride):
    settings = config(objectives=["action"], action_codec="local_delta", frame_stride=stride)
    windows = ForesightWindows(calvin.root, settings)
    assert (windows.action_dim, windows.state_dim) == (7, 8)
    masked = 0
    for i in range(len(windows)):
        window = windows[i]
        e = int(window["episode_index"])
        newest = int(window["index"]) - calvin.starts[e]
        np.testing.assert_array_equal(window["state"][-1], calvin.state(e, newest))
        for t in range(T):
            for k in range(K):
                now = newest + (t - T + 1 + k) * stride
                exists = now + stride < calvin.lengths[e]
                assert bool(window["action_mask"][t, k]) == exists
                action = window["actions"][t, k].double().numpy()
                if not exists:
                    assert (action == 0).all()
                    masked += 1
                    continue
                here, there = calvin.state(e, now), calvin.state(e, now + stride)
                step = np.eye(4)
                step[:3, 3] = action[:3] / 50
                step[:3, :3] = pose_matrix(np.concatenate([np.zeros(3), action[3:6] / 20]))[:3, :3]
                np.testing.assert_allclose(pose_matrix(here) @ step, pose_matrix(there), atol=1e-5)
                assert action[6] == float(there[6] > 0)
    assert masked > 0


def test_a_chunk_of_a_window_takes_the_simulator_through_the_recorded_poses(calvin):
    window = ForesightWindows(calvin.root, config(objectives=["action"], action_codec="local_delta"))[2]
    commands = to_simulator_action(window["actions"][-1], window["state"][-1]).numpy()
    newest = int(window["index"])
    state = calvin.state(0, newest).astype(np.float64)
    for k in range(K):
        state[:6] += commands[k, :6] / np.repeat([50, 20], 3)
        truth = calvin.state(0, newest + k + 1)
        np.testing.assert_allclose(pose_matrix(state), pose_matrix(truth), atol=1e-5)
        assert commands[k, 6] == truth[6]


def test_local_deltas_of_a_grippers_bits_equal_those_of_its_signs(calvin, tmp_path):
    expected = ForesightWindows(calvin.root, config(objectives=["action"], action_codec="local_delta"))
    root = change_states(calvin, tmp_path, 6, lambda gripper: (gripper + 1) / 2)
    windows = ForesightWindows(root, expected.config)
    assert torch.equal(windows[3]["actions"], expected[3]["actions"])


def change_states(facts, tmp_path, entry, change):
    """A copy of a dataset with one entry of its state changed."""
    root = copy_of(facts, tmp_path)
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    values = np.stack(table.column("observation.state").to_numpy())
    values[:, entry] = change(values[:, entry])
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    position = table.column_names.index("observation.state")
    pq.write_table(table.set_column(position, "observation.state", column), path)
    return root


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        (6, lambda g: 0.04 * (g + 1), "values from 0 to 0.08 in entry 6, which must be the gripper"),
        (3, np.degrees, "angle of 1[78].* in entries 3 to 5, which must be roll, pitch, yaw in radians"),
    ],
)
def test_states_that_are_no_poses_are_refused_for_local_deltas(calvin, tmp_path, entry, change, message):
    root = change_states(calvin, tmp_path, entry, change)
    settings = config(objectives=["action"], action_codec="local_delta")
    with pytest.raises(ValueError, match=f"'observation.state' has .*{message}.*'recorded'"):
        ForesightWindows(root, settings)
    ForesightWindows(root, dataclasses.replace(settings, action_codec="recorded"))  # the remedy works


def test_local_deltas_without_a_fitting_state_are_explained_or_masked(facts, pictures, calvin):
    settings = config(objectives=["action"], action_codec="local_delta")
    with pytest.raises(ValueError, match="no column 'observation.state', from whose poses.*'recorded'"):
        ForesightWindows(pictures.root, settings)
    with pytest.raises(ValueError, match="'observation.state' has 3 entries; local_delta.*'recorded'"):
        ForesightWindows(facts.root, settings)
    settings = dataclasses.replace(settings, missing_targets=True)
    mixture = ConcatWindows([ForesightWindows(d.root, settings) for d in (calvin, pictures)])
    window = mixture[len(mixture) - 1]
    assert window["actions"].shape == (T, K, 7) and not window["action_mask"].any()
    assert window["state"].shape == (T, 8) and not window["state_mask"]
    with pytest.raises(ValueError, match="differs from the first in action_codec"):
        ConcatWindows(
            [
                ForesightWindows(calvin.root, settings),
                ForesightWindows(pictures.root, dataclasses.replace(settings, action_codec="recorded")),
            ]
        )


def test_smaller_objectives_read_fewer_columns(calvin, facts, cache):
    windows = ForesightWindows(calvin.root, config(objectives=["future_rgb", "flow_2d"]))
    window = windows[1]
    assert window["depth"] == {} and "actions" not in window
    whole = ForesightWindows(facts.root, config(cache, objectives=["flow"]))
    flat = ForesightWindows(facts.root, config(cache, objectives=["flow_2d"]))
    assert_same(whole[3], flat[3])  # the same points count for both
    with pytest.raises(ValueError, match=r"observation\.depth\.main"):
        ForesightWindows(calvin.root, config(objectives=["future"]))


def test_the_default_objectives_are_the_papers():
    assert WindowConfig().objectives == ["action", "depth", "future", "flow", "progress"]


# -------------------------------------------------------------------- augmentation


def test_shift_moves_rgb_depth_and_tracks_together(facts, cache):
    windows = ForesightWindows(facts.root, config(cache, random_shift=0.08, p_moving=1.0))
    checked, shifted = 0, 0
    for i in range(0, len(windows), 2):
        plain, window = ForesightWindows.__getitem__(windows, i), windows[i, 3]
        shifted += not torch.equal(plain["images"]["main"], window["images"]["main"])
        for t in range(T):
            red = window["images"]["main"][t, 0].float()
            on_dot = red > 200
            if int(on_dot.sum()) != 16:
                continue  # the dot touches the border
            rows, columns = on_dot.nonzero(as_tuple=True)
            x = (columns.float().mean() + 0.5) / WIDTH
            y = (rows.float().mean() + 0.5) / HEIGHT
            assert (window["depth"]["main"][t][on_dot] - 0.5).abs().max() < 2e-3
            distance = (window["track_start"][t] - torch.tensor([x, y])).abs().amax(-1)
            z = window["track"][t, 0, :, 2]
            dot = (z - 0.5).abs() < 1e-3  # point 0 is the only one at 0.5 m
            checked += int(dot.any())
            assert (distance[dot] < 2e-3).all()
    assert checked > 5 and shifted > 5


def test_all_frames_of_a_view_share_one_shift_and_views_differ(pictures):
    settings = config("off", objectives=["action"], random_shift=0.2, goal_image=True)
    windows = ForesightWindows(pictures.root, settings)
    differ = False
    for draw in range(12):
        window, offsets = windows[1, draw], {}
        for view in ("main", "wrist"):
            found = []
            for t in range(T):
                red = window["images"][view][t, 0]
                row, column = np.unravel_index(int((red > 200).int().argmax()), red.shape)
                x_px, y_px = pictures.dot_px(0, 1 + t, view)
                found.append((x_px - int(column), y_px - int(row)))
            offsets[view] = found
            assert len(set(found)) == 1
        differ |= offsets["main"] != offsets["wrist"]
        d_x, d_y = offsets["main"][0]
        goal = window["goal_image"]
        rows = (np.arange(24) + d_y).clip(0, 23)
        columns = (np.arange(32) + d_x).clip(0, 31)
        shifted_goals = [
            pictures.image(0, t, "main")[rows][:, columns].transpose(2, 0, 1) for t in range(4, 8)
        ]
        assert any(np.array_equal(goal, expected) for expected in shifted_goals)
    assert differ


def test_same_item_same_content_other_draw_other_content(facts, cache):
    windows = ForesightWindows(facts.root, config(cache, random_shift=0.05))
    assert_same(windows[4, 1], windows[4, 1])
    assert_same(windows[4], windows[4, 0])
    assert not torch.equal(windows[4, 1]["track_start"], windows[4, 2]["track_start"])
    evaluation = ForesightWindows(facts.root, windows.config.for_evaluation())
    plain = evaluation[4]
    image = plain["images"]["main"][0].permute(1, 2, 0).int().numpy()
    assert np.abs(image - facts.image(0, 4, "main").astype(int)).max() < 25  # a lossy video, not shifted


# -------------------------------------------------------------------- workers


@pytest.mark.parametrize("cached", [True, False])
def test_worker_processes_change_nothing(facts, cache, cached):
    windows = ForesightWindows(facts.root, config(cache if cached else "off", random_shift=0.05))
    windows[0]  # open decoders and maps in the parent: workers must not reuse them

    def batches(workers):
        sampler = WindowSampler(len(windows), batch_size=4, seed=3, start_step=5, steps=8)
        return list(
            DataLoader(windows, batch_sampler=sampler, num_workers=workers, collate_fn=collate_windows)
        )

    alone = batches(0)
    for one, other in zip(alone, batches(2), strict=True):
        assert_same(one, other)
    assert alone[0]["images"]["main"].shape == (4, T + S, 3, HEIGHT, WIDTH)
    assert isinstance(alone[0]["task"], list) and alone[0]["track"].shape == (4, T, L, GRID[0] * GRID[1], 3)


def test_pickled_windows_are_small_and_equal(facts, cache):
    windows = ForesightWindows(facts.root, config(cache))
    windows[0]
    data = pickle.dumps(windows)
    assert len(data) < 200_000  # neither the map nor the Arrow table travel
    assert_same(pickle.loads(data)[7], windows[7])


# -------------------------------------------------------------------- mixtures


def test_mixture_fills_what_a_dataset_lacks_with_masked_zeros(facts, pictures, cache):
    full = ForesightWindows(facts.root, config(cache, episodes=[0]))
    bare_config = config(cache, cameras={"wrist": None}, missing_targets=True)
    bare = ForesightWindows(pictures.root, bare_config)
    mixture = ConcatWindows([full, bare])
    assert len(mixture) == len(full) + len(bare) and mixture.sizes == [len(full), len(bare)]
    assert_same(mixture[2], full[2] | {"dataset": torch.tensor(0)})
    window, own = mixture[len(full) + 1], bare[1]
    assert window["view_mask"].tolist() == [True, False]
    assert not window["images"]["wrist"].any() and not window["depth"]["wrist"].any()
    assert not window["track_weight"].any() and not window["state"].any()
    assert torch.equal(window["actions"], own["actions"])
    assert window["images"]["main"].shape == (T + S, 3, HEIGHT, WIDTH)
    inside = own["depth"]["main"]
    assert torch.equal(window["depth"]["main"][:, ::2, ::2], inside)  # nearest: no new depths
    batch = collate_windows([mixture[0], window])
    assert batch["images"]["wrist"].shape[0] == 2 and batch["state"].shape == (2, T, 3)


def test_datasets_of_different_action_sizes_cannot_be_mixed(facts, cache, tmp_path):
    other = make_dataset(
        tmp_path / "ds", episodes=1, frames=8, cameras=("main",), action_dim=6, depth=False, tracks=False
    )
    settings = config(cache, cameras={"wrist": None}, missing_targets=True)
    with pytest.raises(ValueError, match="differ in action_dim.*name the one of each dataset"):
        ConcatWindows([ForesightWindows(facts.root, config(cache)), ForesightWindows(other.root, settings)])


def robot(name: str, scale, mean=0.0, fps: float = 20, stride: int = 1, actions: int = 3):
    """A dataset of a mixture: actions of three entries, of which the last one is binary."""
    std = np.array([0.3, 0.2, 0.5]) * scale
    mean = mean + 0 * std
    stats = {"mean": mean, "std": std, "min": mean - 2 * std, "max": mean + 2 * std}
    settings = WindowConfig(binary_action_indices=[2, 6], frame_stride=stride)
    return SimpleNamespace(
        rows=SimpleNamespace(name=name, fps=fps),
        config=settings,
        statistics={"action": stats},
        action_dim=actions,
    )


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (
            robot("a", 1),
            robot("b", [1, 1e-3, 1]),
            "a and b .*origin of 'action' .entry 1: 0 ± 0.2 and",
        ),
        (robot("a", 1), robot("b", 57.3), "entry 0.*entry 1"),  # radians and degrees
        (robot("a", 1), robot("b", 1, mean=[0, 50, 0]), "entry 1: 0 ± 0.2 and 50 ± 0.2"),
        (robot("a", 1, fps=30), robot("b", 1, fps=10, actions=0), "per second: a 30, b 10.*frame_stride"),
        (robot("a", 1, fps=30, stride=3), robot("b", 1, fps=10), None),
        (robot("a", 1, fps=30), robot("b", 1, fps=29.97), None),
        (robot("a", 1), robot("b", [4, 0.2, 1], mean=0.3), None),
        (robot("a", 1), robot("b", [1, 0, 1]), None),  # an entry that never moves
        (robot("a", 1), robot("b", [1, 1, 255]), None),  # binary entries are not normalized
    ],
)
def test_datasets_of_a_mixture_that_differ_in_units_or_rates_are_named(first, second, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_differences([first, second])
    assert len(caught) == (told is not None)
    if told:
        assert re.search(told, str(caught[0].message))


def test_actions_of_different_rates_are_refused_with_strides_that_agree():
    with pytest.raises(ValueError, match="a 30, b 20.*all have 10 with frame_stride a 3, b 2"):
        warn_of_differences([robot("a", 1, fps=30), robot("b", 1)])


def test_split_is_by_episode_and_seeded():
    train, val = split_episodes(50, 0.1, seed=3)
    assert len(val) == 5 and sorted(train + val) == list(range(50))
    assert split_episodes(50, 0.1, seed=3) == (train, val) != split_episodes(50, 0.1, seed=4)
    assert split_episodes(2, 0.01, seed=0)[1] != [] and split_episodes(4, 0.0)[1] == []
    with pytest.raises(ValueError, match="val_fraction"):
        split_episodes(1, 0.5)


# -------------------------------------------------------------------- bad input


def test_history_longer_than_every_episode_names_the_longest(facts, cache):
    with pytest.raises(ValueError, match="history_length=14 .*longest of .* episodes has 14 .*smaller"):
        ForesightWindows(facts.root, config(cache, history_length=14))


def test_short_episodes_are_skipped_with_one_warning(facts, cache):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        windows = ForesightWindows(facts.root, config(cache, history_length=10))
    assert windows.episodes.tolist() == [0, 2]
    assert sum("shorter than 11 frames" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("action", np.nan), ("observation.state", np.inf), ("action", 1e39)]
)
def test_nan_in_actions_or_state_is_found_when_opened(facts, cache, tmp_path, key, value):
    root = copy_of(facts, tmp_path)
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    values = np.stack(table.column(key).to_numpy()).astype(np.float64)
    values[LENGTHS[0] + 5, 1] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    position = table.column_names.index(key)
    pq.write_table(table.set_column(position, key, column), path)
    with pytest.raises(ValueError, match=f"'{key}' is not finite in episode 1, frame 5"):
        ForesightWindows(root, config(cache))
    ForesightWindows(root, config(cache, episodes=[0, 2]))  # the remedy works
    unread = ForesightWindows(root, config(cache), with_statistics=False)
    unread.read(0, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"'{key}' is not finite in episode 1, frame 5"):
        unread.read(1, LENGTHS[0] + 3, np.random.default_rng(0))


def test_unknown_camera_lists_the_cameras(facts, cache):
    with pytest.raises(ValueError, match="no camera 'front'.*main, wrist"):
        ForesightWindows(facts.root, config(cache, cameras={"main": "front"}))


def test_missing_depth_tracks_and_actions_name_column_and_command(facts, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"observation\.depth\.wrist.*simulate\.py"):
        ForesightWindows(pictures.root, config("off"))
    with pytest.raises(ValueError, match=r"observation\.points\.main.*simulate\.py"):
        ForesightWindows(pictures.root, config("off", objectives=["flow"]))
    with pytest.raises(ValueError, match="no column 'actions'.*action_key"):
        ForesightWindows(facts.root, config("off", action_key="actions"))


def test_millimeters_stored_as_meters_are_refused(tmp_path):
    common = {"episodes": 1, "frames": 6, "cameras": ("main",), "tracks": False, "depth_factor": 1000.0}
    settings = config("off", views=["main"], objectives=["depth"])
    for use_videos in (True, False):
        made = make_dataset(tmp_path / f"videos-{use_videos}", use_videos=use_videos, **common)
        with pytest.raises(ValueError, match=r"observation\.depth\.main.*millimeters"):
            ForesightWindows(made.root, settings)


def test_truncated_parquet_and_video_are_named(facts, tmp_path):
    root = copy_of(facts, tmp_path)
    parquet = next((root / "data").rglob("*.parquet"))
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{parquet}.*truncated.*again"):
        ForesightWindows(root, config("off"))
    parquet.write_bytes(whole[:2000] + bytes(4000) + whole[6000:])  # the footer is whole, the pages are not
    with pytest.raises(ValueError, match=f"{parquet.name}.*damaged"):
        ForesightWindows(root, config("off"))
    parquet.write_bytes(whole)
    for kind in ("images", "depth"):
        video = next((root / "videos" / f"observation.{kind}.wrist").rglob("*.mp4"))
        content = video.read_bytes()
        video.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{video}.*damaged or truncated"):
            ForesightWindows(root, config(str(tmp_path / "cache")))
        assert not list((tmp_path / "cache").rglob(f"observation.{kind}.wrist*.npy"))
        with pytest.raises(ValueError, match=f"{video}.*damaged or truncated"):
            ForesightWindows(root, config("off"))
        video.write_bytes(content)
    video.unlink()
    with pytest.raises(ValueError, match=f"{video} is missing"):
        ForesightWindows(root, config("off"))


def test_dataset_with_fewer_rows_than_promised_is_refused(facts, tmp_path):
    root = copy_of(facts, tmp_path)
    path = next((root / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, 30), path)
    with pytest.raises(ValueError, match="30 frames but meta/episodes lists 35"):
        ForesightWindows(root, config("off"))


def test_no_dataset_there(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        ForesightWindows(tmp_path / "nothing" / "here", config("off"))
    with pytest.raises(ValueError, match="info.json is missing"):
        ForesightWindows(tmp_path, config("off"))


def test_lost_moving_flags_are_warned_about(facts, cache, tmp_path):
    root = copy_of(facts, tmp_path)
    (root / "meta" / "foresight.json").unlink()  # as LeRobot's split and merge tools do
    with pytest.warns(UserWarning, match="no moving flags"):
        windows = ForesightWindows(root, config(cache))
    assert not windows[0]["track_moving"].any()


def test_impossible_settings_are_explained():
    for changes, message in [
        ({"history_length": 0}, "history_length"),
        ({"views": ["main", "main"]}, "views"),
        ({"objectives": ["action", "sound"]}, "sound"),
        ({"cameras": {"top": "main"}}, "top"),
        ({"random_shift": 0.7}, "random_shift"),
        ({"action_codec": "delta"}, "recorded, local_delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**changes)
    settings = config()
    assert dataclasses.replace(settings, episodes=[1]).flow_grid == GRID
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["history_length"] == T
