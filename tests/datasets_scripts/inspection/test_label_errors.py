"""Errors of labels against the truth: known errors give known figures."""

import json
import shutil

import numpy as np
import pytest

from datasets_scripts.depth.source import DepthClip
from datasets_scripts.inspection.label_errors import DepthErrors, TrackErrors
from datasets_scripts.inspection.source_errors import ExactEpisodes, measure_sources, split_windows
from datasets_scripts.measure_sources import main
from datasets_scripts.tracks import open_tracker

FRAMES, HEIGHT, WIDTH = 4, 6, 10
FOCAL = 20.0
INTRINSICS = {"fx": FOCAL, "fy": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2}


@pytest.fixture
def true_m():
    return np.random.default_rng(0).uniform(0.5, 3, (FRAMES, HEIGHT, WIDTH)).astype(np.float32)


def test_depth_that_is_right_has_no_error_and_a_hole_is_not_covered(true_m):
    errors = DepthErrors()
    holes = true_m.copy()
    holes[:, 0] = 0
    errors.add(holes, true_m)
    assert errors.report() == {
        "abs_rel": 0,
        "rmse_m": 0,
        "delta_125": 1,
        "covered": pytest.approx(5 / 6, 1e-3),
        "flicker": 0,
    }


def test_a_steady_scale_is_an_error_without_flicker(true_m):
    errors = DepthErrors()
    for frame in range(FRAMES):  # frame by frame as in one go
        errors.add(1.3 * true_m[frame : frame + 1], true_m[frame : frame + 1])
    report = errors.report()
    assert report["abs_rel"] == pytest.approx(0.3, 1e-3) and report["delta_125"] == 0
    assert report["rmse_m"] == pytest.approx(0.3 * np.sqrt((true_m.astype(float) ** 2).mean()), 1e-3)
    assert report["flicker"] == pytest.approx(0, abs=1e-6)


def test_a_scale_that_changes_from_frame_to_frame_is_flicker_but_not_across_clips(true_m):
    scale = np.array([1.0, 1.1, 1.0, 1.1])[:, None, None]
    errors = DepthErrors()
    errors.add(scale * true_m, true_m)
    assert errors.report()["flicker"] == pytest.approx(0.1, 1e-3)
    apart = DepthErrors()
    for frame in range(FRAMES):
        apart.start_clip()
        apart.add((scale * true_m)[frame : frame + 1], true_m[frame : frame + 1])
    assert apart.report()["flicker"] is None


def test_nothing_to_compare_gives_no_figures():
    assert set(DepthErrors().report().values()) == {None}
    report = TrackErrors(HEIGHT, WIDTH).report()["moving"]
    assert report.pop("positions") == 0 and set(report.values()) == {None}


def test_distances_are_in_px_at_224_and_in_space_moving_and_still_apart():
    true = np.zeros((FRAMES, 3, 3))
    true[..., :2], true[..., 2] = 0.5, 2.0
    found = true.copy()
    found[:, 0, 0] += 1 / WIDTH  # a pixel to the right: 224 / 6 px at 224 px, 2 m / 20 in space
    found[-1, 0, 0] += 1 / WIDTH
    found[:, 1, 2] += 0.03
    errors = TrackErrors(HEIGHT, WIDTH, INTRINSICS)
    visible = np.ones((FRAMES, 3), bool)
    errors.add(found, visible, true, visible, np.array([True, False, False]))
    report = errors.report()
    assert report["moving"]["epe_px"]["median"] == pytest.approx(224 / HEIGHT, 1e-3)
    assert report["moving"]["epe_px_last"]["median"] == pytest.approx(2 * 224 / HEIGHT, 1e-3)
    assert report["moving"]["epe_cm"]["median"] == pytest.approx(100 * 2.0 / FOCAL, 1e-3)
    assert report["still"]["epe_px"]["mean"] == 0
    assert report["still"]["epe_cm"]["mean"] == pytest.approx(3 / 2, 1e-3)
    assert report["still"]["positions"] == 2 * FRAMES


def test_visibility_is_counted_apart_from_distance():
    true = np.full((FRAMES, 2, 3), 0.5)
    found = true.copy()
    found[0] = 9.0  # lost there, so that where it is does not count
    seen, truly = np.ones((2, FRAMES, 2), bool)
    seen[0], truly[3] = False, False
    errors = TrackErrors(HEIGHT, WIDTH)
    errors.add(found, seen, true, truly, np.array([True, True]))
    report = errors.report()["moving"]
    assert report["visibility_accuracy"] == 0.5
    assert report["found"] == pytest.approx(2 / 3, 1e-3)
    assert report["epe_px"]["p90"] == 0 and report["epe_cm"] is None


def test_windows_lie_within_the_episode():
    assert list(split_windows(14, 6)) == [(0, 6), (3, 9), (6, 12)]
    assert list(split_windows(4, 6)) == [(0, 3)] and list(split_windows(9, 0)) == [(0, 8)]
    assert not list(split_windows(1, 6))


class TenPercentTooFar:
    """A source of depth with a known error."""

    def __init__(self, dataset: ExactEpisodes):
        self.clips = iter(dataset.read(episode)[1] for episode in range(dataset.rows.n_episodes))

    def estimate(self, frames, fps):
        true_m = next(self.clips)
        assert frames.shape == (*true_m.shape, 3) and fps == 20
        far = 1.1 * true_m
        return DepthClip([(far[:9], far[:9] > 0), (far[9:], far[9:] > 0)], {"too_far": 0.1})


@pytest.mark.sim
def test_sources_are_measured_on_exact_episodes(simulated_dataset, tmp_path, capsys):
    root, output = simulated_dataset.root, tmp_path / "errors.json"
    assert main(["--dataset", str(root), "--episodes", "0", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    moving, still = (report["tracks"]["errors"][kind] for kind in ("moving", "still"))
    assert report["camera"] == "main" and report["depth"]["errors"] is None
    assert still["epe_px"]["median"] < 0.5 < moving["epe_px"]["median"] < 10
    assert 0.5 < moving["found"] < 1 and still["found"] > 0.7 and moving["epe_cm"]["median"] < 5
    assert (tmp_path / "errors.md").read_text() == capsys.readouterr().out

    exact = ExactEpisodes(str(root))
    far = measure_sources(exact, [0, 1], TenPercentTooFar(exact), open_tracker("lucas-kanade"))
    assert far["depth"]["abs_rel"] == pytest.approx(0.1, 1e-3) and far["depth"]["covered"] == 1
    assert far["depth"]["flicker"] < 1e-6 and far["clips"]["1"] == {"too_far": 0.1}
    # Tracks lie on the depth that was estimated: right in the image, a tenth too far in space.
    assert far["tracks"]["still"]["epe_px"]["median"] < 0.5
    assert far["tracks"]["still"]["epe_cm"]["median"] > 5


@pytest.mark.sim
def test_a_camera_without_exact_tracks_is_refused(simulated_dataset, tmp_path, capsys):
    output = str(tmp_path / "errors.json")
    assert main(["--dataset", str(simulated_dataset.root), "--camera", "wrist", "--output", output]) == 1
    assert "tracks of main, not of 'wrist'" in capsys.readouterr().err
    assert not (tmp_path / "errors.json").exists()
    assert main(["--dataset", str(simulated_dataset.root), "--output", str(tmp_path / "errors.md")]) == 1
    assert "must be a JSON file" in capsys.readouterr().err


@pytest.mark.sim
def test_estimated_tracks_are_not_taken_for_the_truth(simulated_dataset, tmp_path):
    root = tmp_path / "dataset"
    shutil.copytree(simulated_dataset.root, root)
    facts = json.loads((root / "meta/foresight.json").read_text())
    facts["cameras"]["main"]["tracks"]["source"] = "lucas-kanade"
    (root / "meta/foresight.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="tracks of dataset .* are of lucas-kanade, which nothing can be"):
        ExactEpisodes(str(root))
    del facts["cameras"]  # as LeRobot's own tools leave it
    (root / "meta/foresight.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="depth of dataset .* is of an unknown source"):
        ExactEpisodes(str(root))
