"""Datasets without depth get it from a model: from the command to what the stock reader reads."""

import sys
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.dataset_tools import remove_feature
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts import annotate
from datasets_scripts.annotate import main
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.depth import open_depth
from datasets_scripts.inspection.dataset_card import list_label_licenses
from datasets_scripts.storage.provenance import read_provenance
from tests.datasets_scripts.depth.test_sources import save_network
from tests.synthetic import make_dataset


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Videos of two cameras whose depth was removed, by LeRobot's own tool."""
    folder = tmp_path_factory.mktemp("recorded")
    facts = make_dataset(folder / "data", tracks=False, size=(64, 80), episodes=2, frames=[5, 3])
    whole = LeRobotDataset("local/data", root=facts.root)
    depths = ["observation.depth.main", "observation.depth.wrist"]
    remove_feature(whole, depths, output_dir=folder / "bare", repo_id="local/bare")
    return folder / "bare"


def test_the_stock_reader_reads_what_two_joined_models_give(recorded, tmp_path):
    source, metric = (save_network(tmp_path / kind, kind) for kind in ("relative", "metric"))
    output = tmp_path / "annotated"
    options = [
        "--cameras=main",
        f"--depth={source}",
        "--n-points=20",
        "--workers=1",
        "--device=cpu",
        f"--align-with={metric}",
    ]
    assert main([f"--dataset={recorded}", f"--output={output}", *options]) == 0

    dataset = LeRobotDataset("local/annotated", root=output, depth_output_unit="m", return_uint8=True)
    assert len(dataset) == 8
    for start, stop in ((0, 5), (5, 8)):
        items = [dataset[i] for i in range(start, stop)]
        video = [np.asarray(item["observation.images.main"]).transpose(1, 2, 0) for item in items]
        clip = open_depth(source, align_with=metric, device="cpu").estimate(video, dataset.fps)
        want = np.concatenate([meters for meters, _ in clip.runs])
        stored = np.stack([np.asarray(item["observation.depth.main"])[0] for item in items])
        np.testing.assert_allclose(stored, want, rtol=5e-3)  # 12 bits
    provenance = read_provenance(output)
    models = provenance["cameras"]["main"]["depth"]["models"]
    assert [model["is_metric"] for model in models] == [False, True]
    assert provenance["episodes"]["1"]["main"]["depth"]["key_frames"] == 3


@pytest.mark.slow
def test_a_worker_of_another_environment_annotates_and_its_license_is_kept(recorded, tmp_path):
    script = Path(annotate.__file__).parent / "depth" / "workers" / "brightness.py"
    options = ["--cameras=main", "--depth=worker", "--n-points=20", "--workers=1"]
    options += [f"--depth-model={sys.executable} {script}"]
    for _ in range(2):  # a finished output is left unchanged
        assert main([f"--dataset={recorded}", f"--output={tmp_path / 'out'}", *options]) == 0
    provenance = read_provenance(tmp_path / "out")
    (model,) = provenance["cameras"]["main"]["depth"]["models"]
    assert (model["model"], model["license"]) == ("brightness", "apache-2.0")
    made = provenance["annotation"]["parameters"]
    assert made["depth_model"] == f"{Path(sys.executable).name} brightness.py"
    assert ("brightness", "apache-2.0") in list_label_licenses(provenance["cameras"])
    assert "`brightness`" in (tmp_path / "out" / "README.md").read_text()


def test_models_of_one_name_are_told_apart(tmp_path):
    for folder, weights in (("a", b"0" * 10), ("b", b"0" * 10), ("c", b"0" * 9 + b"1")):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / "model.safetensors").write_bytes(weights)
    one, copy, other = (
        Annotation(("main",), depth=str(tmp_path / folder / "model")).to_dict() for folder in "abc"
    )
    assert one == copy != other and one["depth"] == other["depth"] == "model"


def test_an_executor_of_this_machine_loads_one_model_unless_told_otherwise(recorded, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(annotate, "run_tasks", lambda job, executor, resources, push: given.append(resources))
    depth = save_network(tmp_path / "metric", "metric")
    options = [
        f"--dataset={recorded}",
        f"--output={tmp_path / 'out'}",
        f"--depth={depth}",
        "--executor=local",
    ]
    assert main(options) == main([*options, "--workers=3"]) == 0
    assert [resources.workers for resources in given] == [1, 3]
