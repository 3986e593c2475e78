"""Sources of metric depth, one small file each; this file opens them by name.

| source | is | needs |
|---|---|---|
| `sensor` | a depth column of the dataset | nothing |
| `depth-anything-v2` and others of `CHECKPOINTS` | depth of every frame on its own | transformers |
| `video-depth-anything` | depth that is consistent in time | that project; `model` is its checkpoint file |
| `vda+dav2` | the second, brought to meters by the first (the paper's two models) | both |
| `worker` | a model in another Python environment | `model` is its command, see `workers/serving.py` |
| Hub id or folder | any other depth model of transformers | |

Models whose depth is known up to scale and shift only need a metric model, `align_with`: of `CHECKPOINTS`
`depth-anything` and `dpt`.
"""

from pathlib import Path

from datasets_scripts.depth.source import DepthSource

__all__ = ["DEPTH_SOURCES", "choose_depth_models", "open_depth"]

# Small is the only size whose license allows everything; Base and Large are better and non-commercial.
METRIC_MODEL = "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf"
# Checkpoints of transformers by one name each: for rooms, where a family has several.
CHECKPOINTS = {
    "depth-anything-v2": METRIC_MODEL,
    "depth-pro": "apple/DepthPro-hf",
    "zoedepth": "Intel/zoedepth-nyu",
    "glpn": "vinvino02/glpn-nyu",
    "depth-anything": "LiheYoung/depth-anything-small-hf",
    "dpt": "Intel/dpt-large",
}
DEPTH_SOURCES = ("sensor", *CHECKPOINTS, "video-depth-anything", "vda+dav2", "worker")


def open_depth(
    source: str,
    model: str | None = None,
    align_with: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> DepthSource | None:
    """Load a source for any number of clips; `None` for `sensor`, whose depth the dataset holds.

    Args:
        source (`str`): As in [`choose_depth_models`], as are `model` and `align_with`.
        model (`str`, *optional*): Weights.
        align_with (`str`, *optional*): Metric model for a relative one.
        device (`str`): `"cuda"`, `"cuda:1"`, `"cpu"`, or `"auto"`: a GPU if there is one.
        batch_size (`int`, *optional*): Frames at once for models of single frames (16 on a GPU, 2 on a CPU).
            The last bits of the depth may depend on it.

    Raises:
        ValueError: As [`choose_depth_models`]; also if weights are damaged or the device does not exist.
    """
    opened = [
        estimator(name, device, batch_size)
        for estimator, name in choose_depth_models(source, model, align_with)
    ]
    if not opened:
        return None
    from datasets_scripts.depth.estimated_depth import AlignedDepth, MetricDepth

    return AlignedDepth(*opened) if len(opened) == 2 else MetricDepth(*opened)


def choose_depth_models(
    source: str, model: str | None = None, align_with: str | None = None
) -> list[tuple[type, str]]:
    """Which models a source consists of; checks them without loading weights.

    Args:
        source (`str`): One of `DEPTH_SOURCES`, or Hub id or folder of a depth model of transformers.
        model (`str`, *optional*): Weights: Hub id or folder for sources of transformers (default:
            `CHECKPOINTS`), checkpoint file for the sources with Video-Depth-Anything, command for `worker`.
        align_with (`str`, *optional*): Metric model that gives a relative one its scale and shift:
            one of `CHECKPOINTS`, Hub id or folder. Required for relative models, except for `vda+dav2`.

    Returns:
        `list`: Class and weights of the estimator and, if it is relative, of its metric model; empty for
        `sensor`.

    Raises:
        ValueError: If a source or model is unknown, a package or file is missing, or the arguments exclude
            each other; says what to do.
    """
    if source == "sensor":
        if model or align_with:
            raise ValueError("--depth sensor reads a depth column; --depth-model and --align-with do nothing")
        return []
    estimator, name = _choose_estimator(source, model)
    if source == "vda+dav2" and not align_with:
        align_with = METRIC_MODEL
    align_with = CHECKPOINTS.get(align_with, align_with)
    if estimator.check(name):
        if align_with:
            hint = " (--depth video-depth-anything)" if source == "vda+dav2" else ""
            raise ValueError(f"depth of {name} is metric already: leave --align-with out{hint}")
        return [(estimator, name)]
    return [(estimator, name), _choose_metric_model(name, align_with)]


def _choose_estimator(source: str, model: str | None) -> tuple[type, str]:
    """Class and weights of the estimator of any source but `sensor`."""
    from datasets_scripts.depth.transformers_model import TransformersDepth
    from datasets_scripts.depth.video_depth_anything import VideoDepth
    from datasets_scripts.depth.worker import WorkerDepth

    if source == "worker":
        if not model:
            raise ValueError(
                '--depth worker needs --depth-model "COMMAND", such as "env/bin/python worker.py" '
                "(datasets_scripts/depth/workers)"
            )
        return WorkerDepth, model
    if source in ("video-depth-anything", "vda+dav2"):
        if not model:
            raise ValueError(
                f"--depth {source} needs --depth-model FILE.pth, a checkpoint of Video-Depth-Anything "
                "(its README lists them; video_depth_anything_vits.pth is free of restrictions)"
            )
        return VideoDepth, model
    if source in CHECKPOINTS:
        return TransformersDepth, model or CHECKPOINTS[source]
    if "/" not in source and not Path(source).is_dir():
        raise ValueError(
            f"unknown depth source '{source}'; there is {', '.join(DEPTH_SOURCES)}, or give the Hub id "
            "or folder of a transformers depth model"
        )
    if model:
        raise ValueError(f"--depth {source} names a model already; leave --depth-model {model} out")
    return TransformersDepth, source


def _choose_metric_model(name: str, align_with: str | None) -> tuple[type, str]:
    """Class and weights of what gives the relative depth of model `name` its scale and shift."""
    from datasets_scripts.depth.transformers_model import TransformersDepth

    if not align_with:
        raise ValueError(
            f"depth of {name} is known up to scale and shift only: add --align-with depth-anything-v2, "
            "or another metric model"
        )
    if not TransformersDepth.check(align_with):
        raise ValueError(f"--align-with {align_with} is not metric itself; give it a metric model")
    return TransformersDepth, align_with
