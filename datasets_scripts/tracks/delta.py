"""DELTA from the user's copy of that project: a tracker that follows points in the image and in depth.

The project's predictor goes through a chunk in windows of 16 frames, forwards and backwards from each query.

Source: Ngo et al. 2025, DELTA: Dense Efficient Long-range 3D Tracking for Any video (3D Foresight's tracker).
"""

from collections.abc import Sequence

import numpy as np
import torch

from datasets_scripts.tracks.learned import LearnedTracker, PixelScale, load_weights, resize, track_in_chunks
from datasets_scripts.tracks.lifting import depth_at, fill_holes

# The published network.
SIZES = {"stride": 4, "window_len": 16, "add_space_attn": True, "num_virtual_tracks": 64}
SIZES |= {"model_resolution": (384, 512), "upsample_factor": 4}
FARTHEST_M = 100.0  # the network multiplies depth from frame to frame, so that of a lost point can explode
DENSE_ONLY = "upsample_transformer."  # parameters that sparse tracks do not use


class Delta(LearnedTracker):
    """The 3D tracker; its weights are `densetrack3d.pth`."""

    name, model_name, package = "DELTA", "DELTA", "densetrack3d"
    license = "Snap Inc., non-commercial research only"
    remedy = (
        "clone github.com/snap-research/DELTA_densetrack3d, install jaxtyping, and add the folder to "
        "PYTHONPATH (research license)"
    )

    def __init__(self, checkpoint: str, device: str = "auto"):
        super().__init__(checkpoint, device)
        try:
            from densetrack3d.models.densetrack3d.densetrack3d import DenseTrack3D
            from densetrack3d.models.predictor.predictor import Predictor3D
        except ImportError as error:
            raise ValueError(f"DELTA cannot be imported: {error}; install what it needs") from error
        model = DenseTrack3D(**SIZES)
        load_weights(model, checkpoint, unused=DENSE_ONLY)
        self.predictor = Predictor3D(model=model).to(self.device).eval()

    def track(
        self, video: Sequence[np.ndarray], depth_m: Sequence[np.ndarray], queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See [`TrackSource.track`]; a query without depth is never visible."""
        points, visible, confidence = track_in_chunks(self._predict, (video, depth_m), queries, size=3)
        frame = queries[:, 0].astype(np.int64)
        for first in np.unique(frame):
            here = np.flatnonzero(frame == first)
            visible[:, here] &= depth_at(depth_m[first], queries[here, 1:]) > 0
        return points, visible, confidence

    @torch.inference_mode()
    def _predict(
        self, images: np.ndarray, depth_m: np.ndarray, queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tracks of a chunk: images `(k, H, W, 3)`, depth `(k, H, W)`, queries `(m, 3)`."""
        resolution = self.predictor.interp_shape
        scale = PixelScale(images.shape[1:3], resolution)
        # The network reads a hole as something one centimeter away.
        found = self.predictor(
            resize(images, *resolution, self.device),
            resize(fill_holes(depth_m), *resolution, self.device),
            queries=scale.to_network(queries, self.device),
            backward_tracking=True,
        )
        z = found["trajs_depth"][0].float().clamp(0, FARTHEST_M).cpu().numpy()
        points = np.concatenate([scale.to_image(found["trajs_uv"][0]), z], axis=-1)
        return points, found["vis"][0].cpu().numpy(), found["conf"][0].float().cpu().numpy()
