"""Frames per second of the depth sources, and how busy they keep a GPU; random weights of the true sizes.

A clip is decoded from an AV1 video as LeRobot stores it, goes through a source, and the result is dropped:
what `annotate.py --depth SOURCE` does, without writing. `gpu_busy` is the time of all kernels per frame, from
the profiler, times the frames per second of a run without the profiler. Beside it stand the share of time
between start and end of the network's forward calls (CUDA events; waits between kernels included), and NVML's
figure where `nvidia-ml-py` is installed. Video-Depth-Anything is measured where it is on PYTHONPATH.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _measure import describe_machine, memory_mb, print_table, start_afresh, synchronise, write_csv
from torchcodec.decoders import VideoDecoder
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from datasets_scripts.depth.transformers_model import TransformersDepth
from datasets_scripts.depth.video_depth_anything import ENCODERS, VideoDepth

EXAMPLE = """example:
  python benchmarks/depth_sources.py --device cuda --frames 2000
"""
# Width, layers, heads, layers whose features are used, channels of the neck, of the fusion.
SIZES = {
    "tiny": (48, 4, 2, [1, 2, 3, 4], [8, 8, 16, 16], 8),
    "small": (384, 12, 6, [3, 6, 9, 12], [48, 96, 192, 384], 64),
    "base": (768, 12, 12, [3, 6, 9, 12], [96, 192, 384, 768], 128),
    "large": (1024, 24, 16, [5, 12, 18, 24], [256, 512, 1024, 1024], 256),
}
CLIP_FRAMES = 120  # in the file, which is read again and again
VIDEO = "video-depth-anything"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--models",
        nargs="+",
        help="depth-anything-v2-SIZE or video-depth-anything-SIZE (default: small; on a GPU large too)",
    )
    add("--batch-size", type=int, help="frames at once for depth-anything-v2 (default: as annotate.py)")
    add("--image-size", type=int, nargs=2, default=[224, 224], metavar=("H", "W"), help="of the video")
    add("--frames", type=int, help="frames of the measured run (default: 2000 on a GPU, else 6)")
    add("--small", action="store_true", help="a tiny model, to try the script")
    add("--output", type=Path, default=Path("outputs/benchmarks/depth_sources.csv"))
    args = parser.parse_args(arguments)
    on_gpu = args.device.startswith("cuda")
    sizes = ["tiny"] if args.small else ["small", "large"] if on_gpu else ["small"]
    names = ["depth-anything-v2"]
    if on_gpu and importlib.util.find_spec("video_depth_anything") is not None:
        names.append(VIDEO)
    args.models = args.models or [f"{name}-{size}" for name in names for size in sizes]
    args.frames = args.frames or (2000 if on_gpu else 6)
    if args.frames < 1:
        parser.error("--frames must be at least 1")
    for model in args.models:
        name, _, size = model.rpartition("-")
        if size not in SIZES or name not in ("depth-anything-v2", VIDEO) or (name, size) == (VIDEO, "tiny"):
            parser.error(f"unknown model {model}; sizes are {', '.join(SIZES)}")
    return args


class Clip:
    """Frames of a video file, decoded when they are asked for; longer than the file, which starts anew."""

    def __init__(self, file: Path, n_frames: int):
        self.decoder, self.n_frames = VideoDecoder(file, dimension_order="NHWC"), n_frames

    def __len__(self) -> int:
        return self.n_frames

    def __getitem__(self, i: int) -> np.ndarray:
        return self.decoder[i % CLIP_FRAMES].numpy()


def write_clip(file: Path, height: int, width: int) -> None:
    """A video that moves, encoded as LeRobot does."""
    import av

    y, x = np.mgrid[:height, :width]
    with av.open(file, "w") as container:
        stream = container.add_stream("libsvtav1", rate=30, options={"g": "2", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(CLIP_FRAMES):
            waves = [127 + 120 * np.sin(x / (9 + c) + y / 17 + t / 5 + c) for c in range(3)]
            frame = av.VideoFrame.from_ndarray(np.stack(waves, axis=-1).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def open_source(model: str, device: str, batch_size: int | None, scratch: Path):
    """A source with random weights of a published size."""
    name, _, size = model.rpartition("-")
    hidden, layers, heads, used, neck, fusion = SIZES[size]
    torch.manual_seed(0)
    if name == VIDEO:
        from video_depth_anything.video_depth import VideoDepthAnything

        weights = VideoDepthAnything(**ENCODERS[hidden]).state_dict()
        torch.save(weights, scratch / f"{model}.pth")
        return VideoDepth(str(scratch / f"{model}.pth"), device)
    tower = Dinov2Config(
        image_size=518,
        patch_size=14,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        out_indices=used,
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=tower,
        reassemble_hidden_size=hidden,
        neck_hidden_sizes=neck,
        fusion_hidden_size=fusion,
        depth_estimation_type="metric",
        max_depth=20,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(scratch / model)
    side = 56 if size == "tiny" else 518
    processor = DPTImageProcessor(
        size={"height": side, "width": side},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(scratch / model)
    return TransformersDepth(str(scratch / model), device, batch_size)


class ForwardTime:
    """Seconds between start and end of a network's forward calls, on the device's own clock."""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []
        model.register_forward_pre_hook(self._mark)
        model.register_forward_hook(self._mark)

    def _mark(self, *_) -> None:
        mark = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            mark.record()
        self.marks.append(mark)

    def seconds(self) -> float:
        """Of all calls since the last time; the device must be synchronised."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        return sum(start.elapsed_time(end) / 1000 if self.on_gpu else end - start for start, end in pairs)


class Utilisation:
    """NVML's share of time in which a kernel ran, sampled in a thread; empty where it cannot be had."""

    def __init__(self, device: torch.device):
        self.device, self.samples, self.over = device, [], threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while self.device.type == "cuda" and not self.over.wait(0.2):
            try:
                self.samples.append(torch.cuda.utilization(self.device))
            except (ModuleNotFoundError, RuntimeError):
                return

    def __enter__(self) -> "Utilisation":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()


def drain(runs: Iterator[np.ndarray], device: torch.device) -> float:
    """Seconds until a clip is through."""
    start = time.perf_counter()
    for _ in runs:
        pass
    synchronise(device)
    return time.perf_counter() - start


def kernel_seconds(call, device: torch.device) -> float:
    """Time that kernels of a call ran on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronise(device)
    on_gpu = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in on_gpu) / 1e6


def measure(model: str, args: argparse.Namespace, file: Path, scratch: Path) -> dict:
    """One row of the table."""
    source = open_source(model, args.device, args.batch_size, scratch)
    device = source.device
    at_once = getattr(source, "batch_size", None) or source.window
    forward = ForwardTime(source.model, device)
    drain(source.predict(Clip(file, min(2 * at_once, args.frames)), 30), device)  # kernels are chosen
    forward.seconds()
    with Utilisation(device) as utilisation:
        wall = drain(source.predict(Clip(file, args.frames), 30), device)
    rate = args.frames / wall
    row = {
        "model": model,
        "height": args.image_size[0],
        "width": args.image_size[1],
        "batch": at_once,
        "frames": args.frames,
        "frames_per_s": round(rate, 2),
        "forward_share": round(forward.seconds() / wall, 3),
    }
    few = min(4 * at_once, args.frames)
    again = {"call": lambda: drain(source.predict(Clip(file, few), 30), device), "device": device}
    if device.type == "cuda":
        row["gpu_busy"] = round(kernel_seconds(**again) / few * rate, 3)
        if utilisation.samples:
            row["nvml_busy"] = round(statistics.mean(utilisation.samples) / 100, 3)
    return row | memory_mb(**again)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    machine = describe_machine(device)
    print(f"{machine}; random weights, clip decoded from AV1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_clip(scratch / "clip.mp4", *args.image_size)
        clip = Clip(scratch / "clip.mp4", CLIP_FRAMES)
        start = time.perf_counter()
        for i in range(CLIP_FRAMES):
            clip[i]
        decoding = round(CLIP_FRAMES / (time.perf_counter() - start), 1)
        for model in args.models:
            start_afresh(device)
            rows.append(
                measure(model, args, scratch / "clip.mp4", scratch) | {"decoding_frames_per_s": decoding}
            )
    print_table(rows)
    write_csv(args.output, [row | {"machine": machine} for row in rows])
    print(f"written: {args.output}")
    names = ("frames_per_s", "forward_share", "gpu_busy")
    print(json.dumps({row["model"]: {name: row[name] for name in names if name in row} for row in rows}))


if __name__ == "__main__":
    main()
