"""LIBERO's files become a dataset: upright images, gripper and state as documented, bad files."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.conversion import job as job_file
from datasets_scripts.conversion.job import convert
from datasets_scripts.conversion.libero import LiberoArchive
from datasets_scripts.convert_libero import main
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import read_provenance

h5py = pytest.importorskip("h5py")
Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

SIDE = 48
LENGTHS = {"put_the_bowl_on_the_plate_demo.hdf5": (5, 4, 6), "open_the_drawer_demo.hdf5": (4,)}
WORDS = {name: name.removesuffix("_demo.hdf5").replace("_", " ") for name in LENGTHS}
NAMES = sorted(LENGTHS)  # files in the order of their episodes


def upright(demo: int, t: int, wrist: bool) -> np.ndarray:
    """Upright picture: bright at the top, a block in the upper left that moves right; no symmetry."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = np.linspace(200, 40, SIDE).astype(np.uint8)[:, None, None]
    image[6:14, 4 + 3 * t : 12 + 3 * t] = (20, 20 * (demo + 1), 220 if wrist else 90)
    return image


def rotation_vectors(n_frames: int) -> np.ndarray:
    """Near half a turn about x, as a gripper that points down has."""
    t = np.arange(n_frames)[:, None]
    return np.concatenate([3.1 + 0.02 * np.sin(t), 0.1 * t, -0.05 * t], axis=1)


def demonstration(demo: int, n_frames: int) -> dict[str, np.ndarray]:
    t = np.arange(n_frames)
    command = np.where(t < n_frames // 2, -1.0, 1.0)
    opening = np.where(t < n_frames // 2, 0.039, 0.012)
    position = np.stack([0.1 * demo + 0.01 * t, -0.02 * t, 0.9 + 0 * t], axis=1)
    return {
        "obs/agentview_rgb": np.stack([upright(demo, i, False)[::-1] for i in t]),
        "obs/eye_in_hand_rgb": np.stack([upright(demo, i, True)[::-1] for i in t]),
        "obs/ee_states": np.concatenate([position, rotation_vectors(n_frames)], axis=1),
        "obs/gripper_states": np.stack([opening, -opening], axis=1),
        "obs/joint_states": np.zeros((n_frames, 7)),
        "actions": np.concatenate([np.sin(demo + t)[:, None] * np.full(6, 0.3), command[:, None]], axis=1),
        "states": np.zeros((n_frames, 5)),
    }


def write_file(path, lengths, words, **attributes):
    """A file in LIBERO's layout. demo_10 stands for the order that names alone would get wrong."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": words})
        data.attrs["macros_image_convention"] = "opengl"
        for name, value in attributes.items():
            data.attrs[name] = value
        for number, n_frames in zip((0, 2, 10), lengths, strict=False):
            for key, values in demonstration(number, n_frames).items():
                data.create_dataset(f"demo_{number}/{key}", data=values)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libero") / "libero_goal"
    folder.mkdir()
    for name, lengths in LENGTHS.items():
        write_file(folder / name, lengths, WORDS[name])
    return folder


@pytest.fixture(scope="module")
def dataset(suite, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "libero_goal"
    assert main(command(suite, output)) == 0
    return output


def command(source, output, *more: str) -> list[str]:
    return [f"--source={source}", f"--output={output}", "--workers=1", *more]


def test_images_are_upright_and_states_and_commands_as_documented(dataset):
    stored = LeRobotDataset("local/libero", root=dataset)
    assert stored.fps == 20
    episodes = [(name, demo) for name in NAMES for demo, _ in zip((0, 2, 10), LENGTHS[name], strict=False)]
    lengths = [n for name in NAMES for n in LENGTHS[name]]
    assert [row["length"] for row in stored.meta.episodes] == lengths
    row = 0
    for (name, demo), n_frames in zip(episodes, lengths, strict=True):
        truth = demonstration(demo, n_frames)
        for t in range(n_frames):
            item = stored[row + t]
            assert item["task"] == WORDS[name]
            for camera, wrist in (("main", False), ("wrist", True)):
                image = item[f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
                assert np.abs(image - upright(demo, t, wrist)).mean() < 4
            action, state = item["action"].numpy(), item["observation.state"].numpy()
            assert np.allclose(action[:6], truth["actions"][t, :6])
            is_open = t < n_frames // 2
            assert action[6] == is_open and state[6] == is_open
            assert np.allclose(state[:3], truth["obs/ee_states"][t, :3])
            roll, pitch, yaw = state[3:6]
            turned = [
                Rotation.from_euler(axis, angle)
                for axis, angle in zip("zyx", (yaw, pitch, roll), strict=True)
            ]
            expected = Rotation.from_rotvec(truth["obs/ee_states"][t, 3:])
            assert ((turned[0] * turned[1] * turned[2]).inv() * expected).magnitude() < 1e-5
        row += n_frames
    assert row == len(stored)
    facts = read_provenance(dataset)
    assert facts["episodes"]["3"] == {"file": NAMES[1], "demo": "demo_10"}
    assert "the simulator takes 1 - 2 g" in facts["conversion"]["conventions"]["action"]


def test_next_action_pairs_a_frame_with_the_command_that_follows_it(suite, dataset, tmp_path, capsys):
    assert main(command(suite, tmp_path / "out", "--next-action")) == 0
    plain, shifted = DatasetRows(dataset), DatasetRows(tmp_path / "out")
    assert (shifted.episode_stops - shifted.episode_starts).tolist() == [3, 4, 3, 5]
    first = shifted.rows_of(1)
    old = plain.rows_of(1)
    actions, states = (shifted.column(key).read(first) for key in ("action", "observation.state"))
    assert (actions == plain.column("action").read(old)[1:]).all()
    assert (states == plain.column("observation.state").read(old)[:-1]).all()
    assert main(command(suite, tmp_path / "out")) == 1
    assert "other parameters (next_action" in capsys.readouterr().err


def test_images_that_the_file_calls_upright_are_not_flipped(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    write_file(path, (3,), "go", macros_image_convention="opencv")
    flipped = LiberoArchive(path).read(0).videos["observation.images.main"]
    assert (flipped[1] == upright(0, 1, False)[::-1]).all()


@pytest.mark.parametrize("words", ['"close it"', list("close it"), ["close it"]])
def test_an_instruction_in_quotes_or_in_letters_is_read(words, tmp_path):
    write_file(tmp_path / "a_demo.hdf5", (3,), words)
    assert LiberoArchive(tmp_path).read(0).instruction == "close it"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pick_up_the_milk_demo", "pick up the milk"),
        ("KITCHEN_SCENE3_turn_on_the_stove_demo", "turn on the stove"),
        ("pick_up_the_milk", "pick the milk"),
        ("my_demo", "pick the milk"),
    ],
)
def test_instructions_are_worded_as_in_evaluations_if_the_name_of_the_file_tells(name, words, tmp_path):
    write_file(tmp_path / f"{name}.hdf5", (3,), "pick the milk")
    assert LiberoArchive(tmp_path).read(0).instruction == words


def test_an_interrupted_run_continues_to_the_same_dataset(suite, dataset, tmp_path, monkeypatch):
    output, work, done = tmp_path / "libero_goal", job_file._convert_one, []

    def dies_after_two(*job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return work(*job)

    with monkeypatch.context() as patch:
        patch.setattr(job_file, "_convert_one", dies_after_two)
        assert main(command(suite, output)) == 130 and not output.exists()
    archive = pickle.loads(pickle.dumps(LiberoArchive(suite)))  # as workers get it
    convert(archive, output)
    assert list(stats := json.loads((dataset / "meta" / "stats.json").read_text())) == sorted(stats)
    for path in dataset.rglob("*"):
        name = path.relative_to(dataset)
        if path.suffix in (".json", ".parquet") and path.name != "foresight.json":
            assert path.read_bytes() == (output / name).read_bytes(), name


def without(key):
    def change(file):
        del file[key]

    return change


def replaced(key, values):
    def change(file):
        del file[key]
        file[key] = values

    return change


def stored_elsewhere(file):
    """Bytes of any file as numbers of a demonstration."""
    del file["data/demo_0/actions"]
    options = {"shape": (4, 7), "dtype": "u1", "external": [(__file__, 0, 28)]}
    file["data/demo_0"].create_dataset("actions", **options)


def linked_elsewhere(file):
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = h5py.ExternalLink("a_demo.hdf5", "data/demo_0/actions")


def attribute(name, value):
    return lambda file: file["data"].attrs.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("data"), "is not a demonstration file of LIBERO"),
        (without("data/demo_0/obs/ee_states"), "demo_0 lacks obs/ee_states"),
        (
            replaced("data/demo_0/actions", np.zeros((4, 6))),
            r"actions of demo_0 is \(4, 6\), expected \(4, 7\)",
        ),
        (replaced("data/demo_0/actions", np.zeros((3, 7))), r"actions of demo_0 is \(3, 7\)"),
        (replaced("data/demo_0/actions", np.zeros((4, 7))), "gripper command of demo_0 is not -1"),
        (replaced("data/demo_0/actions", np.full((4, 7), np.nan)), "actions of demo_0 holds .* not finite"),
        (
            replaced("data/demo_0/obs/agentview_rgb", np.zeros((4, 64, 64, 3), np.uint8)),
            r"agentview_rgb of demo_0 is \(64, 64\) px",
        ),
        (
            replaced("data/demo_0/obs/agentview_rgb", np.zeros((4, SIDE, SIDE, 3))),
            "agentview_rgb of demo_0 is float64, expected uint8",
        ),
        (stored_elsewhere, "actions of demo_0 lies in another file"),
        (linked_elsewhere, "actions of demo_0 lies in another file"),
        (attribute("problem_info", "{}"), "has no language"),
        (attribute("problem_info", json.dumps({"language_instruction": ' "" '})), "has no language"),
    ],
)
def test_a_bad_file_is_named(change, message, tmp_path, capsys):
    write_file(tmp_path / "a_demo.hdf5", (4,), "go")
    write_file(tmp_path / "b_demo.hdf5", (4,), "go")
    with h5py.File(tmp_path / "b_demo.hdf5", "r+") as file:
        change(file)
    assert main(command(tmp_path, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "b_demo.hdf5" in error and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_from_libero_is_refused(suite, tmp_path, capsys):
    def refused(source, *more):
        assert main(command(source, tmp_path / "out", *more)) == 1
        assert not (tmp_path / "out.partial").exists()
        return capsys.readouterr().err

    assert "holds no demonstration files of LIBERO" in refused(tmp_path)
    assert "holds no demonstration files of LIBERO" in refused(tmp_path / "nothing")
    assert "--limit is 0" in refused(suite, "--limit=0")
    copy = shutil.copytree(suite, tmp_path / "libero_goal")
    path = copy / NAMES[0]
    whole = path.read_bytes()
    for damaged in (whole[:3000], bytes(4).join(whole.rsplit(b"SNOD", 1)), b"<html>not found</html>"):
        path.write_bytes(damaged)
        assert f"{NAMES[0]} is not an HDF5 file, or it is damaged" in refused(copy)
