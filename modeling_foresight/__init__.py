"""3D Foresight for `transformers`: importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_foresight import ForesightConfig
from .modeling_foresight import ForesightForActionPrediction, ForesightModel, ForesightOutput
from .processing_foresight import ForesightProcessor, build_small_tokenizer
from .remote_code import export_with_code
from .streaming import ForesightStream

__version__ = "0.1.0"  # the one place; pyproject.toml reads it

AutoConfig.register("foresight", ForesightConfig, exist_ok=True)
AutoModel.register(ForesightConfig, ForesightForActionPrediction, exist_ok=True)
AutoProcessor.register(ForesightConfig, ForesightProcessor, exist_ok=True)

__all__ = [
    "ForesightConfig",
    "ForesightForActionPrediction",
    "ForesightModel",
    "ForesightOutput",
    "ForesightProcessor",
    "ForesightStream",
    "build_small_tokenizer",
    "export_with_code",
]
