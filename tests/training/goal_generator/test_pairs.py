"""Pairs for the goal generator: which frames, which prompt, and one augmentation for both."""

import numpy as np
import pytest
import torch

from tests.synthetic import make_dataset
from training.goal_generator.pairs import GoalPairs, collate_pairs

FRAMES = (12, 7)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs") / "demos"
    sizes = {"cameras": {"main": (32, 32), "wrist": (16, 16)}, "depth": False, "tracks": False}
    return make_dataset(root, episodes=2, frames=list(FRAMES), use_videos=False, **sizes)


def open_pairs(demos, **options):
    return GoalPairs(demos.root, **{"ahead": (2, 4), "image_size": 32, "frame_cache": "off", **options})


def test_a_pair_is_a_frame_and_one_ahead_of_it_with_grmgs_prompt(demos):
    pairs = open_pairs(demos, augment=False)
    assert len(pairs) == sum(FRAMES) - 2, "the last frame of an episode has no goal"
    assert pairs.describe(3, 4) == (7, "open the drawer.And 30% of the instruction has been finished.")
    assert pairs.describe(10, 4)[0] == 11, "the episode's last frame"
    goal, prompt = pairs.describe(12, 2)
    assert (goal, prompt[:24]) == (14, "close the drawer.And 10%")
    seen = {tuple(np.ravel(pairs[3, draw]["goal"][:, ::8, ::8]).tolist()) for draw in range(20)}
    assert len(seen) == 3, "2, 3 or 4 frames ahead"
    sample = pairs[3, 0]
    expected = torch.from_numpy(demos.image(0, 3, "main")).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(sample["picture"], expected, atol=1e-5, rtol=0)
    batch = collate_pairs([sample, pairs[4, 0]])
    assert batch["goal"].shape == (2, 3, 32, 32) and len(batch["prompt"]) == 2


def test_augmentation_is_a_function_of_seed_pair_and_draw_and_the_same_for_both_pictures(demos):
    pairs = open_pairs(demos, ahead=(1, 1))
    assert torch.equal(pairs[5, 1]["picture"], open_pairs(demos, ahead=(1, 1))[5, 1]["picture"])
    assert not torch.equal(pairs[5, 1]["picture"], pairs[5, 2]["picture"])
    assert not torch.equal(pairs[5, 1]["picture"], open_pairs(demos, ahead=(1, 1), seed=1)[5, 1]["picture"])
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    sample = pairs[5, 1]
    assert torch.equal(torch.random.get_rng_state(), before)
    # Frames that follow each other differ by the square that moves alone, and by a shade.
    difference = (sample["picture"] - sample["goal"]).abs()
    assert difference.median() < 0.05 < difference.max()


def test_a_camera_that_is_not_there_and_data_without_pairs_are_named(demos, tmp_path):
    with pytest.raises(ValueError, match=r"no camera 'top'; choose --camera among \['main', 'wrist'\]"):
        open_pairs(demos, camera="top")
    sizes = {"size": (32, 32), "depth": False, "tracks": False, "use_videos": False}
    mute = make_dataset(tmp_path / "mute", episodes=2, frames=[4, 3], tasks=("open it", ""), **sizes)
    with pytest.raises(ValueError, match="mute has no language: the instruction of 3 of its 7 frames"):
        open_pairs(mute)
