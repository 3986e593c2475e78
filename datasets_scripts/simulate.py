"""Simulate demonstrations with exact depth and exact 3D tracks, as a LeRobot v3 dataset.

In MetaWorld its own experts act. Ours act in LIBERO (libero_object, libero_spatial) and robosuite (arms that
lift and stack cubes).

Running the same command again resumes what was interrupted and leaves a finished dataset unchanged.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from datasets_scripts.command_line import count_cores, entry_point, split_names
from datasets_scripts.simulation.job import simulate
from datasets_scripts.simulation.metaworld import QUALITIES
from datasets_scripts.simulation.simulators import SIMULATORS


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python datasets_scripts/simulate.py --tasks drawer-open-v3 --episodes 50 "
        "--output outputs/drawer\n  python datasets_scripts/simulate.py --simulator libero "
        "--tasks libero_object --episodes 50 --output outputs/libero_object",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--simulator", choices=SIMULATORS, default="metaworld", help="which simulator (default: %(default)s)")
    names = "comma-separated tasks: drawer-open-v3, or groups: easy, medium, hard, very_hard, all; "
    names += "libero_object, libero_object/3; panda-lift, iiwa-stack (robosuite)"
    add("--tasks", required=True, help=names)
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add("--workers", type=int, default=count_cores(), help="processes (default: one per core)")

    def add_field(name: str, kind: type, text: str, **more) -> None:
        """A field of the simulators' recordings; they have the defaults."""
        known = {sim: getattr(kind, name) for sim, kind in SIMULATORS.items() if hasattr(kind, name)}
        texts = {sim: ",".join(x) if isinstance(x, tuple) else str(x) for sim, x in known.items()}
        usual = texts["metaworld"]
        shown = usual + "".join(f", {sim}: {text}" for sim, text in texts.items() if text != usual)
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {shown})", **more)

    add_field("episodes", int, "episodes per task")
    add_field("image_size", int, "side of the images in px")
    add_field("stride", int, "simulation steps per frame, of 80 a second (libero: 20, robosuite: 50)")
    add_field("seed", int, "seed of starts, noise and points")
    add_field("noise", float, "noise on the expert's actions")
    add_field("detour", int, "most frames of a random motion at the start instead of the expert's")
    add_field("n_points", int, "tracked points per episode")
    add_field("cameras", str, "comma-separated cameras, the first one gets the tracks")
    add_field("depth_max", float, "farthest depth, meters")
    add_field("max_steps", int, "most simulation steps")
    add_field("retries", int, "new starts after a failure")
    add_field("quality", str, "quality of rendering, for metaworld only", choices=QUALITIES)
    return parser


@entry_point(resumes=True)
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    fields = vars(build_parser().parse_args(argv))
    output, workers = fields.pop("output"), fields.pop("workers")
    simulator = fields.pop("simulator")
    recording = SIMULATORS[simulator]
    if "quality" in fields and simulator != "metaworld":
        raise ValueError(f"--quality is of metaworld; {simulator} renders as its evaluation does")
    if "cameras" in fields:
        fields["cameras"] = tuple(split_names(fields["cameras"]))
    fields["tasks"] = tuple(recording.resolve_tasks(fields["tasks"]))
    summary = simulate(recording(**fields), output, workers)
    with contextlib.suppress(BrokenPipeError):
        print(
            f"{output}: {summary['episodes']} episodes, {summary['frames']} frames, "
            f"{summary['bytes'] / 1e6:.1f} MB; "
            f"{summary['failures']} of {summary['attempts']} tries failed and were dropped; "
            f"recording {summary['record_s']:.0f} s, assembling {summary['assemble_s']:.0f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
