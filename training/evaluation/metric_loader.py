"""Load the project's metrics with the Hugging Face library `evaluate`."""

import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

__all__ = ["HUB_METRICS", "load_metric"]

HUB_METRICS = Path(__file__).with_name("hub_metrics")
COMMANDS = Path(__file__).resolve().parents[1]


def load_metric(name: str, config_name: str | None = None, **options) -> "evaluate.EvaluationModule":
    """One of the project's `evaluate` metrics, ready for `add_batch` and `compute`; nothing is downloaded.

    What is added is kept in memory, unless several processes share it (`num_process`).

    Args:
        name (`str`): A folder of `training/evaluation/hub_metrics`; docs/metrics.md lists them.
        config_name (`str`, *optional*): Prefix of its inputs, so that it can be combined with others.
        options: Of the metric, or of `evaluate.load`.

    Raises:
        ValueError: If there is no metric of that name; lists the known ones.
    """
    known = sorted(path.name for path in HUB_METRICS.iterdir() if (path / f"{path.name}.py").is_file())
    if name not in known:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(known)}")
    options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
    metric = import_evaluate().load(str(HUB_METRICS / name), config_name, **options)
    compute = metric.compute

    @functools.wraps(compute)
    def checked(**inputs):
        if not len(metric) and all(inputs.get(feature) is None for feature in metric.features):
            # The library's own error does not say what is missing.
            raise ValueError(f"{name}: nothing was added that it could compute from")
        return compute(**inputs)

    metric.compute = checked
    return metric


def import_evaluate() -> ModuleType:
    """The library `evaluate`, not our command of that name.

    `python training/evaluate.py` puts `training/` first on the search path, where the command would be found
    instead. Once imported from the rest of the path, the library is in `sys.modules` for all later imports.
    """
    if "evaluate" not in sys.modules:
        path = [folder for folder in sys.path if Path(folder).resolve() != COMMANDS]
        spec = importlib.machinery.PathFinder.find_spec("evaluate", path)
        if spec is None:
            raise ImportError("the metrics need the library `evaluate`: pip install evaluate")
        sys.modules["evaluate"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["evaluate"])
    return sys.modules["evaluate"]
