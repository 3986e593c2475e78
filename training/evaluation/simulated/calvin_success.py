"""CALVIN's long-horizon protocol: chains of five instructions in environment D, in closed loop.

D -> D and ABC -> D differ in the training data alone. The chains, the wording, the scenes and the oracle that
says what is solved are those of the user's `calvin_agent` and `calvin_env`, which run in a Python of their
own (`datasets_scripts/simulation/calvin.py`). Images, state and actions are those of `convert_calvin.py`:

| the policy's | is CALVIN's |
| --- | --- |
| views `main`, `wrist` | `rgb_static` (200 px), `rgb_gripper` (84 px) |
| state | `robot_obs` 0..5 and 14 |
| action | a relative action: 1 is 2 cm or 0.05 rad in the world's frame; gripper 1 open, -1 closed |

Every chain begins with a reset of scene and robot. Between its tasks the scene stays, and the policy starts
with the new instruction and an empty window.
"""

import dataclasses
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets_scripts.command_line import list_some
from datasets_scripts.conversion.calvin import (
    CALVIN_ACTIONS,
    CALVIN_CAMERAS,
    CALVIN_FPS,
    STATE_ENTRIES,
    VECTORS,
)
from datasets_scripts.storage.atomic import check_place, read_json, write_json
from training.evaluation.simulated.goal_sources import describe_goals, open_stream
from training.evaluation.simulated.kept_episodes import (
    check_growth,
    claim_evaluation,
    evaluation_job,
    read_finished,
    reopen,
)
from training.evaluation.simulated.options import PolicyOptions, option
from training.evaluation.simulated.simulation_pool import WorkerPool, become_command
from training.evaluation.simulated.success import (
    describe_checkpoint,
    format_rates,
    open_policy,
    rate_figures,
)
from training.evaluation.simulated.timing import Sessions, describe_timing
from training.run_record import describe_run

__all__ = ["CalvinPool", "CalvinOptions", "format_calvin", "measure_calvin", "task_outcomes"]

CALVIN_CHAINS, CHAIN_LENGTH, CALVIN_MAX_STEPS = 1000, 5, 360
SIMULATOR = Path(__file__).parents[3] / "datasets_scripts" / "simulation" / "calvin.py"


@dataclasses.dataclass
class CalvinOptions(PolicyOptions):
    """What to measure, and how; `evaluate.py --benchmark calvin` has a flag for every field.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    calvin_data: Path = option("unpacked archive of CALVIN with its validation split, such as task_D_D")
    calvin_python: str = option(
        "Python in which calvin_env and calvin_agent are installed (default: this one)", sys.executable
    )
    chains: int = option(
        f"run only the first of the protocol's {CALVIN_CHAINS} chains (default: all)", CALVIN_CHAINS
    )
    output: Path = option("results file (default: %(default)s)", Path("calvin.json"))
    max_steps: int = option("steps until a task has failed (default: %(default)s)", CALVIN_MAX_STEPS)
    execute_steps: int = option(
        "actions of a chunk to execute before the next plan (default: %(default)s)", 1
    )

    def __post_init__(self):
        super().__post_init__()
        check_place(self.output, "--output")
        if self.chains > CALVIN_CHAINS:
            raise ValueError(f"--chains is {self.chains}; the protocol has {CALVIN_CHAINS}")


class CalvinPool(WorkerPool):
    """CALVIN's simulators, each a process of another Python.

    Args:
        size (`int`): Number of simulators.
        python (`str`): Python in which CALVIN is installed.
        folder (`Path`): Unpacked archive.

    Attributes:
        chains (`list[tuple[dict, list[str]]]`): The protocol's chains: state of the scene and tasks.
        versions (`dict[str, str]`): Of that Python and of PyBullet.

    Raises:
        ValueError: If there is no such Python.
        RuntimeError: If CALVIN is not installed in it, a simulator does not start, or the chains have
            another form.
    """

    def __init__(self, size: int, python: str, folder: Path):
        found = shutil.which(python)
        if found is None:
            raise ValueError(f"--calvin_python is {python}, which cannot be run; name the Python of CALVIN")
        self._python, self.versions = python, None
        self._places: dict[int, tuple[int, str]] = {}  # by simulator, its chain and task
        super().__init__(size, become_command, (found, str(SIMULATOR), str(folder.resolve())))
        try:
            self.versions = [super(CalvinPool, self).receive(worker) for worker in range(size)][0]
            self._send(0, ("chains", CALVIN_CHAINS))
            self.chains = super().receive(0)
            lengths = Counter(len(tasks) for _, tasks in self.chains)
            if lengths != {CHAIN_LENGTH: CALVIN_CHAINS}:
                raise RuntimeError(
                    f"CALVIN's get_sequences gave {len(self.chains)} chains of {sorted(lengths)} tasks; "
                    f"expected {CALVIN_CHAINS} of {CHAIN_LENGTH}: install calvin_agent of mees/calvin"
                )
        except BaseException:
            self.__exit__()
            raise

    def reset(self, worker: int, task: str, seed: int) -> None:
        """Asks for the start of chain `seed`, whose first task is `task`; then call [`receive`]."""
        self._places[worker] = seed, task
        self._send(worker, ("reset", self.chains[seed][0], task))

    def follow(self, worker: int, task: str) -> None:
        """See `WorkerPool.follow`."""
        self._places[worker] = self._places[worker][0], task
        self._send(worker, ("follow", task))

    def step(self, worker: int, action: np.ndarray, repeat: int = 1) -> None:
        """Asks for one relative action, which cannot be held; then call [`receive`]."""
        if repeat != 1:
            raise ValueError(f"CALVIN's actions are changes for one step; they cannot last {repeat}")
        self._send(worker, ("step", np.asarray(action, dtype=np.float64).tolist()))

    def receive(self, worker: int) -> Mapping:
        """The answer to the last request, with the columns of `convert_calvin.py`; see `WorkerPool`.

        Raises:
            RuntimeError: If CALVIN failed, or what it shows has another form; names the chain and its task.
        """
        try:
            return _read_observation(super().receive(worker))
        except RuntimeError as error:
            chain, task = self._places[worker]
            raise RuntimeError(f"chain {chain}, task {task}: {error}") from error

    def _describe_death(self, worker: int) -> RuntimeError:
        death = super()._describe_death(worker)
        if self.versions is not None:
            return death
        return RuntimeError(
            f"--calvin_python is {self._python}, which ended without an answer ({death}); name the Python "
            "that CALVIN is installed in"
        )


def _read_observation(answer: Mapping) -> dict:
    """An answer of CALVIN's simulator with images by view and the state; refuses what has another form."""
    images = {}
    for view, (camera, _, _) in CALVIN_CAMERAS.items():
        pixels, shape, dtype = answer["images"][camera]
        image = np.frombuffer(pixels, dtype=dtype).reshape(shape)
        is_rgb = image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        # PyBullet gives plain integers where it was built without numpy.
        if not is_rgb or image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
            raise RuntimeError(
                f"CALVIN gave rgb_{camera} as {dtype} of shape {shape}; expected integers in 0..255 "
                "(height, width, 3)"
            )
        images[view] = image.astype(np.uint8)
    robot_obs, expected = np.array(answer["robot_obs"]), (VECTORS["robot_obs"],)
    if robot_obs.shape != expected:
        raise RuntimeError(f"CALVIN gave robot_obs of shape {robot_obs.shape}; expected {expected}")
    state = robot_obs[list(STATE_ENTRIES)].astype(np.float32)
    if not np.isfinite(state).all():
        raise RuntimeError(f"CALVIN gave robot_obs with NaN or infinity in the state {state.tolist()}")
    return {**answer, "images": images, "state": state}


def measure_calvin(options: CalvinOptions, arguments: Sequence[str] | None = None) -> dict:
    """Runs the chains; those that an interrupted evaluation finished are kept.

    Args:
        options (`CalvinOptions`): What to measure.
        arguments (`Sequence[str]`, *optional*): As of [`success.measure`].

    Returns:
        `dict`: What goes into the JSON file: `chains` (success of 1 to 5 tasks in a row and Avg. Len., with
        standard errors), `tasks` (success rate of each task that was tried, with its interval), `episodes`
        (one per chain), `settings`, `timing`, `checkpoint`, what `describe_run` gives.

    Raises:
        ValueError: If checkpoint, data and earlier chains do not fit together; names the remedy.
        RuntimeError: If CALVIN is missing or fails.
    """
    environment = _read_environment(options.calvin_data)
    with open_policy(options, lambda config: _check_policy(config, options)) as (model, processor):
        _check_units(processor)
        settings = {
            "control_hz": CALVIN_FPS,
            "execute_steps": options.execute_steps,
            "max_steps": options.max_steps,
            "environment": environment,
            "goal_source": "none",
            "success": "CALVIN's task oracle after any step",
            **({"embodiment": processor.embodiment} if processor.embodiment else {}),
            **describe_goals(model.config, options),
        }
        checkpoint = describe_checkpoint(options, model.config)
        facts = {"benchmark": "CALVIN", "checkpoint": checkpoint, "settings": settings}
        run = describe_run("training/evaluate.py" if arguments is not None else None, arguments)
        return _measure(options, model, processor, facts, run)


def _measure(options: CalvinOptions, model, processor, facts: dict, run: dict) -> dict:
    from training.evaluation.metric_loader import load_metric

    # Before the chains: the cache of such scripts may be read-only.
    chain_metric, task_metric = load_metric("task_chain"), load_metric("success_rate")
    job, size = evaluation_job(options.output, facts), min(options.num_envs, options.chains)
    results = read_finished(job)
    finished = len(results["episodes"]) if results else 0
    check_growth(finished, options.chains, "--chains", options.output)
    if finished == options.chains and not job.partial.exists():
        print(f"{options.output} holds this evaluation, which is finished")
        return results
    with claim_evaluation(job):
        if results:
            reopen(job.partial, results, lambda chain: _chain_file(chain["chain"]))
        known = _read_chains(job.partial, options.chains)  # before CALVIN starts, which takes a minute
        with (
            open_stream(model, processor, options, size, CALVIN_FPS) as stream,
            CalvinPool(size, options.calvin_python, options.calvin_data) as pool,
        ):
            _check_chains(known, pool.chains, job.partial)
            run["versions"] |= pool.versions
            sessions = Sessions(job.partial, run)
            episodes, timing = _run_chains(options, stream, pool, job.partial, known, sessions)
        outcomes = sorted(task_outcomes(episodes).items())
        results = {
            "version": 1,
            **facts,
            "chains": chain_metric.compute(predictions=[episode["solved"] for episode in episodes]),
            "tasks": {task: rate_figures(task_metric, tries) for task, tries in outcomes},
            "timing": timing,
            "episodes": episodes,
            **run,
            **sessions.describe(),
        }
        write_json(options.output, results)
    return results


def _run_chains(
    options: CalvinOptions,
    stream,
    pool: CalvinPool,
    folder: Path,
    known: dict[int, dict],
    sessions: Sessions,
) -> tuple[list[dict], dict]:
    """Runs the chains that are not `known`, and keeps them in `folder`.

    Returns:
        All chains, and the `timing` of the results.
    """
    from training.evaluation.simulated.closed_loop import run_episodes

    missing = [number for number in range(options.chains) if number not in known]
    resumed = options.chains - len(missing)
    with tqdm(total=options.chains, initial=resumed, desc="evaluate", unit="chain") as bar:

        def keep(episode) -> None:
            known[episode.seed] = {
                "chain": episode.seed,
                "tasks": [episode.task, *episode.following],
                "solved": episode.solved,
                "steps": episode.steps,
            }
            write_json(folder / _chain_file(episode.seed), known[episode.seed])
            sessions.save()
            bar.set_postfix_str(f"Avg. Len. {np.mean([chain['solved'] for chain in known.values()]):.2f}")
            bar.update()

        chains = [(number, pool.chains[number][1]) for number in missing]
        trials = [(tasks[0], number, tuple(tasks[1:])) for number, tasks in chains]
        limits = dict.fromkeys((task for _, tasks in chains for task in tasks), options.max_steps)
        _, timing = run_episodes(stream, pool, trials, 1, limits, options.execute_steps, on_done=keep)
    figures = describe_timing(timing, sessions, len(pool), resumed)
    return [known[number] for number in range(options.chains)], figures


def task_outcomes(episodes: Sequence[Mapping]) -> dict[str, list[bool]]:
    """By task, whether each try of it succeeded: those solved, and the one at which a chain ended."""
    outcomes: dict[str, list[bool]] = {}
    for episode in episodes:
        for number, task in enumerate(episode["tasks"][: episode["solved"] + 1]):
            outcomes.setdefault(task, []).append(number < episode["solved"])
    return outcomes


def format_calvin(results: dict) -> str:
    """A line for people per task, and the row of the paper's Table I."""
    chains = results["chains"]
    rates = " ".join(f"{chains[f'{k}_in_a_row']:.1%}" for k in range(1, CHAIN_LENGTH + 1))
    error = f" +- {chains['avg_len_se']:.3f}" if "avg_len_se" in chains else ""
    row = f"1 to {CHAIN_LENGTH} in a row: {rates}; Avg. Len. {chains['avg_len']:.3f}{error}"
    return "\n".join([*format_rates(results["tasks"]), f"{row} ({chains['chains']} chains)"])


def _read_environment(folder: Path) -> str | None:
    """Letter of the scene of the archive's validation split; refuses a folder that is no such archive."""
    settings = folder / "validation" / ".hydra" / "merged_config.yaml"
    if not settings.is_file():
        raise ValueError(
            f"--calvin_data is {folder}, which has no validation/.hydra/merged_config.yaml; give the "
            "unpacked archive with training and validation inside, such as task_D_D or task_ABC_D"
        )
    found = re.search(r"calvin_table_([A-D])\b", settings.read_text())
    return found and found.group(1)


def _check_policy(config, options: CalvinOptions) -> None:
    """Refuses a policy that does not fit CALVIN's robot, cameras and rate."""
    if set(config.views) != set(CALVIN_CAMERAS):
        raise ValueError(
            f"the checkpoint has the views {list(config.views)}; CALVIN's protocol shows "
            f"{list(CALVIN_CAMERAS)} (static and gripper camera): train with --model.views [main,wrist]"
        )
    for name, sizes in {"action_dim": (len(CALVIN_ACTIONS),), "state_dim": (0, len(STATE_ENTRIES))}.items():
        if getattr(config, name) not in sizes:
            raise ValueError(f"the checkpoint has {name} {getattr(config, name)}, CALVIN's robot {sizes[-1]}")
    if config.fps not in (None, CALVIN_FPS):
        raise ValueError(
            f"the checkpoint acts at {config.fps} steps a second, CALVIN's robot at {CALVIN_FPS}: train on "
            "frames that follow each other (frame_stride 1)"
        )
    if options.execute_steps > config.chunk_size:
        raise ValueError(
            f"--execute_steps is {options.execute_steps}, but the model plans {config.chunk_size} actions"
        )


def _check_units(processor) -> None:
    """Refuses recorded actions that cannot be CALVIN's relative ones, which are clipped to -1 and 1.

    The gripper is one of the two. `local_delta` needs no check: the codec gives CALVIN's actions.
    """
    robots = {None: {"action": processor.action_stats}, **(processor.statistics or {})}
    stats = robots.get(processor.embodiment, {}).get("action")
    if processor.action_codec != "recorded" or stats is None:
        return
    for name, low, high in zip(CALVIN_ACTIONS, stats["min"], stats["max"], strict=True):
        fits = {low, high} <= {-1, 1} if name == "gripper" else max(-low, high) <= 1
        if not fits:
            raise ValueError(
                f"the checkpoint's recorded actions have {name} from {low:.4g} to {high:.4g}; CALVIN's go "
                "from -1 to 1 (2 cm, 0.05 rad; gripper 1 open, -1 closed): train on a dataset of "
                "convert_calvin.py, or with action_codec local_delta"
            )


def _chain_file(number: int) -> str:
    return f"{number:06d}.json"


def _read_chains(folder: Path, chains: int) -> dict[int, dict]:
    """The finished chains in `folder`, by number; damaged ones are left out.

    Raises:
        ValueError: If some are beyond the first `chains`: they would be removed with the folder at the end.
    """
    stored = [number for number in range(CALVIN_CHAINS) if (folder / _chain_file(number)).exists()]
    known = {number: chain for number in stored if (chain := _read_chain(folder, number)) is not None}
    check_growth(max(known, default=-1) + 1, chains, "--chains", folder)
    if damaged := [number for number in stored if number < chains and number not in known]:
        print(f"chains that are damaged in {folder} run again: {list_some(damaged, most=10)}")
    return known


def _read_chain(folder: Path, number: int) -> dict | None:
    """A finished chain, or `None` if its file is damaged."""
    try:
        chain = read_json(folder / _chain_file(number))
    except ValueError:
        return None
    tasks, solved = chain.get("tasks"), chain.get("solved")
    is_whole = chain.get("chain") == number and type(chain.get("steps")) is int
    is_whole &= isinstance(tasks, list) and type(solved) is int and 0 <= solved <= CHAIN_LENGTH
    return chain if is_whole else None


def _check_chains(known: Mapping[int, Mapping], chains: Sequence[tuple], folder: Path) -> None:
    """Refuses to resume an evaluation whose chains are not those of the installed CALVIN."""
    for number, chain in known.items():
        if chain["tasks"] != list(chains[number][1]):
            raise ValueError(
                f"chain {number} in {folder} has other tasks than this calvin_agent gives it; choose another "
                f"--output, or delete {folder}"
            )
