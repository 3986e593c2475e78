"""Sources of 3D tracks, one small file each; this file opens them by name.

| source | is | needs |
|---|---|---|
| `lucas-kanade` | OpenCV's pyramidal Lucas-Kanade, lifted with the depth | nothing |
| `delta` | DELTA, a 3D tracker: the paper's | that project; `model` is its checkpoint |
| `cotracker3` | CoTracker3, a 2D tracker, lifted with the depth | that project; `model` is its checkpoint |
"""

from datasets_scripts.tracks.source import TrackSource

__all__ = ["TRACK_SOURCES", "choose_tracker", "open_tracker"]

TRACK_SOURCES = ("lucas-kanade", "delta", "cotracker3")


def open_tracker(source: str, model: str | None = None, device: str = "auto") -> TrackSource:
    """Load a source for any number of clips.

    Args:
        source (`str`): One of `TRACK_SOURCES`.
        model (`str`, *optional*): Checkpoint file of a learned tracker.
        device (`str`): Such as `"cuda"`, `"cuda:1"`, `"cpu"`, or `"auto"`: a GPU if there is one.

    Raises:
        ValueError: As [`choose_tracker`]; also if weights are damaged or the device does not exist.
    """
    tracker = choose_tracker(source, model)
    return tracker() if source == "lucas-kanade" else tracker(model, device)


def choose_tracker(source: str, model: str | None = None) -> type:
    """Class of a source, which is checked without loading its weights.

    Raises:
        ValueError: If the source is unknown, a package or file is missing, or `model` does not go with it;
            says what to do.
    """
    if source not in TRACK_SOURCES:
        raise ValueError(f"unknown track source '{source}'; there is {', '.join(TRACK_SOURCES)}")
    if source == "lucas-kanade":
        from datasets_scripts.tracks.lucas_kanade import LucasKanade

        if model:
            raise ValueError(f"--tracks lucas-kanade has no weights; leave --track-model {model} out")
        return LucasKanade
    if source == "delta":
        from datasets_scripts.tracks.delta import Delta as Tracker
    else:
        from datasets_scripts.tracks.cotracker3 import CoTracker3 as Tracker
    Tracker.check(model)
    return Tracker
