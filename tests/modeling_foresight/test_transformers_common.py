"""The common tests of the installed `transformers`, run on the tiny model: `make test-common`.

They come from the library's source distribution; `scripts/fetch_common_tests.py` unpacks them into build/.
What they skip needs a GPU, another library, or a part that this model does not have.
"""

import copy
import functools
import importlib.metadata
import sys
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightModel
from modeling_foresight.base_model import ForesightPreTrainedModel
from tests.tiny import tiny_config, tiny_inputs, tiny_targets

SOURCES = (
    Path(__file__).parents[2] / "build" / f"transformers-{importlib.metadata.version('transformers')}-tests"
)
if not SOURCES.exists():
    pytest.skip("the common tests are not unpacked: run `make test-common`", allow_module_level=True)
sys.path.insert(0, str(SOURCES))

from transformers_tests import test_modeling_common as common  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.common]

BATCH, FRAMES = 8, 3  # the tests cut 7 samples out, and would fill fewer up with random masks


def zero_init(config: ForesightConfig) -> ForesightConfig:
    """Their `_config_zero_init`, which takes `image_std` for the scale of initial weights."""
    config = copy.deepcopy(config)
    config.initializer_range = config.embedding_initializer_range = 1e-10
    return config


class ModelTester:
    """What the mixin asks about the model."""

    batch_size = BATCH
    is_training = True
    num_hidden_states_types = 2  # `hidden_states`, and `embeddings` before their LayerNorm

    def __init__(self):
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        with torch.device("meta"):
            self.seq_length = len(ForesightModel(config).layout(FRAMES))

    def get_config(self):
        return tiny_config(goal_image=True, history_length=FRAMES, future_shift=2, freeze_text=False)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, tiny_inputs(config, batch=BATCH)


class TestCommonModel(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ForesightModel, ForesightForActionPrediction)
    _is_composite = True
    test_resize_embeddings = False  # the vocabulary belongs to CLIP's text tower
    additional_model_inputs = list(tiny_inputs(tiny_config(goal_image=True), batch=1))[1:]

    def setUp(self):
        self.model_tester = ModelTester()
        self.config_tester = ConfigTester(
            self,
            config_class=ForesightConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
        )
        # Several tests load checkpoints that lack weights on purpose, which `from_pretrained` refuses here.
        load = ForesightPreTrainedModel.from_pretrained.__func__
        lenient = classmethod(functools.partial(load, strict=False))
        for patched in (
            patch.object(ForesightPreTrainedModel, "from_pretrained", lenient),
            patch.object(common, "_config_zero_init", zero_init),
            patch.dict(MODEL_MAPPING_NAMES, foresight="ForesightModel"),  # by this they know a trunk: no loss
        ):
            patched.start()
            self.addCleanup(patched.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is ForesightForActionPrediction:
            inputs |= tiny_targets(self.model_tester.get_config(), batch=BATCH)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()
