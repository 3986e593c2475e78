import numpy as np
import pytest

from training.windows.flow_targets import FlowSampling, build_flow_targets, choose_points, grid_nodes

FRAMES, FLOW_LENGTH, POINTS, GRID = 3, 4, 40, (3, 5)
NODES = GRID[0] * GRID[1]
SAMPLING = FlowSampling(FRAMES, FLOW_LENGTH, GRID)


def candidates_by_loop(xy, visible, grid):
    """Point numbers a node may take at one frame, straight from the rule, one node after the other."""
    rows, cols = grid
    result = []
    for r in range(rows):
        for c in range(cols):
            node = np.array([(c + 0.5) / cols, (r + 0.5) / rows])
            spacing = np.array([1 / cols, 1 / rows])
            inside, nearest, nearest_distance = [], None, np.inf
            for i, point in enumerate(xy):
                if not visible[i] or not ((point >= 0) & (point < 1)).all():
                    continue
                distance = (np.abs(point - node) / spacing).max()
                if distance <= 0.5:
                    inside.append(i)
                if distance <= 2 and distance < nearest_distance:
                    nearest, nearest_distance = i, distance
            result.append((inside, nearest))
    return result


def random_tracks(seed, n_rows=FRAMES + FLOW_LENGTH - 1, n_points=POINTS):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.1, 1.1, (n_rows, n_points, 3)).astype(np.float32)
    points[..., 2] = rng.uniform(0.5, 2, (n_rows, n_points))
    return points, rng.random((n_rows, n_points)) < 0.7, rng.random(n_points) < 0.25


def test_nodes_are_patch_centers_in_row_major_order():
    nodes = grid_nodes((2, 4))
    np.testing.assert_allclose(nodes[0], [0.125, 0.25])
    np.testing.assert_allclose(nodes[1], [0.375, 0.25])
    np.testing.assert_allclose(nodes[4], [0.125, 0.75])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_points", [POINTS, 6])
def test_every_choice_is_among_the_candidates_of_the_plain_loop(seed, n_points):
    points, visible, moving = random_tracks(seed, n_points=n_points)
    xy = points[:FRAMES, :, :2]
    choice = choose_points(xy, visible[:FRAMES], moving, GRID, 0.5, np.random.default_rng(seed))
    for t in range(FRAMES):
        for node, (inside, nearest) in enumerate(candidates_by_loop(xy[t], visible[t], GRID)):
            if inside:
                assert choice[t, node] in inside
            else:
                assert choice[t, node] == (-1 if nearest is None else nearest)


def test_with_p_moving_one_a_cell_with_a_moving_point_always_takes_it():
    points, visible, moving = random_tracks(5)
    xy = points[:FRAMES, :, :2]
    choice = choose_points(xy, visible[:FRAMES], moving, GRID, 1.0, np.random.default_rng(0))
    seen = 0
    for t in range(FRAMES):
        for node, (inside, _) in enumerate(candidates_by_loop(xy[t], visible[t], GRID)):
            if moving[inside].any():
                assert moving[choice[t, node]]
                seen += 1
    assert seen > 5


@pytest.mark.parametrize(("p_moving", "expected"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_share_of_moving_choices_follows_p_moving(p_moving, expected):
    # One cell with four candidates, one of them moving: p + (1 - p) / 4.
    xy = np.full((2000, 4, 2), 0.5, np.float32)
    moving = np.array([False, True, False, False])
    choice = choose_points(xy, np.ones((2000, 4), bool), moving, (1, 1), p_moving, np.random.default_rng(7))
    assert moving[choice].mean() == pytest.approx(expected, abs=0.04)


def test_frames_choose_independently_and_uniformly():
    xy = np.full((3000, 3, 2), 0.5, np.float32)
    choice = choose_points(
        xy, np.ones((3000, 3), bool), np.zeros(3, bool), (1, 1), 0.5, np.random.default_rng(8)
    )
    counts = np.bincount(choice[:, 0], minlength=3)
    assert counts.min() > 880 and counts.max() < 1120
    pairs = np.bincount(3 * choice[:-1, 0] + choice[1:, 0], minlength=9)
    assert pairs.min() > 250 and pairs.max() < 420


def test_targets_equal_a_plain_loop_over_frames_steps_and_nodes():
    points, visible, moving = random_tracks(
        9, n_rows=FRAMES + 1
    )  # the episode ends one step after the window
    seed, occluded = 11, 0.25
    sampling = SAMPLING._replace(occluded_weight=occluded)
    got = build_flow_targets(points, visible, moving, sampling, np.random.default_rng(seed))
    choice = choose_points(
        points[:FRAMES, :, :2], visible[:FRAMES], moving, GRID, 0.5, np.random.default_rng(seed)
    )
    nodes = grid_nodes(GRID)
    for t in range(FRAMES):
        for node in range(NODES):
            i = choice[t, node]
            if i < 0:
                np.testing.assert_array_equal(got["track_start"][t, node], nodes[node])
                assert not got["track_weight"][t, :, node].any() and not got["track_moving"][t, node]
                continue
            np.testing.assert_array_equal(got["track_start"][t, node], points[t, i, :2])
            assert got["track_moving"][t, node] == moving[i]
            for k in range(FLOW_LENGTH):
                if t + k < len(points):
                    np.testing.assert_array_equal(got["track"][t, k, node], points[t + k, i])
                    weight = 1 if visible[t + k, i] else occluded
                    assert got["track_weight"][t, k, node] == np.float32(weight)
                else:
                    assert got["track_weight"][t, k, node] == 0
    assert {value.dtype for key, value in got.items() if key != "track_moving"} == {np.dtype(np.float32)}


def test_step_zero_of_a_track_is_its_start():
    points, visible, moving = random_tracks(2)
    got = build_flow_targets(points, visible, moving, SAMPLING, np.random.default_rng(0))
    weighted = got["track_weight"][:, 0] > 0
    np.testing.assert_array_equal(got["track"][:, 0, :, :2][weighted], got["track_start"][weighted])


def test_padding_points_and_points_shifted_out_are_never_used():
    points, visible, moving = random_tracks(3)
    visible[:, 30:] = False
    points[:, :5, 0] = 1.02
    choice = choose_points(
        points[:FRAMES, :, :2], visible[:FRAMES], moving, GRID, 0.5, np.random.default_rng(0)
    )
    assert not np.isin(choice, [0, 1, 2, 3, 4, *range(30, POINTS)]).any()


def test_nothing_visible_gives_the_grid_with_weight_zero():
    points, visible, moving = random_tracks(4)
    visible[:] = False
    got = build_flow_targets(points, visible, moving, SAMPLING, np.random.default_rng(0))
    np.testing.assert_array_equal(got["track_start"], np.broadcast_to(grid_nodes(GRID), (FRAMES, NODES, 2)))
    assert not got["track_weight"].any() and np.isfinite(got["track"]).all()


def test_tracks_that_are_not_finite_or_have_no_depth_weigh_nothing():
    points, visible, moving = random_tracks(6)
    points[2, :, 2] = 0
    points[4] = np.nan
    got = build_flow_targets(points, visible, moving, SAMPLING._replace(frames=2), np.random.default_rng(0))
    assert not got["track_weight"][0, 2].any() and not got["track_weight"][1, 1].any()
    assert not got["track_weight"][1, 3].any() and got["track_weight"][0, 1].any()
    assert np.isfinite(got["track"]).all()
