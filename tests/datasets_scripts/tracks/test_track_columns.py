"""Tracks as the values of their columns."""

import numpy as np

from datasets_scripts.columns import unpack_points
from datasets_scripts.tracks.track_columns import pad_tracks


def test_padding_is_hidden_and_still_and_behind_the_tracks():
    points = np.random.default_rng(0).random((3, 2, 3))
    arrays = pad_tracks(points, np.ones((3, 2), bool), np.array([True, False]), n_points=5)
    assert {name: values.shape for name, values in arrays.items()} == {
        "points": (3, 15),
        "visible": (3, 5),
        "moving": (5,),
    }
    unpacked = unpack_points(arrays["points"])
    assert np.abs(unpacked[:, :2] - points).max() < 1e-3 and not unpacked[:, 2:].any()
    assert arrays["visible"][:, :2].all() and not arrays["visible"][:, 2:].any()
    assert arrays["moving"].tolist() == [True, False, False, False, False]
