"""What a checkpoint foresees beside what happened, drawn: depth, future and 3D flow of a held-out episode."""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets_scripts.inspection.pictures import (
    add_depth_scale,
    draw_depth,
    draw_flow,
    import_matplotlib,
    save_png,
)
from datasets_scripts.storage.rows import DatasetRows
from modeling_foresight import ForesightForActionPrediction
from training.checkpoint_folder import load_checkpoint, read_run_config
from training.config import DatasetSource
from training.evaluation.predictions import Moment, depth_limits, foresee
from training.evaluation.videos import write_video
from training.run_data import window_config
from training.windows import ForesightWindows, split_episodes

EXAMPLE = """example:
  python training/visualize.py --checkpoint outputs/quickstart/model --dataset outputs/quickstart/dataset \\
      --output foresight.png --moments 4 --mp4 foresight.mp4"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parse(arguments)
    try:
        visualize(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def visualize(args: argparse.Namespace) -> None:
    """Draws what the command line asks for (see `--help`).

    Raises:
        ValueError: If checkpoint, dataset, episode or view do not fit together; names the remedy.
        RuntimeError: If matplotlib is missing.
    """
    import_matplotlib()
    if args.moments < 1:
        raise ValueError(f"--moments is {args.moments}; it must be at least 1")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_checkpoint(args.checkpoint, device, args.revision)
    views = list(model.config.views)
    view = args.view or views[0]
    if view not in views:
        raise ValueError(f"the checkpoint has no view '{view}'; choose from {', '.join(views)}")
    windows, held_out = _open_episode(args, model)
    episode, first_row = windows.locate(0)
    start = int(windows.rows.episode_starts[episode])
    # Later windows have no frame `future_shift` ahead to compare with.
    last = max(0, len(windows) - (model.config.future_shift if model.config.has("future") else 1))
    chosen = sorted({round(i) for i in np.linspace(0, last, args.moments)})
    moments = foresee(model, processor, windows, chosen, view, start)
    kind = "held-out episode" if held_out else "episode"
    title = f"{kind} {episode} of {Path(windows.rows.name).name}: “{windows[0]['task']}”, {view} camera"
    caption = _caption(model, windows.rows.fps / windows.config.frame_stride)
    save_png(args.output, draw(moments, title, caption))
    print(f"wrote {args.output}: {title}, frames {', '.join(str(m.frame) for m in moments)}")
    if args.mp4:
        every = foresee(model, processor, windows, list(range(last + 1)), view, start)
        limits = depth_limits(every)
        pictures = (to_pixels(draw([moment], title, caption, limits)) for moment in every)
        write_video(args.mp4, pictures, max(1, windows.rows.fps / windows.config.frame_stride / 4))
        print(f"wrote {args.mp4}: all {len(every)} moments at a quarter of the speed")


def draw(
    moments: Sequence[Moment],
    title: str,
    caption: str,
    depth_limits_m: tuple[float, float] | None = None,
):
    """One row per moment, truth and prediction side by side; objectives that are off have no columns.

    Args:
        moments (`Sequence[Moment]`): Rows.
        title (`str`): Above.
        caption (`str`): Below.
        depth_limits_m (`tuple[float, float]`, *optional*): Range of the depth colours; by default that of the
            moments' true depth.

    Returns:
        `matplotlib.figure.Figure`: To be saved; no window is opened.
    """
    figure_type, canvas_type = import_matplotlib()
    first = moments[0]
    flow_label = "2D flow" if first.flow is not None and first.flow[1].points.shape[-1] == 2 else "3D flow"
    columns: list[tuple[str, str, int]] = [("camera", "camera", 0)]
    for name, label in (
        ("depth", "depth"),
        ("future_rgb", "future image"),
        ("future_depth", "future depth"),
        ("flow", flow_label),
    ):
        if getattr(first, name) is not None:
            columns += [(name, f"{label}\n{which}", i) for i, which in enumerate(("recorded", "predicted"))]
    limits = depth_limits_m or depth_limits(moments)
    caption = "\n".join(textwrap.wrap(caption, 24 * len(columns)))
    bottom = 0.35 + 0.16 * (caption.count("\n") + 1)
    height = 1.55 * len(moments) + 0.85 + bottom
    figure = figure_type(figsize=(1.5 * len(columns) + 1.0, height))
    canvas_type(figure)
    axes = figure.subplots(len(moments), len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.05, right=0.93, top=1 - 0.8 / height, bottom=bottom / height, wspace=0.04, hspace=0.04
    )
    colours = None
    for row, moment in zip(axes, moments, strict=True):
        for axis, (name, label, which) in zip(row, columns, strict=True):
            axis.set_xticks([]), axis.set_yticks([])
            if moment is first:
                axis.set_title(label, fontsize=9)
            picture = moment.camera if name == "camera" else getattr(moment, name)[which]
            if picture is None:  # not recorded
                axis.set_facecolor("0.6")
            elif name in ("depth", "future_depth"):
                colours = draw_depth(axis, picture, limits)
            elif name == "flow":
                colours = draw_flow(axis, moment.camera, picture, limits) or colours
            else:
                axis.imshow(picture)
        row[0].set_ylabel(f"frame {moment.frame}", fontsize=9)
    if colours is not None:
        add_depth_scale(figure, colours, (0.945, bottom / height, 0.01, 1 - (0.8 + bottom) / height))
    figure.suptitle(title, fontsize=10, y=1 - 0.12 / height, va="top")
    figure.text(0.05, 0.12 / height, caption, fontsize=7.5, va="bottom")
    return figure


def _caption(model: ForesightForActionPrediction, fps: float) -> str:
    config, parts = model.config, []
    if config.has("future"):
        distance = f"{config.future_shift} frames ({config.future_shift / fps:.2f} s)"
        if config.future_targets == "window":  # the newest frame's future was never trained
            parts.append(f"Future: of this frame, predicted {distance} before.")
        else:
            parts.append(f"Future: {distance} ahead.")
    if config.has("depth") or config.has("future"):
        what = "Images and depth" if config.has_depth_decoder else "Images"
        parts.append(
            f"{what} are predicted normalised per patch; for display each patch has the mean and deviation "
            "of the current recorded frame, so only the structure within patches is the model's."
        )
    if config.has_depth_decoder:
        parts.append("Grey: no depth was recorded; what is predicted there was never trained.")
    if config.has("flow"):
        colour = " coloured by depth" if config.flow_dim == 3 else ""
        parts.append(
            f"Flow: {config.flow_length} steps of the tracked point nearest to each grid node, trails of "
            f"moving points{colour}, still points grey."
        )
    return " ".join(parts)


def to_pixels(figure, dpi: int = 120) -> np.ndarray:
    """A figure as `(H, W, 3)` uint8."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _open_episode(
    args: argparse.Namespace, model: ForesightForActionPrediction
) -> tuple[ForesightWindows, bool]:
    """Windows of one episode, with lookahead frames, and whether it was held out from training."""
    run = read_run_config(args.checkpoint)
    rows = DatasetRows(args.dataset)
    known = [source for source in run.data.datasets if Path(source.path).name == Path(args.dataset).name]
    source = known[0] if known else DatasetSource(args.dataset)
    _, held_out = split_episodes(
        rows.n_episodes, run.data.val_fraction if rows.n_episodes > 1 else 0, run.seed
    )
    episode = args.episode
    if episode is None:
        episode = held_out[0] if held_out else rows.n_episodes - 1
    config = window_config(model.config, run).for_evaluation([episode])
    config = dataclasses.replace(
        config,
        cameras=source.cameras,
        frame_stride=source.frame_stride,
        lookahead=model.config.has("future"),
        p_moving=1.0,  # show what moves
        skip_flagged=False,  # the episode was asked for
    )
    return ForesightWindows(args.dataset, config), bool(known) and episode in held_out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model, or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument(
        "--dataset", required=True, help="LeRobot dataset with depth and tracks: folder or Hub id"
    )
    parser.add_argument("--output", type=Path, default=Path("foresight.png"), help="(default: %(default)s)")
    parser.add_argument("--episode", type=int, help="default: the first that training held back")
    parser.add_argument("--moments", type=int, default=4, help="rows (default: %(default)s)")
    parser.add_argument("--view", help="camera (default: the model's first one, which has the flow)")
    parser.add_argument("--mp4", type=Path, help="also write all moments of the episode as a video")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
