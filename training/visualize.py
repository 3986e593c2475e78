"""Draw what a checkpoint predicts beside what happened: depth, future and 3D flow of a held-out episode."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from datasets_scripts.inspection.drawing import import_matplotlib, save_png
from datasets_scripts.storage.dataset_rows import DatasetRows
from modeling_foresight import ForesightConfig
from training.config import DatasetSource
from training.evaluation.figures import draw_episode, draw_moments, explain_figure, last_window, to_pixels
from training.evaluation.predictions import depth_limits, predict_windows
from training.evaluation.videos import write_video
from training.model_folder import load_checkpoint, read_run_config
from training.run_data import window_config
from training.windows import ForesightWindows, split_episodes

EXAMPLE = """example:
  python training/visualize.py --checkpoint outputs/quickstart/model --dataset outputs/quickstart/dataset \\
      --output foresight.png --moments 4 --mp4 foresight.mp4"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_arguments(arguments)
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
    processor, config = processor.for_embodiment(args.embodiment), model.config
    view = args.view or config.views[0]
    if view not in config.views:
        raise ValueError(f"the checkpoint has no view '{view}'; choose from {', '.join(config.views)}")
    windows, held_out = open_episode(args, config)

    kind = "held-out episode" if held_out else "episode"
    figure, title, moments = draw_episode(model, processor, windows, view, args.moments, kind)
    save_png(args.output, figure)
    print(f"wrote {args.output}: {title}, frames {', '.join(str(m.frame) for m in moments)}")
    if args.mp4:
        fps = windows.rows.fps / windows.config.frame_stride
        chosen = range(last_window(windows, config) + 1)
        every = [p.views[view] for p in predict_windows(model, processor, windows, chosen, [view])]
        limits, caption = depth_limits(every), explain_figure(config, fps)
        pictures = (to_pixels(draw_moments([moment], title, caption, limits)) for moment in every)
        write_video(args.mp4, pictures, max(1, fps / 4))
        print(f"wrote {args.mp4}: all {len(every)} moments at a quarter of the speed")


def open_episode(args: argparse.Namespace, model: ForesightConfig) -> tuple[ForesightWindows, bool]:
    """Windows of one episode, with lookahead frames, and whether it was held out from training."""
    run, rows = read_run_config(args.checkpoint), DatasetRows(args.dataset)
    known = [source for source in run.data.datasets if Path(source.path).name == Path(args.dataset).name]
    source = known[0] if known else DatasetSource(args.dataset)
    _, held_out = split_episodes(
        rows.n_episodes, run.data.val_fraction if rows.n_episodes > 1 else 0, run.seed
    )
    episode = args.episode
    if episode is None:
        episode = held_out[0] if held_out else rows.n_episodes - 1
    config = dataclasses.replace(
        window_config(model, run).for_evaluation([episode]),
        cameras=source.cameras,
        frame_stride=source.frame_stride,
        strided_commands=source.strided_commands,
        lookahead=model.has("future"),
        p_moving=1.0,  # show what moves
        skip_flagged=False,  # the episode was asked for
    )
    return ForesightWindows(rows, config), bool(known) and episode in held_out


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model, or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument("--embodiment", help="name of the robot, of a checkpoint for several")
    parser.add_argument(
        "--dataset", required=True, help="LeRobot dataset with depth and tracks: folder or Hub id"
    )
    parser.add_argument("--output", type=Path, default=Path("foresight.png"), help="(default: %(default)s)")
    parser.add_argument("--episode", type=int, help="default: the first that training held out")
    parser.add_argument("--moments", type=int, default=4, help="rows (default: %(default)s)")
    parser.add_argument("--view", help="camera (default: the model's first one, which has the flow)")
    parser.add_argument("--mp4", type=Path, help="also write all moments of the episode as a video")
    parser.add_argument("--device", help="default: cuda if there is one, otherwise cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
