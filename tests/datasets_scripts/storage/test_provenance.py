"""What is known of labels is written and read."""

import numpy as np
import pytest

from datasets_scripts.storage import provenance

POINTS = 9


def test_provenance_round_trip_and_moving_flags(tmp_path):
    moving = np.arange(POINTS) % 4 == 1
    facts = {"n_points": POINTS, "n_moving": 2, "moving": provenance.encode_flags(moving)}
    provenance.write_provenance(tmp_path, {"episodes": {"3": {"main": facts, "task": "x"}}})
    read = provenance.read_provenance(tmp_path)
    assert read["version"] == provenance.PROVENANCE_VERSION
    assert (provenance.moving_flags(read, 3, "main", POINTS) == moving).all()
    assert not provenance.moving_flags(read, 0, "main", POINTS).any()
    assert provenance.moving_flags(read, 3, "main", POINTS + 5).sum() == moving.sum()
    assert provenance.read_provenance(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ('{"version": 99}', "version 99")])
def test_unreadable_provenance_is_refused(tmp_path, text, message):
    path = tmp_path / provenance.PROVENANCE_PATH
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        provenance.read_provenance(tmp_path)
