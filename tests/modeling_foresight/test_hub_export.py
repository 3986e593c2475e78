"""A policy with its code: where this project cannot be imported, the exported files alone act the same."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_foresight import ForesightForActionPrediction, ForesightModel, ForesightStream, export_with_code
from tests.tiny import TASKS, tiny_config, tiny_inputs, tiny_processor

ROOT = Path(__file__).parents[2]
OURS = ("modeling_foresight", "training", "lerobot_policy_foresight", "__editable__")

HEAVY = ("timm", "lerobot", "peft", "datasets", "pandas", "wandb", "matplotlib", "gradio", "training")

LOAD_AND_ACT = f"""
import importlib.util, os, sys
assert sys.flags.isolated and sys.flags.no_site
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("modeling_foresight") is None, "this project can be imported here"

def refuse_network(event, args):
    assert event not in ("socket.connect", "socket.getaddrinfo"), (event, args)

sys.addaudithook(refuse_network)
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

trust = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained("./exported-policy", **trust)
type(config)(), type(config).from_preset("foresight_3d")
get_class_from_dynamic_module("modeling_foresight.ForesightForActionPrediction", "./exported-policy")
def check_imports(what):
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"importing {{what}} imports {{heavy}}"

check_imports("the exported files")
if (child := os.fork()) == 0:  # only this copy of the process can import the project
    sys.path.append(sys.argv[2])
    import modeling_foresight
    check_imports("the project")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
model = AutoModel.from_pretrained("./exported-policy", **trust)
processor = AutoProcessor.from_pretrained("./exported-policy", **trust)
actor = AutoModel.from_pretrained("./exported-policy", auxiliary_heads=False, **trust)
names = [type(x).__name__ for x in (config, model, processor)]
assert names == ["ForesightConfig", "ForesightForActionPrediction", "ForesightProcessor"], names
assert "modeling_foresight" not in sys.modules and "lerobot" not in sys.modules

given = torch.load("given.pt", weights_only=False)
torch.testing.assert_close(model.predict_action(**given["inputs"]), given["action"])
torch.testing.assert_close(actor.predict_action(**given["inputs"]), given["action"])
assert not any(p.requires_grad for p in model.model.vision_encoder.parameters())
stream = model.stream(processor)
stream.reset(given["task"])
for images, state, step in given["steps"]:
    torch.testing.assert_close(stream.step(images, state), step)
model.save_pretrained("./saved-again")
processor.save_pretrained("./saved-again")
"""


def site_packages_without_this_project(folder: Path) -> Path:
    """A folder of links to all that is installed, but for what makes this project importable."""
    folder.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(OURS):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def policy():
    torch.manual_seed(0)
    config = tiny_config()
    return ForesightForActionPrediction(config).eval(), tiny_processor(config)


def auto_map(file: Path) -> dict | None:
    return json.loads(file.read_text()).get("auto_map")


def test_exported_files_act_without_this_project_import_nothing_heavy_and_need_no_network(policy, tmp_path):
    model, processor = policy
    export_with_code(model, processor, tmp_path / "exported-policy")
    draw = np.random.default_rng(1)
    stream, steps = ForesightStream(model, processor), []
    stream.reset(TASKS[1])
    for _ in range(2):
        images = {view: draw.integers(0, 255, (52, 44, 3), dtype=np.uint8) for view in processor.views}
        state = draw.random(model.config.state_dim, dtype=np.float32)
        steps.append((images, state, stream.step(images, state)))
    inputs = tiny_inputs(model.config)
    given = {"inputs": inputs, "action": model.predict_action(**inputs), "task": TASKS[1], "steps": steps}
    torch.save(given, tmp_path / "given.pt")
    packages = site_packages_without_this_project(tmp_path / "packages")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOAD_AND_ACT, str(packages), str(ROOT)],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exported, again = (
        {file.name for file in (tmp_path / folder).glob("*.py")}
        for folder in ("exported-policy", "saved-again")
    )
    assert exported == again >= {"modeling_foresight.py", "configuration_foresight.py", "streaming.py"}


def test_an_export_names_all_three_classes_and_leaves_no_trace(policy, tmp_path):
    model, processor = policy
    export_with_code(model, processor, tmp_path / "with", max_shard_size="100KB")
    assert auto_map(tmp_path / "with/config.json") == {
        "AutoConfig": "configuration_foresight.ForesightConfig",
        "AutoModel": "modeling_foresight.ForesightForActionPrediction",
    }
    named = auto_map(tmp_path / "with/processor_config.json")
    assert named == {"AutoProcessor": "processing_foresight.ForesightProcessor"}
    assert (tmp_path / "with/model.safetensors.index.json").exists()
    model.save_pretrained(tmp_path / "without")
    processor.save_pretrained(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.py"))
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        assert auto_map(tmp_path / "without" / name) is None, name


def test_only_a_bare_policy_is_exported(policy, tmp_path):
    model, processor = policy
    with pytest.raises(TypeError, match="takes a ForesightForActionPrediction, not a ForesightModel. Unwrap"):
        export_with_code(ForesightModel(model.config), processor, tmp_path)
    mine = type("MyPolicy", (ForesightForActionPrediction,), {})(model.config)
    with pytest.raises(TypeError, match="takes a ForesightForActionPrediction, not a MyPolicy"):
        export_with_code(mine, processor, tmp_path)  # its code is not sent
    with pytest.raises(TypeError, match="takes a ForesightProcessor"):
        export_with_code(model, processor.tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
