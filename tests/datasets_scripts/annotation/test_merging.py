"""Estimated depth becomes columns that LeRobot reads; parts of a dataset; datasets that are partly broken."""

import errno
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets, split_dataset
from lerobot.datasets.io_utils import load_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.annotate import main
from datasets_scripts.annotation import dry_run, settings
from datasets_scripts.annotation import episode as annotate_episode
from datasets_scripts.annotation import merging as annotated_dataset
from datasets_scripts.columns import clean_depth, unpack_points
from datasets_scripts.depth.source import DepthClip
from datasets_scripts.inspect_dataset import main as inspect
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import read_provenance
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from tests.synthetic import make_dataset
from training.windows import ForesightWindows, WindowConfig

DEPTH_MAX_M, LENGTHS = 4.0, [7, 6, 4, 5]


class DepthOfRed:
    """A source of known truth: meters grow with red, the left border and what is far have none."""

    def describe(self):
        return {"models": [{"model": "red", "license": "apache-2.0"}]}

    def estimate(self, frames, fps):
        facts = {}

        def runs():
            for start in range(0, len(frames), 5):
                images = np.stack([frames[t] for t in range(start, min(start + 5, len(frames)))])
                yield depth_of(images), np.broadcast_to(np.arange(images.shape[2]) > 1, images.shape[:3])
            facts.update(error=0.1, fallback=len(frames) == LENGTHS[1])

        return DepthClip(runs(), facts)


def depth_of(images: np.ndarray) -> np.ndarray:
    return 0.5 + images[..., 0].astype(np.float32) / 60  # 0.5 to 4.75 m


@pytest.fixture(scope="module", autouse=True)
def red_depth():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotate_episode, "open_depth", lambda *_: DepthOfRed())
        patch.setattr(settings, "choose_depth_models", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded") / "data"
    options = {"depth": False, "tracks": False, "file_per_episode": True}
    return make_dataset(root, frames=LENGTHS, size=(48, 64), **options)


@pytest.fixture(scope="module")
def annotated(recorded, tmp_path_factory):
    output = tmp_path_factory.mktemp("annotated") / "data"
    assert main(command_line(recorded.root, output)) == 0
    return output


@pytest.fixture(scope="module")
def part(recorded, tmp_path_factory):
    output = tmp_path_factory.mktemp("part") / "data"
    assert main(command_line(recorded.root, output, "--episodes=0,2:", "--limit=2")) == 0
    return output


def command_line(dataset, output, *more: str) -> list[str]:
    options = {"n-points": 60, "workers": 1, "depth": "red", "depth-max": DEPTH_MAX_M}
    options |= {"dataset": dataset, "output": output}
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def expected_depth(rows: DatasetRows, camera: str, span: range) -> np.ndarray:
    """`(F, H, W)` meters, 0 where invalid."""
    images = FrameDecoder(rows, f"observation.images.{camera}").decode(span)
    depth = depth_of(images.transpose(0, 2, 3, 1))
    depth[..., :2] = 0
    return np.where(depth < DEPTH_MAX_M - 0.01, depth, 0)


@pytest.mark.parametrize("camera", ["main", "wrist"])
def test_depth_of_every_camera_is_what_the_source_gave(annotated, camera):
    rows = DatasetRows(annotated)
    decoder = FrameDecoder(rows, f"observation.depth.{camera}")
    stock = LeRobotDataset("local/x", root=annotated, depth_output_unit="m")
    for start, stop in zip(rows.episode_starts, rows.episode_stops, strict=True):
        span = range(int(start), int(stop))
        expected = expected_depth(rows, camera, span)
        found = decoder.meters(decoder.decode(span))
        assert np.abs(found - expected).max() < 2e-3
        assert (expected > 0).any() and (expected == 0).any()
        last = stock[int(stop) - 1][f"observation.depth.{camera}"].numpy()[0]
        assert np.abs(clean_depth(last, DEPTH_MAX_M) - expected[-1]).max() < 2e-3


def test_tracks_of_the_first_camera_lie_on_that_depth(annotated):
    rows = DatasetRows(annotated)
    assert "observation.points.wrist" not in rows.features
    decoder = FrameDecoder(rows, "observation.depth.main")
    depth = decoder.meters(decoder.decode(range(LENGTHS[0])))
    points = unpack_points(rows.column("observation.points.main").read(range(LENGTHS[0]))) * [64, 48, 1]
    visible = rows.column("observation.points_visible.main").read(range(LENGTHS[0]))
    for frame, place, seen in zip(depth, points, visible, strict=True):
        x, y, z = place[seen].T
        offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        near = [frame[(y + i).astype(int).clip(0, 47), (x + j).astype(int).clip(0, 63)] for i, j in offsets]
        assert len(z) and np.abs(np.stack(near) - z).min(0).max() < 5e-3


def test_statistics_are_in_lerobots_places(annotated):
    rows = DatasetRows(annotated)
    by_episode = []
    for path in sorted(annotated.glob("meta/episodes/*/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            stats = {name: np.array(row[f"stats/observation.depth.main/{name}"]) for name in ("mean", "max")}
            first = int(row["dataset_from_index"])
            truth = expected_depth(rows, "main", range(first, first + row["length"]))
            assert stats["mean"].shape == (1, 1, 1)
            assert abs(stats["max"].item() - DEPTH_MAX_M) < 0.02 or truth.max() < stats["max"].item() + 0.02
            by_episode.append(row)
    assert [row["length"] for row in by_episode] == LENGTHS
    assert list(stats := load_stats(annotated)) == sorted(stats)  # the same in every process
    whole = stats["observation.depth.main"]
    assert whole["count"] == sum(LENGTHS)
    weighted = [row["stats/observation.depth.main/mean"][0][0][0] * row["length"] for row in by_episode]
    assert np.isclose(whole["mean"].item(), sum(weighted) / sum(LENGTHS))


def test_the_provenance_says_how_each_episode_went(annotated):
    provenance = read_provenance(annotated)
    assert provenance["cameras"]["wrist"]["depth"] == {
        "source": "red",
        "depth_max_m": DEPTH_MAX_M,
        "models": [{"model": "red", "license": "apache-2.0"}],
    }
    assert provenance["episodes"]["1"]["wrist"]["depth"]["error"] == 0.1
    assert {"main/depth-fallback", "wrist/depth-fallback"} <= set(provenance["episodes"]["1"]["flags"])
    assert "main/depth-fallback" not in provenance["episodes"]["0"]["flags"]
    assert "red" in (annotated / "README.md").read_text()


def test_a_part_holds_its_episodes_with_all_labels_renumbered(annotated, part):
    old, new = (LeRobotDataset("local/x", root=root, depth_output_unit="m") for root in (annotated, part))
    assert read_provenance(part)["annotation"]["source_episode"] == [0, 2]
    assert (new.num_episodes, len(new)) == (2, LENGTHS[0] + LENGTHS[2])
    first_of_2 = sum(LENGTHS[:2])
    for ours, theirs in ((0, 0), (LENGTHS[0] - 1, LENGTHS[0] - 1), (LENGTHS[0] + 3, first_of_2 + 3)):
        found, wanted = new[ours], old[theirs]
        assert found["index"] == ours and found["episode_index"] == int(ours >= LENGTHS[0])
        assert found["task"] == wanted["task"]
        same = [key for key in wanted if key not in ("index", "episode_index", "task", "task_index")]
        assert all((found[key] == wanted[key]).all() for key in same)


def test_statistics_of_a_part_are_those_of_its_episodes(recorded, part):
    found = load_stats(part)
    assert list(found) == sorted(found)  # the same in every process
    assert found["index"]["max"] == LENGTHS[0] + LENGTHS[2] - 1 and found["episode_index"]["max"] == 1
    states = [[recorded.state(e, t) for t in range(LENGTHS[e])] for e in (0, 2)]
    assert np.allclose(found["observation.state"]["mean"], np.concatenate(states).mean(0), atol=1e-5)


def test_a_part_shares_only_the_videos_it_needs(recorded, part):
    ours = {path.relative_to(part) for path in part.glob("videos/observation.images*/*/*.mp4")}
    assert len(ours) == 4  # two cameras, two episodes
    assert all((part / place).samefile(recorded.root / place) for place in ours)


def test_stock_tools_split_delete_and_merge_a_part(part, tmp_path):
    dataset = LeRobotDataset("local/part", root=part, depth_output_unit="m")
    last = dataset[len(dataset) - 1]
    split = split_dataset(dataset, {"a": [0], "b": [1]}, output_dir=tmp_path / "split")
    merged = merge_datasets(list(split.values()), output_repo_id="local/m", output_dir=tmp_path / "merged")
    shorter = delete_episodes(dataset, [0], output_dir=tmp_path / "deleted", repo_id="local/d")
    for made, n_frames in ((merged, len(dataset)), (shorter, LENGTHS[2])):
        made = LeRobotDataset(made.repo_id, root=made.root, depth_output_unit="m")
        assert len(made) == n_frames
        for key in ("observation.points.main", "observation.depth.wrist", "observation.state"):
            assert (made[n_frames - 1][key] == last[key]).all()


def test_pictures_instead_of_videos_get_depth_videos(tmp_path):
    options = {"depth": False, "tracks": False, "use_videos": False, "cameras": ("main",)}
    facts = make_dataset(tmp_path / "data", frames=[5, 4], **options)
    assert main(command_line(facts.root, tmp_path / "output", "--episodes=1")) == 0
    stock = LeRobotDataset("local/x", root=tmp_path / "output", depth_output_unit="m")
    depth, image = stock[3]["observation.depth.main"][0].numpy(), facts.image(1, 3, "main")
    assert np.abs(depth - depth_of(image))[:, 2:][depth_of(image)[:, 2:] < DEPTH_MAX_M].max() < 2e-3


def test_a_camera_is_found_by_the_name_of_its_column_too(tmp_path):
    options = {"depth": False, "tracks": False, "image_prefix": "", "cameras": ("image",)}
    facts = make_dataset(tmp_path / "data", frames=[5], size=(48, 64), **options)
    assert main(command_line(facts.root, tmp_path / "output")) == 0
    item = LeRobotDataset("local/x", root=tmp_path / "output", depth_output_unit="m")[4]
    assert {"image", "observation.depth.image", "observation.points.image"} <= set(item)


def test_a_picture_that_cannot_be_decoded_is_left_out_like_a_video(tmp_path, capsys):
    options = {"depth": False, "tracks": False, "use_videos": False, "cameras": ("main",), "size": (48, 64)}
    facts = make_dataset(tmp_path / "data", frames=[3, 4], **options)
    (path,) = facts.root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    found = table.to_pylist()
    found[1]["observation.images.main"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(found, schema=table.schema), path)
    arguments = command_line(facts.root, tmp_path / "output")
    assert main(arguments) == 1
    assert re.search(r"a picture of 'observation.images.main' .*--skip-broken", capsys.readouterr().err)
    assert main([*arguments, "--skip-broken"]) == 0
    assert [known["episode"] for known in read_provenance(tmp_path / "output")["annotation"]["skipped"]] == [
        0
    ]


def truncate_video(root, camera: str, number: int):
    path = sorted(root.glob(f"videos/observation.images.{camera}/*/*.mp4"))[number]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_broken_episodes_stop_the_run_or_are_left_out_and_recorded(recorded, annotated, tmp_path, capsys):
    shutil.copytree(recorded.root, tmp_path / "data")
    truncated = truncate_video(tmp_path / "data", "main", 1)
    missing = sorted((tmp_path / "data").glob("videos/observation.images.wrist/*/*.mp4"))[3]
    missing.unlink()
    arguments = command_line(tmp_path / "data", tmp_path / "output")
    assert main(arguments) == 1
    assert re.search(rf"video file {truncated} .* --skip-broken", capsys.readouterr().err)
    assert main([*arguments, "--skip-broken"]) == 0
    assert "left out because they cannot be read: 2 episodes (1, 3)" in capsys.readouterr().out
    skipped = read_provenance(tmp_path / "output")["annotation"]["skipped"]
    assert [known["episode"] for known in skipped] == [1, 3]
    assert skipped[1]["file"] == missing.relative_to(tmp_path / "data").as_posix()
    assert str(tmp_path) not in json.dumps(skipped)
    stock = LeRobotDataset("local/x", root=tmp_path / "output", depth_output_unit="m")
    whole = LeRobotDataset("local/x", root=annotated, depth_output_unit="m")
    assert len(stock) == LENGTHS[0] + LENGTHS[2]
    ours, theirs = stock[len(stock) - 1], whole[sum(LENGTHS[:3]) - 1]
    assert (ours["observation.depth.main"] == theirs["observation.depth.main"]).all()


def test_a_video_that_is_repaired_undoes_nothing_else(recorded, tmp_path, monkeypatch, capsys):
    """Frames that cannot be decoded are found at work only; finished episodes are kept then."""
    shutil.copytree(recorded.root, tmp_path / "data")
    path = sorted((tmp_path / "data").glob("videos/observation.images.main/*/*.mp4"))[2]
    good = path.read_bytes()
    spoiled = bytearray(good)
    media = good.index(b"mdat")
    spoiled[media + 4 : media + 4000] = bytes(3996)
    path.write_bytes(bytes(spoiled[:-40]) if b"moov" in good[:media] else bytes(spoiled))
    arguments = command_line(tmp_path / "data", tmp_path / "output")
    assert main(arguments) == 1
    assert str(path) in capsys.readouterr().err
    path.write_bytes(good)
    made, work = [], annotate_episode.LabelMaker.label
    monkeypatch.setattr(
        annotate_episode.LabelMaker,
        "label",
        lambda self, span, episode, folder: made.append(episode) or work(self, span, episode, folder),
    )
    assert main(arguments) == 0
    assert made == [2, 3]


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(recorded, tmp_path, capsys):
    assert main(command_line(recorded.root, tmp_path / "output", "--dry-run", "--episodes=:3")) == 0
    said = capsys.readouterr().out
    assert f"3 of 4 episodes, {sum(LENGTHS[:3])} frames" in said
    assert "observation.depth.wrist" in said
    assert re.search(r"time: about \d+ s with 1 workers .*disk: about", said, re.DOTALL)
    assert not list(tmp_path.iterdir())
    times = [dry_run._format_time(seconds) for seconds in (5, 720, 11160)]
    assert times == ["5 s", "12 min", "3.1 h"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes=4"], "names none of the episodes 0 to 3"),
        (["--limit=0"], "--limit is 0"),
        (["--workers=-1"], "--workers is -1"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--depth-max=0"], "--depth-max is 0 m"),
        (["--output={data}/videos/x"], "lies inside the dataset"),
        (["--output={data}"], "lies inside the dataset|not made by this script"),
    ],
)
def test_options_that_make_no_sense_are_refused(recorded, tmp_path, capsys, options, message):
    options = [option.format(data=recorded.root) for option in options]
    assert main([*command_line(recorded.root, tmp_path / "output"), *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_older_format_is_named_with_the_command_that_converts_it(recorded, tmp_path, capsys):
    shutil.copytree(recorded.root, tmp_path / "data")
    edit_info(tmp_path / "data", codebase_version="v2.1")
    assert main(command_line(tmp_path / "data", tmp_path / "output")) == 1
    assert "lerobot.scripts.convert_dataset_v21_to_v30 --repo-id" in capsys.readouterr().err


def test_estimated_depth_does_not_replace_a_column(annotated, tmp_path, capsys):
    assert main(command_line(annotated, tmp_path / "output")) == 1
    assert "has the column 'observation.depth.main' already" in capsys.readouterr().err


def test_an_episode_without_frames_is_named_or_left_out(recorded, tmp_path, capsys):
    shutil.copytree(recorded.root, tmp_path / "data")
    path = sorted(tmp_path.glob("data/meta/episodes/*/*.parquet"))[-1]
    table = pq.read_table(path)
    empty = table.slice(table.num_rows - 1).to_pylist()[0]
    empty |= {"episode_index": 4, "length": 0, "dataset_from_index": sum(LENGTHS)}
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([empty], schema=table.schema)]), path)
    edit_info(tmp_path / "data", total_episodes=5)
    arguments = command_line(tmp_path / "data", tmp_path / "output", "--episodes=3:")
    assert main(arguments) == 1
    assert "episode 4 of dataset" in (error := capsys.readouterr().err) and "has no frames" in error
    assert main([*arguments, "--skip-broken"]) == 0
    assert read_provenance(tmp_path / "output")["annotation"]["skipped"][0]["episode"] == 4
    assert len(LeRobotDataset("local/x", root=tmp_path / "output")) == LENGTHS[3]


class FullDisk:
    """A file on a disk without room."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("where", ["depth", "data"])
def test_a_full_disk_keeps_what_is_finished(where, recorded, annotated, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = command_line(recorded.root, tmp_path / "data")
    with monkeypatch.context() as patch:
        if where == "depth":
            video = annotate_episode.DepthVideo
            patch.setattr(annotate_episode, "DepthVideo", lambda file, *rest: video(FullDisk(file), *rest))
        else:
            patch.setattr(annotated_dataset, "append_tracks", full)
        assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message and "run the same command again" in message
    assert not (tmp_path / "data").exists()
    if where == "data":
        assert len(list(tmp_path.glob("data.partial/episodes/0*"))) == len(LENGTHS)
        monkeypatch.setattr(annotate_episode.LabelMaker, "label", full)  # nothing is made twice
    assert main(arguments) == 0
    found, wanted = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "data", annotated)
    )
    assert found == wanted


@pytest.mark.parametrize("more", [["--dry-run"], [], ["--skip-broken"]])
def test_depth_in_millimeters_is_refused_at_the_first_episode(recorded, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(f"{__name__}.depth_of", lambda images: 1000 * (0.5 + images[..., 0] / 255))
    assert main(command_line(recorded.root, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"--depth red gives depth of camera 'main' in episode 0 .* looks like millimeters", error
    )
    assert not (tmp_path / "out").exists()


def test_an_episode_without_any_depth_is_named_and_can_be_left_out(recorded, tmp_path, monkeypatch, capsys):
    def far_from_the_second_episode_on(self, frames, fps):
        depth_m = 2.0 if len(frames) == LENGTHS[0] else 50.0
        shape = (len(frames), *frames[0].shape[:2])
        return DepthClip([(np.full(shape, depth_m, np.float32), np.ones(shape, bool))])

    monkeypatch.setattr(DepthOfRed, "estimate", far_from_the_second_episode_on)
    arguments = command_line(recorded.root, tmp_path / "out", "--limit=2")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"no depth of camera 'main' in episode 1 between 0.011 and 4 m \(its values are 50 to 50\)", error
    )
    assert "raise --depth-max" in error and "--skip-broken" in error
    assert main([*arguments, "--skip-broken"]) == 0
    (skipped,) = read_provenance(tmp_path / "out")["annotation"]["skipped"]
    assert skipped["episode"] == 1 and "no depth of camera 'main'" in skipped["reason"]


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda times: times + 1 / 10, 0),  # begins later
        (lambda times: np.where(np.arange(len(times)) > 1, times + 1 / 10, times), 2),  # a row was left out
    ],
)
def test_depth_is_not_stored_at_other_times_than_the_rows_have(recorded, tmp_path, capsys, change, row):
    root = tmp_path / "other"
    shutil.copytree(recorded.root, root)
    path = sorted(root.glob("data/*/*.parquet"))[1]
    table = pq.read_table(path)
    place = table.schema.get_field_index("timestamp")
    times = change(table.column(place).to_numpy()).astype(np.float32)
    pq.write_table(table.set_column(place, "timestamp", pa.array(times)), path)
    assert main(command_line(root, tmp_path / "out")) == 1
    told = f"row {row} of episode 1 of dataset .* and not frame_index / fps = .* would be shifted"
    assert re.search(told, capsys.readouterr().err)
    assert main(command_line(root, tmp_path / "out", "--skip-broken")) == 0
    assert read_provenance(tmp_path / "out")["annotation"]["skipped"][0]["episode"] == 1


def test_labels_are_made_again_for_a_dataset_whose_metadata_were_corrected(recorded, tmp_path, capsys):
    root = tmp_path / "other"
    shutil.copytree(recorded.root, root)
    assert main(command_line(root, tmp_path / "out", "--limit=1")) == 0
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.main"]["info"]["note"] = "corrected"
    (root / "meta/info.json").write_text(json.dumps(info))
    assert main(command_line(root, tmp_path / "out", "--limit=1")) == 1
    assert "with other parameters (source_sha256: " in capsys.readouterr().err


def test_a_second_annotation_keeps_what_the_first_one_was(part, recorded, tmp_path):
    options = ["--output", str(tmp_path / "more"), "--cameras=wrist", "--n-points=60"]
    assert main(["--dataset", str(part), *options]) == 0
    first, second = (read_provenance(root)["annotation"] for root in (part, tmp_path / "more"))
    assert second["earlier"][0]["source_episode"] == first["source_episode"] == [0, 2]
    assert second["earlier"][0]["parameters"] == first["parameters"] and "earlier" not in first


def test_depth_that_is_mostly_farther_than_kept_is_inspected_and_trained_on(
    recorded, tmp_path, monkeypatch, capsys
):
    """Its far limit is ours; only where the source is unknown does it look like millimeters."""

    def far(self, frames, fps):
        depth_m = np.full((len(frames), *frames[0].shape[:2]), 50, np.float32)
        depth_m[-1, 20:30, 20:30] = 1
        return DepthClip([(depth_m, np.ones_like(depth_m, bool))])

    monkeypatch.setattr(DepthOfRed, "estimate", far)
    output = tmp_path / "out"
    assert main(command_line(recorded.root, output)) == 0
    assert inspect([str(output), "--report", str(tmp_path / "report.html")]) == 0
    window = WindowConfig(views=("main",), objectives=("depth",), history_length=2)
    assert len(ForesightWindows(output, window)) > 0
    (output / "meta/foresight.json").unlink()
    with pytest.raises(ValueError, match="this looks like millimeters"):
        ForesightWindows(output, window)
