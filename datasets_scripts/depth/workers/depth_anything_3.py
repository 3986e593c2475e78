"""Depth-Anything-3 as a worker, in an environment of its own: its package needs NumPy below 2.

Written from its documented interface; **not tried**, as its weights were not available to us.

    python3.11 -m venv da3 && da3/bin/pip install depth-anything-3
    annotate.py --depth worker --depth-model "da3/bin/python .../depth_anything_3.py --focal-px 610" ...

DA3METRIC-LARGE (Apache-2.0) predicts depth for a focal length of 300 px at the network's resolution: meters
are its depth times the true focal length in those pixels, divided by 300. `--focal-px` is that of the
recorded images. Without it, the model that finds the focal length itself is taken
(DA3NESTED-GIANT-LARGE, CC BY-NC 4.0), whose depth is in meters.
"""

import argparse

import numpy as np
from serving import serve

METRIC, NESTED = "depth-anything/DA3METRIC-LARGE", "depth-anything/DA3NESTED-GIANT-LARGE"
CANONICAL_FOCAL_PX = 300.0
DA3_LICENSES = {METRIC: "apache-2.0", NESTED: "cc-by-nc-4.0"}


def open_model(name, focal_px):
    """Weights on a GPU if there is one."""
    import torch
    from depth_anything_3.api import DepthAnything3

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DepthAnything3.from_pretrained(name).to(device).eval()

    def estimate(frames, fps):
        found = []
        for frame in frames:  # each on its own: the frames of a video are not views of one still scene
            depth = np.asarray(model.inference([frame]).depth[0], np.float32)  # (h, w) of the network
            if focal_px is not None:
                depth = depth * (focal_px * depth.shape[1] / frame.shape[1]) / CANONICAL_FOCAL_PX
            depth = torch.from_numpy(depth)[None, None]
            size = frame.shape[:2]
            depth = torch.nn.functional.interpolate(depth, size, mode="bilinear", align_corners=False)
            found.append(torch.nan_to_num(depth[0, 0], 0.0, 0.0, 0.0).numpy())
        return np.stack(found)

    return estimate


def main():
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="another checkpoint, of meters")
    parser.add_argument("--license", help="its license")
    parser.add_argument("--focal-px", type=float, help="focal length of the recorded images, in their pixels")
    parser.add_argument("--describe", action="store_true")
    args = parser.parse_args()
    name = args.model or (METRIC if args.focal_px else NESTED)
    license = args.license or DA3_LICENSES.get(name)
    if license is None:
        parser.error("--license is needed for " + name)
    facts = {"model": name, "license": license, "is_metric": True, "package": "depth-anything-3"}
    serve(dict(facts, focal_px=args.focal_px), lambda: open_model(name, args.focal_px))


if __name__ == "__main__":
    main()
