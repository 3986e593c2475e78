"""Options of closed-loop evaluation, and the command line that is made of them."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets_scripts.command_line import count_cores
from datasets_scripts.storage.atomic import check_place
from training.evaluation.simulated.film import MAX_FILMED

__all__ = ["EvaluationOptions", "GoalOptions", "PolicyOptions", "option", "parse_benchmark"]

MAX_SEED = 2**32  # of NumPy's generator, which the simulators use
# At least 1, where a benchmark has them.
COUNTED_OPTIONS = ("episodes", "chains", "num_envs", "execute_steps", "max_steps", "stride", "threads")


def option(help: str, default=dataclasses.MISSING, **more):
    """A field with its help text; `default` may be a function that gives the value."""
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"help": help, **more})


def parse_benchmark(
    kinds: Mapping[str, type], description: str, examples: str, arguments: Sequence[str] | None
) -> tuple[str, Any]:
    """The `--benchmark` of a command line, the first by default, and the options that this one has.

    Args:
        kinds (`Mapping[str, type]`): Options of each benchmark, a dataclass with a flag per field.
        description, examples (`str`): For `--help`.
        arguments (`Sequence[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: If a value makes no sense; names it.
    """
    from transformers import HfArgumentParser

    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    names = list(kinds)
    chooser.add_argument(
        "--benchmark", choices=names, default=names[0], help="which benchmark (default: %(default)s)"
    )
    name = chooser.parse_known_args(arguments)[0].benchmark
    help_page = {"description": description, "epilog": examples}
    help_page["formatter_class"] = RawDescriptionHelpFormatter
    given = vars(HfArgumentParser(kinds[name], parents=[chooser], **help_page).parse_args(arguments))
    del given["benchmark"]
    return name, kinds[name](**given)


@dataclasses.dataclass(kw_only=True)
class GoalOptions:
    """Where a policy that was trained with goal images gets them."""

    goal_source: str | None = option(
        "goal images of recorded demonstrations or of a generator; with none, a policy that was trained with "
        "them acts without",
        None,
        choices=["none", "recorded", "generator"],
    )
    goal_dataset: str | None = option("LeRobot v3 dataset of --goal_source recorded, folder or Hub id", None)
    goal_camera: str | None = option(
        "camera of --goal_dataset for the policy's first view (default: the one that it was trained on, if "
        "the run is beside the checkpoint, otherwise the one of the view's name)",
        None,
    )
    goal_generator: str | None = option("InstructPix2Pix pipeline of --goal_source generator", None)
    goal_background: bool = option(
        "draw goals beside the simulation, as on a robot: results then depend on the machine's speed", False
    )


@dataclasses.dataclass
class PolicyOptions(GoalOptions):
    """Which policy acts in simulation, and on what machine.

    Raises:
        ValueError: If a number that counts something is below 1; names it.
    """

    checkpoint: str = option("folder of a trained model, or Hub id")
    _: dataclasses.KW_ONLY
    revision: str | None = option("commit, branch or tag of a Hub id", None)
    embodiment: str | None = option("name of the robot, of a checkpoint for several", None)
    num_envs: int = option("simulators side by side (default: one per core, %(default)s here)", count_cores)
    threads: int | None = option("threads of PyTorch (default: 1 for a small model)", None)
    device: str | None = option("device of the model (default: cuda if there is one, otherwise cpu)", None)

    def __post_init__(self):
        for name in COUNTED_OPTIONS:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclasses.dataclass
class EvaluationOptions(PolicyOptions):
    """What every benchmark asks; `evaluate.py` has a flag for every field and explains it.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    checkpoint: str = option("folder of a trained model or of an exported policy, or Hub id")
    _: dataclasses.KW_ONLY
    episodes: int = option("episodes per task (default: %(default)s)", 20)
    seed: int = option("start of the first episode; the others follow (default: %(default)s)", 10000)
    output: Path = option("results file (default: %(default)s)", Path("eval.json"))
    video: Path | None = option(
        f"film of up to {MAX_FILMED} episodes, .mp4: failures first, of all tasks alike, each marked at the "
        "step where the progress that the policy predicts was highest",
        None,
    )
    dataset: str | None = option("also measure errors on the held-out episodes of this dataset", None)
    execute_steps: int = option(
        "actions of a chunk to execute before the next plan (default: %(default)s)", 1
    )
    image_size: int | None = option("rendered pixels per side (default: as in the training data)", None)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed <= self.seeds[-1] < MAX_SEED:
            raise ValueError(f"--seed is {self.seed}; the starts must be in 0 to {MAX_SEED - 1}")
        check_place(self.output, "--output")
        if self.video:
            check_place(self.video, "--video", ".mp4")

    @property
    def films(self) -> list[Path]:
        """Files to make from filmed episodes; without any, pictures are not kept."""
        return [self.video] if self.video else []

    @property
    def seeds(self) -> range:
        """Starts of the episodes of each task."""
        return range(self.seed, self.seed + self.episodes)
