"""Arms of robosuite: what is refused, and a recording in the real simulator."""

import sys

import numpy as np
import pytest

from datasets_scripts.columns import points_key, points_visible_key
from datasets_scripts.simulate import main
from datasets_scripts.simulation import robosuite_arms
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import moving_flags, read_provenance


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["panda-fly"], "unknown robosuite task 'panda-fly'; there are panda-lift, panda-stack, iiwa-lift"),
        (["panda-lift,iiwa-lift"], "record each robot as a dataset of its own"),
        (["panda-lift", "--cameras", "main"], "unknown camera 'main'; the simulator has agent, front, side"),
        (["panda-lift", "--stride", "4"], "choose a stride from 1, 2, 5, 10, 25, 50"),
        (["panda-lift", "--quality", "fast"], "--quality is of metaworld"),
    ],
)
def test_what_robosuite_cannot_record_is_one_line(tmp_path, capsys, flags, message):
    assert main(["--simulator", "robosuite", "--output", str(tmp_path / "x"), "--tasks", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not list(tmp_path.iterdir())


def test_a_missing_robosuite_is_named_with_the_extra_that_has_it(monkeypatch):
    robosuite_arms._import_robosuite.cache_clear()
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(RuntimeError, match=r"pip install 'lerobot_policy_foresight\[libero\]'"):
        robosuite_arms.RobosuiteSim("panda-lift")


@pytest.mark.slow
@pytest.mark.parametrize(("robot", "camera", "stride"), [("panda", "agent", 2), ("iiwa", "side", 5)])
def test_an_arm_lifts_the_cube_and_its_points_rise_with_it(tmp_path, robot, camera, stride):
    pytest.importorskip("robosuite", reason="`make libero` installs it")
    flags = ["--simulator", "robosuite", "--tasks", f"{robot}-lift", "--episodes", "1", "--workers", "1"]
    flags += ["--cameras", camera, "--stride", str(stride), "--n-points", "200", "--noise", "0"]
    assert main([*flags, "--output", str(tmp_path / "arm")]) == 0
    rows = DatasetRows(tmp_path / "arm")
    assert rows.fps == 50 // stride and rows.tasks == ["Lift the red cube"]
    hand = rows.column("observation.state").read(range(len(rows)))
    assert hand[:, 2].argmin() < len(hand) - 3 and hand[-1, 2] - hand[:, 2].min() > 0.03
    points = rows.column(points_key(camera)).read(range(len(rows))).reshape(len(rows), -1, 3)
    seen = rows.column(points_visible_key(camera)).read(range(len(rows)))
    moving = moving_flags(read_provenance(rows.root), 0, camera, points.shape[1])
    travel = np.abs(np.diff(points.astype(np.float64), axis=0)).sum(0)[:, :2].max(1)
    real = seen.any(0)
    assert 20 < moving.sum() < real.sum()
    assert np.median(travel[moving]) > 20 * np.median(travel[real & ~moving])
