# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Read the messages of LeRobot's client: pickles, of which nothing is called that it does not send.

LeRobot's own server calls whatever a pickle names. Here only numpy's types, plain values and LeRobot's two
dataclasses pass, and only as much of each as a robot could send.
"""

import io
import math
import pickletools
from collections.abc import Iterable, Iterator

import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport import services_pb2

from datasets_scripts.storage.numpy_pickles import NumpyUnpickler

__all__ = ["limit_chunks", "read_observation", "read_policy_request"]

MAX_OBSERVATION = 128 << 20  # bytes: five pictures of 4K
MAX_OPERATIONS = 100_000  # of a pickle; an observation has about a hundred, a thousand motors some thousands
MAX_TIMESTEP = 1 << 31  # 24 days at 1000 frames per second


class _LeRobotUnpickler(NumpyUnpickler):
    allowed = frozenset({RemotePolicyConfig, TimedObservation})


def limit_chunks(chunks: Iterable[services_pb2.Observation]) -> Iterator[services_pb2.Observation]:
    """The parts of an observation, up to its largest size.

    Raises:
        ValueError: If there are more bytes or parts.
    """
    size = 0
    for number, chunk in enumerate(chunks):
        size += len(chunk.data)
        if size > MAX_OBSERVATION or number > MAX_OPERATIONS:
            raise ValueError(f"An observation is larger than {MAX_OBSERVATION >> 20} MB: send less.")
        yield chunk


def read_policy_request(data: bytes) -> RemotePolicyConfig:
    """What a client asks the server to load.

    Raises:
        ValueError: If the message is another one.
    """
    request = _unpickle(data, RemotePolicyConfig)
    for name, kind in {"policy_type": str, "pretrained_name_or_path": str, "actions_per_chunk": int}.items():
        if not isinstance(getattr(request, name, None), kind):
            raise ValueError(f"{name} of the request must be {kind.__name__}, as LeRobot's client sends it.")
    return request


def read_observation(data: bytes) -> TimedObservation:
    """What a robot saw.

    Raises:
        ValueError: If the message is another one, or a number of it is out of range.
    """
    seen = _unpickle(data, TimedObservation)
    timestep, timestamp, values = (
        getattr(seen, name, None) for name in ("timestep", "timestamp", "observation")
    )
    if type(timestep) is not int or not 0 <= timestep < MAX_TIMESTEP:
        raise ValueError(f"timestep={str(timestep)[:40]} of an observation must be from 0 to {MAX_TIMESTEP}.")
    if type(timestamp) not in (int, float) or not math.isfinite(timestamp):
        raise ValueError(f"timestamp={str(timestamp)[:40]} of an observation must be seconds.")
    if not isinstance(values, dict) or not isinstance(values.get("task", ""), str):
        raise ValueError("An observation must be a dict, and its task a text.")
    if sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray)) > len(data):
        raise ValueError("An observation says that it has larger pictures than it has bytes.")
    return seen


def _unpickle(data: bytes, kind: type):
    """The object of a message.

    Raises:
        ValueError: If it holds anything that LeRobot's client does not send.
    """
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            # The unpickler would reserve memory for as many entries as the largest number says.
            if count > MAX_OPERATIONS or ("PUT" in operation.name and argument > MAX_OPERATIONS):
                raise ValueError("it has too many parts")
        message = _LeRobotUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"A message is not LeRobot's: {' '.join(str(error).split())[:200]}.") from None
    if type(message) is not kind:
        raise ValueError(f"A message is a {type(message).__name__}, expected a {kind.__name__}.")
    return message
