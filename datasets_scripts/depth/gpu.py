"""Keeping a GPU busy: decoding, computing and whoever takes the results work at the same time."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def prefetch[T](items: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """Makes up to `ahead` items in a thread while the one before them is used.

    Errors come out where the item would have. When the result is closed or at its end, the thread has ended
    and `items` is closed.
    """
    end = object()
    try:
        with ThreadPoolExecutor(1) as thread:
            waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
            try:
                while (item := waiting.popleft().result()) is not end:
                    waiting.append(thread.submit(next, items, end))
                    yield item
            finally:
                for call in waiting:
                    call.cancel()
    finally:
        items.close()


def pick_device(device: str) -> torch.device:
    """The device of a name; `"auto"` is a GPU if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device '{device}': use auto, cpu, cuda or cuda:1") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device '{device}': PyTorch sees {torch.cuda.device_count()} GPUs")
    return picked


def send_back(depth: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Starts the copy of a result to the CPU; [`fetch_depth`] waits for it."""
    if depth.device.type != "cuda":
        return depth.cpu(), None
    copy = torch.empty(depth.shape, dtype=depth.dtype, pin_memory=True)
    copy.copy_(depth, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def fetch_depth(depth: torch.Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    """The result of [`send_back`], once it has arrived."""
    if event is not None:
        event.synchronize()
    return depth.numpy()
