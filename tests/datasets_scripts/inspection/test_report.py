"""The page about a dataset's labels, where it says to look first, and the flags it records."""

import re
import shutil

import numpy as np
import pytest

from datasets_scripts.inspect_dataset import main
from datasets_scripts.inspection import report as label_report
from datasets_scripts.inspection.report import rank_episodes
from datasets_scripts.storage.dataset_rows import parse_episodes
from datasets_scripts.storage.provenance import flagged_episodes, read_provenance, write_provenance
from tests.synthetic import make_dataset

EPISODES, FRAMES = 3, 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tracks that have nothing to do with the depth, and an instruction that looks like HTML."""
    root = tmp_path_factory.mktemp("report") / "drawer"
    tasks = ("open the <b>drawer</b>",)
    make_dataset(root, episodes=EPISODES, frames=FRAMES, size=(32, 40), tasks=tasks, use_videos=False)
    return root


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """One picture of an episode that stands out, none of others, two moments each."""
    for name, count in {"PICTURED_EPISODES": 1, "ORDINARY_EPISODES": 0, "MOMENTS": 2}.items():
        monkeypatch.setattr(label_report, name, count)


@pytest.fixture
def dataset(made, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(made, tmp_path / "drawer")


def facts(**changed) -> dict:
    depth = {"valid_share": 0.9, "median_m": 0.8, "flicker": 0.004}
    main = {"n_points": 600, "n_moving": 150, "visible_share": 0.9, "off_depth_share": 0.01, "depth": depth}
    return {"main": main | changed, "flags": [], "task": "open"}


def test_grave_flags_come_first_then_what_is_unlike_the_others():
    episodes = {str(e): facts(visible_share=0.9 + 0.001 * e) for e in range(8)}
    episodes["3"] = facts(visible_share=0.5)
    episodes["5"] = facts(depth={"valid_share": 0.9, "median_m": 5.0, "flicker": 0.004})  # far, not worse
    episodes["6"] = facts() | {"flags": ["main/no-motion"]}
    episodes["2"] = facts() | {"flags": ["main/depth-fallback"]}
    found = rank_episodes(episodes)
    assert [episode for episode, _ in found] == [2, 6, 3]
    assert found[0][1] == ["main/depth-fallback"]
    assert found[2][1] == ["main: frames in which a point is visible 50.0% (median 90.0%)"]


def test_the_page_shows_every_camera_and_the_worst_episodes_by_itself(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(label_report, "PICTURED_EPISODES", 2)
    page = tmp_path / "pages" / "labels.html"
    assert main([str(dataset), "--report", str(page)]) == 0
    text = page.read_text()
    assert "<h2>Camera main</h2>" in text and "<h2>Camera wrist</h2>" in text
    assert "3 episodes, 21 frames at 20 per second" in text and "3 of 3 episodes have one" in text
    assert "open the &lt;b&gt;drawer" in text and "<b>drawer" not in text
    pictures = len(re.findall('src="data:image/webp;base64,', text))
    assert pictures == 2 + 2 * 2  # distributions by camera; moments and paths by episode
    assert "http" not in re.sub('base64,[^"]+', "", text) and str(tmp_path) not in text
    assert "look at episode 0: main/off-depth" in capsys.readouterr().out
    assert "flags" not in read_provenance(dataset)["episodes"]["0"]  # only looked at


def test_flags_are_recorded_for_every_episode(dataset, capsys):
    before = read_provenance(dataset)
    assert main([str(dataset), "--write-flags"]) == 0
    assert "figures and flags of 3 episodes; 3 have a flag" in capsys.readouterr().out
    after = read_provenance(dataset)
    assert flagged_episodes(after) == {e: ["main/off-depth"] for e in range(EPISODES)}
    assert after["cameras"] == before["cameras"]
    for episode, known in before["episodes"].items():
        assert after["episodes"][episode]["main"]["moving"] == known["main"]["moving"]
    assert after["episodes"]["1"]["wrist"]["depth"]["median_m"] == pytest.approx(1.25, rel=0.05)


def test_interrupted_recording_goes_on_and_leaves_no_half_of_the_flags(dataset, monkeypatch, capsys):
    measured, genuine = [], label_report._measure_one

    def measure_two(number):
        measured.append(number)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return genuine(number)

    monkeypatch.setattr(label_report, "SAVE_EVERY", 1)
    monkeypatch.setattr(label_report, "_measure_one", measure_two)
    assert main([str(dataset), "--write-flags"]) == 130
    assert not any("flags" in known for known in read_provenance(dataset)["episodes"].values())
    assert main([str(dataset), "--write-flags"]) == 0
    assert measured == [0, 1, 2, 2]
    assert len(flagged_episodes(read_provenance(dataset))) == EPISODES
    assert main([str(dataset), "--write-flags"]) == 0 and len(measured) == 4  # all is known


def test_a_dataset_without_provenance_gets_flags_too(tmp_path):
    made = make_dataset(tmp_path / "plain", episodes=2, frames=4, tracks=False, use_videos=False)
    assert main([str(made.root), "--write-flags"]) == 0
    provenance = read_provenance(made.root)
    assert [provenance["episodes"][str(e)]["flags"] for e in range(2)] == [[], []]


def test_a_truncated_video_is_named_flagged_and_the_rest_is_shown(tmp_path, capsys):
    root = make_dataset(tmp_path / "cut", episodes=2, frames=5, cameras=("main",), tracks=False).root
    (video,) = root.glob("videos/observation.depth.main/*/*.mp4")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    page = tmp_path / "labels.html"
    assert main([str(root), "--report", str(page), "--write-flags"]) == 1
    assert "episode 1, camera main: video file videos/observation.depth.main" in capsys.readouterr().err
    assert flagged_episodes(read_provenance(root))[1] == ["main/unreadable"]
    text = page.read_text()
    assert (
        "It cannot be shown: video file videos/observation.depth.main" in text and str(tmp_path) not in text
    )


def test_a_missing_video_is_flagged_without_any_label_too(tmp_path, capsys):
    options = {"cameras": ("main",), "depth": False, "tracks": False}
    root = make_dataset(tmp_path / "plain", episodes=2, frames=3, **options).root
    for video in root.glob("videos/*/*/*.mp4"):
        video.unlink()
    assert main([str(root), "--write-flags"]) == 0
    assert "2 have a flag" in capsys.readouterr().out
    facts = read_provenance(root)["episodes"]["1"]
    assert facts["flags"] == ["main/unreadable"]
    assert facts["main"]["problem"].startswith("video file videos/observation.images.main")


def test_a_page_of_chosen_episodes_reads_those_alone(dataset, tmp_path, monkeypatch):
    read, genuine = [], label_report._measure_one
    monkeypatch.setattr(label_report, "_measure_one", lambda e: read.append(e) or genuine(e))
    monkeypatch.setattr(label_report, "write_report", lambda *_: None)
    assert main([str(dataset), "--report", str(tmp_path / "x.html"), "--episodes", "1:"]) == 0
    assert read == [1, 2]


def test_alignment_errors_of_the_annotation_are_in_the_page(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(label_report, "_choose_pictured", lambda survey, first: [])
    content = read_provenance(dataset)
    content["episodes"] = dict(content["episodes"])
    for episode in range(EPISODES):
        depth = {"error": 0.05 + 0.2 * episode, "fallback": episode == 1}
        content["episodes"][str(episode)]["main"]["depth"] = depth
    write_provenance(dataset, content)
    page = tmp_path / "labels.html"
    assert main([str(dataset), "--report", str(page), "--episodes", "0"]) == 0
    text = page.read_text()
    assert re.search(r"error of the alignment of two depth models</td>.*?25.0%.*?5.0%.*?45.0%.*?>2<", text)
    first = re.search(r'<h2 id="first">.*?<td class="number">(\d)</td>', text, re.DOTALL)
    assert first.group(1) == "1" and "main/depth-fallback" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:3,7", [0, 1, 2, 7]), ("7,:2", [0, 1, 7]), ("-2:", [8, 9]), ("3", [3]), ("8:20", [8, 9])],
)
def test_episodes_are_named_by_numbers_and_ranges(text, expected):
    assert parse_episodes(text, 10) == expected


@pytest.mark.parametrize("text", ["", "10", "a", "5:5", "1:2:3", "0,,2"])
def test_episodes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="names none of the episodes 0 to 9"):
        parse_episodes(text, 10)


def test_a_long_episode_is_sampled(tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "long", episodes=1, frames=80, tracks=False, use_videos=False).root
    monkeypatch.setattr(label_report, "SAMPLED_CHUNKS", 2)
    label_report._open_dataset(str(root))
    facts = label_report._measure_one(0)["facts"]["main"]["depth"]
    # Of the three runs the middle one is left out; the wall recedes by 1 cm a frame.
    frames = [*range(32), *range(64, 80)]
    assert facts["median_m"] == pytest.approx(np.median([1.2 + 0.01 * t for t in frames]), rel=0.1)
