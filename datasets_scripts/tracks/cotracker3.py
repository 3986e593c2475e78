"""CoTracker3 from the user's installed package: 2D tracks through occlusions, lifted with the depth.

The offline network sees a chunk of frames at once and follows points both ways. It is called as in the
project's predictor, which does not return the confidence.

Source: Karaev et al. 2024, CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos.
"""

from collections.abc import Sequence

import numpy as np
import torch

from datasets_scripts.tracks.learned import LearnedTracker, PixelScale, load_weights, resize, track_in_chunks
from datasets_scripts.tracks.lifting import lift_tracks

WINDOW = 60  # frames of the network's time embedding, which is interpolated for other lengths
ITERATIONS = 6
MIN_VISIBILITY = 0.9
SUPPORT_SIDE = 6  # side of a grid of points that the network gets for context
SUPPORT_MARGIN = 1 / 64  # of the network's width


class CoTracker3(LearnedTracker):
    """The offline tracker; its weights are `scaled_offline.pth` or `baseline_offline.pth`."""

    name, model_name, package = "CoTracker", "CoTracker3 offline", "cotracker"
    license = "cc-by-nc-4.0"
    remedy = "pip install git+https://github.com/facebookresearch/co-tracker (non-commercial license)"

    def __init__(self, checkpoint: str, device: str = "auto"):
        super().__init__(checkpoint, device)
        from cotracker.models.build_cotracker import build_cotracker

        self.model = build_cotracker(None, offline=True, window_len=WINDOW)
        load_weights(self.model, checkpoint)
        self.model.to(self.device).eval()

    def track(
        self, video: Sequence[np.ndarray], depth_m: Sequence[np.ndarray], queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See [`TrackSource.track`]; a track without any depth is never visible."""
        places, visible, confidence = track_in_chunks(self._predict, (video,), queries, size=2)
        z = lift_tracks(places, visible, depth_m, queries[:, 0].astype(np.int64))
        visible &= (z > 0).any(axis=0)
        return np.concatenate([places, z[..., None]], axis=-1), visible, confidence

    @torch.inference_mode()
    def _predict(self, images: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tracks of a chunk: images `(k, H, W, 3)`, queries `(m, 3)`."""
        resolution = self.model.model_resolution
        scale = PixelScale(images.shape[1:3], resolution)
        asked = scale.to_network(queries, self.device)
        places, seen, trust, _ = self.model(
            video=resize(images, *resolution, self.device),
            queries=torch.cat([asked, self._support(*resolution)], dim=1),
            iters=ITERATIONS,
        )
        n = len(queries)
        visible = (seen[0, :, :n] > MIN_VISIBILITY).cpu().numpy()
        places, confidence = scale.to_image(places[0, :, :n]), trust[0, :, :n].float().cpu().numpy()
        # In its own frame a query is visible, where it was given.
        frame, columns = queries[:, 0].astype(np.int64), np.arange(n)
        places[frame, columns], visible[frame, columns] = queries[:, 1:], True
        return places, visible, confidence

    def _support(self, height: int, width: int) -> torch.Tensor:
        """Points of a regular grid in the first frame: `(1, 36, 3)`."""
        margin = width * SUPPORT_MARGIN
        y, x = (torch.linspace(margin, length - margin, SUPPORT_SIDE) for length in (height, width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([torch.zeros_like(x), x, y], dim=-1).reshape(1, -1, 3).to(self.device)
