"""Simulators without a simulator, for tests of the closed loop and of the commands that run it."""

import json
from types import SimpleNamespace

import numpy as np

SIDE = 24


class FakePool:
    """Simulators that succeed after `seed % 7` actions (never for 0), and check how they are used."""

    def __init__(self, size):
        self.size, self.state, self.asked = size, {}, set()

    def __len__(self):
        return self.size

    def reset(self, worker, task, seed):
        self.state[worker] = SimpleNamespace(task=task, seed=seed, steps=0, frames=0)
        self.asked.add(worker)

    def step(self, worker, action, repeat):
        assert worker not in self.asked, "two requests without reading the answer"
        state = self.state[worker]
        assert action[0] == state.seed, "an action for another robot"
        state.steps += 1
        state.repeat = repeat
        self.asked.add(worker)

    def receive(self, worker):
        self.asked.remove(worker)
        state = self.state[worker]
        picture = np.full((SIDE, SIDE, 3), state.steps, np.uint8)
        return {
            "images": {"main": picture, "wrist": picture},
            "state": np.array([state.seed, state.steps, 0, 0], np.float32),
            "success": 0 < state.seed % 7 <= state.steps,
            "instruction": state.task,
            "simulation_steps": state.steps * 4,
        }


class CommandPool(FakePool):
    """The same as a command opens it: an untrained policy's actions succeed too.

    Attributes:
        notes (`SimpleNamespace`): `opened`, with which options, and `used`, for which tasks and seeds.
    """

    notes: SimpleNamespace

    def __init__(self, size, make_simulator):
        super().__init__(size)
        self.notes.opened, self.notes.used = {"size": size, **make_simulator.keywords}, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def reset(self, worker, task, seed):
        super().reset(worker, task, seed)
        self.notes.used.append((task, seed))

    def step(self, worker, action, repeat):
        super().step(worker, [self.state[worker].seed], repeat)


def record_libero_file(task: str, actions: np.ndarray, path, side: int) -> None:
    """Writes an episode from a suite's first initial state as LIBERO's own scripts do.

    It has commands, images after each and states before each of them, and the model with paths of another
    machine.
    """
    import h5py
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    from datasets_scripts.simulation.libero import asset_folders
    from datasets_scripts.simulation.libero_files import load_initial_states, task_file

    env = OffScreenRenderEnv(bddl_file_name=str(task_file(task)), camera_heights=side, camera_widths=side)
    env.seed(0)
    env.reset()
    env.set_init_state(load_initial_states(task)[0])
    for _ in range(10):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1]))
    frames = {"agentview_rgb": [], "eye_in_hand_rgb": [], "ee_states": [], "gripper_states": []}
    states = []
    for action in actions:
        states.append(env.get_sim_state())
        seen, *_ = env.step(action)
        frames["agentview_rgb"].append(seen["agentview_image"])
        frames["eye_in_hand_rgb"].append(seen["robot0_eye_in_hand_image"])
        turn = quat2axisangle(seen["robot0_eef_quat"].copy())
        frames["ee_states"].append(np.concatenate([seen["robot0_eef_pos"], turn]))
        frames["gripper_states"].append(seen["robot0_gripper_qpos"])
    model = env.sim.model.get_xml()
    libero, robosuite = asset_folders()
    for ours, theirs in ((libero, "chiliocosm/assets"), (robosuite, "robosuite/robosuite/models/assets")):
        for name in {str(ours), str(ours.resolve())}:
            model = model.replace(name, f"/somewhere/{theirs}")
    env.close()
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "go"})
        for name, values in frames.items():
            data.create_dataset(f"demo_0/obs/{name}", data=np.stack(values))
        data.create_dataset("demo_0/actions", data=actions)
        data.create_dataset("demo_0/states", data=np.stack(states))
        data["demo_0"].attrs["model_file"] = model
