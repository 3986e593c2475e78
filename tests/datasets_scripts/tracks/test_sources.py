"""Learned trackers behind their interface: stand-ins of the projects that know the truth, and the real ones.

Each frame of the test clip is one gray level, which says how far the scene has moved; a stand-in reads it and
so follows every point exactly, in the coordinates that the project uses.
"""

import sys
import types

import numpy as np
import pytest
import torch

from datasets_scripts.columns import pack_points
from datasets_scripts.tracks import choose_tracker, learned, open_tracker
from datasets_scripts.tracks.lifting import fill_holes, lift_tracks

FRAMES, HEIGHT, WIDTH = 50, 30, 45
STEP_PX = np.array([1.5, 0.5])  # of the image, per level of gray
LEARNED = ("cotracker3", "delta")


def levels() -> np.ndarray:
    """How far the scene is in each frame: there and back again."""
    return (10 * (1 - np.cos(np.arange(FRAMES) / 8))).round()


@pytest.fixture
def clip():
    video = np.repeat(levels(), HEIGHT * WIDTH * 3).reshape(FRAMES, HEIGHT, WIDTH, 3).astype(np.uint8)
    depth = np.full((FRAMES, HEIGHT, WIDTH), 0.8, np.float32)
    depth[:, :, :3] = 0
    return video, depth


@pytest.fixture
def queries():
    draw = np.random.default_rng(0)
    return np.c_[draw.integers(0, FRAMES, 40), draw.uniform([5, 0], [WIDTH, HEIGHT], (40, 2))]


class Network(torch.nn.Module):
    """Follows what moves as the gray level says, where it is inside the image."""

    model_resolution = (48, 64)

    def __init__(self):
        super().__init__()
        self.unit = torch.nn.Parameter(torch.ones(1))

    def follow(self, video, queries):
        height, width = video.shape[-2:]
        level = video.mean(dim=(2, 3, 4))[0].round()  # (k,)
        factor = torch.tensor([(width - 1) / (WIDTH - 1), (height - 1) / (HEIGHT - 1)])
        moved = level[:, None] - level[queries[0, :, 0].long()]
        places = queries[0, :, 1:3] + moved[..., None] * torch.from_numpy(STEP_PX).float() * factor
        image = places / factor  # pixels of the image, counted from their centres
        inside = ((image >= -0.5) & (image <= torch.tensor([WIDTH, HEIGHT]) - 0.5)).all(dim=-1)
        return places[None], inside[None].float() * self.unit


class CoTrackerStandIn(Network):
    def forward(self, video, queries, iters=4, is_train=False, add_space_attn=True, fmaps_chunk_size=200):
        assert video.shape[2:] == (3, *self.model_resolution) and video.dtype == torch.float32
        places, inside = self.follow(video, queries)
        return places, inside, 0.25 + inside / 2, None


class DeltaStandIn(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.interp_shape = model, model.model_resolution

    def forward(self, video, videodepth, queries, backward_tracking=False):
        assert videodepth.shape == (*video.shape[:2], 1, *video.shape[3:]) and (videodepth > 0).all()
        places, inside = self.model.follow(video, queries)
        if not backward_tracking:
            raise AssertionError("frames before the query are not followed")
        frame, column, row = queries[0].long().T
        z = videodepth[0, frame, 0, row.clamp(0, 47), column.clamp(0, 63)]
        z = z.expand(places.shape[1], -1)[None, ..., None]
        return {"trajs_uv": places, "trajs_depth": z, "vis": inside > 0.9, "conf": 0.25 + inside / 2}


@pytest.fixture
def projects(monkeypatch, tmp_path):
    """Stand-ins in place of the two projects; the path of a checkpoint that fits both."""

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content, __path__=[], __spec__=types.SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("cotracker", "cotracker.models", "densetrack3d", "densetrack3d.models"):
        module(name)
    build = {"build_cotracker": lambda checkpoint, offline, window_len: CoTrackerStandIn()}
    module("cotracker.models.build_cotracker", **build)
    module("densetrack3d.models.densetrack3d")
    module("densetrack3d.models.densetrack3d.densetrack3d", DenseTrack3D=lambda **sizes: Network())
    module("densetrack3d.models.predictor")
    module("densetrack3d.models.predictor.predictor", Predictor3D=DeltaStandIn)
    torch.save({"model": {"unit": torch.ones(1)}}, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def truth(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moved = levels()[:, None] - levels()[queries[:, 0].astype(int)]
    places = queries[:, 1:] + moved[..., None] * STEP_PX
    return places, ((places >= 0) & (places <= [WIDTH, HEIGHT])).all(axis=-1)


@pytest.mark.parametrize("source", LEARNED)
def test_points_are_followed_both_ways_in_pixels_of_the_image(source, projects, clip, queries):
    points, visible, confidence = open_tracker(source, projects, "cpu").track(*clip, queries)
    places, inside = truth(queries)
    assert points.shape == (FRAMES, 40, 3) and points.dtype == np.float32
    assert visible.dtype == bool and confidence.dtype == np.float32
    np.testing.assert_allclose(points[..., :2], places, atol=1e-3)
    np.testing.assert_allclose(points[..., 2], 0.8, atol=1e-6)
    assert (visible == inside).all()
    np.testing.assert_allclose(confidence, np.where(inside, 0.75, 0.25))


@pytest.mark.parametrize("source", LEARNED)
def test_a_long_clip_is_followed_chunk_by_chunk(source, projects, clip, queries, monkeypatch):
    asked = []
    chunked = learned.track_in_chunks

    def small_chunks(predict, parts, queries, size):
        def counted(*arguments):
            asked.append((len(arguments[0]), len(arguments[-1])))
            return predict(*arguments)

        return chunked(counted, parts, queries, size, chunk=16, overlap=4)

    monkeypatch.setattr(learned, "MAX_QUERIES", 15)
    monkeypatch.setattr(f"datasets_scripts.tracks.{source}.track_in_chunks", small_chunks)
    queries[0] = [0, WIDTH - 2, 10]  # leaves the image soon, and comes back in the end
    points, visible, confidence = open_tracker(source, projects, "cpu").track(*clip, queries)
    places, inside = truth(queries)
    assert max(frames for frames, _ in asked) == 16 and max(n for _, n in asked) <= 15
    np.testing.assert_allclose(points[visible, :2], places[visible], atol=2e-3)
    assert not (visible & ~inside).any()
    # What is visible somewhere in every overlap is followed as if the clip had been one piece.
    through = inside.all(axis=0)
    assert through.any() and visible[:, through].all() and (confidence[:, through] > 0.7).all()
    # What is hidden all through an overlap ends there, and stays where it was.
    assert inside[-1, 0] and not visible[12:, 0].any() and (points[16:, 0] == points[15, 0]).all()


@pytest.mark.parametrize("source", LEARNED)
def test_points_without_depth_are_never_visible(source, projects, clip):
    video, depth = clip
    depth[:, :, :] = 0
    _, visible, _ = open_tracker(source, projects, "cpu").track(video, depth, np.array([[3, 20.0, 10.0]]))
    assert not visible.any()


def test_depth_that_runs_away_from_a_lost_point_can_be_stored(projects, clip):
    video, depth = clip
    points, _, _ = open_tracker("delta", projects, "cpu").track(
        video, 1e6 * depth, np.array([[3, 20.0, 10.0]])
    )
    assert pack_points(points).max() <= 100


@pytest.mark.parametrize("source", LEARNED)
def test_a_clip_of_one_frame(source, projects, clip):
    video, depth = clip
    points, visible, _ = open_tracker(source, projects, "cpu").track(
        video[:1], depth[:1], np.array([[0, 20.5, 10.5]])
    )
    np.testing.assert_allclose(points[0, 0], [20.5, 10.5, 0.8], atol=1e-4)
    assert visible.all()


@pytest.mark.parametrize("source", LEARNED)
def test_the_provenance_names_weights_and_license(source, projects):
    facts = open_tracker(source, projects, "cpu").describe()
    assert "weights.pth" in facts["model"] and len(facts["revision"]) == len("sha256:") + 32
    assert "non-commercial" in facts["license"] or "nc" in facts["license"]


def test_depth_continues_behind_an_occluder_and_past_an_edge():
    frames = 12
    depth = np.tile(np.linspace(1.0, 1.11, frames, dtype=np.float32)[:, None, None], (1, 8, 9))
    truth_m = depth[:, 4, 4].copy()
    depth[4:7, :, :] = 0.4  # a hand passes in front
    depth[8, 4, 4] = 2.0  # an edge of one pixel
    depth[9] = 0
    places = np.full((frames, 2, 2), 4.5, np.float32)
    visible = np.ones((frames, 2), bool)
    visible[4:6] = False  # the tracker notices the hand one frame late
    z = lift_tracks(places, visible, depth, np.array([0, 10]))
    np.testing.assert_allclose(z[:, 0], truth_m, atol=1e-5)
    np.testing.assert_allclose(z[:, 1], truth_m, atol=1e-5)


def test_holes_in_depth_are_filled_from_their_neighbors():
    depth = np.full((3, 6, 8), 1.0, np.float32)
    depth[:, :, 5:] = 2.0
    depth[0, 2:4, 1:3] = depth[0, 0, 7] = 0
    depth[1] = 0
    filled = fill_holes(depth)
    assert (filled[0, :, :5] == 1).all() and (filled[0, :, 5:] == 2).all()
    assert (filled[1] == filled[0]).all() and (filled[2] == depth[2]).all()
    assert (fill_holes(np.zeros((2, 3, 4), np.float32)) == 1).all()


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("sift", None, "unknown track source 'sift'; there is lucas-kanade, delta, cotracker3"),
        ("lucas-kanade", "a.pth", "leave --track-model a.pth out"),
        ("delta", None, "needs its weights: --track-model"),
        ("cotracker3", "nowhere.pth", "there is no checkpoint nowhere.pth"),
    ],
)
def test_bad_trackers_are_refused_before_weights_are_loaded(projects, source, model, message):
    with pytest.raises(ValueError, match=message):
        choose_tracker(source, model)


@pytest.mark.parametrize("source", LEARNED)
def test_a_missing_project_or_damaged_weights_are_named(source, projects, tmp_path, monkeypatch):
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(b"PK not weights")
    torch.save({"encoder.weight": torch.zeros(2)}, other)
    for file in (damaged, other):
        with pytest.raises(ValueError, match=f"{file.name} holds no weights of Network|of CoTrackerStandIn"):
            open_tracker(source, str(file), "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is not installed: .*github.com"):
        choose_tracker(source, projects)


@pytest.mark.slow
def test_cotracker_equals_its_own_predictor(tmp_path, clip):
    pytest.importorskip("cotracker", reason="needs the CoTracker package")
    from cotracker.predictor import CoTrackerPredictor

    predictor = CoTrackerPredictor(checkpoint=None).eval()
    torch.save(predictor.model.state_dict(), tmp_path / "random.pth")
    video = np.random.default_rng(0).integers(0, 256, (4, HEIGHT, WIDTH, 3)).astype(np.uint8)
    queries = np.array([[0, 10.0, 8.0], [2, 30.5, 20.5]])
    found, visible, _ = open_tracker("cotracker3", str(tmp_path / "random.pth"), "cpu").track(
        video, clip[1][:4], queries
    )
    wanted, seen = predictor(
        torch.from_numpy(video).permute(0, 3, 1, 2)[None].float(),
        queries=torch.from_numpy(queries - [0, 0.5, 0.5])[None].float(),
    )
    np.testing.assert_allclose(found[..., :2], wanted[0].numpy() + 0.5, atol=1e-3)
    assert (visible == seen[0].numpy()).all()


@pytest.mark.slow
def test_delta_gives_tracks_of_the_published_network(tmp_path, clip):
    pytest.importorskip("densetrack3d", reason="needs the DELTA project")
    from densetrack3d.models.densetrack3d.densetrack3d import DenseTrack3D

    from datasets_scripts.tracks.delta import SIZES

    torch.save({"model": DenseTrack3D(**SIZES).state_dict()}, tmp_path / "random.pth")
    queries = np.array([[0, 10.0, 8.0], [2, 30.5, 20.5]])
    points, visible, confidence = open_tracker("delta", str(tmp_path / "random.pth"), "cpu").track(
        clip[0][:4], clip[1][:4], queries
    )
    assert points.shape == (4, 2, 3) and np.isfinite(points).all() and (confidence >= 0).all()
    np.testing.assert_allclose(points[[0, 2], [0, 1]], np.c_[queries[:, 1:], [0.8, 0.8]], atol=1e-3)
    assert visible[[0, 2], [0, 1]].all()
