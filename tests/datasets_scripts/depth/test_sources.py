"""Depth models as sources: small random networks, a stand-in for Video-Depth-Anything, and known truth."""

import json
import shutil
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    DepthProImageProcessor,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
    ZoeDepthImageProcessor,
)

from datasets_scripts.depth import CHECKPOINTS, choose_depth_models, open_depth
from datasets_scripts.depth.estimated_depth import AlignedDepth, MetricDepth
from datasets_scripts.depth.gpu import prefetch
from datasets_scripts.depth.transformers_model import TransformersDepth
from datasets_scripts.depth.video_depth_anything import VideoDepth

FRAMES, HEIGHT, WIDTH, FPS = 5, 48, 60, 10.0
SCALE, SHIFT = 0.37, 0.21  # 1 / depth = SCALE * q + SHIFT


def save_network(folder, depth_estimation_type):
    """A Depth-Anything with random weights, a few kB."""
    tower = Dinov2Config(
        image_size=56,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=tower,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        initializer_range=0.2,
        depth_estimation_type=depth_estimation_type,
        max_depth=20,
    )
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config)
    torch.nn.init.constant_(model.head.conv3.bias, -2)  # meters of a room: 20 m * sigmoid(-2)
    model.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("metric"), "metric")


@pytest.fixture(scope="module")
def relative(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("relative"), "relative")


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def collect(clip):
    """Depth and validity of a whole clip."""
    meters, valid = zip(*clip.runs, strict=True)
    return np.concatenate(meters), np.concatenate(valid)


class Truth:
    """An estimator that knows the depth of frame i, which every frame's first pixel tells."""

    def __init__(self, depths, is_metric=True):
        self.depths, self.is_metric = depths, is_metric

    def describe(self):
        return {"model": "truth"}

    def predict(self, frames, fps):
        def runs():
            for start in range(0, len(frames), 3):
                numbers = [int(frames[i][0, 0, 0]) for i in range(start, min(start + 3, len(frames)))]
                yield np.stack([self.depths[number] for number in numbers])

        return prefetch(runs())


@pytest.fixture
def scene():
    """True meters of 60 frames, each named by its first pixel; and inverse depth up to scale and shift."""
    draw = np.random.default_rng(1)
    ramp = np.linspace(0.4, 4.0, 24 * 20).reshape(24, 20)
    depth = np.stack([ramp + 0.005 * t for t in range(60)]) + draw.normal(0, 0.005, (60, 24, 20))
    depth = depth.astype(np.float32)
    frames = np.zeros((60, 24, 20, 3), np.uint8)
    frames[:, 0, 0, 0] = range(60)
    return frames, depth, (1 / depth - SHIFT) / SCALE


# Networks of transformers


def test_depth_is_what_transformers_gives_for_each_frame(metric, video):
    """In batches that do not divide the clip, beside the library's own example for one image."""
    clip = open_depth(metric, batch_size=2, device="cpu").estimate(video, FPS)
    meters, valid = collect(clip)
    assert meters.shape == (FRAMES, HEIGHT, WIDTH) and meters.dtype == np.float32 and valid.all()
    processor = AutoImageProcessor.from_pretrained(metric)
    model = AutoModelForDepthEstimation.from_pretrained(metric)
    for frame, depth in zip(video, meters, strict=True):
        with torch.no_grad():
            outputs = model(**processor(images=frame, return_tensors="pt"))
        want = processor.post_process_depth_estimation(outputs, target_sizes=[(HEIGHT, WIDTH)])
        np.testing.assert_allclose(depth, want[0]["predicted_depth"], rtol=1e-4)
    assert np.ptp(meters) > 1e-3  # a constant would pass too


def save_other(kind, folder):
    """Networks of other families, all tiny."""
    tower = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    size = {"height": 32, "width": 32}
    if kind == "glpn":
        config = GLPNConfig(
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=8,
        )
        model, processor = GLPNForDepthEstimation(config), GLPNImageProcessor()
    elif kind == "depth_pro":
        part = {"model_type": "dinov2", "image_size": 16, "patch_size": 4, "hidden_size": 16}
        part |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = DepthProConfig(
            fusion_hidden_size=8,
            patch_size=16,
            initializer_range=0.02,
            intermediate_hook_ids=[1, 0],
            intermediate_feature_dims=[8, 8],
            scaled_images_ratios=[0.5, 1.0],
            scaled_images_overlap_ratios=[0.0, 0.2],
            scaled_images_feature_dims=[8, 8],
            image_model_config=part,
            patch_model_config=part,
            fov_model_config=part,
            num_fov_head_layers=0,
        )
        model, processor = DepthProForDepthEstimation(config), DepthProImageProcessor(size=size)
    elif kind == "dpt":
        config = DPTConfig(
            **tower,
            image_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[4, 4, 8, 8],
            fusion_hidden_size=8,
        )
        model, processor = DPTForDepthEstimation(config), DPTImageProcessor(size=size)
    else:
        backbone = {"model_type": "beit", **tower, "image_size": 32, "out_indices": [1, 2, 3, 4]}
        config = ZoeDepthConfig(
            backbone_config=backbone | {"reshape_hidden_states": False},
            neck_hidden_sizes=[4, 8, 8, 16],
            fusion_hidden_size=8,
            bottleneck_features=8,
            num_relative_features=8,
            num_attractors=[4, 2, 2, 1],
            bin_embedding_dim=8,
            bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
        )
        model, processor = ZoeDepthForDepthEstimation(config), ZoeDepthImageProcessor(size=size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "is_metric"), [("zoedepth", True), ("glpn", True), ("depth_pro", True), ("dpt", False)]
)
def test_other_families_work_and_are_metric_or_relative(kind, is_metric, video, tmp_path):
    save_other(kind, tmp_path)
    source = TransformersDepth(str(tmp_path), "cpu")
    assert source.is_metric is is_metric
    depth = np.concatenate(list(source.predict(video, FPS)))
    assert depth.shape == (FRAMES, HEIGHT, WIDTH) and np.isfinite(depth).all()


def test_every_family_has_a_name_with_a_checkpoint_and_takes_another_one(monkeypatch, metric):
    metric_ones = {"depth-anything-v2", "depth-pro", "zoedepth", "glpn"}
    by_name = {CHECKPOINTS[name]: name in metric_ones for name in CHECKPOINTS}
    monkeypatch.setattr(TransformersDepth, "check", staticmethod(lambda name: by_name.get(name, True)))
    for name, checkpoint in CHECKPOINTS.items():
        align = None if name in metric_ones else "zoedepth"
        chosen = [part for _, part in choose_depth_models(name, align_with=align)]
        assert chosen == [checkpoint, *([CHECKPOINTS["zoedepth"]] if align else [])]
    assert choose_depth_models("depth-pro", metric) == [(TransformersDepth, metric)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("chmv2", "of type 'chmv2': it measures the height of trees"),
        ("prompt_depth_anything", "it refines the depth of a sensor, .* use --depth sensor"),
        ("vit", "is a model of type 'vit'; depth comes from depth_anything, zoedepth, depth_pro"),
    ],
)
def test_models_that_measure_something_else_are_refused_with_the_reason(tmp_path, kind, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=message):
        choose_depth_models(str(tmp_path))


def test_a_source_describes_its_model_for_the_provenance(metric, tmp_path):
    folder = tmp_path / "network"
    shutil.copytree(metric, folder)
    (folder / "README.md").write_text("---\nlicense: Apache-2.0\n---\n")
    (model,) = open_depth(str(folder)).describe()["models"]
    assert (model["model"], model["license"], model["is_metric"]) == ("network", "apache-2.0", True)
    assert model["revision"].startswith("sha256:") and "transformers" in model["package"]


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_close_to_float32(metric, video):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_gpu, _ = collect(open_depth(metric, device="cuda").estimate(video, FPS))
    on_cpu, _ = collect(open_depth(metric, device="cpu").estimate(video, FPS))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0.02)


# A relative model joined with a metric one


def test_a_relative_model_gives_meters(scene):
    frames, depth, inverse = scene
    flicker = np.random.default_rng(2).normal(1, 0.03, (60, 1, 1)).astype(np.float32)
    source = AlignedDepth(Truth(inverse, is_metric=False), Truth(depth * flicker))
    clip = source.estimate(frames, FPS)
    meters, valid = collect(clip)
    np.testing.assert_allclose(meters, depth, rtol=0.03)
    assert valid.all()
    ratio = np.median(meters / depth, axis=(1, 2))
    assert ratio.std() < 0.005 < 0.02 < flicker.std()  # the flicker of the metric model is gone
    assert clip.facts["scale"] == pytest.approx(SCALE, rel=0.03) and clip.facts["error"] < 0.05
    assert (clip.facts["fallback"], clip.facts["key_frames"]) == (False, 32)


def test_where_the_models_disagree_the_metric_one_is_used_and_recorded(scene):
    frames, depth, _ = scene
    depth[7] = 0  # a frame without any depth
    flicker = np.random.default_rng(2).normal(1, 0.05, (60, 1, 1)).astype(np.float32)
    nonsense = np.random.default_rng(3).uniform(0, 5, depth.shape).astype(np.float32)
    clip = AlignedDepth(Truth(nonsense, is_metric=False), Truth(depth * flicker)).estimate(frames, FPS)
    meters, valid = collect(clip)
    assert clip.facts["fallback"] and clip.facts["error"] > 0.25 and clip.facts["flicker_ratio"] > 1.02
    assert not valid[7].any() and valid[6].all()
    seen = np.arange(60) != 7
    ratio = np.median(meters[seen] / depth[seen], axis=(1, 2))
    assert ratio.std() < 0.5 * flicker.std()


def test_no_depth_at_all_is_invalid_and_facts_stay_json(scene):
    frames, depth, inverse = scene
    clip = AlignedDepth(Truth(inverse, is_metric=False), Truth(depth * np.nan)).estimate(frames, FPS)
    _, valid = collect(clip)
    assert not valid.any() and clip.facts["fallback"] and clip.facts["error"] is None
    json.dumps(clip.facts, allow_nan=False)


class CountedFrames:
    """Frames made on demand, and how many of them are alive at most."""

    def __init__(self, n):
        self.n, self.alive, self.most, self.asked = n, 0, 0, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked.append(i)
        frame = np.full((8, 8, 3), i % 256, np.uint8)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(frame, self.forget)
        return frame

    def forget(self):
        self.alive -= 1


def test_a_long_clip_is_read_once_and_held_in_part(scene):
    n = 1200
    depth = np.linspace(0.5, 3, 256 * 64).reshape(256, 8, 8).astype(np.float32)
    frames = CountedFrames(n)
    source = AlignedDepth(Truth(1 / depth, is_metric=False), Truth(depth))
    count = sum(len(meters) for meters, _ in source.estimate(frames, FPS).runs)
    assert count == n and frames.asked == list(range(n))
    assert frames.most < 60


# Video-Depth-Anything

STAND_IN = '''
"""The interface of the project: names, arguments and shapes. Depth is read off the first channel."""
import torch

INFER_LEN, OVERLAP, INTERP_LEN = 32, 10, 8
KEYFRAMES = [0, 12, 24, 25, 26, 27, 28, 29, 30, 31]


class VideoDepthAnything(torch.nn.Module):
    def __init__(self, encoder="vitl", features=256, out_channels=(), use_bn=False, use_clstoken=False,
                 num_frames=32, pe="ape", metric=False):
        super().__init__()
        self.pretrained = torch.nn.Module()
        width = {"vits": 384, "vitl": 1024}[encoder]
        self.pretrained.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.metric, self.calls = metric, 0

    def forward(self, x):  # (1, 32, 3, h, w), normalized
        assert x.shape[:3] == (1, 32, 3) and x.shape[3] % 14 == x.shape[4] % 14 == 0
        self.calls += 1
        q = x[:, :, 0] * 0.229 + 0.485 + 0.5
        return q if self.metric else q * (0.5 + 0.3 * self.calls) + 0.1 * self.calls
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A stand-in for the user's copy of Video-Depth-Anything; every window has its own scale and shift."""
    (tmp_path / "video_depth_anything").mkdir()
    (tmp_path / "video_depth_anything" / "video_depth.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("video_depth_anything")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("video_depth_anything")]:
        del sys.modules[name]


def save_checkpoint(folder, name="video_depth_anything_vits.pth", width=384):
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, width)}, folder / name)
    return str(folder / name)


def soft_video(n, height=28, width=42):
    """Frames whose first channel is a slope that moves, and what the stand-in sees in them: (n, H, W)."""
    y, x = np.mgrid[:height, :width]
    levels = np.stack([0.2 + 0.6 * (x / width + y / height) / 2 + 0.15 * np.sin(t / 9) for t in range(n)])
    frames = np.repeat((levels * 255).round().astype(np.uint8)[..., None], 3, axis=-1)
    return frames, frames[..., 0].astype(np.float32) / 255 + 0.5


@pytest.mark.parametrize("n", [1, 22, 32, 33, 100])
def test_windows_of_a_clip_get_one_scale_and_shift(project, n):
    frames, truth = soft_video(n)
    source = VideoDepth(save_checkpoint(project), "cpu", side=28)
    depth = np.concatenate(list(source.predict(frames, FPS)))
    assert depth.shape == truth.shape
    np.testing.assert_allclose(depth, 0.8 * truth + 0.1, atol=2e-3)  # scale and shift of the first window


def test_frames_of_a_video_keep_their_size_whatever_the_network_takes(project):
    frames, truth = soft_video(3, height=30, width=70)  # wider than the network likes
    source = VideoDepth(save_checkpoint(project), "cpu", side=56)
    depth = np.concatenate(list(source.predict(frames, FPS)))
    np.testing.assert_allclose(depth, 0.8 * truth + 0.1, atol=0.02)  # resized twice


def test_a_metric_checkpoint_is_recognized_by_its_name_and_not_scaled(project):
    frames, truth = soft_video(40)
    source = open_depth("video-depth-anything", save_checkpoint(project, "metric_vits.pth"), device="cpu")
    assert isinstance(source, MetricDepth)
    source.estimator.side = 28
    meters, _ = collect(source.estimate(frames, FPS))
    np.testing.assert_allclose(meters, truth, atol=2e-3)


def test_the_papers_two_models_give_meters(project, metric):
    """By name, with a random metric network; then with one that knows the truth."""
    frames, truth = soft_video(40)
    source = open_depth("vda+dav2", save_checkpoint(project), align_with=metric, device="cpu")
    source.relative.side = 28
    models = source.describe()["models"]
    assert [model["is_metric"] for model in models] == [False, True]
    assert models[0]["license"] == "apache-2.0"
    clip = source.estimate(frames, FPS)
    meters, _ = collect(clip)
    assert meters.shape == truth.shape
    assert {"scale", "shift", "error", "fallback", "key_frames"} <= clip.facts.keys()

    frames[:, 0, 0, 0] = range(40)
    source = AlignedDepth(source.relative, Truth(1 / truth))
    source.relative.model.calls = 0
    clip = source.estimate(frames, FPS)
    meters, _ = collect(clip)
    assert not clip.facts["fallback"]
    np.testing.assert_allclose(meters[:, 4:, 4:], 1 / truth[:, 4:, 4:], rtol=0.01)


def test_a_restrictive_license_is_recorded(project):
    source = VideoDepth(save_checkpoint(project, "large.pth", width=1024), "cpu")
    assert source.describe()["license"] == "cc-by-nc-4.0"


def test_a_clip_equals_that_of_the_projects_own_function(tmp_path):
    """With the project itself, where it is installed, and random weights."""
    pytest.importorskip("video_depth_anything.video_depth", reason="needs the project on PYTHONPATH")
    from video_depth_anything.video_depth import VideoDepthAnything

    from datasets_scripts.depth.video_depth_anything import ENCODERS

    torch.manual_seed(0)
    network = VideoDepthAnything(**ENCODERS[384]).eval()
    with torch.no_grad():  # random weights may give nothing but zeros
        [layer for layer in network.head.scratch.output_conv2 if hasattr(layer, "bias")][-1].bias.fill_(0.5)
    torch.save(network.state_dict(), tmp_path / "vits.pth")
    frames, _ = soft_video(40, height=48, width=64)
    depth = np.concatenate(list(VideoDepth(tmp_path / "vits.pth", "cpu", side=56).predict(frames, FPS)))
    want, _ = network.infer_video_depth(frames, FPS, input_size=56, device="cpu", fp32=True)
    np.testing.assert_allclose(depth, want, atol=1e-3)  # its least squares are in float32


# What goes wrong


def test_the_depth_of_the_dataset_needs_no_source():
    assert open_depth("sensor") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("depth-everything",), "unknown depth source 'depth-everything'; there is sensor"),
        (("sensor", "some/model"), "--depth-model"),
        (("relative",), "--align-with depth-anything-v2"),
        (("depth-anything-v2", "relative"), "up to scale and shift"),
        (("metric", None, "metric"), "metric already"),
        (("relative", None, "relative"), "not metric itself"),
        (("metric", "metric"), "leave --depth-model"),
        (("nobody/has-this-model",), "nobody/has-this-model cannot be read"),
        (("text",), "type 'clip_text_model'"),
        (("video-depth-anything",), "needs --depth-model FILE.pth"),
        (("video-depth-anything", "gone.pth"), "no checkpoint gone.pth"),
    ],
)
def test_bad_sources_are_refused_before_weights_are_loaded(
    arguments, message, metric, relative, project, tmp_path
):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "clip_text_model"}')
    places = {"metric": metric, "relative": relative, "text": str(tmp_path / "text")}
    with pytest.raises(ValueError, match=message):
        choose_depth_models(*(places.get(argument, argument) for argument in arguments))


def test_a_missing_project_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "video_depth_anything", None)
    with pytest.raises(ValueError, match="PYTHONPATH"):
        choose_depth_models("video-depth-anything", save_checkpoint(tmp_path), "depth-anything-v2")


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", {"pretrained.cls_token": torch.zeros(1, 1, 5)}, {}]
)
def test_a_damaged_checkpoint_is_named(project, content):
    file = project / "vits.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"vits\.pth is not a checkpoint"):
        VideoDepth(str(file), "cpu")


def test_code_in_a_checkpoint_is_not_run(project):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"pretrained.cls_token": Trap()}, project / "vits.pth")
    with pytest.raises(ValueError, match="not a checkpoint"):
        VideoDepth(str(project / "vits.pth"), "cpu")


def test_damaged_weights_and_unknown_devices_are_named(metric, tmp_path):
    folder = tmp_path / "network"
    shutil.copytree(metric, folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_depth(str(folder))
    save_file({"other": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="belong to another model"):
        open_depth(str(folder))
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        open_depth(metric, device="gpu")
    with pytest.raises(ValueError, match=r"no device 'cuda:99'"):
        open_depth(metric, device="cuda:99")


def test_a_frame_that_cannot_be_decoded_ends_the_clip_with_its_error(metric, video):
    class Broken(CountedFrames):
        def __getitem__(self, i):
            if i == 3:
                raise ValueError("file-000.mp4 is damaged")
            return video[i]

    with pytest.raises(ValueError, match="damaged"):
        collect(open_depth(metric, device="cpu").estimate(Broken(FRAMES), FPS))


def test_leaving_a_clip_early_ends_its_threads(metric):
    before = threading.active_count()
    runs = open_depth(metric, device="cpu").estimate(CountedFrames(500), FPS).runs
    next(iter(runs))
    runs.close()
    assert threading.active_count() == before
