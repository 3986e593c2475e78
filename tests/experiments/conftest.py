"""Plans of miniature size, and simulators without a process of their own."""

import pytest
import yaml

PLAN = {
    "tasks": ["drawer-open-v3"],
    "variants": {"foresight_3d": None, "action_only": None},
    "steps": 2,
    "demonstrations": [2],
    "recording": {"image_size": 32, "stride": 10, "n_points": 50, "noise": 0.0, "cameras": ["main"]},
    "episodes": 2,
    "max_steps": 20,
    "losses": ["depth", "flow"],
    "overrides": {
        "model.views": ["main"],
        "model.image_size": 32,
        "model.vision_config.model_args.img_size": 32,
        "data.val_fraction": 0.5,
        "data.baseline_windows": 4,
        "train.batch_size": 2,
        "train.warmup_steps": 1,
    },
}


def row_facts(plan, trials):
    """What the row of a finished cell says about how it was made."""
    made = {"commit": "abc", "command": "made", "versions": {}, "hardware": {}}
    return {"steps": plan.steps, "trials": trials, "first_start": plan.first_start, "step_cpu_s": 0.5} | made


@pytest.fixture
def write_plan(tmp_path):
    """Writes the plan with changes; gives its path."""

    def write(**changes):
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
        return path

    return write


class LocalPool:
    """A `SimulationPool` of one simulator in this process."""

    def __init__(self, size, make_simulator):
        assert size == 1
        self.make_simulator, self.sim, self.success = make_simulator, None, False

    def __len__(self):
        return 1

    def reset(self, worker, task, seed):
        self.sim = self.sim or self.make_simulator(task)
        self.sim.reset(seed)
        self.success = False

    def step(self, worker, action, repeat):
        self.success = self.sim.step(action, repeat, stop_on_success=True)

    def receive(self, worker):
        seen = self.sim.observe() | {"success": self.success, "simulation_steps": self.sim.steps_taken}
        return seen | {"instruction": self.sim.task_description}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sim.close()


@pytest.fixture
def local_pool(simulator, monkeypatch, tmp_path):
    """Evaluations run in this process; caches lie in the test's folder."""
    monkeypatch.setattr("training.evaluation.simulated.simulation_pool.SimulationPool", LocalPool)
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return LocalPool
