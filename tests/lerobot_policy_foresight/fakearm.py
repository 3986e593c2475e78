"""A robot without hardware, registered by LeRobot's own means as `--robot.type=fake_arm`.

LeRobot finds a robot's class in the module that is named like it, in lower case, beside its config.
"""

from dataclasses import dataclass, field

import numpy as np
from lerobot.robots import Robot, RobotConfig

HEIGHT, WIDTH = 30, 50


@RobotConfig.register_subclass("fake_arm")
@dataclass(kw_only=True)
class FakeArmConfig(RobotConfig):
    """Which parts the arm has; after `frames` observations somebody presses Ctrl-C, or `stop` is called."""

    joints: list[str] = field(default_factory=lambda: ["pan", "lift", "elbow", "wrist", "gripper"])
    views: list[str] = field(default_factory=lambda: ["main", "wrist"])
    depth_views: list[str] = field(default_factory=list)
    frames: int = 5


class FakeArm(Robot):
    """Shows pictures that depend on how often it was asked, and remembers what it was told."""

    config_class = FakeArmConfig
    name = "fake_arm"
    made: list["FakeArm"] = []  # tests look at the last one

    def __init__(self, config: FakeArmConfig):
        super().__init__(config)
        self.config, self.seen, self.sent = config, [], []
        self.connected = False
        self.made.append(self)

    @property
    def observation_features(self) -> dict:
        joints = {f"{joint}.pos": float for joint in self.config.joints}
        views = dict.fromkeys(self.config.views, (HEIGHT, WIDTH, 3))
        return joints | views | {f"{view}_depth": (HEIGHT, WIDTH, 1) for view in self.config.depth_views}

    @property
    def action_features(self) -> dict:
        return {f"{joint}.pos": float for joint in self.config.joints}

    @property
    def is_connected(self) -> bool:
        return self.connected

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict:
        """The first one is LeRobot's, to know where the robot stands."""
        if len(self.seen) > self.config.frames:
            raise KeyboardInterrupt
        draw = np.random.default_rng(len(self.seen))
        seen = {f"{joint}.pos": float(draw.normal()) for joint in self.config.joints}
        for view in self.config.views:
            seen[view] = draw.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for view in self.config.depth_views:
            seen[f"{view}_depth"] = draw.integers(300, 2000, (HEIGHT, WIDTH, 1), dtype=np.uint16)
        self.seen.append(seen)
        return dict(seen)

    def send_action(self, action: dict) -> dict:
        self.sent.append(action)
        return action

    def disconnect(self) -> None:
        self.connected = False
