"""Simulators without a simulator, for tests of the closed loop and of the commands that run it."""

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
