# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's asynchronous policy server, for policies that remember what they saw.

python -m lerobot_policy_foresight.policy_server --host=127.0.0.1 --port=8080 --fps=20

LeRobot's own server knows no plugins, and drops observations that wait or look alike. Here every observation
enters the window in order: one frame per executed action, as in training. The client is LeRobot's, with
`--chunk_size_threshold=1.0`, so that it sends every frame. One client at a time.

LeRobot's messages are pickles, of which only the types that its client sends are read (`server_messages.py`).
Nobody has to log in: whoever reaches the port can load models and move the robot. Keep it on loopback, and
reach it from another machine through an SSH tunnel or a VPN (docs/robots.md).
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field

import draccus
import torch
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame
from lerobot.utils.import_utils import register_third_party_plugins
from torch import Tensor

from datasets_scripts.command_line import entry_point
from datasets_scripts.extras import install_advice

try:
    import grpc
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.constants import SUPPORTED_POLICIES
    from lerobot.async_inference.helpers import TimedAction, TimedObservation
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot.transport import services_pb2
    from lerobot.transport.utils import receive_bytes_in_chunks

    from .server_messages import limit_chunks, read_observation, read_policy_request
except ImportError as error:
    raise ImportError(f"The policy server needs {error.name}: {install_advice('async')}.") from error

from .modeling_foresight import LeRobotForesightPolicy

__all__ = ["ForesightServer", "ForesightServerConfig", "make_server"]

# A client has two calls at a time. Beyond these numbers, the oldest call that sends nothing, or waits for
# actions, gives way: silent clients never keep the others waiting.
LISTENING, ASKING = 16, 4
THREADS = 2 * (LISTENING + ASKING)
SERVER_OPTIONS = {
    "grpc.so_reuseport": 0,  # some clients of a server that runs on the port would reach the second one
    "grpc.keepalive_time_ms": 10_000,  # a client whose network is gone is forgotten
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.max_connection_idle_ms": 60_000,
    "grpc.max_concurrent_streams": 64,  # calls of one connection
    "grpc.max_allowed_incoming_connections": 512,
}
OLDER = 3  # observations in a row of steps that are over, before the server takes them for the right ones


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
        embodiment (`str`, *optional*): The robot, of a policy for several.
    """

    host: str = "127.0.0.1"
    inference_latency: float = 0.0
    cameras: dict[str, str | None] = field(default_factory=dict)
    embodiment: str | None = None


class ForesightServer(PolicyServer):
    """Answers LeRobot's `RobotClient` with chunks of actions.

    The window has one frame per executed action. A newer observation of the same timestep, which a client
    sends while it waits, replaces the older one; the previous frame fills in for missing timesteps.
    """

    def __init__(self, config: ForesightServerConfig):
        super().__init__(config)
        if LeRobotForesightPolicy.name not in SUPPORTED_POLICIES:
            SUPPORTED_POLICIES.append(LeRobotForesightPolicy.name)
        self._changed = threading.Condition()  # guards the next seven, and wakes who waits for actions
        self._listening: dict[grpc.ServicerContext, None] = {}  # calls that have not sent all, by age
        self._asking: deque[grpc.ServicerContext] = deque(maxlen=ASKING)
        self._waiting: dict[int, TimedObservation] = {}  # timestep -> its newest observation, in order
        self._last_timestep = -1  # of any observation that arrived
        self._older = 0  # observations in a row that came after one of a later step
        self._history = 1  # frames that can matter
        self._restarted = False  # what the policy saw is of another client
        self._policy_lock = threading.Lock()
        self._loading = threading.Lock()
        self._newest: tuple[int, dict] | None = None  # timestep and batch of the window's newest frame

    @contextlib.contextmanager
    def listen(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Counts a call whose messages have not all come; ends the oldest of too many."""
        with self._changed:
            self._listening[context] = None
            if len(self._listening) > LISTENING:
                oldest = next(iter(self._listening))
                del self._listening[oldest]
                oldest.cancel()
        try:
            yield
        finally:
            with self._changed:
                self._listening.pop(context, None)

    def _reset_server(self) -> None:
        """Forgets the last client and its robot's observations."""
        with self._changed:
            for context in self._listening:
                context.cancel()
            self._waiting.clear()
            self._last_timestep, self._older, self._restarted = -1, 0, True

    def stop(self) -> None:
        """Ends all calls that wait."""
        self.shutdown_event.set()
        self._reset_server()
        with self._changed:
            self._asking.clear()
            self._changed.notify_all()

    def _forget(self) -> None:
        self._newest = None
        if self.policy is not None:
            self.policy.reset()

    def SendPolicyInstructions(self, request, context):  # noqa: N802
        """Loads the policy that the client names; the client gets the message if it does not fit."""
        asked = read_policy_request(request.data)
        if asked.policy_type != LeRobotForesightPolicy.name:
            raise ValueError(
                f"This server serves foresight policies; {asked.policy_type!r} is not supported: use "
                "python -m lerobot.async_inference.policy_server."
            )
        if not self._loading.acquire(blocking=False):
            raise ValueError("Another client's policy is being loaded: try again in a moment.")
        try:
            with self._policy_lock:
                self.policy = self._newest = None
                # It unpickles the same bytes, in which nothing else is named.
                answer = super().SendPolicyInstructions(request, context)
                policy, self.policy = self.policy, None
                self._check_policy(policy)
                self.policy, self._history = policy, policy.model.config.history_length
        finally:
            self._loading.release()
        return answer

    def _check_policy(self, policy) -> None:
        """Raises if the policy would fail, or move the robot wrongly, at the first observation."""
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
        # Refuses a robot that is unknown, or none of several.
        policy.processor.choose_embodiment(self.config.embodiment or config.embodiment)
        if self.config.cameras or self.config.embodiment:
            config.embodiment = self.config.embodiment or config.embodiment
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

    def SendObservations(self, request_iterator, context):  # noqa: N802
        """Keeps an observation until the next answer; the client gets the message if it is refused."""
        data = receive_bytes_in_chunks(limit_chunks(request_iterator), None, self.shutdown_event)
        if data is not None:  # whole
            self._enqueue_observation(read_observation(data))
        return services_pb2.Empty()

    def _enqueue_observation(self, obs: TimedObservation) -> bool:
        """Keeps every frame that can matter; LeRobot would keep the last one, if it differs."""
        timestep = obs.get_timestep()
        with self._changed:
            self._older = self._older + 1 if timestep < self._last_timestep else 0
            if 0 < self._older <= OLDER:
                self.logger.warning(
                    f"An observation of step {timestep} came after one of step {self._last_timestep} and is "
                    "left out: does a second client send to this server? It serves one client at a time."
                )
                return False
            if self._older:  # the later step was the wrong one
                self._waiting.clear()
                self._older = 0
            self._last_timestep = timestep
            self._waiting[timestep] = obs
            while len(self._waiting) > self._history:
                del self._waiting[next(iter(self._waiting))]
            self._changed.notify_all()
        return True

    def GetActions(self, request, context):  # noqa: N802
        """The next chunk of actions, after an observation has come; otherwise nothing."""
        start = time.monotonic()
        with self._changed:
            self._asking.append(context)
            self._changed.notify_all()  # the oldest of too many
            self._changed.wait_for(
                lambda: (self._waiting and self._asking[-1] is context) or context not in self._asking,
                self.config.obs_queue_timeout,
            )
        try:
            # Loading a policy takes long.
            if not self._policy_lock.acquire(timeout=self.config.obs_queue_timeout):
                return services_pb2.Actions()
            try:
                actions = self._plan_from_waiting(context)
            finally:
                self._policy_lock.release()
        except Exception as error:
            self.logger.error(f"No actions: {error}")
            return services_pb2.Actions()
        finally:
            with self._changed, contextlib.suppress(ValueError):
                self._asking.remove(context)
                self._changed.notify_all()  # the one before may be next
        time.sleep(max(0, self.config.inference_latency - (time.monotonic() - start)))
        # As LeRobot's client reads them.
        return services_pb2.Actions(data=pickle.dumps(actions) if actions else b"")

    def _plan_from_waiting(self, context: grpc.ServicerContext) -> list[TimedAction]:
        """Adds all waiting frames to the window and plans from the newest one.

        Nothing if there is none, or somebody asked later.
        """
        with self._changed:
            mine = self._asking and self._asking[-1] is context and context.is_active()
            frames, self._waiting = (list(self._waiting.values()), {}) if mine else ([], self._waiting)
            restarted, self._restarted = self._restarted, False
        if restarted:
            self._forget()
        if frames and self.policy is None:
            raise RuntimeError("No policy is loaded: the client has not named one, or it was refused.")
        if not frames:
            return []
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
        if missing >= self.policy.model.config.history_length or missing < -1:
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
    pool = futures.ThreadPoolExecutor(THREADS)
    server = grpc.server(pool, options=list(SERVER_OPTIONS.items()), maximum_concurrent_rpcs=4 * THREADS)
    messages = {
        "Ready": services_pb2.Empty,
        "SendPolicyInstructions": services_pb2.PolicySetup,
        "SendObservations": services_pb2.Observation,
        "GetActions": services_pb2.Empty,
    }
    handlers = {name: _build_handler(service, name, kind) for name, kind in messages.items()}
    generic = grpc.method_handlers_generic_handler("transport.AsyncInference", handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_insecure_port(f"{config.host}:{config.port}")
    return server, service


def _build_handler(service: ForesightServer, method: str, kind: type) -> grpc.RpcMethodHandler:
    """How gRPC calls a method. A single message comes as a stream of one, as on the wire.

    Otherwise gRPC would wait for it in a thread that nothing can wake.
    """
    answer = getattr(service, method)

    def handle(messages, context):
        try:
            with service.listen(context):
                if method == "SendObservations":
                    return answer(messages, context)
                message = next(messages)
            return answer(message, context)
        except ValueError as error:
            service.logger.error(f"{method} of {context.peer()} is refused: {error}")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:1000])

    return grpc.stream_unary_rpc_method_handler(
        handle,
        request_deserializer=kind.FromString,
        response_serializer=lambda reply: reply.SerializeToString(),
    )


def run_until_ended(start: Callable[[], None]) -> None:
    """Starts something, and returns after Ctrl-C or SIGTERM; must run in the main thread."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    start()
    # Handlers run in this thread, but a signal that the system gives to one of gRPC's does not wake it.
    while not ended.wait(timeout=0.2):
        pass


@draccus.wrap()
def serve(config: ForesightServerConfig) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    server, service = make_server(config)

    def start() -> None:
        server.start()
        service.logger.info(f"Serving 3D Foresight on {config.host}:{config.port}")

    run_until_ended(start)
    service.stop()
    server.stop(grace=1).wait(timeout=5)
    service.logger.info("Stopped")
    logging.shutdown()
    os._exit(0)  # a model that loads or computes would keep the process


@entry_point()
def main() -> None:
    """The command `foresight-policy-server`."""
    register_third_party_plugins()
    serve()


if __name__ == "__main__":
    sys.exit(main())
