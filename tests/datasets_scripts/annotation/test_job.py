"""Depth of a camera is checked by a few frames before the work, and episodes may be left out."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_scripts.annotate import main
from datasets_scripts.storage.provenance import read_provenance
from tests.synthetic import SyntheticDataset, make_dataset
from training.windows import ForesightWindows, WindowConfig

FORM = {"tracks": False, "use_videos": False, "cameras": ("main",), "size": (48, 64)}


@pytest.fixture
def annotate(tmp_path, capsys):
    """Runs the command on a dataset; its exit code and what it says of an error."""

    def run(root, *options):
        places = [f"--dataset={root}", f"--output={tmp_path / 'out'}"]
        code = main([*places, "--n-points=20", "--workers=1", *options])
        return code, capsys.readouterr().err

    return run


def test_a_camera_that_warms_up_is_no_broken_camera(tmp_path, annotate, monkeypatch):
    depth = SyntheticDataset.depth
    monkeypatch.setattr(
        SyntheticDataset,
        "depth",
        lambda self, e, t, camera: depth(self, e, t, camera) + (np.nan if t == 0 else 0),
    )
    facts = make_dataset(tmp_path / "data", frames=[4, 3, 5], **FORM)
    assert annotate(facts.root)[0] == 0
    config = WindowConfig(views=["main"], history_length=2, objectives=["action", "depth"], frame_cache="off")
    assert len(ForesightWindows(facts.root, config))


@pytest.mark.parametrize("broken", [0, 2])
def test_an_episode_whose_depth_cannot_be_read_is_left_out(tmp_path, annotate, broken):
    facts = make_dataset(tmp_path / "data", frames=[4, 3, 5], **FORM)
    (path,) = facts.root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    found = table.to_pylist()
    for row in found:
        if row["episode_index"] == broken:
            row["observation.depth.main"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(found, schema=table.schema), path)
    code, error = annotate(facts.root)
    assert code == 1 and re.search("a picture of 'observation.depth.main' .*--skip-broken", error)
    for option in ("--dry-run", "--workers=1"):
        assert annotate(facts.root, "--skip-broken", option)[0] == 0
    skipped = read_provenance(tmp_path / "out")["annotation"]["skipped"]
    assert [known["episode"] for known in skipped] == [broken]


@pytest.mark.parametrize("option", ["--episodes=", "--cameras="])
def test_an_empty_choice_is_not_everything(tmp_path, annotate, option):
    facts = make_dataset(tmp_path / "data", frames=[4, 3], **FORM)
    assert annotate(facts.root, option)[0] == 1
    assert not (tmp_path / "out").exists()
