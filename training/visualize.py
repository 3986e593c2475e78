"""Draw what a checkpoint predicts beside what happened: depth, future and 3D flow of a held-out episode."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets_scripts.command_line import entry_point, pick_device
from datasets_scripts.inspection.drawing import import_matplotlib, save_png
from datasets_scripts.inspection.rerun_recording import import_rerun
from datasets_scripts.storage.atomic import check_place
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import find_intrinsics, read_provenance
from modeling_foresight import ForesightConfig
from training.evaluation.figures import draw_episode, draw_moments, explain_figure, to_pixels
from training.evaluation.prediction_recording import record_predictions
from training.evaluation.predictions import Moment, depth_limits, predict_windows
from training.evaluation.videos import write_video
from training.models.model_folder import load_checkpoint
from training.policy_data import find_held_out, fit_windows
from training.windows import ForesightWindows

LIMIT_MOMENTS = 16  # whose depth decides the colors of a film

EXAMPLE = """example:
  python training/visualize.py --checkpoint outputs/quickstart/model --dataset outputs/quickstart/dataset \\
      --output foresight.png --moments 4 --video foresight.mp4 --rerun foresight.rrd"""


@entry_point()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    visualize(parse_arguments(arguments))


def visualize(args: argparse.Namespace) -> None:
    """Draws what the command line asks for (see `--help`).

    Raises:
        ValueError: If checkpoint, dataset, episode or view do not fit together; names the remedy.
        RuntimeError: If matplotlib is missing.
    """
    import_matplotlib()
    for name, suffix in (("output", ".png"), ("video", ".mp4"), ("rerun", ".rrd")):
        if path := getattr(args, name):
            check_place(path, f"--{name}", suffix)
    if args.rerun:
        import_rerun()
    if args.moments < 1:
        raise ValueError(f"--moments is {args.moments}; it must be at least 1")
    device = pick_device(args.device)
    model, processor = load_checkpoint(args.checkpoint, device, args.revision)
    processor, config = processor.for_embodiment(args.embodiment), model.config
    view = args.view or config.views[0]
    if view not in config.views:
        raise ValueError(f"the checkpoint has no view '{view}'; choose from {', '.join(config.views)}")
    windows, held_out = open_episode(args, config, processor.embodiment)
    if view not in windows.cameras:
        raise ValueError(
            f"dataset {windows.rows.name} has no camera for the view '{view}'; choose --view from "
            f"{', '.join(windows.cameras)}"
        )

    kind = "held-out episode" if held_out else "episode"
    figure, title, moments = draw_episode(model, processor, windows, view, args.moments, kind)
    save_png(args.output, figure)
    print(f"wrote {args.output}: {title}, frames {', '.join(str(m.frame) for m in moments)}")
    # All moments of a long episode would take gigabytes: they are predicted one by one, for each file again.
    predict = functools.partial(predict_windows, model, processor, windows)
    if args.video:
        _write_film(args.video, predict, windows, view, title, config)
    if args.rerun:
        known, features = read_provenance(windows.rows.root), windows.rows.features
        lenses = {v: find_intrinsics(known, features, camera) for v, camera in windows.cameras.items()}
        record_predictions(args.rerun, predict(range(len(windows))), title, windows.rows.fps, lenses)
        print(f"wrote {args.rerun}; look at it with: rerun {args.rerun}")


def _write_film(
    path: Path, predict: Callable, windows: ForesightWindows, view: str, title: str, config: ForesightConfig
) -> None:
    """All moments of an episode, at a quarter of the speed, or one a second if that is faster."""

    def moments(chosen: Sequence[int]) -> Iterator[Moment]:
        return (prediction.views[view] for prediction in predict(chosen, [view]))

    fps, count = windows.rows.fps / windows.config.frame_stride, len(windows)
    caption, shown_fps = explain_figure(config, fps), max(1, round(fps / 4))
    limits = depth_limits(list(moments(range(0, count, -(-count // LIMIT_MOMENTS)))))
    pictures = (to_pixels(draw_moments([moment], title, caption, limits)) for moment in moments(range(count)))
    write_video(path, pictures, shown_fps)
    print(f"wrote {path}: all {count} moments at {shown_fps / fps:.2g} of the speed")


def open_episode(
    args: argparse.Namespace, model: ForesightConfig, embodiment: str | None = None
) -> tuple[ForesightWindows, bool]:
    """Windows of one episode, with lookahead frames, and whether it was held out from training."""
    rows = DatasetRows(args.dataset)
    held_out = find_held_out(args.checkpoint, model, rows) or []
    wanted, notes = fit_windows(
        args.checkpoint,
        model,
        rows,
        cameras=args.cameras,
        embodiment=embodiment,
        lookahead=model.has("future"),
        p_moving=1.0,  # show what moves
        skip_flagged=False,  # the episode was asked for
    )
    for note in notes:
        print(note)
    episode = args.episode
    if episode is None:
        lengths = rows.episode_stops - rows.episode_starts
        inside = [e for e in held_out or range(rows.n_episodes) if lengths[e] >= wanted.frames_needed]
        episode = (inside or held_out or [0])[0]  # that none is long enough is said by the windows
    return ForesightWindows(rows, dataclasses.replace(wanted, episodes=[episode])), episode in held_out


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model, or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument("--embodiment", help="name of the robot, of a checkpoint for several")
    parser.add_argument(
        "--dataset",
        required=True,
        help="LeRobot dataset, folder or Hub id; labels that it lacks are left out",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("foresight.png"), help="picture to write (default: %(default)s)"
    )
    parser.add_argument(
        "--cameras",
        default="",
        help="camera of each view, such as main=front,wrist=none (default: by name, then in order)",
    )
    parser.add_argument(
        "--episode", type=int, help="episode to draw (default: the first that training held out)"
    )
    parser.add_argument(
        "--moments", type=int, default=4, help="moments to draw, a row each (default: %(default)s)"
    )
    parser.add_argument("--view", help="view to draw (default: the model's first one, which has the flow)")
    text = "the whole episode, as a video (.mp4): depth, future and flow beside the truth"
    parser.add_argument("--video", "--mp4", type=Path, help=text)
    parser.add_argument(
        "--rerun", type=Path, help="the whole episode with all cameras, for Rerun's viewer (.rrd)"
    )
    parser.add_argument("--device", help="device of the model (default: cuda if there is one, otherwise cpu)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
