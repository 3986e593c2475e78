# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Whether a device computes in bfloat16 without losing time."""

import torch

NO_BFLOAT16 = "this CPU has no kernels for bfloat16: computing in float32, which is many times faster here"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has kernels for bfloat16; x86 CPUs without AVX-512, for example, do not.

    There PyTorch falls back to plain loops: a step of the quickstart takes 16 times as long as in float32,
    and larger matrices lose more (pytorch/pytorch#146508).
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
