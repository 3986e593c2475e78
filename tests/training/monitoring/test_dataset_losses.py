"""The losses of each dataset of a mixture."""

from types import SimpleNamespace

import pytest
import torch

from modeling_foresight import ForesightForActionPrediction
from tests.tiny import tiny_batch, tiny_config
from training.monitoring.dataset_losses import DatasetLosses


def test_losses_by_dataset_are_those_of_its_samples_alone():
    config = tiny_config()
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval()
    batch, datasets = tiny_batch(config), torch.tensor([1, 0, 1])
    batch["frame_mask"][0, 3:] = False
    accelerator = SimpleNamespace(device="cpu", reduce=lambda sums, how: sums)
    by_dataset = DatasetLosses(accelerator, config, ["a", "b"], log_every=1)
    with torch.no_grad():
        by_dataset.add(0, model(**batch), batch, datasets)
        found = by_dataset.pop()
        for number, name in enumerate("ab"):
            alone = model(**{key: value[datasets == number] for key, value in batch.items()}).losses
            for loss, value in alone.items():
                assert found[f"{loss}/{name}"] == pytest.approx(value.item(), rel=1e-4), loss
    assert not by_dataset.pop()
    assert not DatasetLosses(accelerator, config, ["a"], log_every=1).pop()
