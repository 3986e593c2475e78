"""Batches that cannot be read: all processes save and stop, whatever was raised, with one line."""

import pytest
import torch

from training.engines.reading import read_everywhere


class Ranks:
    """An `Accelerator` of this process and another one, which has read its batch or not."""

    device = torch.device("cpu")

    def __init__(self, other_has_read: bool):
        self.other_has_read = other_has_read

    def gather(self, flag):
        return torch.cat([flag, torch.tensor([self.other_has_read])])


def failing(error):
    """A batch, and then the error."""
    yield "batch"
    raise error


IN_LOADER = "Caught {0} in DataLoader worker process 0.\n"
IN_LOADER += "Original Traceback (most recent call last):\n  a line\n{0}: {1}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("video x is damaged"), "step 5: video x is damaged. The"),
        (OSError(IN_LOADER.format("OSError", "no video x")), "step 5: no video x. The"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "killed.* 7.*num_workers"),
        (RuntimeError(IN_LOADER.format("RuntimeError", "cannot decode")), "step 5: RuntimeError: cannot dec"),
        (MemoryError(), "step 5: MemoryError: . The"),
        (StopIteration(), "step 5: "),
    ],
)
def test_whatever_keeps_a_batch_from_being_read_is_one_line_after_a_checkpoint(error, told):
    saved, batches = [], iter([]) if isinstance(error, StopIteration) else failing(error)
    with pytest.raises(ValueError, match=told) as caught:
        read_everywhere(Ranks(True), batches, 2, 4, lambda: saved.append(4))
    assert saved == [4] and "checkpoint of step 4 is saved; continue with --resume" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_process_that_has_read_its_batch_stops_with_the_others_and_saves_nothing_before_a_step():
    with pytest.raises(ValueError, match="step 1: another process could not .* Nothing was trained since"):
        read_everywhere(Ranks(False), iter("ab"), 2, 0, None)
    assert read_everywhere(Ranks(True), iter("ab"), 2, 0, None) == ["a", "b"]
