"""The asynchronous policy server, asked over loopback by LeRobot's own client."""

import dataclasses
import importlib
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from tests.lerobot_policy_foresight.fakearm import FakeArmConfig
from tests.lerobot_policy_foresight.test_rollout import TASK, sent_actions, write_folder

grpc = pytest.importorskip("grpc", reason="extra async")
from lerobot.async_inference.helpers import TimedObservation  # noqa: E402
from lerobot.transport import services_pb2, services_pb2_grpc  # noqa: E402

from lerobot_policy_foresight.server_messages import limit_chunks, read_observation  # noqa: E402

WAIT_S = 30  # for what takes milliseconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Our server's module and LeRobot's client's; importing them makes a folder `logs` where one stands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("logs"))
        for name in ("handlers", "level"):
            patch.setattr(logging.root, name, getattr(logging.root, name))
        return (
            importlib.import_module("lerobot_policy_foresight.policy_server"),
            importlib.import_module("lerobot.async_inference.robot_client"),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    write_folder(folder)
    return folder


@pytest.fixture
def serve(modules, monkeypatch):
    """Starts servers, gives their addresses, and stops them."""
    module, _ = modules
    for name in ("handlers", "level"):
        monkeypatch.setattr(logging.root, name, getattr(logging.root, name))
    running = []

    def start(**options):
        config = module.ForesightServerConfig(port=free_port(), **{"fps": 20} | options)
        server, service = module.make_server(config)
        server.start()
        running.append((server, service))
        return f"127.0.0.1:{config.port}", service

    yield start
    for server, service in running:
        service.stop()
        assert server.stop(grace=None).wait(WAIT_S)


@pytest.fixture
def connect(modules, folder, tmp_path):
    """Makes LeRobot's client, with the arm, and disconnects it at the end."""
    _, module = modules
    made = []

    class Client(module.RobotClient):
        """LeRobot's, which also says when actions have come."""

        def __init__(self, config):
            super().__init__(config)
            self.start_barrier = threading.Barrier(1)  # the test is the other thread, and needs no start
            self.answered = threading.Event()

        def _aggregate_action_queues(self, *args):
            super()._aggregate_action_queues(*args)
            self.answered.set()

        def tick(self, wait: bool = True) -> None:
            """As `control_loop`; then waits for the answer in place of the time until the next tick."""
            if self.actions_available():
                self.control_loop_action()
            self.answered.clear()
            self.control_loop_observation(TASK)
            assert not wait or self.answered.wait(WAIT_S)

    def make(address: str, options: dict | None = None, **robot) -> Client:
        config = module.RobotClientConfig(
            policy_type="foresight",
            pretrained_name_or_path=str(folder),
            robot=FakeArmConfig(calibration_dir=tmp_path / "calibration", frames=100, **robot),
            actions_per_chunk=4,
            task=TASK,
            server_address=address,
            chunk_size_threshold=1.0,
            aggregate_fn_name="latest_only",
            fps=20,
        )
        client = Client(dataclasses.replace(config, **(options or {})))
        client.thread = threading.Thread(target=client.receive_actions, daemon=True)
        made.append(client)
        return client

    yield make
    for client in made:
        client.stop()
        if client.thread.is_alive():
            client.thread.join(WAIT_S)


class Expected:
    """What the model's own stream does."""

    def __init__(self, folder):
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        self.stream = model.stream(processor)
        self.stream.reset(TASK)

    def chunk(self, seen: dict, again: bool = False, views=("main", "wrist")) -> np.ndarray:
        state = np.array([value for key, value in seen.items() if key.endswith(".pos")], dtype=np.float32)
        return self.stream.step_chunk({view: seen[view] for view in views}, state, again=again).numpy()


def assert_queue(client, chunk: np.ndarray, first: int) -> None:
    """The client holds the chunk from its entry `first` on."""
    held = torch.stack([action.get_action() for action in client.action_queue.queue])
    np.testing.assert_allclose(held, chunk[first:], rtol=1e-4, atol=1e-5)


def test_a_client_gets_the_actions_of_the_stream(serve, connect, folder):
    address, _ = serve()
    client, expected = connect(address), Expected(folder)
    assert client.start()
    client.thread.start()
    client.tick()
    seen = client.robot.seen
    chunks = [expected.chunk(seen[0])]
    assert_queue(client, chunks[0], 0)
    for step in range(6):
        client.tick()
        # LeRobot counts from the last performed action: what is seen before and after the first is step 0.
        chunks.append(expected.chunk(seen[-1], again=step == 0))
        assert_queue(client, chunks[-1], 1)
    done = [chunks[0][0], *(chunk[1] for chunk in chunks[1:-1])]
    np.testing.assert_allclose(sent_actions(client.robot), done, rtol=1e-4, atol=1e-5)


def test_frames_that_come_while_the_model_thinks_enter_the_window_too(serve, connect, folder):
    address, service = serve()
    client, expected = connect(address), Expected(folder)
    assert client.start()
    client.thread.start()
    client.tick()
    chunk = expected.chunk(client.robot.seen[0])
    with service._policy_lock:  # it thinks
        for step in range(3):
            client.tick(wait=False)
            chunk = expected.chunk(client.robot.seen[-1], again=step == 0)
        client.answered.clear()
    assert client.answered.wait(WAIT_S)
    held = [action.get_action() for action in client.action_queue.queue]
    np.testing.assert_allclose(held[-1], chunk[-1], rtol=1e-4, atol=1e-5)


def test_a_frame_that_never_comes_is_replaced_by_the_one_before(serve, connect, folder, caplog):
    address, service = serve()
    client, expected = connect(address), Expected(folder)
    assert client.start()
    client.thread.start()
    client.tick()
    client.tick()
    for seen, again in zip(client.robot.seen, (False, True), strict=True):
        expected.chunk(seen, again)
    client.control_loop_action()  # and sends nothing
    caplog.set_level(logging.WARNING)
    client.tick()
    expected.chunk(client.robot.seen[1])
    assert_queue(client, expected.chunk(client.robot.seen[2]), 1)
    assert "No observation came for 1 steps before step 2" in caplog.text


def test_after_a_failure_on_the_way_the_next_frame_begins_a_window(
    serve, connect, folder, monkeypatch, caplog
):
    address, service = serve()
    client = connect(address)
    assert client.start()
    client.thread.start()
    client.tick()

    def fails(*args):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(service.policy._stream, "_predict", fails)
    client.tick(wait=False)
    for _ in range(100 * WAIT_S):
        if "the device is lost" in caplog.text:
            break
        time.sleep(0.01)
    client.tick()
    assert_queue(client, Expected(folder).chunk(client.robot.seen[-1]), 1)


def test_a_long_gap_begins_a_window(serve, connect, folder):
    address, _ = serve()
    client = connect(address)
    assert client.start()
    client.thread.start()
    client.tick()
    client.latest_action = 5  # and nothing was sent since; the window has 4 frames
    client.answered.clear()
    client.control_loop_observation(TASK)
    assert client.answered.wait(WAIT_S)
    assert_queue(client, Expected(folder).chunk(client.robot.seen[-1]), 1)


def test_a_second_client_is_named(serve, connect, caplog):
    address, _ = serve()
    first, second = connect(address), connect(address)
    assert first.start() and second.start()
    first.latest_action = 7
    first.control_loop_observation(TASK)
    second.control_loop_observation(TASK)
    assert "step 0 came after one of step 7 and is left out: does a second client" in caplog.text


def test_a_port_serves_one_server(modules, serve):
    address, _ = serve()
    module, _ = modules
    with pytest.raises(RuntimeError, match=address):
        module.make_server(module.ForesightServerConfig(port=int(address.rpartition(":")[2])))


def test_a_new_client_resets_the_server(serve, connect, folder):
    address, _ = serve()
    for _ in range(2):
        client = connect(address)
        assert client.start()
        client.thread.start()
        client.tick()
        assert_queue(client, Expected(folder).chunk(client.robot.seen[0]), 0)
        client.stop()
        client.thread.join(WAIT_S)


def test_cameras_are_named_at_the_server(serve, connect, folder):
    address, _ = serve(cameras={"main": "observation.images.top", "wrist": None})
    client = connect(address, views=["top", "side"], depth_views=["top"])
    assert client.start()
    client.thread.start()
    client.tick()
    seen = {**client.robot.seen[0], "main": client.robot.seen[0]["top"]}
    assert_queue(client, Expected(folder).chunk(seen, views=("main",)), 0)


def test_a_preprocessor_may_rename_in_several_steps(serve, connect, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    pipeline = json.loads((copy / "policy_preprocessor.json").read_text())
    (rename,) = (step for step in pipeline["steps"] if step["registry_name"].startswith("rename"))
    pipeline["steps"].insert(0, rename)
    (copy / "policy_preprocessor.json").write_text(json.dumps(pipeline))
    address, _ = serve()
    client = connect(address, {"pretrained_name_or_path": str(copy)})
    assert client.start()
    client.thread.start()
    client.tick()
    assert_queue(client, Expected(folder).chunk(client.robot.seen[0]), 0)


@pytest.mark.parametrize(
    ("server", "options", "robot", "message"),
    [
        ({}, {"policy_type": "cleverer"}, {}, "'cleverer' is not supported"),
        ({}, {"policy_type": "act", "pretrained_name_or_path": "unsafe"}, {}, "'act' is not supported"),
        ({}, {"pretrained_name_or_path": "unsafe"}, {}, "not registered .*subprocess.Popen"),
        ({"fps": 30}, {}, {}, "--fps=30; the policy learned from 20"),
        ({}, {}, {"views": ["top", "wrist"]}, "needs .'observation.images.main'.: .* --cameras="),
        ({}, {}, {"joints": ["pan", "lift"]}, "2 entries .'pan.pos', 'lift.pos'.; the policy was made for 5"),
        ({}, {"pretrained_name_or_path": "adapter"}, {}, "adapter.*merge"),
        ({}, {"actions_per_chunk": 1}, {}, "--actions_per_chunk=1, .* would stop after its first step"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_robot_moves(
    serve, connect, folder, tmp_path, monkeypatch, caplog, server, options, robot, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "config.json").write_text((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "unsafe")
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(tmp_path / "ran")]}}
    (tmp_path / "unsafe" / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
    address, _ = serve(**server)
    client = connect(address, options, **robot)
    with caplog.at_level(logging.ERROR):
        assert not client.start()
    assert re.search(message, caplog.text) and not (tmp_path / "ran").exists()


@pytest.fixture
def call_silently():
    """Starts calls that never send anything, counts those that have ended, and ends the others."""
    end, ended, channels = threading.Event(), threading.Semaphore(0), []

    def call(address: str, method: str, count: int) -> threading.Semaphore:
        for _ in range(count):
            channels.append(grpc.insecure_channel(address))
            started = channels[-1].stream_unary(f"/transport.AsyncInference/{method}")
            started.future(iter(end.wait, True)).add_done_callback(lambda _: ended.release())
        return ended

    yield call
    end.set()
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("method", ["Ready", "SendPolicyInstructions", "SendObservations", "GetActions"])
def test_silent_clients_do_not_keep_the_others_waiting(modules, serve, call_silently, method):
    address, _ = serve()
    ended = call_silently(address, method, modules[0].LISTENING + 3)
    assert all(ended.acquire(timeout=WAIT_S) for _ in range(3))  # the oldest gave way; the others are silent
    with grpc.insecure_channel(address) as channel:
        services_pb2_grpc.AsyncInferenceStub(channel).Ready(services_pb2.Empty(), timeout=1)


def test_whoever_asks_last_gets_the_actions(modules, serve, connect, folder):
    address, service = serve(obs_queue_timeout=WAIT_S)
    client = connect(address)
    assert client.start()
    with grpc.insecure_channel(address) as channel:
        ask = services_pb2_grpc.AsyncInferenceStub(channel).GetActions.future
        ended = threading.Semaphore(0)
        for _ in range(modules[0].ASKING + 2):
            ask(services_pb2.Empty()).add_done_callback(lambda call: call.result().data or ended.release())
        assert ended.acquire(timeout=WAIT_S) and ended.acquire(timeout=WAIT_S)  # the oldest, with nothing
        with service._changed:
            before = set(service._asking)
            client.thread.start()
            # What it sees may go out only after it asked: the call before it would get the actions.
            assert service._changed.wait_for(lambda: set(service._asking) - before, WAIT_S)
        client.tick()
        assert_queue(client, Expected(folder).chunk(client.robot.seen[0]), 0)


def test_frames_older_than_the_window_are_not_kept(serve, connect, folder, monkeypatch):
    address, service = serve()
    client, expected = connect(address), Expected(folder)
    assert client.start()
    for step in range(50):
        client.latest_action = step
        client.control_loop_observation(TASK)
    assert list(service._waiting) == [46, 47, 48, 49]
    client.thread.start()
    assert client.answered.wait(WAIT_S)
    for seen in client.robot.seen[-4:]:
        chunk = expected.chunk(seen)
    assert_queue(client, chunk, 1)


def test_a_wrong_timestep_does_not_silence_a_client(serve, connect, folder):
    address, service = serve()
    client, other = connect(address), connect(address)
    assert client.start()
    for wrong in (10**15, -1, 2**31, 1.5, True, float("nan"), "7", None):
        other.latest_action = 0
        assert not other.send_observation(
            TimedObservation(timestamp=0.0, timestep=wrong, observation={"task": TASK})
        )
    assert other.send_observation(TimedObservation(timestamp=0.0, timestep=10**9, observation={}))
    for _ in range(4):  # the server believes the fourth
        client.control_loop_observation(TASK)
    client.thread.start()
    assert client.answered.wait(WAIT_S)
    assert_queue(client, Expected(folder).chunk(client.robot.seen[-1]), 0)


class Runs:
    """Its pickle runs a function that LeRobot's client does not send."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps(Runs(os.mkdir, "made")), "asks for posix.mkdir"),
        (pickle.dumps(TimedObservation(0.0, 0, {"main": Runs(os.mkdir, "made")})), "asks for posix.mkdir"),
        (pickle.dumps(TimedObservation(0.0, 0, {"main": torch.zeros(2)})), "asks for torch"),
        (pickle.dumps({"timestep": 0}), "is a dict, expected a TimedObservation"),
        (pickle.dumps(TimedObservation(0.0, 0, [1])), "must be a dict"),
        (pickle.dumps(TimedObservation(0.0, 0, {"task": 7})), "its task a text"),
        (pickle.dumps(TimedObservation(float("inf"), 0, {})), "timestamp=inf"),
        (pickle.dumps(TimedObservation(0.0, 0, {"main": Runs(np.ndarray, (5000, 5000), "u1")})), "larger"),
        (b"\x80\x04Nr\xff\xff\xff\xff.", "too many parts"),
        (b"\x80\x04" + b"(" * 200_000 + b".", "too many parts"),
        (b"nothing", "is not LeRobot's"),
        (b"", "is not LeRobot's"),
    ],
)
def test_a_message_that_lerobots_client_does_not_send_is_refused(tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        read_observation(data)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_robots_send_passes(protocol):
    values = {"pan.pos": np.float32(1.5), "lift.pos": 2.0, "task": TASK}
    values |= {
        "main": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1],
        "depth": np.ones(3, np.uint16),
    }
    seen = read_observation(pickle.dumps(TimedObservation(0.0, 3, values), protocol)).observation
    assert seen.keys() == values.keys() and all(np.array_equal(seen[key], values[key]) for key in seen)


def test_an_observation_of_any_size_ends(monkeypatch):
    monkeypatch.setattr("lerobot_policy_foresight.server_messages.MAX_OBSERVATION", 1 << 20)
    endless = itertools.repeat(services_pb2.Observation(data=bytes(1 << 18)))
    with pytest.raises(ValueError, match="larger than 1 MB"):
        list(limit_chunks(endless))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_reaches_another_thread_ends_the_server_too(modules, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    main, ended, late = threading.main_thread().ident, threading.Event(), []

    def waits() -> bool:
        callers = sys._current_frames()[main].f_back.f_back  # of Condition.wait in Event.wait
        return callers is not None and callers.f_code.co_name == "run_until_ended"

    def send():
        while not waits():
            pass
        signal.pthread_kill(threading.get_ident(), number)
        if not ended.wait(WAIT_S):
            late.append(number)
            signal.pthread_kill(main, number)

    thread = threading.Thread(target=send, daemon=True)
    try:
        modules[0].run_until_ended(thread.start)
    finally:
        ended.set()
        for each, handler in before.items():
            signal.signal(each, handler)
    thread.join(WAIT_S)
    assert not late


@pytest.mark.slow
def test_the_command_serves_until_it_is_ended(connect, call_silently, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "lerobot_policy_foresight.policy_server", f"--port={port}", "--fps=20"]
    server = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = ""
        for line in server.stdout:  # until it listens
            said += line
            if f"Serving 3D Foresight on 127.0.0.1:{port}" in line:
                break
        assert "Serving" in said, said
        client = connect(f"127.0.0.1:{port}")
        assert client.start()
        client.thread.start()
        client.tick()
        client.stop()
        client.thread.join(WAIT_S)
        call_silently(f"127.0.0.1:{port}", "SendObservations", 5)
        server.send_signal(signal.SIGTERM)
        assert "Stopped" in server.stdout.read() and server.wait(WAIT_S) == 0
    finally:
        server.kill()
