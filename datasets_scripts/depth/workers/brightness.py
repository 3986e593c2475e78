"""A worker to try the protocol with: "depth" from brightness, by NumPy alone. It knows nothing of depth.

annotate.py --depth worker --depth-model "python3 datasets_scripts/depth/workers/brightness.py" ...
"""

import numpy as np
from serving import serve

BRIGHT_M, DARK_M = 0.3, 2.0


def open_model():
    """Bright is near."""

    def estimate(frames, fps):
        darkness = 1 - frames.mean(-1, dtype=np.float32) / 255  # (k, H, W)
        return BRIGHT_M + (DARK_M - BRIGHT_M) * darkness

    return estimate


if __name__ == "__main__":
    package = "numpy " + np.__version__
    serve({"model": "brightness", "license": "apache-2.0", "is_metric": True, "package": package}, open_model)
