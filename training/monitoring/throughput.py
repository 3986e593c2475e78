"""How much a GPU computes: FLOP/s of training, beside what its data sheet promises."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["FlopMeter"]

# Dense bfloat16 of tensor cores, TFLOP/s, from NVIDIA's data sheets; by the first name that fits.
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125}
PEAKS |= {"RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71}


class FlopMeter:
    """Counts the floating-point operations of one step, and tells speed from the time of others.

    What gradient checkpointing computes a second time counts too.

    Args:
        device (`torch.device`): What computes.

    Attributes:
        peak (`float`, *optional*): Its TFLOP/s in bfloat16, if we know it.
    """

    def __init__(self, device: torch.device):
        self.device, self.flops = device, 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAKS.items() if part in name), None)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Adds what is computed inside to the operations of a step."""
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops += counter.get_total_flops()

    def speed(self, seconds: float) -> dict[str, float]:
        """`tflops` (TFLOP/s) of a step of `seconds`, `mfu` its share of the peak; empty if not counted."""
        if not self.flops:
            return {}
        tflops = self.flops / seconds / 1e12
        return {"tflops": tflops, **({"mfu": tflops / self.peak} if self.peak else {})}
