"""Success of a policy in closed loop while one thing is changed, against the unchanged policy.

Every condition meets the same tasks and starts, so a difference is one of pairs. A condition is one
evaluation, kept with all its episodes in a file of its own, which is never measured again.
"""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.diagnostics.intervals import paired_difference
from training.diagnostics.stream_changes import ChangedStream, FrozenCamera, SwappedViews, shorten_history
from training.evaluation.simulated.success import Benchmark, measure_policy, outcomes_by_task

__all__ = ["PLAIN", "Condition", "list_conditions", "measure_conditions"]

PLAIN = "plain"
MAX_EXECUTED = 5


@dataclasses.dataclass(frozen=True)
class Condition:
    """What is changed, and where it is tried; a `StreamChange`.

    Attributes:
        name (`str`): Its name in the results.
        tasks (`tuple[str, ...]`): Tasks that can be tried.
        wrap (`Callable`): Stream -> changed stream.
        options (`Mapping`): Options of the evaluation that differ, those that choose the tasks included.
    """

    name: str
    tasks: tuple[str, ...]
    wrap: Callable[[Any], Any] = ChangedStream
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, stream: Any) -> Any:
        """The changed stream."""
        return self.wrap(stream)


def list_conditions(
    config, tasks: Sequence[str], other_tasks: Sequence[Condition]
) -> tuple[dict[str, Condition], dict[str, str]]:
    """Conditions that make sense for a policy, and why the others do not, both by name.

    Args:
        config (`ForesightConfig`): The policy's.
        tasks (`Sequence[str]`): Tasks to try.
        other_tasks (`Sequence[Condition]`): Those in which the policy is told another task, if a scene
            allows one.
    """
    tasks, skipped = tuple(tasks), {}
    found = [Condition(PLAIN, tasks), Condition("frozen_camera", tasks, FrozenCamera)]
    if len(config.views) > 1:
        found.append(Condition("swapped_views", tasks, SwappedViews))
    else:
        skipped["swapped_views"] = "it has one camera"
    found += other_tasks
    if not other_tasks:
        skipped["other_instruction"] = "no scene of the tasks allows another one"
    for frames in (1, 2):
        name = f"history_{frames}"
        if frames < config.history_length:
            found.append(Condition(name, tasks, functools.partial(shorten_history, frames=frames)))
        elif frames == 1:
            skipped[name] = "it sees one frame, the present one"
    for steps in range(2, 1 + min(MAX_EXECUTED, config.chunk_size)):
        found.append(Condition(f"execute_{steps}", tasks, options={"execute_steps": steps}))
    if config.chunk_size == 1:
        skipped["execute_2"] = "it plans one action"
    return {condition.name: condition for condition in found}, skipped


def measure_conditions(
    benchmark: Benchmark, model, processor, conditions: Mapping[str, Condition], folder: Path
) -> dict[str, dict]:
    """Figures of each condition; what was measured before is read.

    Args:
        benchmark (`Benchmark`): Starts and limits of all conditions.
        model, processor: The policy, as `open_policy` gives it.
        conditions (`Mapping[str, Condition]`): Of [`list_conditions`], the unchanged policy first.
        folder (`Path`): Gets `NAME.json` of each condition.

    Returns:
        `dict`: By condition: success as in an evaluation, `tasks` (successes of each), `outcomes` (task ->
        `1` or `0` for each start in order) and, except for the unchanged policy, `plain_successes`, what that
        solves of the same trials, and `difference`, success minus its success, with a 95 % interval.

    Raises:
        ValueError: If a file is there that was measured otherwise; names it.
    """
    results = {}
    for name, condition in conditions.items():
        options = dataclasses.replace(benchmark.options, output=folder / f"{name}.json", **condition.options)
        print(f"{name}: {len(condition.tasks)} tasks, {options.episodes} starts each", flush=True)
        results[name] = measure_policy(type(benchmark)(options), model, processor, change=condition)
    unchanged = outcomes_by_task(results[PLAIN])
    figures = {}
    for name, result in results.items():
        outcomes = outcomes_by_task(result)
        figures[name] = {
            **result["mean"],
            "tasks": {task: one["successes"] for task, one in result["tasks"].items()},
            "outcomes": {task: "".join(map(str, row)) for task, row in outcomes.items()},
        }
        if name != PLAIN:
            # Trials of all tasks are drawn together: within a task there may be two, too few to draw from.
            here, plain = (
                np.ravel([one[task] for task in outcomes])[None, None] for one in (outcomes, unchanged)
            )
            figures[name]["plain_successes"] = int(plain.sum())
            figures[name]["difference"] = paired_difference(here, plain)  # each (1, 1, T * E)
    return figures
