"""Figures of labels, the flags they raise, and the card that shows them."""

import numpy as np
import pytest
from huggingface_hub import DatasetCard

from datasets_scripts.inspection.dataset_card import (
    _read_source_card,
    as_list,
    list_label_licenses,
    write_card,
)
from datasets_scripts.inspection.quality import (
    DepthMeter,
    TrackMeter,
    find_flags,
    merge_facts,
    summarize_figures,
)
from datasets_scripts.storage.provenance import flagged_episodes, read_provenance, write_provenance
from tests.synthetic import make_dataset

FRAMES, HEIGHT, WIDTH, POINTS = 9, 40, 56, 64
GOOD = {
    "n_points": 64,
    "n_moving": 16,
    "visible_share": 0.9,
    "off_depth_share": 0.0,
    "depth": {"valid_share": 0.9, "median_m": 0.8, "flicker": 0.001},
}


def scene(flicker: float = 0.0, rate: float = 0.0):
    """Depth of a tilted wall and pictures of it that do not change."""
    rng = np.random.default_rng(3)
    wall = np.linspace(0.5, 2.0, WIDTH) * np.ones((FRAMES, HEIGHT, 1))
    t = np.arange(FRAMES)[:, None, None]
    scale = 1 + flicker * (t % 2) + rate * t
    texture = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return (wall * scale).astype(np.float32), np.repeat(texture[None], FRAMES, 0)


def measure(depth, images=None, run=4) -> dict:
    meter = DepthMeter()
    for first in range(0, len(depth), run):
        here = slice(first, first + run)
        meter.add(depth[here], None if images is None else images[here])
    return meter.figures()


def test_percentiles_and_valid_pixels_are_those_of_the_depth():
    depth, images = scene()
    depth[:, :10] = 0
    facts = measure(depth, images)
    assert facts["valid_share"] == 0.75 and facts["flicker"] == 0
    expected = np.percentile(depth[depth > 0], [1, 50, 99])
    np.testing.assert_allclose([facts["near_m"], facts["median_m"], facts["far_m"]], expected, rtol=0.02)


def test_the_figures_do_not_depend_on_how_frames_come():
    depth, images = scene(flicker=0.03)
    assert measure(depth, images, run=1) == measure(depth, images, run=5) == measure(depth, images, run=99)


def test_flicker_is_noise_in_time_and_not_approach_or_motion():
    assert measure(*scene(flicker=0.03))["flicker"] == pytest.approx(0.03, rel=0.05)
    assert measure(*scene(rate=0.05))["flicker"] < 0.001  # as seen by a camera that drives at a wall
    depth, images = scene(flicker=0.03)
    moving = np.random.default_rng(0).integers(0, 255, images.shape, dtype=np.uint8)
    assert measure(depth, moving)["flicker"] is None  # nothing stays where it is
    assert measure(depth)["flicker"] is None


def test_an_episode_without_any_valid_depth_has_no_percentiles():
    facts = measure(np.zeros((FRAMES, HEIGHT, WIDTH), np.float32))
    assert facts == {"valid_share": 0, "near_m": None, "median_m": None, "far_m": None, "flicker": None}
    assert find_flags({"main": {"depth": facts}}) == ["main/depth-sparse"]


def test_images_and_depth_must_come_together():
    depth, images = scene()
    with pytest.raises(ValueError, match="9 depth maps came with 8 images"):
        DepthMeter().add(depth, images[:8])


def tracks():
    """Points on the wall: every fourth one moves 56 px to the right (at 224), one is padding."""
    points = np.empty((FRAMES, POINTS, 3), np.float32)
    points[..., :2] = np.random.default_rng(1).uniform(0.1, 0.7, (POINTS, 2))
    moving = np.arange(POINTS) % 4 == 0
    points[:, moving, 0] += np.linspace(0, 0.25, FRAMES)[:, None]
    points[..., 2] = np.interp(points[..., 0] * WIDTH, np.arange(WIDTH) + 0.5, np.linspace(0.5, 2, WIDTH))
    visible = np.ones((FRAMES, POINTS), bool)
    visible[:, -1] = False
    visible[2:5, 7] = False
    return points, visible, moving


def test_tracks_are_counted_without_their_padding():
    points, visible, moving = tracks()
    meter = TrackMeter(points, visible, moving)
    meter.add(0, scene()[0][:5])
    meter.add(5, scene()[0][5:])
    facts = meter.figures()
    assert facts["n_points"] == POINTS - 1 and facts["n_moving"] == moving.sum()
    assert facts["visible_share"] == pytest.approx(1 - 3 / FRAMES / (POINTS - 1), abs=1e-4)
    assert facts["motion_px"] == pytest.approx(56, abs=0.1)
    assert facts["off_depth_share"] == 0
    still = TrackMeter(points, visible, ~moving).figures()
    assert still["motion_px"] == 0 and still["off_depth_share"] is None


def test_points_off_the_depth_map_are_told():
    points, visible, moving = tracks()
    points[:, : POINTS // 2, 2] *= 1.2
    meter = TrackMeter(points, visible, moving)
    meter.add(0, scene()[0])
    assert meter.figures()["off_depth_share"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({}, None),
        ({"depth": {"valid_share": 0.1}}, "depth-sparse"),
        ({"depth": {"median_m": 30.0}}, "depth-implausible"),
        ({"depth": {"flicker": 0.2}}, "depth-flickers"),
        ({"depth": {"error": 0.4, "fallback": True}}, "depth-fallback"),
        ({"n_points": 8, "n_moving": 2}, "few-tracks"),
        ({"n_moving": 0}, "no-motion"),
        ({"n_points": 312, "n_moving": 300}, "all-moves"),
        ({"visible_share": 0.35}, "tracks-hidden"),
        ({"off_depth_share": 0.5}, "off-depth"),
    ],
)
def test_every_flag_is_raised_by_what_it_means(changed, flag):
    facts = {"main": GOOD | changed, "wrist": {"depth": GOOD["depth"]}, "task": "open", "attempts": 2}
    assert find_flags(facts) == ([f"main/{flag}"] if flag else [])


def test_the_summary_names_the_worst_episode():
    episodes = {str(e): {"main": GOOD | {"visible_share": share}} for e, share in enumerate([0.9, 0.5, 0.7])}
    rows = summarize_figures(episodes | {"3": {"task": "open"}})
    found = {row["measure"]: row for row in rows if row["camera"] == "main"}
    seen = found["frames in which a point is visible"]
    assert (seen["median"], seen["min"], seen["max"], seen["worst"]) == ("70.0%", "50.0%", "90.0%", 1)
    assert found["points that move"]["median"] == "25.0%" and found["median depth"]["worst"] is None


@pytest.fixture
def annotated(tmp_path):
    """A dataset with what `annotate.py` writes about its labels; two episodes have a flag."""
    facts = make_dataset(tmp_path / "drawer", episodes=3, frames=4, use_videos=False)
    models = {"models": [{"model": "owner/tracker", "license": "cc-by-nc-4.0"}, {"model": "owner/other"}]}
    cameras = {
        "main": {"depth": {"source": "sensor"}, "tracks": {"source": "some-tracker", "seed": 5} | models},
        "wrist": {"depth": {"source": "sensor"}},
    }
    episodes = {str(e): {"main": dict(GOOD), "flags": []} for e in range(3)}
    for episode in ("0", "2"):
        episodes[episode]["main"]["n_moving"] = 0
        episodes[episode]["flags"] = find_flags(episodes[episode])
    annotation = {"parameters": {"dataset": "someone/drawer", "depth": "sensor"}}
    write_provenance(facts.root, {"cameras": cameras, "episodes": episodes, "annotation": annotation})
    return facts.root


def test_flags_can_be_asked_for_by_camera(annotated):
    provenance = read_provenance(annotated)
    assert flagged_episodes(provenance) == {0: ["main/no-motion"], 2: ["main/no-motion"]}
    assert flagged_episodes(provenance, ["wrist"]) == {}
    assert flagged_episodes({}) == {}


def test_the_card_says_what_was_added_how_and_how_good(annotated):
    write_card(annotated)
    card = DatasetCard.load(annotated / "README.md")
    assert card.data.task_categories == ["robotics"] and "LeRobot" in card.data.tags
    assert card.data.size_categories == ["n<1K"] and card.data.source_datasets == ["someone/drawer"]
    text = card.text
    assert "`someone/drawer` with 3D point tracks added" in text and "# someone/drawer with depth" in text
    assert "| `observation.depth.main` | depth along the optical axis" in text
    assert "| `observation.points.main` | 60 points x (x, y, z in meters) | some-tracker |" in text
    assert "| tracks (main): seed | 5 |" in text and "| depth: source | sensor |" in text
    assert "- `owner/tracker`: cc-by-nc-4.0" in text
    assert "| tracks (main): models 2 model | owner/other |" in text
    assert "| main | tracked points | 64 | 64 | 64 |" in text
    assert "| `main/no-motion` | 0, 2 | no point moves |" in text and "2 of 3 episodes have a flag" in text
    assert str(annotated.parent) not in text


def test_the_card_of_the_source_stays_below_and_its_metadata_too(annotated):
    old = "---\nlicense: cc-by-4.0\ntags:\n- LeRobot\n- aloha\nmine: 7\n---\n\n# Drawer\n\nIn a kitchen.\n"
    (annotated / "README.md").write_text(old)
    write_card(annotated)
    once = (annotated / "README.md").read_text()
    write_card(annotated)
    assert (annotated / "README.md").read_text() == once
    card = DatasetCard(once)
    assert card.data.license == ["cc-by-4.0", "cc-by-nc-4.0"]  # the source's, and the tracker's
    assert card.data.to_dict()["mine"] == 7
    assert {"aloha", "depth"} <= set(card.data.tags)
    assert once.endswith("# Drawer\n\nIn a kitchen.\n") and once.count("# Drawer") == 1


@pytest.mark.parametrize(
    ("of_source", "of_labels", "license"),
    [
        ("MIT", "Apache-2.0", "mit"),
        ("mit", "bsd-2-clause", "mit"),
        ("mit", "cc-by-4.0", "mit"),
        ("mit", "CC-BY-NC-4.0", ["mit", "cc-by-nc-4.0"]),
        ("mit", "openrail", ["mit", "openrail"]),
        ("mit", ["mit", "CC-BY-NC-4.0"], ["mit", "cc-by-nc-4.0"]),
        ("mit", "Snap Inc., non-commercial research only", ["mit", "other"]),
        ("mit", "not stated", ["mit", "unknown"]),
        (None, "apache-2.0", None),
        (None, "CC-BY-NC-4.0", ["unknown", "cc-by-nc-4.0"]),
    ],
)
def test_the_licenses_of_source_and_labels_reach_the_metadata(annotated, of_source, of_labels, license):
    provenance = read_provenance(annotated)
    provenance["cameras"]["main"]["tracks"]["models"] = [{"model": "owner/tracker", "license": of_labels}]
    write_provenance(annotated, provenance)
    if of_source:
        (annotated / "README.md").write_text(f"---\nlicense: {of_source}\n---\n\n# Drawer\n")
    for _ in range(2):  # writing it again changes nothing
        write_card(annotated)
        assert DatasetCard.load(annotated / "README.md").data.license == license
    write_card(annotated, license="Apache-2.0")
    chosen = as_list(DatasetCard.load(annotated / "README.md").data.license)
    limits = as_list(license)[1:]
    assert chosen == ["apache-2.0", *limits]
    with pytest.raises(ValueError, match="--license free is not a name that the Hub knows"):
        write_card(annotated, license="free")


def test_labels_of_before_the_first_release_keep_their_license():
    labels = {"main": {"tracks": {"models": [{"model": "owner/tracker", "licence": "CC-BY-NC-4.0"}]}}}
    assert list_label_licenses(labels) == [("owner/tracker", "cc-by-nc-4.0")]


def test_a_card_without_proper_metadata_is_kept_as_text(annotated):
    (annotated / "README.md").write_text("---\ntags: [unclosed\n---\nMy notes\n")
    write_card(annotated)
    text = (annotated / "README.md").read_text()
    assert text.endswith("---\ntags: [unclosed\n---\nMy notes\n")


@pytest.mark.parametrize("metadata", ["a: " + "[" * 5000, "a: 0x" + "f" * 5000])
def test_metadata_that_cannot_be_read_or_written_is_kept_as_text(tmp_path, metadata):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{metadata}\n---\nMy notes\n")
    assert _read_source_card(card) == ({}, card.read_text())


def test_metadata_of_a_source_that_is_no_list_of_names_is_left_out(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: {a: b}\ntags: [{a: b}, aloha]\ntask_categories: &x [*x]\n---\nMy notes\n")
    data, text = _read_source_card(card)
    assert (data["license"], data["tags"], data["task_categories"], text) == (
        None,
        ["aloha"],
        None,
        "My notes\n",
    )


def test_a_published_card_loads_from_the_hub(annotated):
    write_card(annotated, repo_id="you/drawer-depth")
    text = (annotated / "README.md").read_text()
    assert 'LeRobotDataset("you/drawer-depth", depth_output_unit="m")' in text and "root=" not in text


def test_what_was_left_out_is_told(annotated):
    provenance = read_provenance(annotated)
    skipped = [{"episode": 4, "file": "videos/x.mp4", "reason": "videos/x.mp4 is truncated"}]
    provenance["annotation"] |= {"skipped": skipped, "source_episode": [0, 1, 3]}
    write_provenance(annotated, provenance)
    write_card(annotated)
    text = (annotated / "README.md").read_text()
    assert "it holds 3 of its episodes, with new numbers" in text
    assert "- episode 4: videos/x.mp4 is truncated" in text


def test_newer_figures_of_an_episode_keep_what_the_source_of_depth_said_and_drop_what_was_mended():
    earlier = {"wrist": {"problem": "truncated", "depth": {"fallback": True, "error": 0.4, "valid": 0.1}}}
    merged = merge_facts(earlier, {"wrist": {"depth": {"valid": 0.9}}})
    assert merged == {"wrist": {"depth": {"fallback": True, "error": 0.4, "valid": 0.9}}}
    assert "wrist/depth-fallback" in find_flags(merged) and "wrist/unreadable" in find_flags(earlier)
    assert "wrist/unreadable" not in find_flags(merged)
