"""CALVIN's protocol with a stand-in for its packages: chains, resumption, figures, what is refused."""

import ast
import json
import os
import pickle
import shutil
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets_scripts.conversion.calvin import STATE_ENTRIES
from datasets_scripts.simulation import calvin
from modeling_foresight import ForesightForActionPrediction, ForesightStream
from modeling_foresight.action_codec import encode_local_delta
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from training import evaluate
from training.evaluation.simulated import calvin_success
from training.evaluation.simulated.calvin_success import CalvinOptions, CalvinPool
from training.evaluation.simulated.simulation_pool import WorkerPool

STAND_IN = Path(__file__).parents[3] / "calvin_stand_in"
PACKAGES = ("calvin_env", "calvin_agent", "hydra", "omegaconf")
TASKS = ("turn_on_led", "open_drawer", "move_slider_left", "close_drawer")
WORDING = ("turn on the led", "open the drawer", "slide the door left", "close the drawer")
SOLVED = [5, 1, 0, 2]  # of the stand-in's chains, which repeat
STEPS = [23, 11, 8, 19]  # when a task fails after 8
ARCHIVE = """\
env:
  _target_: calvin_env.envs.play_table_env.PlayTableSimEnv
  cameras: {static: {height: 200, width: 200}, gripper: {height: 84, width: 84}, tactile: {}}
scene: {table: calvin_table_D/urdf/calvin_table_D.urdf}
"""


def robot_config(**overrides):
    """A tiny policy in CALVIN's form."""
    form = {"action_codec": "local_delta", "state_representation": "relative", "state_dim": 7}
    form |= {"binary_state_indices": (6,), "binary_action_indices": (6,)}
    return tiny_config(**{**form, "fps": 30, **overrides})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("checkpoint") / "model", robot_config())


def save(folder, config):
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "task_D_D"
    (folder / "validation" / ".hydra").mkdir(parents=True)
    (folder / "validation" / ".hydra" / "merged_config.yaml").write_text(ARCHIVE)
    return folder


@pytest.fixture
def stand_in(monkeypatch):
    """Lets this process import the stand-in for CALVIN."""
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    for folder in (STAND_IN / "calvin_models", STAND_IN):
        monkeypatch.syspath_prepend(folder)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


class LocalConnection:
    """A simulator in this process instead of one at the other end; messages are pickled as there."""

    def __init__(self, folder):
        self.simulator, self.answers = calvin.CalvinSimulator(folder), deque([{"pybullet": "3.2.7"}])

    def send(self, request):
        answer = calvin.answer_request(self.simulator, pickle.loads(pickle.dumps(request)))
        self.answers.append(pickle.dumps(answer))

    def recv(self):
        answer = self.answers.popleft()
        return pickle.loads(answer) if isinstance(answer, bytes) else answer

    def close(self):
        pass


class FakeStream:
    """Asks for no motion, and notes instructions and what is seen of each."""

    def __init__(self, model, processor, num_envs, with_progress):
        self.model, self.tasks, self.current = model, [], {}
        self.state_dim = model.config.state_dim
        FakeStream.last = self

    def reset(self, instruction, envs):
        for env in envs:
            self.current[env] = []
            self.tasks.append((instruction, self.current[env]))

    def step_chunk(self, images, state, envs):
        assert images["main"].shape[1:] == (200, 200, 3) and images["wrist"].shape[1:] == (84, 84, 3)
        for env, picture in zip(envs, images["wrist"], strict=True):
            self.current[env].append(int(picture[0, 0, 0]))
        return torch.zeros(len(envs), 4, 7)


@pytest.fixture
def rooms(stand_in, monkeypatch):
    """The simulators of every pool that is opened: in this process, with the stand-in for CALVIN."""
    opened = []

    def start(pool, size, serve, settings):
        pool._connections, pool._processes = [LocalConnection(settings[-1]) for _ in range(size)], []
        opened.append([connection.simulator for connection in pool._connections])

    monkeypatch.setattr(WorkerPool, "__init__", start)
    monkeypatch.setattr(WorkerPool, "__len__", lambda pool: len(pool._connections))
    return opened


@pytest.fixture
def run(checkpoint, archive, rooms, tmp_path, monkeypatch, capsys):
    """Runs the command with stand-ins for CALVIN and the policy; gives code, output and results."""

    monkeypatch.setattr(ForesightForActionPrediction, "stream", lambda *args, **kw: FakeStream(*args, **kw))
    output = tmp_path / "results" / "calvin.json"

    def run(*options, checkpoint=checkpoint, again=False):
        if not again:  # results of another evaluation are not overwritten
            output.unlink(missing_ok=True)
        arguments = ["--benchmark", "calvin", "--checkpoint", str(checkpoint), "--calvin_data", str(archive)]
        code = evaluate.main([*arguments, "--output", str(output), "--max_steps", "8", *options])
        printed = capsys.readouterr()
        results = json.loads(output.read_text()) if output.exists() else None
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, results=results)

    run.output, run.partial = output, output.with_name("calvin.json.partial")
    return run


def outcomes(results):
    return [(e["chain"], e["solved"], e["steps"]) for e in results["episodes"]]


@pytest.mark.parametrize("size", [1, 3])
def test_a_failure_ends_a_chain_however_many_run_side_by_side(run, size):
    done = run("--chains", "6", "--num_envs", str(size))
    assert done.code == 0, done.err
    results = done.results
    assert outcomes(results) == [(i, SOLVED[i % 4], STEPS[i % 4]) for i in range(6)]
    assert results["settings"]["environment"] == "D" and not run.partial.exists()
    assert results["versions"]["pybullet"] == "3.2.7"
    chains = results["chains"]
    assert [round(chains[f"{k}_in_a_row"] * 6) for k in range(1, 6)] == [5, 3, 2, 2, 2]
    solved = [SOLVED[i % 4] for i in range(6)]
    assert chains["avg_len"] == pytest.approx(np.mean(solved))
    assert chains["avg_len_se"] == pytest.approx(np.std(solved, ddof=1) / 6**0.5)
    tried = {task: (f["successes"], f["episodes"]) for task, f in results["tasks"].items()}
    assert tried == {
        "close_drawer": (0, 2),
        "move_slider_left": (5, 5),
        "open_drawer": (7, 7),
        "turn_on_led": (2, 4),
    }
    assert "Avg. Len. 2.333 +- 0.882 (6 chains)" in done.out and "open_drawer: 7/7 = 100.0%" in done.out


def test_between_tasks_the_scene_stays_and_the_policy_starts_anew(run):
    run("--chains", "4", "--num_envs", "1")
    first = FakeStream.last.tasks[:5]
    assert [task for task, _ in first] == [
        "turn on the led",
        "open the drawer",
        "slide the door left",
        "open the drawer",
        "slide the door left",
    ]
    shown = [step for _, steps in first for step in steps]
    assert shown == list(range(23)), "a picture for every step of the chain: no reset, none shown twice"
    assert FakeStream.last.tasks[5] == ("open the drawer", [0, 1, 2]), "the next chain begins with a reset"


@pytest.fixture
def interrupted(run, monkeypatch):
    """An evaluation that ended in its third chain."""
    with monkeypatch.context() as patch:
        step, left = calvin.CalvinSimulator._step, iter(range(40))

        def interrupt(self, action):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step(self, action)

        patch.setattr(calvin.CalvinSimulator, "_step", interrupt)
        done = run("--chains", "5", "--num_envs", "1")
    assert done.code == 130 and done.results is None
    assert [path.name for path in sorted(run.partial.glob("0*"))] == ["000000.json", "000001.json"]
    return run


def test_an_interrupted_evaluation_resumes_to_the_same_results(interrupted):
    sessions = interrupted.partial / "sessions.json"
    known = json.loads(sessions.read_text())
    sessions.write_text(json.dumps(known | {"wall_s": known["wall_s"] + 1000}))
    resumed = interrupted("--chains", "5")
    assert resumed.code == 0 and len(FakeStream.last.tasks) == 1 + 3 + 5, "the first two chains are kept"
    assert resumed.results["timing"]["resumed_after"] == 2
    assert resumed.results["timing"]["wall_s"] > 1000, "seconds of both sessions"
    whole = interrupted("--chains", "5").results
    for name in ("episodes", "chains", "tasks"):
        assert resumed.results[name] == whole[name]


def test_a_finished_evaluation_is_read_and_grows(run):
    first = run("--chains", "2")
    assert first.code == 0, first.err
    again = run("--chains", "2", again=True)
    assert again.code == 0 and again.results == first.results and "which is finished" in again.out
    fewer = run("--chains", "1", again=True)
    assert fewer.code == 1 and fewer.results == first.results
    assert "calvin.json has finished more than --chains 1: take --chains 2 or more" in fewer.err
    more = run("--chains", "3", again=True)
    assert more.code == 0 and len(FakeStream.last.tasks) == 1, "the third chain alone, which fails at once"
    assert more.results["timing"]["resumed_after"] == 2
    assert more.results["episodes"][:2] == first.results["episodes"]
    assert more.results["versions"] == first.results["versions"] and not run.partial.exists()
    assert [one["command"] for one in more.results["earlier_sessions"]] == [first.results["command"]]
    whole = run("--chains", "3").results
    for name in ("episodes", "chains", "tasks"):
        assert more.results[name] == whole[name]


def test_chains_of_another_policy_or_other_settings_are_refused_and_kept(interrupted, tmp_path):
    torch.manual_seed(1)
    other = interrupted("--chains", "5", checkpoint=save(tmp_path / "other", robot_config()))
    assert other.code == 1 and "with other parameters (checkpoint: " in other.err and "--output" in other.err
    slower = interrupted("--chains", "5", "--max_steps", "9")
    assert slower.code == 1 and "with other parameters (settings.max_steps: " in slower.err
    kept = interrupted.partial / "000000.json"
    kept.write_text(kept.read_text().replace("turn_on_led", "close_drawer"))
    newer = interrupted("--chains", "5")
    assert newer.code == 1 and "has other tasks than this calvin_agent gives it" in newer.err
    assert len(list(interrupted.partial.glob("0*"))) == 2


def test_more_chains_resume_from_fewer_and_fewer_do_not_delete_finished_ones(interrupted):
    fewer = interrupted("--chains", "1")
    assert fewer.code == 1 and fewer.results is None and "take --chains 2 or more" in fewer.err
    assert len(list(interrupted.partial.glob("0*"))) == 2
    more = interrupted("--chains", "6")
    assert more.code == 0 and more.results["timing"]["resumed_after"] == 2
    assert [chain["solved"] for chain in more.results["episodes"]] == [SOLVED[i % 4] for i in range(6)]


def test_a_damaged_file_of_a_chain_counts_as_missing_and_is_named(interrupted, capsys):
    whole = {"chain": 0, "tasks": ["open_drawer"] * 5, "solved": 1, "steps": 9}
    others = [{**whole, "chain": 1}, {**whole, "tasks": None}, {**whole, "solved": 6}, {"chain": 0}, [whole]]
    files = [interrupted.partial / f"{number:06d}.json" for number in range(2)]
    for content in ["{", "\x00", *map(json.dumps, others)]:
        files[0].write_text(content)
        assert list(calvin_success._read_chains(interrupted.partial, 5)) == [1]
    (interrupted.partial / "1 copy.json").write_text("{")
    capsys.readouterr()
    resumed = interrupted("--chains", "5")
    assert resumed.code == 0 and resumed.results["timing"]["resumed_after"] == 1
    assert f"chains that are damaged in {interrupted.partial} run again: 0" in resumed.out.splitlines()
    assert [chain["solved"] for chain in resumed.results["episodes"]] == [SOLVED[i % 4] for i in range(5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--execute_steps", "5"], "plans 4 actions"),
        (["--chains", "1001"], "--chains is 1001"),
        (["--num_envs", "0"], "--num-envs is 0"),
        (["--calvin_python", "no/such/python"], "--calvin_python is no/such/python"),
        (["--calvin_data", "elsewhere"], "elsewhere, which has no validation/.hydra"),
    ],
)
def test_user_mistakes_are_one_clear_message(run, options, message):
    done = run(*options)
    assert done.code == 1 and done.results is None
    assert done.err.splitlines()[-1].startswith("error: ") and message in done.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"views": ["main"]}, r"the views \['main'\]; CALVIN's protocol shows \['main', 'wrist'\]"),
        ({"state_dim": 9}, "state_dim 9"),
        ({"fps": 10}, "10 steps a second"),
    ],
)
def test_a_policy_that_does_not_fit_the_protocol_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        calvin_success._check_policy(robot_config(**overrides), CalvinOptions("model", Path("task_D_D")))


def action_statistics(low, high):
    return {"mean": [0.1] * 7, "std": [0.5] * 7, "min": low, "max": high}


@pytest.mark.parametrize("codec", ["recorded", "local_delta"])
def test_either_codec_gives_the_actions_that_calvin_takes(codec, archive, rooms):
    form = {"action_codec": codec, "state_representation": "absolute"}
    stats = {"action_stats": action_statistics([-1.0] * 7, [1.0] * 7)} if codec == "recorded" else {}
    processor = tiny_processor(robot_config(**form), **stats)
    calvin_success._check_units(processor)
    with CalvinPool(1, sys.executable, archive) as pool:
        pool.reset(0, "close_drawer", 0)
        start = torch.tensor(pool.receive(0)["state"])
        motion = torch.tensor([0.01, -0.005, 0.02, 0.04, 0.01, -0.05])
        goal = torch.cat([start[:6] + motion, torch.tensor([-1.0])])
        recorded = torch.cat([motion * torch.tensor([50.0] * 3 + [20.0] * 3), goal[6:]])[None]
        action = recorded if codec == "recorded" else encode_local_delta(torch.stack([start, goal]))
        predicted = processor.normalize_actions(action)
        predicted[:, 6] -= 0.5  # a logit
        decoded = processor.decode_actions(predicted, start)
        pool.step(0, decoded[0].numpy())
        assert pool.receive(0)["state"] == pytest.approx(goal.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("entry", "low", "high", "message"),
    [
        (3, -3.14, 3.14, "delta_roll from -3.14 to 3.14; CALVIN's go from -1 to 1"),  # absolute poses
        (6, 0.0, 1.0, "gripper from 0 to 1"),  # LIBERO's
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_recorded_actions_that_are_not_calvins_are_refused(entry, low, high, message, several):
    stats = action_statistics([-1.0] * 7, [1.0] * 7)
    stats["min"][entry], stats["max"][entry] = low, high
    form = {"action_codec": "recorded", "state_representation": "absolute"}
    if several:
        form["embodiments"] = {"panda": {"action": [*range(7)], "state": [*range(7)]}}
        given = {"statistics": {"panda": {"action": stats}}}
    else:
        given = {"action_stats": stats}
    processor = tiny_processor(robot_config(**form), **given).for_embodiment(None)
    with pytest.raises(ValueError, match=message):
        calvin_success._check_units(processor)


def test_a_policy_trained_with_goals_needs_a_source_of_them_or_acts_without_on_request(run, tmp_path):
    folder = save(tmp_path / "model", robot_config(goal_image=True))
    done = run("--chains", "1", checkpoint=folder)
    assert done.code == 1 and "--goal_source none" in done.err and done.results is None
    done = run("--chains", "1", "--goal_source", "none", checkpoint=folder)
    assert done.code == 0 and done.results["settings"]["goal_source"] == "none"


@pytest.mark.slow
def test_every_task_of_a_chain_begins_with_a_goal_of_its_own(archive, rooms, tmp_path, monkeypatch):
    folder, shown = save(tmp_path / "model", robot_config(goal_image=True)), []
    sizes = {"size": (24, 24), "depth": False, "tracks": False, "use_videos": False}
    demos = make_dataset(tmp_path / "demos", episodes=len(WORDING), frames=30, tasks=WORDING, fps=30, **sizes)
    set_goal = ForesightStream.set_goal

    def note(stream, image, envs):
        shown.append(int(image[0, 0, 0, 2]))  # tells episode and frame
        set_goal(stream, image, envs)

    monkeypatch.setattr(ForesightStream, "set_goal", note)
    # A task that asks for no motion is solved all the same, as in the tests above.
    monkeypatch.setattr(
        ForesightStream, "step_chunk", lambda self, images, state, envs, again: torch.zeros(len(envs), 4, 7)
    )
    options = {"chains": 1, "num_envs": 1, "max_steps": 8, "output": tmp_path / "calvin.json"}
    source = {"goal_source": "recorded", "goal_dataset": str(demos.root)}
    results = calvin_success.measure_calvin(CalvinOptions(str(folder), archive, **options, **source))
    assert results["settings"]["goal_source"] == "recorded"
    (chain,) = results["episodes"]
    firsts = [demos.image(TASKS.index(task), 21, "main")[0, 0, 2] for task in chain["tasks"]]
    assert chain["solved"] == 5 and shown == firsts
    assert results["timing"]["goal_ms"]["count"] == 5


@pytest.mark.parametrize("lost", ["calvin_agent", "calvin_env", "hydra"])
def test_a_missing_package_is_named_with_what_installs_it(run, monkeypatch, lost):
    monkeypatch.setitem(sys.modules, lost, None)
    done = run("--chains", "1")
    assert done.code == 1 and done.results is None and not run.partial.exists()
    assert lost in done.err and "install.sh" in done.err and "--calvin_python" in done.err


def test_a_renderer_that_does_not_start_is_named(run, archive):
    config = archive / "validation" / ".hydra" / "merged_config.yaml"
    config.write_text(ARCHIVE.replace("  cameras", "  use_egl: true\n  cameras"))
    done = run("--chains", "1")
    assert done.code == 1 and "use_egl: false" in done.err and "merged_config.yaml" in done.err


def change_observation(monkeypatch, change):
    """Changes what the stand-in shows."""
    from calvin_env.envs.play_table_env import PlayTableSimEnv

    def show(env, seen=PlayTableSimEnv.get_obs):
        observation = seen(env)
        change(observation)
        return observation

    monkeypatch.setattr(PlayTableSimEnv, "get_obs", show)


def shorten_state(seen):
    seen["robot_obs"] = seen["robot_obs"][:14]


def spoil_state(seen):
    seen["robot_obs"][2] = np.nan


def scale_images(seen):
    seen["rgb_obs"] = {name: pixels.astype(np.float32) / 255 for name, pixels in seen["rgb_obs"].items()}


def widen_images(seen):
    seen["rgb_obs"] = {name: pixels.astype(np.int64) for name, pixels in seen["rgb_obs"].items()}


def overflow_images(seen):
    widen_images(seen)
    seen["rgb_obs"]["rgb_gripper"][0, 0, 0] = 256


def add_alpha(seen):
    seen["rgb_obs"]["rgb_gripper"] = np.zeros((84, 84, 4), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten_state, r"robot_obs of shape \(14,\); expected \(15,\)"),
        (spoil_state, "robot_obs with NaN or infinity"),
        (scale_images, r"rgb_static as float32 of shape \(200, 200, 3\); expected integers in 0..255"),
        (overflow_images, r"rgb_gripper as int64 of shape \(84, 84, 3\); expected integers in 0..255"),
        (
            add_alpha,
            r"rgb_gripper as uint8 of shape \(84, 84, 4\); expected integers .* \(height, width, 3\)",
        ),
    ],
)
def test_an_observation_of_another_form_is_named_with_chain_and_task(
    archive, rooms, monkeypatch, change, message
):
    change_observation(monkeypatch, change)
    with CalvinPool(1, sys.executable, archive) as pool:
        pool.reset(0, "open_drawer", 3)
        with pytest.raises(RuntimeError, match=f"^chain 3, task open_drawer: CALVIN gave {message}"):
            pool.receive(0)


def test_images_of_a_pybullet_without_numpy_are_the_same_pictures(archive, rooms, monkeypatch):
    seen = []
    for change in (lambda seen: None, widen_images):
        with monkeypatch.context() as patch:
            change_observation(patch, change)
            with CalvinPool(1, sys.executable, archive) as pool:
                pool.reset(0, "open_drawer", 3)
                seen.append(pool.receive(0)["images"])
    for view, pixels in seen[0].items():
        assert pixels.dtype == seen[1][view].dtype == np.uint8 and np.array_equal(pixels, seen[1][view])


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ([({}, ("open_drawer",) * 5)] * 4, r"4 chains of \[5\] tasks; expected 1000 of 5"),
        ([({}, ("open_drawer",) * 6)] * 1000, r"1000 chains of \[6\] tasks"),
    ],
)
def test_other_chains_than_those_of_the_protocol_are_refused(archive, rooms, monkeypatch, chains, message):
    monkeypatch.setattr("calvin_agent.evaluation.multistep_sequences.get_sequences", lambda number: chains)
    with pytest.raises(RuntimeError, match=f"get_sequences gave {message}"):
        CalvinPool(1, sys.executable, archive)


def test_a_wording_without_lists_is_refused_at_the_start(archive, rooms, monkeypatch):
    monkeypatch.setattr("omegaconf.OmegaConf.to_container", lambda config: {"open_drawer": "open the drawer"})
    with pytest.raises(
        RuntimeError, match="validation.yaml words open_drawer as 'open the drawer'; expected"
    ):
        CalvinPool(1, sys.executable, archive)


@pytest.mark.parametrize(
    ("broken", "task", "kind"),
    [
        ("calvin_agent.evaluation.utils.get_env_state_for_initial_condition", "turn_on_led", "reset"),
        ("calvin_env.envs.tasks.Tasks.get_task_info_for_set", "turn_on_led", "step"),
    ],
)
def test_an_error_of_reset_or_oracle_names_chain_and_task(run, monkeypatch, broken, task, kind):
    def fail(*args):
        raise KeyError("slider")

    monkeypatch.setattr(broken, fail)
    done = run("--chains", "2", "--num_envs", "1")
    message = f"error: chain 0, task {task}: CALVIN's simulator failed at {kind}: KeyError('slider')"
    assert done.code == 1 and done.err.splitlines()[-1] == message and not run.partial.exists()


def test_a_program_that_is_not_calvins_python_is_named(archive):
    program = shutil.which("true")
    with pytest.raises(RuntimeError, match=f"--calvin_python is {program}, which ended without an answer"):
        CalvinPool(1, program, archive)


def test_state_and_gripper_have_the_signs_of_the_converter(archive, stand_in):
    simulator = calvin.CalvinSimulator(str(archive))
    state, tasks = simulator.answer(("chains", 2))[1]
    simulator.answer(("reset", state, tasks[0]))
    for gripper in (0.9, 0.0, -1.0):
        seen = simulator.answer(("step", [0.5, 0, 0, 0, 0, 1, gripper]))
    sent = np.array(simulator._env.actions)
    assert sent[:, 6].tolist() == [1, -1, -1] and (sent[:, :6] == [0.5, 0, 0, 0, 0, 1]).all()
    assert seen["robot_obs"][0] == pytest.approx(0.0259 + 3 * 0.01) and seen["robot_obs"][14] == -1
    opened = simulator.answer(("reset", state, tasks[0]))["robot_obs"][14]
    assert opened == 1, "a chain begins with an open gripper, whatever the one before ended with"
    assert STATE_ENTRIES == (0, 1, 2, 3, 4, 5, 14)


def test_the_simulator_runs_in_an_old_python_without_the_project():
    tree = ast.parse(Path(calvin.__file__).read_text(), feature_version=(3, 8))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("datasets_scripts", "training")}


def test_a_connection_that_closes_ends_the_simulator_quietly(archive, stand_in):
    class Closed:
        """The other end: it asks once, and is gone when the answer comes."""

        def recv(self):
            return ("chains", 1)

        def send(self, answer):
            if isinstance(answer, list):
                raise BrokenPipeError

    calvin.serve_requests(Closed(), str(archive))


def test_a_process_of_another_python_answers_and_its_end_is_reported(archive, monkeypatch):
    folders = (STAND_IN, STAND_IN / "calvin_models")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    with CalvinPool(1, sys.executable, archive) as pool:
        assert len(pool.chains) == 1000 and "calvin_python" in pool.versions
        pool.reset(0, "turn_on_led", 0)
        seen = pool.receive(0)
        assert seen["images"]["wrist"].shape == (84, 84, 3) and seen["state"].dtype == np.float32
        assert seen["state"].tolist() == pytest.approx([0.0259, -0.2313, 0.5713, 3.0905, -0.0291, 1.5001, 1])
        pool.step(0, np.zeros(7))
        assert pool.receive(0)["success"]
        pool.follow(0, "no_such_task")
        with pytest.raises(RuntimeError, match="failed at follow: KeyError"):
            pool.receive(0)
        pool._processes[0].terminate()
        with pytest.raises(RuntimeError, match="simulator process 0 ended"):
            pool.follow(0, "open_drawer")
            pool.receive(0)


def test_the_policy_acts_alike_alone_and_beside_others(checkpoint, archive, rooms, tmp_path):
    for size in (1, 2):
        shared = {"chains": 2, "num_envs": size, "max_steps": 3, "output": tmp_path / f"{size}.json"}
        calvin_success.measure_calvin(CalvinOptions(str(checkpoint), archive, **shared))
    (alone,), (one, two) = rooms
    beside = [*one._env.actions, *two._env.actions]
    assert len(alone._env.actions) == len(beside) and np.abs(alone._env.actions).max() > 0
    np.testing.assert_allclose(alone._env.actions, beside, atol=1e-4)
