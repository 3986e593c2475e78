"""Depth from a command in another Python environment: the protocol, and what can go wrong with it."""

import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from datasets_scripts.depth import choose_depth_models, open_depth, worker
from datasets_scripts.depth.worker import WorkerDepth
from datasets_scripts.inspection.dataset_card import list_label_licenses
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError
from hub_cards.cards.licenses import derive_license

WORKERS = Path(choose_depth_models.__code__.co_filename).parent / "workers"
FRAMES, HEIGHT, WIDTH, FPS = 5, 6, 8, 10.0


def command(*parts) -> str:
    return shlex.join([sys.executable, *map(str, parts)])


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def write_worker(tmp_path):
    """A worker whose `estimate` has this body; gives its command."""

    def write(body: str, before: str = "", facts: str = "") -> str:
        path = tmp_path / "worker.py"
        path.write_text(
            f"import os, sys\nsys.path.insert(0, {str(WORKERS)!r})\nimport numpy as np\n"
            "from serving import serve\n"
            f"{before}\n"
            "def open_model():\n    def estimate(frames, fps):\n"
            + textwrap.indent(textwrap.dedent(body), " " * 8)
            + "\n    return estimate\n"
            "facts = {'model': 'a', 'license': 'cc-by-nc-4.0', 'is_metric': True, 'package': 'b'}\n"
            f"{facts}\nserve(facts, open_model)\n"
        )
        return command(path)

    return write


def test_the_example_gives_depth_of_every_frame_in_requests_that_do_not_divide_the_clip(video):
    source = open_depth("worker", command(WORKERS / "brightness.py"), batch_size=2)
    for _ in range(2):  # one process serves every clip
        meters, valid = zip(*source.estimate(video, FPS).runs, strict=True)
        want = 0.3 + 1.7 * (1 - video.mean(-1) / 255)
        np.testing.assert_allclose(np.concatenate(meters), want, rtol=1e-5)
        assert np.concatenate(valid).all() and [len(run) for run in meters] == [2, 2, 1]
    process = source.estimator._process
    source.estimator.__dict__.clear()
    del source
    assert process.wait(timeout=20) == 0  # it ends with what asked it


@pytest.mark.slow
def test_its_license_reaches_the_cards_of_dataset_and_model(write_worker):
    (model,) = open_depth("worker", write_worker("return frames[..., 0]")).describe()["models"]
    labels = {"main": {"depth": {"source": "worker", "models": [model]}}}
    assert list_label_licenses(labels) == [("a", "cc-by-nc-4.0")]
    part = {"what": "labels of data", "name": "a", "license": model["license"]}
    assert derive_license([part]) == {"license": "cc-by-nc-4.0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such frame')", "frames 0 to 4: ValueError: no such frame"),
        ("print('out of memory', file=sys.stderr); os._exit(9)", "exit code 9: out of memory"),
        ("return frames[:, :3, :, 0]", r"shape \[5, 3, 8\] in 480 bytes; expected \[5, 6, 8\] float32"),
        ("d = frames[..., 0] * 1.0; d[2, 1, 1] = np.nan; return d", "depth of frame 2 has NaN; write 0"),
        ("os.write(1, b'noise'); print('noise'); return frames[..., 0]", None),  # goes to standard error
    ],
)
def test_what_goes_wrong_in_a_worker_is_named_and_the_next_clip_gets_a_new_one(
    write_worker, video, body, message
):
    source = WorkerDepth(write_worker(body))
    if message is None:
        assert np.concatenate(list(source.predict(video, FPS))).shape == video.shape[:3]
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as raised:
            list(source.predict(video, FPS))
        assert "depth worker `" in str(raised.value)


@pytest.fixture
def write_own(tmp_path):
    """A worker without our file, that answers with this code; gives its command."""

    def write(code: str) -> str:
        path = tmp_path / "own.py"
        path.write_text(
            "import json, struct, sys\n"
            "if '--describe' in sys.argv:\n"
            '    print(\'{"model": "a", "license": "MIT", "is_metric": true, "package": "b"}\')\n'
            f"else:\n{textwrap.indent(textwrap.dedent(code), '    ')}\n"
        )
        return command(path)

    return write


def announce(facts: str) -> str:
    """Code that writes the head of an answer and then waits."""
    return f"""
    head = json.dumps({facts}).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(head)) + head)
    sys.stdout.flush()
    sys.stdin.buffer.read()
    """


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('Loading weights', flush=True); sys.stdin.buffer.read()", "b'Load', then b'ing weights"),
        # More than a pipe holds, before it reads: neither side may wait for the other one.
        ("sys.stdout.write('x' * 200_000); sys.stdin.buffer.read()", "b'xxxx', then b'xxx"),
        (
            announce("{'shape': [2, 480, 640], 'bytes': 10**9}"),
            r"in 1000000000 bytes; expected \[2, 480",
        ),
        (announce("[]"), "not a message of the protocol"),
        ("sys.stdin.close()", "it ended with exit code 0"),
    ],
)
def test_an_answer_that_is_wrong_is_named_instead_of_waited_for(write_own, code, message):
    frames = np.zeros((5, 480, 640, 3), np.uint8)  # more than a pipe holds
    with pytest.raises(ValueError, match=f"own.py`, frames 0 to 1: .*{message}"):
        list(WorkerDepth(write_own(code), batch_size=2).predict(frames, FPS))


def test_a_worker_that_never_answers_is_killed_with_what_it_started(tmp_path, video, monkeypatch):
    monkeypatch.setattr(worker, "ANSWER_S", 0.3)
    script = tmp_path / "wrapper.sh"
    script.write_text(
        'if [ "$1" = --describe ]; then\n'
        '    echo \'{"model": "a", "license": "mit", "is_metric": true, "package": "b"}\'\n'
        "else\n    (cat >&2; true)\n    true\nfi\n"  # the shell inside keeps the output open
    )
    source = WorkerDepth(f"sh {shlex.quote(str(script))}")
    with pytest.raises(ValueError, match=r"frames 0 to 4: it gave no answer in 0\.005 minutes"):
        list(source.predict(video, FPS))


def test_a_clip_that_is_left_early_ends_its_worker_and_the_next_one_gets_another(write_worker, video):
    source = WorkerDepth(write_worker("return frames[..., 0]"), batch_size=1)
    for _ in range(2):
        runs = source.predict(video, FPS)
        np.testing.assert_array_equal(next(runs)[0], video[0, ..., 0])
        process = source._process
        runs.close()
        assert process.returncode is not None
    np.testing.assert_array_equal(np.concatenate(list(source.predict(video, FPS))), video[..., 0])


def test_a_frame_that_cannot_be_read_is_told_as_such_after_those_before_it(write_worker, video):
    class Damaged(list):
        def __getitem__(self, frame):
            if frame == 3:
                raise BrokenEpisodeError("frame 3 is damaged")
            return super().__getitem__(frame)

    runs = WorkerDepth(write_worker("return frames[..., 0]"), batch_size=1).predict(Damaged(video), FPS)
    assert [next(runs).shape for _ in range(3)] == [(1, HEIGHT, WIDTH)] * 3
    with pytest.raises(BrokenEpisodeError, match="frame 3 is damaged"):
        next(runs)


def test_the_license_that_a_worker_states_gets_the_hubs_name(write_own):
    assert WorkerDepth(write_own("pass")).describe()["license"] == "mit"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "--depth worker needs --depth-model"),
        ("no-such-program --x", "`no-such-program --x` cannot be started"),
        (command("-c", "raise SystemExit('broken')"), r"does not describe itself.*exit code 1: broken"),
        (command("-c", "print('{}')"), "does not say its model, license, is_metric, package"),
        (
            command("-c", "print('Hello\\n{}')"),
            r"exit code 0.: expected JSON .* begins with b'Hello\\n",
        ),
        ("python 'x.py", "--depth-model python 'x.py is not a command: No closing quotation"),
        (" ", "--depth-model ' ' is not a command: it is empty"),
    ],
)
def test_a_command_that_is_no_worker_is_refused_before_any_work(given, message):
    with pytest.raises(ValueError, match=message):
        choose_depth_models("worker", given)


@pytest.mark.slow
def test_relative_depth_of_a_worker_needs_a_metric_model(write_worker):
    given = write_worker("return frames[..., 0]", facts="facts['is_metric'] = False")
    with pytest.raises(ValueError, match="add --align-with depth-anything-v2"):
        choose_depth_models("worker", given)


@pytest.mark.slow
def test_depth_anything_3_describes_itself_without_its_package():
    script = WORKERS / "depth_anything_3.py"
    for options, license in ((["--focal-px", "610"], "apache-2.0"), ([], "cc-by-nc-4.0")):
        source = WorkerDepth(command(script, *options))
        assert source.is_metric and source.describe()["license"] == license
    with pytest.raises(ValueError, match="--license is needed for my/own"):
        WorkerDepth(command(script, "--model", "my/own"))
