"""Goal images in closed loop: where they come from, what is refused, what the results say of them."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from training.run_facts import portable_path

__all__ = ["check_goal_options", "describe_goals", "open_stream"]

READS = {"recorded": "goal_dataset", "generator": "goal_generator"}  # option of each source


def check_goal_options(config, options) -> None:
    """Refuses a goal source that the policy cannot use, or the lack of one.

    Args:
        config (`ForesightConfig`): The policy's.
        options (`success.GoalOptions`): Where goals come from.

    Raises:
        ValueError: Names the option and the remedy.
    """
    source = options.goal_source
    if config.goal_image and source is None:
        raise ValueError(
            "the checkpoint was trained with goal images, and there is no source of them: add --goal_source "
            "generator (with --goal_generator) or recorded (with --goal_dataset), --goal_source none to let "
            "it act without, or train with --model.goal_image false"
        )
    if source in READS and not config.goal_image:
        raise ValueError(
            f"--goal_source is {source}, but the checkpoint takes no goal images (model.goal_image is "
            "false): leave it out"
        )
    for name, field in READS.items():
        given = getattr(options, field)
        if source == name and given is None:
            raise ValueError(f"--goal_source {name} needs --{field}")
        if source != name and given is not None:
            raise ValueError(f"--{field} is read with --goal_source {name} alone")
    if source != "generator" and options.goal_background:
        raise ValueError("--goal_background is for --goal_source generator: nothing else takes long")
    if source == "generator" and not config.has("progress"):
        raise ValueError(
            "the generator's prompt has the progress, which the checkpoint does not predict: train with the "
            "objective progress, or use --goal_source recorded"
        )


def describe_goals(config, options) -> dict:
    """What decides the goals, for the settings of the results; empty for a policy that takes none."""
    if not config.goal_image:
        return {}
    found = {"goal_source": options.goal_source}
    if options.goal_source == "recorded":
        found["goal_dataset"] = Path(options.goal_dataset).name
    if options.goal_source == "generator":
        found["goal_generator"] = portable_path(options.goal_generator, options.output.parent)
        found["goal_generator_unet_sha256"] = _digest_unet(Path(options.goal_generator))
        found["goal_background"] = options.goal_background
    return found


def _digest_unet(folder: Path) -> str | None:
    """SHA-256 of a local pipeline's U-Net; finetuning changes nothing else."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("unet/*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


@contextlib.contextmanager
def open_stream(
    model, processor, options, num_envs: int, control_hz: float, with_progress: bool = False
) -> Iterator:
    """Yields the policy's stream for `num_envs` robots, with goals as the options say.

    With `with_progress` it predicts the progress too, if the policy can.

    Raises:
        ValueError: If dataset or generator do not exist, or do not fit; names it.
        RuntimeError: If diffusers is not installed, or the generator's process does not start.
    """
    config, source = model.config, options.goal_source
    if source not in READS:
        shows_progress = with_progress and config.has("progress")
        yield model.stream(processor, num_envs=num_envs, with_progress=shows_progress)
        return
    from goal_images.background import GoalWorker
    from goal_images.control import GoalStream
    from goal_images.generator import GoalGenerator
    from goal_images.recorded import RecordedGoals

    stream = model.stream(processor, num_envs=num_envs, with_progress=config.has("progress"))
    if source == "recorded":
        camera = _find_camera(options.checkpoint, config.views[0])
        yield GoalStream(stream, RecordedGoals(options.goal_dataset, control_hz, camera))
        return
    make_generator = functools.partial(GoalGenerator, options.goal_generator, device=str(model.device))
    if not options.goal_background:
        yield GoalStream(stream, make_generator())
        return
    with GoalWorker(make_generator) as worker:
        yield GoalStream(stream, worker)


def _find_camera(checkpoint: str, view: str) -> str:
    """The dataset camera that a view was trained on, as far as known; otherwise the one of its name."""
    from training.model_folder import read_run_config

    sources = read_run_config(checkpoint).data.datasets
    return (sources[0].cameras.get(view) if sources else None) or view
