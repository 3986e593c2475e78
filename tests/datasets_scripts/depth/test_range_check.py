"""Depth that cannot be meters is told from a scene that is far away, dark, or under an open sky."""

import numpy as np
import pytest

from datasets_scripts.depth.range_check import DepthRange
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError

FRAMES, HEIGHT, WIDTH, LIMIT_M = 6, 20, 30, 10.0
ROOM_M = np.random.default_rng(0).uniform(0.4, 3.0, (FRAMES, HEIGHT, WIDTH)).astype(np.float32)


def check(depth_m: np.ndarray) -> None:
    found = DepthRange(LIMIT_M)
    for run in np.split(depth_m, 3):
        found.add(run, np.isfinite(run) & (run > 0))
    found.check("--depth worker", "camera 'main' in episode 2")


def under_the_sky(sky_m: float, share: float) -> np.ndarray:
    """A scene of 4 to 60 m below a sky that fills a share of the rows, and one frame of sky alone."""
    depth_m = ROOM_M * 20 - 4
    depth_m[:, : int(share * HEIGHT)] = sky_m
    depth_m[0] = sky_m
    return depth_m


@pytest.mark.parametrize(
    "depth_m",
    [
        ROOM_M,
        under_the_sky(80.0, 0.7),  # a metric outdoor model
        under_the_sky(10_000.0, 0.7),  # DepthPro
        np.where(np.arange(FRAMES)[:, None, None] == 3, ROOM_M, 0),  # all frames but one are dark
        np.where(np.arange(WIDTH) < 1, ROOM_M, np.inf),
        ROOM_M * 10 + 5,  # little is near enough
    ],
)
def test_a_scene_with_some_depth_is_taken(depth_m):
    check(depth_m.astype(np.float32))


def test_millimeters_are_refused_though_a_gripper_is_near():
    depth_mm = 1000 * ROOM_M
    depth_mm[:, -1] = 60.0  # fingers, 6 cm before a wrist camera
    with pytest.raises(ValueError, match="--depth worker gives .* in episode 2 .*millimeters") as error:
        check(depth_mm)
    assert not isinstance(error.value, BrokenEpisodeError)  # leaving this episode out would not help


@pytest.mark.parametrize(
    ("depth_m", "seen"),
    [
        (-ROOM_M, "none is finite and positive"),
        (ROOM_M * np.nan, "none is finite and positive"),
        (ROOM_M / 1000, "its values are 0.0004"),
        (ROOM_M * 20 + 10, "its values are 18"),
    ],
)
def test_a_clip_of_which_nothing_is_kept_is_refused(depth_m, seen):
    with pytest.raises(BrokenEpisodeError, match=f"{seen}.*raise --depth-max"):
        check(depth_m)
