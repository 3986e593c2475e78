"""A trained policy in the loop: the last T observations of every robot -> one action chunk for each.

As GR-MG controls: the newest observation is appended to a buffer of at most T frames, the whole window runs
through the model with style z = 0, and the chunk of the newest frame counts. Buffers start empty with every
instruction.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor

__all__ = ["History", "WindowPolicy"]


class History:
    """The last T observations of one robot since its instruction began.

    Args:
        length (`int`): T.
    """

    def __init__(self, length: int):
        self.frames: deque[tuple[dict[str, np.ndarray], np.ndarray]] = deque(maxlen=length)

    def append(self, images: Mapping[str, np.ndarray], state: np.ndarray) -> None:
        """Adds an observation: view -> uint8 `(H, W, 3)` RGB, and the state `(state_dim,)`."""
        self.frames.append((dict(images), np.asarray(state, dtype=np.float32)))

    def clear(self) -> None:
        """Forgets everything; for the start of an instruction."""
        self.frames.clear()


class WindowPolicy:
    """Runs the model over whole windows, several robots in one forward pass.

    Args:
        model (`ForesightForActionPrediction`): In evaluation mode.
        processor (`ForesightProcessor`): Its processor.
    """

    def __init__(self, model: ForesightForActionPrediction, processor: ForesightProcessor):
        self.model, self.processor = model, processor

    def start(self) -> History:
        """An empty history of the model's length."""
        return History(self.model.config.history_length)

    def act(self, histories: Sequence[History], instructions: Sequence[str]) -> np.ndarray:
        """Action chunks from what each robot has seen.

        Args:
            histories (`Sequence[History]`): One per robot, none empty; they may differ in length.
            instructions (`Sequence[str]`): One per robot.

        Returns:
            `np.ndarray`: `(B, K, A)` float32 in the dataset's units, step 0 is for now.
        """
        # Frames that are padding for every robot change nothing (they are masked), so they are not computed.
        longest = max(len(history.frames) for history in histories)
        frame_mask = torch.tensor([[t < len(h.frames) for t in range(longest)] for h in histories])

        def stack(values: list[list[np.ndarray]]) -> torch.Tensor:
            """Pads at the end, by repeating the newest value."""
            return torch.from_numpy(np.stack([np.stack(v + v[-1:] * (longest - len(v))) for v in values]))

        raw = {
            "images": {
                view: stack([[images[view] for images, _ in h.frames] for h in histories]).movedim(-1, -3)
                for view in self.model.config.views
            },
            "task": list(instructions),
            "frame_mask": frame_mask,
        }
        if self.model.config.state_dim:
            raw["state"] = stack([[state for _, state in h.frames] for h in histories])
        batch = self.processor.prepare_batch(raw, self.model.device, history_length=longest)
        return self.processor.decode_actions(self.model.predict_action(**batch)).cpu().numpy()
