"""Simulated datasets: exactness after storage, stock tools, resuming, refusals."""

import errno
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets, split_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.columns import clean_depth, unpack_points, validate_columns
from datasets_scripts.simulate import main
from datasets_scripts.simulation import job as job_file
from datasets_scripts.simulation import recording as recording_file
from datasets_scripts.simulation.exact_tracks import RigidClip, follow_pixels
from datasets_scripts.simulation.job import Rollout, record_rollouts, simulate
from datasets_scripts.simulation.metaworld import MetaWorldSim
from datasets_scripts.simulation.recording import FRAMES_AFTER_SUCCESS, plan_episode
from datasets_scripts.simulation.simulators import MetaWorldRecording
from datasets_scripts.storage import episode_job
from datasets_scripts.storage.dataset_folder import load_features
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import moving_flags, read_provenance, scripted_in
from datasets_scripts.storage.shards import read_shard_summary

pytestmark = pytest.mark.sim

# As small as it gets: for everything but exactness.
TINY = {"image_size": 32, "n_points": 20, "stride": 8, "quality": "fast"}
DEPTH_MAX = 4.0


@pytest.fixture(scope="module")
def stored(simulated_dataset):
    """What the stock reader gives for the session's dataset, as arrays per episode."""
    dataset = LeRobotDataset("local/simulated", root=simulated_dataset.root, depth_output_unit="m")
    episodes = []
    for row in dataset.meta.episodes:
        items = [dataset[i] for i in range(row["dataset_from_index"], row["dataset_to_index"])]
        episodes.append(
            {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0] if key != "task"}
            | {"task": items[0]["task"]}
        )
    return dataset, episodes


@pytest.fixture(scope="module")
def tiny_recording():
    return MetaWorldRecording(("drawer-open-v3",), episodes=2, **TINY)


@pytest.fixture(scope="module")
def tiny_dataset(simulator, tiny_recording, tmp_path_factory):
    """Two tiny episodes made in one go, to compare others with."""
    root = tmp_path_factory.mktemp("tiny") / "dataset"
    summary = simulate(tiny_recording, root)
    assert summary["episodes"] == 2
    return root


@pytest.fixture(scope="module")
def sim(simulator, simulated_dataset):
    """One simulator for the tests that compare with the session's dataset."""
    with MetaWorldSim("drawer-open-v3", image_size=simulated_dataset.recording.image_size) as opened:
        yield opened


def decode_rgb(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def assert_same_dataset(root: Path, other: Path) -> None:
    """All files are equal, RGB videos and their sizes up to the noise of their lossy encoder.

    x264 does not always give the same bytes for the same frames, even in one process with one thread.
    """
    names = [{path.relative_to(folder) for path in folder.rglob("*.*")} for folder in (root, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if str(name).startswith("videos/observation.images.") and name.suffix == ".mp4":
            frames, others = decode_rgb(root / name), decode_rgb(other / name)
            assert frames.shape == others.shape
            assert np.abs(frames - others).mean() < 1.0
        elif name.name == "foresight.json":
            facts, others = (read_provenance(folder) for folder in (root, other))
            del facts["simulation"]["video_bytes"], others["simulation"]["video_bytes"]
            assert facts == others
        elif (root / name).is_file():
            assert (root / name).read_bytes() == (other / name).read_bytes(), name


def depth_of(episode: dict, camera: str) -> np.ndarray:
    return clean_depth(episode[f"observation.depth.{camera}"][:, 0], DEPTH_MAX)


def test_stock_reader_finds_every_column(stored, simulated_dataset):
    dataset, episodes = stored
    size, n_points = simulated_dataset.recording.image_size, simulated_dataset.recording.n_points
    assert dataset.fps == 20
    assert len(episodes) == 2
    for episode in episodes:
        assert episode["task"] == "Open a drawer"
        assert episode["observation.images.main"].shape[1:] == (3, size, size)
        assert episode["observation.images.wrist"].shape[1:] == (3, size, size)
        assert episode["observation.state"].shape[1:] == (4,)
        assert episode["action"].dtype == np.float32
        assert np.abs(episode["action"]).max() <= 1.0
        assert episode["observation.points.main"].shape[1:] == (3 * n_points,)
        assert episode["observation.points_visible.main"].shape[1:] == (n_points,)
    validate_columns(
        load_features(simulated_dataset.root), ["main", "wrist"], need_depth=True, need_tracks=True
    )


def test_statistics_cover_inputs_but_not_points(stored):
    dataset, episodes = stored
    stats = dataset.meta.stats
    actions = np.concatenate([episode["action"] for episode in episodes])
    states = np.concatenate([episode["observation.state"] for episode in episodes])
    assert np.allclose(stats["action"]["mean"], actions.mean(axis=0), atol=1e-5)
    assert np.allclose(stats["action"]["std"], actions.std(axis=0), atol=1e-3)
    assert np.allclose(stats["observation.state"]["max"], states.max(axis=0))
    assert np.shape(stats["observation.images.main"]["mean"]) == (3, 1, 1)
    assert 0.1 < np.min(stats["observation.images.main"]["mean"]) < 0.9
    assert not [key for key in stats if "points" in key]


def test_stored_frames_and_state_are_what_the_simulator_shows(stored, simulated_dataset, sim):
    _, episodes = stored
    sim.reset(read_provenance(simulated_dataset.root)["episodes"]["1"]["seed"])
    view = sim.observe()
    depth = {camera: sim.render_depth(camera) for camera in ("main", "wrist")}
    expert = sim.expert_action()
    first = {key: value[0] for key, value in episodes[1].items() if key != "task"}
    assert (first["observation.state"] == view["state"]).all()
    assert (first["action"] == expert).all()
    for camera in ("main", "wrist"):
        shown = view["images"][camera].transpose(2, 0, 1) / 255
        assert np.abs(first[f"observation.images.{camera}"] - shown).mean() < 0.03
        near = depth[camera] < DEPTH_MAX - 0.01
        stored_depth = clean_depth(first[f"observation.depth.{camera}"][0], DEPTH_MAX)
        assert np.abs(stored_depth - depth[camera])[near].max() < 1e-3
        assert (stored_depth[depth[camera] > DEPTH_MAX] == 0).all()


def test_points_reproject_to_their_pixel_after_storage(stored, simulated_dataset, sim):
    """Frame 0: within 0.5 px of a pixel center, and within 2 mm of the depth rendered there."""
    _, episodes = stored
    provenance = read_provenance(simulated_dataset.root)
    size = simulated_dataset.recording.image_size
    for index, episode in enumerate(episodes):
        facts = provenance["episodes"][str(index)]
        points = unpack_points(episode["observation.points.main"])[0]
        sim.reset(facts["seed"])
        clip = RigidClip(
            np.where(sim.render_depth("main") < DEPTH_MAX, sim.render_depth("main"), 0)[None],
            sim.render_geometry("main")[1][None],
            *(pose[None] for pose in (*sim.body_poses(), *sim.camera_pose("main"))),
            intrinsics=sim.intrinsics("main"),
        )
        pixels = (points[:, :2] * size).astype(int).clip(0, size - 1)
        exact, _ = follow_pixels(clip, np.stack([0 * pixels[:, 0], pixels[:, 1], pixels[:, 0]], axis=-1))
        # Points seeded in frame 0 sit on pixel centers; those seeded later may lie anywhere.
        off_centre_px = np.abs(points[:, :2] * size - pixels - 0.5).max(axis=-1)
        seeded_here = episode["observation.points_visible.main"][0] & (off_centre_px < 0.05)
        assert seeded_here.mean() > 0.5
        nearest = np.linalg.norm(
            (points[seeded_here, None, :2] - exact[0, None, :, :2]) * size, axis=-1
        ).argmin(axis=1)
        match = exact[0, nearest]
        assert np.abs((points[seeded_here, :2] - match[:, :2]) * size).max() < 0.5
        depth_error = np.abs(points[seeded_here, 2] - match[:, 2])
        assert np.quantile(depth_error, 0.99) < 2e-3


def test_visible_points_agree_with_the_stored_depth(stored):
    """Within 1 cm of the stored depth at 99 %, looking at the pixel and its neighbors as the depth test
    does."""
    errors, at_pixel = [], []
    for episode in stored[1]:
        depth = depth_of(episode, "main")
        n_frames, size, _ = depth.shape
        points = unpack_points(episode["observation.points.main"])
        visible = episode["observation.points_visible.main"]
        x, y = ((points[..., axis] * size).astype(int).clip(0, size - 1) for axis in (0, 1))
        padded = np.pad(depth, ((0, 0), (1, 1), (1, 1)))
        t = np.arange(n_frames)[:, None]
        around = [padded[t, y + down, x + right] for down in range(3) for right in range(3)]
        difference = np.abs(np.stack(around) - points[..., 2])
        errors.append(difference.min(axis=0)[visible])
        at_pixel.append(difference[4][visible])
    assert np.mean(np.concatenate(errors) < 0.01) > 0.99
    assert np.mean(np.concatenate(at_pixel) < 0.01) > 0.9  # edges and slanted surfaces make up the rest


def test_a_quarter_of_the_points_moves_and_the_others_stand_still(stored, simulated_dataset):
    provenance = read_provenance(simulated_dataset.root)
    n = simulated_dataset.recording.n_points
    for index, episode in enumerate(stored[1]):
        points = unpack_points(episode["observation.points.main"])
        facts = provenance["episodes"][str(index)]["main"]
        moving = moving_flags(provenance, index, "main", n)
        assert facts["n_points"] == n
        assert moving.sum() == facts["n_moving"] == round(n / 4)
        # What counts is where a point is seen: one that the arm pushed while hidden behind it is not moving.
        seen = np.where(episode["observation.points_visible.main"][..., None], points, np.nan)
        extent_px = 224 * np.hypot(*(np.nanmax(seen, axis=0) - np.nanmin(seen, axis=0)).T[:2])
        assert extent_px[~moving].max() < 2 * 1.5 * 2**0.5 + 0.2  # 1.5 px to every side of the median
        assert np.median(extent_px[moving]) > 10
        stands_still = np.ptp(points, axis=0).max(axis=-1) == 0
        assert stands_still.sum() > n / 2


def test_tracks_of_a_still_scene_do_not_move(simulator):
    recording = MetaWorldRecording(("drawer-open-v3",), episodes=1, image_size=32, n_points=300)
    with MetaWorldSim("drawer-open-v3", image_size=32) as sim:
        sim.step = lambda *_: False  # nobody acts
        _, arrays, facts = recording_file.render_episode(
            sim, recording, 3, np.zeros((6, 4), np.float32), np.random.default_rng(0)
        )
    points = unpack_points(arrays["points"])
    assert not facts["has_motion"]
    assert facts["n_moving"] == 0
    assert facts["n_points"] >= 200
    assert np.ptp(points, axis=0).max() == 0


def test_episodes_continue_for_a_few_frames_after_success(stored, simulated_dataset):
    for index, episode in enumerate(stored[1]):
        facts = read_provenance(simulated_dataset.root)["episodes"][str(index)]
        assert facts["attempts"] >= 1
        assert len(episode["action"]) > FRAMES_AFTER_SUCCESS + 5
        assert (np.abs(np.diff(episode["observation.state"][-FRAMES_AFTER_SUCCESS:], axis=0)) > 0).any()


def test_simulated_dataset_passes_stock_split_delete_and_merge(stored, tmp_path):
    dataset, episodes = stored
    split = split_dataset(dataset, {"a": [0], "b": [1]}, output_dir=tmp_path / "split")
    merged = merge_datasets(list(split.values()), output_repo_id="local/m", output_dir=tmp_path / "merged")
    shorter = delete_episodes(dataset, [0], output_dir=tmp_path / "deleted", repo_id="local/d")
    for made, kept in ((merged, episodes), (shorter, episodes[1:])):
        made = LeRobotDataset(made.repo_id, root=made.root, depth_output_unit="m")
        assert len(made) == sum(len(episode["action"]) for episode in kept)
        last, expected = made[len(made) - 1], kept[-1]
        for key in ("observation.points.main", "observation.points_visible.main", "observation.state"):
            assert (last[key].numpy() == expected[key][-1]).all()
        depth = clean_depth(last["observation.depth.main"][0].numpy(), DEPTH_MAX)
        assert np.abs(depth - depth_of(expected, "main")[-1]).max() < 1e-3


def test_interrupted_run_continues_to_the_same_dataset(tiny_dataset, tiny_recording, tmp_path, monkeypatch):
    output = tmp_path / "dataset"
    tries, started = [], []
    render, work_on_all = recording_file.render_episode, episode_job.work_on_all

    def interrupted(*args):
        tries.append(args)
        if len(tries) == 2:
            raise KeyboardInterrupt
        return render(*args)

    def noted(make, jobs, *options):
        started.append([episode for episode, _ in jobs])
        return work_on_all(make, jobs, *options)

    monkeypatch.setattr(episode_job, "work_on_all", noted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recording_file, "render_episode", interrupted)
        simulate(tiny_recording, output)
    assert not output.exists()
    simulate(tiny_recording, output)
    assert started == [[0, 1], [1]]  # the first episode was kept
    assert_same_dataset(output, tiny_dataset)
    assert not output.with_name("dataset.partial").exists()


@pytest.mark.slow  # starts two processes that import the simulator; quicker with the converters' episodes
def test_workers_do_not_change_the_result(tiny_dataset, tiny_recording, tmp_path):
    simulate(tiny_recording, tmp_path / "dataset", workers=2)
    assert_same_dataset(tmp_path / "dataset", tiny_dataset)


@pytest.mark.slow  # simulates twice
def test_truncated_shard_is_recorded_again(tiny_dataset, tiny_recording, tmp_path):
    partial = tmp_path / "dataset.partial"
    shard = partial / "episodes" / "000001"
    with MetaWorldSim("drawer-open-v3", image_size=32) as sim:
        recording_file.record_shard(sim, tiny_recording, 1, shard)
    (partial / "parameters.json").write_text(json.dumps(tiny_recording.to_dict()))
    video = shard / "observation.images.main.mp4"
    video.write_bytes(video.read_bytes()[:-7])
    assert read_shard_summary(shard) is None
    simulate(tiny_recording, tmp_path / "dataset")
    assert_same_dataset(tmp_path / "dataset", tiny_dataset)


@pytest.mark.slow  # simulates twice
def test_full_disk_leaves_no_incomplete_dataset(tiny_dataset, tmp_path, monkeypatch, capsys):
    output = tmp_path / "dataset"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    steps = [(np, "savez_compressed"), (job_file, "append_tracks"), (job_file, "write_provenance")]
    for place, name in steps:  # recording, assembly, the last step of all
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            assert main(command(output)) == 1
        message = capsys.readouterr().err
        assert "No space left on device" in message
        assert "free some space and run the same command again" in message
        assert "Traceback" not in message
        assert not output.exists()
    assert main(command(output)) == 0
    assert_same_dataset(output, tiny_dataset)


def command(output: Path, **changes) -> list[str]:
    options = {"tasks": "drawer-open-v3", "episodes": 2, "image-size": 32, "n-points": 20, "stride": 8}
    options |= {"workers": 1, "output": output}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_finished_dataset_stays_unchanged(tiny_dataset, tmp_path, capsys):
    output = shutil.copytree(tiny_dataset, tmp_path / "dataset")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(command(output)) == 0
    assert "2 episodes" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_finished_dataset_of_other_parameters_is_refused(tiny_dataset, capsys):
    assert main(command(tiny_dataset, seed=5)) == 1
    assert "other parameters (seed: 0 there, 5 here); choose another --output" in capsys.readouterr().err


def test_unfinished_run_of_other_parameters_is_refused(tmp_path, capsys):
    partial = tmp_path / "dataset.partial"
    partial.mkdir()
    other = MetaWorldRecording(("drawer-open-v3",), episodes=4, **TINY)
    (partial / "parameters.json").write_text(json.dumps(other.to_dict()))
    assert main(command(tmp_path / "dataset")) == 1
    assert "unfinished run" in (message := capsys.readouterr().err)
    assert "episodes: 4 there, 2 here" in message


@pytest.mark.parametrize("victim", ["videos", "data"])
def test_damaged_finished_dataset_is_named(tiny_dataset, tmp_path, capsys, victim):
    output = shutil.copytree(tiny_dataset, tmp_path / "dataset")
    path = next((output / victim).rglob("file-*"))
    path.write_bytes(path.read_bytes()[:-50])
    assert main(command(output)) == 1
    message = capsys.readouterr().err
    assert path.name in message
    assert f"delete {output}" in message


def test_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(command(tmp_path)) == 1
    assert "was not made by this script" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "drawer-opened-v3"}, "unknown MetaWorld task 'drawer-opened-v3'"),
        ({"tasks": ""}, "no task given"),
        ({"episodes": 0}, "at least one episode"),
        ({"cameras": "main,front"}, "unknown camera 'front'"),
        ({"stride": 3}, "80/3 frames per second"),
        ({"n_points": 1}, "at least 2 points"),
        ({"image_size": 33}, "even size"),
        ({"noise": -1}, "--noise is -1"),
        ({"detour": -1}, "--detour is -1"),
        ({"detour": 125}, "--detour is 125 frames"),
        ({"depth_max": 0}, "--depth-max is 0"),
        ({"max_steps": 501}, "--max-steps is 501"),
    ],
)
def test_bad_options_give_one_message_and_exit_code_1(tmp_path, capsys, changes, message):
    assert main(command(tmp_path / "dataset", **changes)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_detour_moves_the_hand_at_the_start_and_labels_stay_the_experts(simulator):
    sim = MetaWorldSim("reach-v3", image_size=16)
    recording = MetaWorldRecording(("reach-v3",), noise=0.0, detour=6, **TINY)
    lengths = set()
    for seed in range(4):
        labels, executed = plan_episode(sim, recording, seed, np.random.default_rng(seed))
        away = np.flatnonzero((labels != executed).any(1))
        assert away.tolist() == list(range(len(away))), "only the start is disturbed"
        assert (executed[: len(away)] == executed[0]).all(), "by one motion"
        assert (labels[:, 3] == executed[:, 3]).all(), "the gripper is the expert's"
        lengths.add(len(away))
        sim.reset(seed)
        for label, action in zip(labels, executed, strict=True):
            np.testing.assert_array_equal(label, sim.expert_action())
            sim.step(action, recording.stride)
    sim.close()
    assert len(lengths) > 1 and max(lengths) <= 6


def test_expert_that_cannot_succeed_is_reported(simulator, tmp_path, capsys):
    assert main(command(tmp_path / "dataset", max_steps=8, retries=1)) == 1
    assert "the expert failed 2 times in a row on drawer-open-v3" in capsys.readouterr().err
    assert not (tmp_path / "dataset").exists()


@pytest.mark.slow
def test_the_episodes_of_a_policy_are_replayed_exactly_and_are_no_demonstrations(sim, tmp_path):
    recording = MetaWorldRecording(("drawer-open-v3",), episodes=1, noise=0.0, **TINY)
    actions = np.random.default_rng(0).uniform(-1, 1, size=(5, 4)).astype(np.float32)
    outcome = {"success": False, "failed_at": 3}
    for _ in range(2):  # a dataset that is there is replaced
        rollouts = [Rollout("drawer-open-v3", 7, actions, outcome)]
        record_rollouts(recording, rollouts, tmp_path / "own", {"path": "a/policy"})
    rows = DatasetRows(tmp_path / "own")
    sim.reset(7)
    states = []
    for action in actions:
        states.append(sim.state())
        sim.step(action, recording.stride)
    np.testing.assert_array_equal(rows.column("observation.state").read(range(5)), np.stack(states))
    np.testing.assert_array_equal(rows.column("action").read(range(5)), actions)
    provenance = read_provenance(tmp_path / "own")
    assert provenance["episodes"]["0"]["outcome"] == outcome
    assert scripted_in(provenance) is None and provenance["simulation"]["policy"] == {"path": "a/policy"}
