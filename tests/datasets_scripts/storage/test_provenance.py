"""What is known of labels is written and read."""

import json
import pickle

import numpy as np
import pytest

from datasets_scripts.storage import provenance

POINTS = 9


def test_provenance_round_trip_and_moving_flags(tmp_path):
    moving = np.arange(POINTS) % 4 == 1
    facts = {"n_points": POINTS, "n_moving": 2, "moving": provenance.encode_flags(moving)}
    provenance.write_provenance(tmp_path, {"episodes": {"3": {"main": facts, "task": "x"}}})
    read = provenance.read_provenance(tmp_path)
    assert read["version"] == provenance.PROVENANCE_VERSION
    assert (provenance.moving_flags(read, 3, "main", POINTS) == moving).all()
    assert not provenance.moving_flags(read, 0, "main", POINTS).any()
    assert provenance.moving_flags(read, 3, "main", POINTS + 5).sum() == moving.sum()
    assert provenance.read_provenance(tmp_path / "elsewhere") == {}


def test_facts_of_an_episode_are_read_when_they_are_asked_for(tmp_path):
    facts = {str(e): {"task": f"task {e}", "main": {"flags": []}} for e in (10, 2, 0)}
    provenance.write_provenance(tmp_path, {"cameras": {}, "episodes": facts})
    known = pickle.loads(pickle.dumps(provenance.read_provenance(tmp_path)["episodes"]))
    assert known == facts and len(known) == 3 and "7" not in known and known.get("1", {}) == {}
    assert list(known) == ["0", "2", "10"] and known["2"]["task"] == "task 2"
    provenance.write_provenance(tmp_path, {"cameras": {}, "episodes": {"2": {"task": "another"}}})
    assert known == facts  # whoever reads the file that was replaced
    provenance.write_provenance(tmp_path, {"cameras": {}, "episodes": known})
    path = tmp_path / provenance.EPISODE_FACTS_PATH
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"episode": 2, "task": ', lines[2]]))
    damaged = provenance.read_provenance(tmp_path)["episodes"]
    assert damaged["0"] == facts["0"]
    with pytest.raises(ValueError, match=r"foresight_episodes\.jsonl is damaged in line 2"):
        damaged["2"]
    path.write_text(lines[0])
    with pytest.raises(ValueError, match=r"promises facts of 3 episodes, .*jsonl has 1: copy both files"):
        provenance.read_provenance(tmp_path)


def test_the_first_version_kept_everything_in_one_file_and_is_still_read(tmp_path):
    path = tmp_path / provenance.PROVENANCE_PATH
    path.parent.mkdir()
    path.write_text(
        json.dumps({"version": 1, "episodes": {"0": {"task": "x", "flags": ["main/few-tracks"]}}})
    )
    old = provenance.read_provenance(tmp_path)
    assert provenance.flagged_episodes(old) == {0: ["main/few-tracks"]}
    provenance.write_provenance(tmp_path, old)
    new = provenance.read_provenance(tmp_path)
    assert new["version"] == provenance.PROVENANCE_VERSION and new["episodes"] == old["episodes"]


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ('{"version": 99}', "version 99")])
def test_unreadable_provenance_is_refused(tmp_path, text, message):
    path = tmp_path / provenance.PROVENANCE_PATH
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        provenance.read_provenance(tmp_path)


LENS = {"fx": 610.0, "fy": 611.0, "cx": 320.0, "cy": 240.5, "height": 480, "width": 640}


MATRIX = [[610.0, 0, 319.5], [0, 611.0, 240.0], [0, 0, 1]]


@pytest.mark.parametrize(
    "stated",
    [
        {"fx": 610.0, "fy": 611.0, "ppx": 319.5, "ppy": 240.0, "coeffs": [0.0] * 5},
        {"fx": 610.0, "fy": 611.0, "cx": 319.5, "cy": 240.0, "height": 480, "width": 640},
        MATRIX,
        {"K": MATRIX, "distortion": [0.0] * 5},
        {"camera_matrix": sum(MATRIX, []), "height": 480, "width": 640},
    ],
)
def test_the_lens_is_that_of_lerobots_feature_unless_ours_is_known(stated):
    image, info = {"dtype": "video", "shape": (480, 640, 3)}, {"intrinsics": stated}
    features = {"observation.images.front": image | {"info": info}, "observation.images.side": image}
    assert provenance.find_intrinsics({}, features, "front") == LENS
    assert provenance.find_intrinsics({}, features, "side") is None
    ours = LENS | {"fx": 1.0}
    assert provenance.find_intrinsics({"cameras": {"front": {"intrinsics": ours}}}, features, "front") == ours
    depth = image | {"shape": (480, 640, 1), "info": info | {"is_depth_map": True}}
    assert provenance.find_intrinsics({}, features | {"observation.depth.side": depth}, "side") == LENS


def test_a_matrix_of_pictures_of_another_size_keeps_that_size():
    stated = {"K": MATRIX, "height": 720, "width": 1280}
    feature = {"dtype": "video", "shape": (480, 640, 3), "info": {"intrinsics": stated}}
    lens = provenance.find_intrinsics({}, {"observation.images.a": feature}, "a")
    assert lens == LENS | {"height": 720, "width": 1280}


@pytest.mark.parametrize(
    "stated",
    [
        {"fx": 1.0},
        [1, 2],
        "lens.json",
        {"fx": 1, "fy": 1, "cx": None, "cy": 1},
        {"fx": 0, "fy": 1, "cx": 1, "cy": 1},
        {"fx": 1, "fy": float("nan"), "cx": 1, "cy": 1},
        {"fx": 1, "fy": 1, "cx": float("inf"), "cy": 1},
        {"K": MATRIX, "height": 0, "width": 640},
        {"K": [[1, 0, 0], [0, 1, 0], [1, 1, 1]]},  # transposed
        {"K": {"rows": 3}},
        {"matrix": MATRIX},
    ],
)
def test_a_lens_in_another_form_is_left_out_and_its_feature_and_the_known_forms_are_named(stated):
    feature = {"dtype": "video", "shape": (480, 640, 3), "info": {"intrinsics": stated}}
    with pytest.warns(
        UserWarning, match=r"in the info of observation\.images\.a are not used.*fx, fy.*\(3, 3\)"
    ):
        assert provenance.find_intrinsics({}, {"observation.images.a": feature}, "a") is None
