"""Keep a GPU busy: decode frames, compute and use the results at the same time."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def prefetch[T](items: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """Make up to `ahead` items in a thread while the one before them is used.

    Errors come out where the item would have. When the result is closed or exhausted, the thread has ended
    and `items` is closed.
    """
    end = object()
    with contextlib.closing(items), ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item
        finally:
            for call in waiting:
                call.cancel()


def compute_ahead(
    batches: Iterator[list[np.ndarray]],
    compute: Callable[[Iterator[torch.Tensor]], Iterator[torch.Tensor]],
    device: torch.device,
) -> Iterator[np.ndarray]:
    """Results of a network, while the next frames are decoded and computed.

    Args:
        batches (`Iterator`): Frames `(H, W, 3)` uint8 of successive batches.
        compute (`Callable`): From batches `(k, H, W, 3)` uint8 to results, both on the device.
        device (`torch.device`): Device of the network.
    """

    def stack_frames() -> Iterator[torch.Tensor]:
        for frames in batches:
            batch = torch.from_numpy(np.stack(frames))
            yield batch.pin_memory() if device.type == "cuda" else batch  # copied while the GPU computes

    def fetch_results() -> Iterator[np.ndarray]:
        under_way = deque()  # a result is waited for only when the next one is under way
        with contextlib.closing(prefetch(stack_frames())) as stacked:
            for result in compute(batch.to(device, non_blocking=True) for batch in stacked):
                under_way.append(_start_copy(result))
                if len(under_way) > 1:
                    yield _finish_copy(*under_way.popleft())
        yield from (_finish_copy(*copy) for copy in under_way)

    return prefetch(fetch_results())


def _start_copy(result: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if result.device.type != "cuda":
        return result.cpu(), None
    copy = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    copy.copy_(result, non_blocking=True)
    return copy, torch.cuda.current_stream(result.device).record_event()


def _finish_copy(copy: torch.Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    if event is not None:
        event.synchronize()
    return copy.numpy()
