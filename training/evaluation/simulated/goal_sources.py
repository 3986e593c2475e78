"""Goal images in closed loop: where they come from, what is refused, what the results say of them."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_goal_options", "describe_goals", "open_stream"]

READS = {"recorded": "goal_dataset", "generator": "goal_generator"}  # option of each source


def check_goal_options(config, options) -> None:
    """Refuses a goal source that the policy cannot use, or the lack of one.

    Args:
        config (`ForesightConfig`): The policy's.
        options (`options.GoalOptions`): Where goals come from.

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
    if source != "recorded" and options.goal_camera is not None:
        raise ValueError("--goal_camera is read with --goal_source recorded alone")
    if source != "generator" and options.goal_background:
        raise ValueError("--goal_background is for --goal_source generator: nothing else takes long")
    if source == "generator" and not config.has("progress"):
        was_left_out = "progress" in config.objectives  # as in an exported policy
        remedy = "give the model it came from" if was_left_out else "train with the objective progress"
        raise ValueError(
            f"the generator's prompt has the progress, which the checkpoint does not predict: {remedy}, "
            "or use --goal_source recorded"
        )


def describe_goals(config, options) -> dict:
    """What decides the goals, for the settings of the results; empty for a policy that takes none.

    Datasets and generators are told apart by their content. Of their paths the last part alone is kept, for
    people: copies elsewhere are the same.

    Raises:
        ValueError: If dataset or generator do not exist, or are something else; names it.
        RuntimeError: If a generator of the Hub cannot be downloaded, because diffusers is not installed.
    """
    if not config.goal_image:
        return {}
    found = {"goal_source": options.goal_source}
    if options.goal_source == "recorded":
        found["goal_dataset"] = _identify_dataset(options.goal_dataset)
        found["goal_camera"] = _find_camera(options, config.views[0])
    if options.goal_source == "generator":
        from goal_images.generator import pipeline_digest, read_sampling

        source = options.goal_generator
        found["goal_generator"] = {
            "name": Path(source).name,
            "sha256": pipeline_digest(source),
            "sampling": dataclasses.asdict(read_sampling(source)),
        }
        found["goal_background"] = options.goal_background
    return found


def _identify_dataset(source: str) -> dict:
    from datasets_scripts.storage.dataset_rows import DatasetRows
    from training.run_data import dataset_identity

    return dataset_identity(DatasetRows(source, stream=True))  # no videos are needed here


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
        camera = _find_camera(options, config.views[0])
        yield GoalStream(stream, RecordedGoals(options.goal_dataset, control_hz, camera))
        return
    make_generator = functools.partial(GoalGenerator, options.goal_generator, device=str(model.device))
    if not options.goal_background:
        yield GoalStream(stream, make_generator())
        return
    with GoalWorker(make_generator) as worker:
        yield GoalStream(stream, worker)


def _find_camera(options, view: str) -> str:
    """The camera of the options, or the one that a view of the robot was trained on, or that of its name."""
    from training.models.model_folder import read_run_config

    sources, robot = read_run_config(options.checkpoint).data.datasets, options.embodiment
    trained_on = [source.cameras.get(view) for source in sources if robot in (None, source.embodiment)]
    return options.goal_camera or (trained_on[0] if trained_on else None) or view
