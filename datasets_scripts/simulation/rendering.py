"""Choose MuJoCo's renderer, before MuJoCo is imported."""

import os
import sys

__all__ = ["check_image_size", "choose_renderer", "rendering_advice"]


def choose_renderer() -> None:
    """Pick software rendering on Linux, which needs neither a display nor a GPU; keep the user's choice."""
    if sys.platform.startswith("linux") and "PYOPENGL_PLATFORM" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "osmesa")
        # Mesa would start a thread per core for each renderer, which makes small scenes slower.
        os.environ.setdefault("LP_NUM_THREADS", "0")


def check_image_size(side: int) -> None:
    """Raise a `ValueError` if images would be too small to show anything."""
    if side < 16:
        raise ValueError(f"image size is {side} px; it must be at least 16")


def rendering_advice(error: Exception) -> str:
    """What to do when MuJoCo cannot render."""
    return (
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')} ({error}); install the "
        "software renderer (Debian and Ubuntu: `apt-get install libosmesa6`), "
        "or set MUJOCO_GL=egl on a machine with a GPU"
    )
