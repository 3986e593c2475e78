"""Goals from demonstrations: which demonstration, and which of its frames."""

import numpy as np
import pytest

from goal_images.recorded import GOAL_AHEAD_STEPS, RecordedGoals
from goal_images.source import GoalRequest
from tests.synthetic import make_dataset

FRAMES, FPS = 60, 20


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Three demonstrations; the first and the last have one instruction."""
    root = tmp_path_factory.mktemp("goals") / "demos"
    cameras, frames = {"main": (24, 32), "wrist": (16, 16)}, [FRAMES, 3, FRAMES]
    return make_dataset(
        root, episodes=3, frames=frames, cameras=cameras, depth=False, tracks=False, use_videos=False, fps=FPS
    )


def like_start(demos, episode, **facts):
    start = demos.image(episode, 0, "main")
    return GoalRequest(start, start, "open the drawer", **facts)


def test_the_goal_is_ahead_of_the_frame_at_the_progress_or_after_as_many_steps(demos):
    goals = RecordedGoals(demos.root, control_hz=FPS)
    first = int(demos.starts[2])
    assert goals.choose_row(like_start(demos, 2)) == first + GOAL_AHEAD_STEPS
    assert goals.choose_row(like_start(demos, 2, steps=20)) == first + 20 + GOAL_AHEAD_STEPS
    half = like_start(demos, 2, steps=20, progress=0.5)
    assert goals.choose_row(half) == first + round(0.5 * (FRAMES - 1) + GOAL_AHEAD_STEPS)
    for late in ({"steps": 500}, {"progress": 1.0}):
        assert goals.choose_row(like_start(demos, 2, **late)) == first + FRAMES - 1
    for ratio in (2, 1.5, 0.5):  # rows per control step
        other = RecordedGoals(demos.root, control_hz=FPS / ratio)
        wanted = first + round(ratio * (3 + GOAL_AHEAD_STEPS))
        assert other.choose_row(like_start(demos, 2, steps=3)) == wanted, ratio


def test_the_demonstration_is_the_one_that_starts_most_alike_whatever_the_size_of_the_picture(demos):
    goals = RecordedGoals(demos.root, control_hz=FPS)
    for episode in (0, 2):
        picture = demos.image(episode, 0, "main").repeat(2, axis=0).repeat(2, axis=1)
        row = goals.choose_row(GoalRequest(picture, picture, "open the drawer"))
        assert goals.rows.episode_of(row) == episode
    drawn = goals.draw([like_start(demos, 0), like_start(demos, 2)])
    expected = [demos.image(episode, GOAL_AHEAD_STEPS, "main") for episode in (0, 2)]
    np.testing.assert_array_equal(drawn, expected)


def test_an_instruction_without_demonstration_and_a_camera_that_is_not_there_are_named(demos):
    goals = RecordedGoals(demos.root, control_hz=FPS)
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"no demonstration of 'fly'; it has 2 instructions such as \['open"):
        goals.draw([GoalRequest(picture, picture, "fly")])
    with pytest.raises(
        ValueError, match=r"no camera 'top': name the one .* with --goal_camera, among \['main', 'wrist'\]"
    ):
        RecordedGoals(demos.root, FPS, "top")
