# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's asynchronous policy server, for policies that remember what they saw.

python -m lerobot_policy_foresight.policy_server --host=127.0.0.1 --port=8080 --fps=20

LeRobot's own server knows no plugins, and drops observations that wait or look alike. Here every observation
enters the window in order: one frame per executed action, as in training. The client is LeRobot's, with
`--chunk_size_threshold=1.0`, so that it sends every frame. One client at a time.

LeRobot's protocol unpickles what it receives: whoever reaches the port can run code here. Listen on other
addresses than loopback only in networks that you trust.
"""

import contextlib
import signal
import threading
from concurrent import futures
from dataclasses import dataclass, field
from queue import Empty

import draccus
import torch
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame
from lerobot.utils.import_utils import register_third_party_plugins
from torch import Tensor

try:
    import grpc
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.constants import SUPPORTED_POLICIES
    from lerobot.async_inference.helpers import TimedAction, TimedObservation
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot.transport import services_pb2_grpc
except ImportError as error:
    raise ImportError(
        f"The policy server needs {error.name}: pip install 'lerobot_policy_foresight[async]'."
    ) from error

from .modeling_foresight import LeRobotForesightPolicy

__all__ = ["ForesightServer", "ForesightServerConfig", "make_server"]


@dataclass
class ForesightServerConfig(PolicyServerConfig):
    """Options of the server.

    Args:
        host (`str`): Address to listen on; only this machine reaches the default.
        port (`int`): Port to listen on.
        fps (`int`): Frames per second of the robot; must be those of the policy's training data.
        inference_latency (`float`): Least seconds that an answer takes.
        obs_queue_timeout (`float`): Seconds that a request waits for an observation.
        cameras (`dict[str, str]`): View -> image key of the robot, where they are not the policy's; LeRobot's
            client has no option for it. `{"wrist": null}` leaves out a view.
    """

    host: str = "127.0.0.1"
    inference_latency: float = 0.0
    cameras: dict[str, str | None] = field(default_factory=dict)


class ForesightServer(PolicyServer):
    """Answers LeRobot's `RobotClient` with chunks of actions.

    The window has one frame per executed action. A newer observation of the same timestep, which a client
    sends while it waits, replaces the older one; the previous frame fills in for missing timesteps.
    """

    def __init__(self, config: ForesightServerConfig):
        super().__init__(config)
        if LeRobotForesightPolicy.name not in SUPPORTED_POLICIES:
            SUPPORTED_POLICIES.append(LeRobotForesightPolicy.name)
        self._waiting: dict[int, TimedObservation] = {}  # timestep -> its newest observation, in order
        self._last_timestep = -1  # of any observation that arrived
        self._waiting_lock = threading.Lock()
        self._policy_lock = threading.Lock()
        self._newest: tuple[int, dict] | None = None  # timestep and batch of the window's newest frame

    def _reset_server(self) -> None:
        """Forgets the last client and its robot's observations."""
        super()._reset_server()
        with self._policy_lock, self._waiting_lock:
            self._waiting.clear()
            self._last_timestep = -1
            self._forget()

    def _forget(self) -> None:
        self._newest = None
        if self.policy is not None:
            self.policy.reset()

    def SendPolicyInstructions(self, request, context):  # noqa: N802
        """Loads the policy that the client names; the client gets the message if it does not fit."""
        with self._policy_lock:
            self.policy = self._newest = None
            answer = super().SendPolicyInstructions(request, context)
            if self.policy is None:  # no client has said that it is ready
                return answer
            policy, self.policy = self.policy, None
            self._check_policy(policy)
            self.policy = policy
        return answer

    def _check_policy(self, policy) -> None:
        """Raises if the policy would fail, or move the robot wrongly, at the first observation."""
        if not isinstance(policy, LeRobotForesightPolicy):
            raise ValueError(
                f"This server serves foresight policies, not {self.policy_type!r}, for which there is "
                "python -m lerobot.async_inference.policy_server."
            )
        config = policy.config
        if config.fps and config.fps != self.config.fps:
            raise ValueError(
                f"The server was started with --fps={self.config.fps}; the policy learned from {config.fps} "
                "frames per second: give that to server and client."
            )
        asked, planned = self.actions_per_chunk, policy.model.config.chunk_size
        if min(asked, planned) < 2:
            raise ValueError(
                f"An answer would have one action (the client's --actions_per_chunk={asked}, the policy "
                f"plans {planned}), which LeRobot's client has executed when it arrives: the robot would "
                "stop after its first step. Give it 2 or more."
            )
        if self.config.cameras:
            config.cameras = config.cameras | self.config.cameras
            config.validate_features()
        renamed = {}
        for step in self.preprocessor.steps:
            if isinstance(step, RenameObservationsProcessorStep):
                renamed |= step.rename_map
        there = {renamed.get(key, key): value for key, value in self.lerobot_features.items()}
        if absent := [key for key in config.cameras.values() if key not in there]:
            images = [key for key in there if key != OBS_STATE]
            raise ValueError(
                f"The robot has {images}, but the policy needs {absent}: start the server with "
                """--cameras='{"VIEW": "KEY"}', or with '{"VIEW": null}' to leave the view out."""
            )
        state = config.robot_state_feature
        joints = there.get(OBS_STATE, {"shape": (0,), "names": []})
        if state is not None and tuple(joints["shape"]) != tuple(state.shape):
            raise ValueError(
                f"The robot's state has the {joints['shape'][0]} entries {joints['names']}; the policy was "
                f"made for {state.shape[0]}."
            )

    def _enqueue_observation(self, obs: TimedObservation) -> bool:
        """Keeps every frame until the next answer; LeRobot would keep the last one, if it differs."""
        with self._waiting_lock:
            timestep = obs.get_timestep()
            if timestep < self._last_timestep:
                self.logger.warning(
                    f"An observation of step {timestep} came after one of step {self._last_timestep} and is "
                    "left out: does a second client send to this server? It serves one client at a time."
                )
                return False
            self._last_timestep = timestep
            self._waiting[timestep] = obs
            self._empty_queue()
            self.observation_queue.put(obs)  # wakes who waits for an answer
        return True

    def _empty_queue(self) -> None:
        with contextlib.suppress(Empty):
            self.observation_queue.get_nowait()

    def _predict_action_chunk(self, observation_t: TimedObservation) -> list[TimedAction]:
        """Adds all waiting frames to the window and plans from the newest one."""
        with self._policy_lock:
            with self._waiting_lock:
                frames, self._waiting = list(self._waiting.values()), {}
                self._empty_queue()
            if self.policy is None:
                raise RuntimeError("No policy is loaded: the client has not named one, or it was refused.")
            if not frames:
                raise RuntimeError("The client has restarted.")
            try:
                for frame in frames:
                    chunk = self._add_frame(frame)
            except Exception:
                self._forget()  # half a frame is in the window
                raise
            actions = self.postprocessor(chunk[0, : self.actions_per_chunk])
        newest = frames[-1]
        return self._time_action_chunk(newest.get_timestamp(), list(actions.cpu()), newest.get_timestep())

    def _add_frame(self, frame: TimedObservation) -> Tensor:
        """Adds one frame to the window; returns the policy's chunk `(1, K, A)` for it."""
        timestep = frame.get_timestep()
        raw = frame.get_observation()
        batch = build_dataset_frame(self.lerobot_features, raw, prefix=OBS_STR)
        batch = prepare_observation_for_inference(batch, torch.device(self.device), raw.get("task"))
        batch = self.preprocessor(batch)  # as in lerobot-rollout: only our processor resizes
        before, last = self._newest or (timestep - 1, batch)
        missing = timestep - before - 1
        if missing > 0:
            self.logger.warning(
                f"No observation came for {missing} steps before step {timestep}: start the client with "
                "--chunk_size_threshold=1.0, or use a faster network."
            )
        if missing >= self.policy.model.config.history_length:
            self.policy.reset()
            missing = 0
        for _ in range(missing):
            self.policy.predict_action_chunk(last)
        chunk = self.policy.predict_action_chunk(batch, again=timestep == before)
        self._newest = timestep, batch
        return chunk


def make_server(config: ForesightServerConfig) -> tuple[grpc.Server, ForesightServer]:
    """A server that is bound to its address but not started, and its service.

    Raises:
        RuntimeError: If the address is taken.
    """
    service = ForesightServer(config)
    # By default gRPC would share the port with a running server, and some clients would reach that one.
    alone = [("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=alone)
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(service, server)
    server.add_insecure_port(f"{config.host}:{config.port}")
    return server, service


@draccus.wrap()
def serve(config: ForesightServerConfig) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    server, service = make_server(config)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    server.start()
    service.logger.info(f"Serving 3D Foresight on {config.host}:{config.port}")
    stopped.wait()
    service.stop()
    server.stop(grace=1).wait()
    service.logger.info("Stopped")


def main() -> None:
    """The command `foresight-policy-server`."""
    register_third_party_plugins()
    serve()


if __name__ == "__main__":
    main()
