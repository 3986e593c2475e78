"""Frames per second of the depth sources, and how busy they keep a GPU; random weights of the true sizes.

A clip is decoded from an AV1 video as LeRobot stores it and goes through a source, as in
`annotate.py --depth SOURCE`, without writing. `gpu_busy` is the time of all kernels per frame, from the
profiler, times the frames per second of a run without the profiler. `forward_share` is the share of time in
the network's forward calls, waits between kernels included. Video-Depth-Anything is measured where it is on
PYTHONPATH.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _measure import (
    build_parser,
    describe_machine,
    memory_mb,
    print_table,
    start_afresh,
    synchronize,
    write_csv,
)
from torchcodec.decoders import VideoDecoder
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from datasets_scripts.command_line import entry_point, pick_device
from datasets_scripts.depth.transformers_model import TransformersDepth
from datasets_scripts.depth.video_depth_anything import ENCODERS, VideoDepth

EXAMPLE = """example:
  python benchmarks/depth_sources.py --device cuda --frames 2000
"""
# Width, layers, heads, layers that give features, channels of the neck, of the fusion.
SIZES = {
    "tiny": (48, 4, 2, [1, 2, 3, 4], [8, 8, 16, 16], 8),
    "small": (384, 12, 6, [3, 6, 9, 12], [48, 96, 192, 384], 64),
    "base": (768, 12, 12, [3, 6, 9, 12], [96, 192, 384, 768], 128),
    "large": (1024, 24, 16, [5, 12, 18, 24], [256, 512, 1024, 1024], 256),
}
CLIP_FRAMES = 120  # in the file, which repeats
VIDEO = "video-depth-anything"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--device", default=str(pick_device()))
    models = "depth-anything-v2-SIZE or video-depth-anything-SIZE (default: small; on a GPU large too)"
    add("--models", nargs="+", help=models)
    add("--batch-size", type=int, help="frames at once for depth-anything-v2 (default: as annotate.py)")
    add("--image-size", type=int, nargs=2, default=[224, 224], metavar=("H", "W"), help="size of the video")
    add("--frames", type=int, help="frames of the measured run (default: 2000 on a GPU, 6 on a CPU)")
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
    """`n_frames` of a video file, which repeats, decoded on demand."""

    def __init__(self, file: Path, n_frames: int):
        self.decoder, self.n_frames = VideoDecoder(file, dimension_order="NHWC"), n_frames

    def __len__(self) -> int:
        return self.n_frames

    def __getitem__(self, i: int) -> np.ndarray:
        return self.decoder[i % CLIP_FRAMES].numpy()


def write_clip(file: Path, height: int, width: int) -> None:
    """Write a video of moving waves, encoded as LeRobot does."""
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
    tower = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    tower |= {"image_size": 518, "patch_size": 14, "out_indices": used, "reshape_hidden_states": False}
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(**tower, apply_layernorm=True),
        reassemble_hidden_size=hidden,
        neck_hidden_sizes=neck,
        fusion_hidden_size=fusion,
        depth_estimation_type="metric",
        max_depth=20,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(scratch / model)
    side = 56 if size == "tiny" else 518
    size = {"height": side, "width": side}
    processor = DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)
    processor.save_pretrained(scratch / model)
    return TransformersDepth(str(scratch / model), device, batch_size)


class ForwardTime:
    """Seconds in a network's forward calls, on the device's clock."""

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
        """Seconds of all calls since the last time; the device must be synchronized."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        return sum(start.elapsed_time(end) / 1000 if self.on_gpu else end - start for start, end in pairs)


def drain(runs: Iterator[np.ndarray], device: torch.device) -> float:
    """Seconds to read a whole clip."""
    start = time.perf_counter()
    for _ in runs:
        pass
    synchronize(device)
    return time.perf_counter() - start


def kernel_seconds(call, device: torch.device) -> float:
    """Seconds of the kernels of a call on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    on_gpu = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in on_gpu) / 1e6


def measure(model: str, args: argparse.Namespace, file: Path, scratch: Path) -> dict:
    """One row of the table."""
    source = open_source(model, args.device, args.batch_size, scratch)
    device = source.device
    at_once = getattr(source, "batch_size", None) or source.window
    forward = ForwardTime(source.model, device)
    drain(source.predict(Clip(file, min(2 * at_once, args.frames)), 30), device)  # picks kernels
    forward.seconds()
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
    return row | memory_mb(**again)


@entry_point()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    machine = describe_machine(device)
    print(f"{machine}; random weights, clip decoded from AV1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_clip(scratch / "clip.mp4", *args.image_size)
        clip = Clip(scratch / "clip.mp4", CLIP_FRAMES)
        decoding = round(CLIP_FRAMES / drain((clip[i] for i in range(CLIP_FRAMES)), device), 1)
        for model in args.models:
            start_afresh(device)
            row = measure(model, args, scratch / "clip.mp4", scratch)
            rows.append(row | {"decoding_frames_per_s": decoding})
    print_table(rows)
    write_csv(args.output, [row | {"machine": machine} for row in rows])
    print(f"written: {args.output}")
    names = ("frames_per_s", "forward_share", "gpu_busy")
    print(json.dumps({row["model"]: {name: row[name] for name in names if name in row} for row in rows}))


if __name__ == "__main__":
    sys.exit(main())
