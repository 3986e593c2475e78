"""The worker's side of `--depth worker`: frames from standard input, depth to standard output.

This file needs NumPy alone, from any Python of 3.8 or newer. Copy it beside your worker, or start the worker
from this folder. A worker is called in two ways:

| call | what it does |
| --- | --- |
| `COMMAND --describe` | prints `model`, `license`, `is_metric`, `package` as JSON; loads no weights |
| `COMMAND` | answers requests until standard input ends |

`is_metric`: depth is in meters along the optical axis; otherwise it is inverse depth up to scale and shift.

A message is a length (4 bytes, unsigned, little-endian), so many bytes of JSON, and then `bytes` bytes of an
array in C order, as the JSON says:

| from | JSON | array |
| --- | --- | --- |
| us | `{"shape": [k, H, W, 3], "fps": 20.0, "bytes": n}` | uint8 RGB, k successive frames |
| worker | `{"shape": [k, H, W], "bytes": n}` | float32 little-endian; 0 where depth is unknown, never NaN |
| worker | `{"error": "what is wrong", "bytes": 0}` | none; the worker then ends |

Standard error is free for messages; its last line is shown if the worker fails. A worker is killed if an
answer is wrong, or takes an hour (the first one may include a download). Requests are sent ahead of answers.
"""

import json
import os
import struct
import sys

import numpy as np

LONGEST_JSON = 1 << 16  # bytes


def serve(describe, open_model):
    """Serves one process of annotation.

    Args:
        describe (`dict`): `model`, `license`, `is_metric`, `package`; more is kept unchanged.
        open_model (`Callable`): Loads weights and gives a function: frames `(k, H, W, 3)` uint8 and frames
            per second -> depth `(k, H, W)`.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    if "--describe" in sys.argv:
        answers.write(json.dumps(describe).encode() + b"\n")
        answers.flush()
        return
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between messages
    try:
        estimate = open_model()
        while True:
            message = read_message(sys.stdin.buffer)
            if message is None:
                return
            facts, content = message
            frames = np.frombuffer(content, np.uint8).reshape(facts["shape"])
            depth = np.ascontiguousarray(estimate(frames, facts["fps"]), "<f4")
            write_message(answers, {"shape": list(depth.shape)}, depth.tobytes())
    except Exception as error:
        write_message(answers, {"error": f"{type(error).__name__}: {error}"}, b"")
        raise


def write_message(stream, facts, content):
    """Writes one message."""
    head = json.dumps(dict(facts, bytes=len(content))).encode()
    stream.write(struct.pack("<I", len(head)) + head)
    stream.write(content)
    stream.flush()


def read_message(stream):
    """The JSON and the bytes of one message; `None` at the end of the stream."""
    facts = read_message_header(stream)
    return None if facts is None else (facts, stream.read(facts["bytes"]))


def read_message_header(stream):
    """The JSON of one message; `None` at the end of the stream. Its bytes follow in the stream."""
    start = stream.read(4)
    if len(start) < 4:
        return None
    (length,) = struct.unpack("<I", start)
    if length > LONGEST_JSON:  # otherwise we would wait for what never comes
        raise ValueError(f"it begins with {start!r}")
    return json.loads(stream.read(length))
