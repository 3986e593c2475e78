"""The exported action path gives the stream's actions, and what cannot be exported is refused in one line."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.action_graphs import build_graphs, describe_graph
from modeling_foresight.export import compare_actions, main, write_policy
from modeling_foresight.exported_policy import ExportedPolicy
from tests.modeling_foresight.test_streaming import build, draw_image
from tests.tiny import BATCH_NORM_TOWER, tiny_config, tiny_processor, tiny_tokenizer

RUN_ONNX = Path(__file__).resolve().parents[2] / "examples" / "run_onnx.py"
ROBOTS, STEPS = 3, 50
PARITY = 1e-4
TASKS = ["open the drawer", "push the red cube to the left", "close it " * 20]  # the last one is cut
CALVIN = {"action_codec": "local_delta", "state_representation": "relative", "binary_action_indices": (6,)}
CALVIN |= {"binary_state_indices": (6,)}
ROBOT_KINDS = {
    "arm": {"action": [0, 1, 2], "state": [0, 1, 4]},
    "hand": {"action": [2, 3, 4, 5, 6], "state": [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]},
}
STATELESS_HAND = {**ROBOT_KINDS, "hand": {"action": [2, 3, 4, 5, 6], "state": []}}
VARIANTS = {
    "history of five frames": {},
    "one frame": {"history_length": 1, "future_targets": "lookahead"},
    "goals, pose changes and relative states": {"goal_image": True, **CALVIN},
    "three views, no state": {
        "views": ("main", "left-hand", "top 2"),
        "state_dim": 0,
        "binary_state_indices": (),
    },
    "several robots": {"embodiments": ROBOT_KINDS},
    "a robot without a state among others": {"embodiments": STATELESS_HAND},
    "a convolutional tower": {"vision_config": BATCH_NORM_TOWER},
    "no text tower": {"towers": ("vision",)},
}


class UntracedPolicy(ExportedPolicy):
    """Runs the graphs as modules, before any export."""

    def __init__(self, model, processor):
        self.config, self._modules = model.config, build_graphs(model, processor)
        graphs = {name: describe_graph(graph, "") for name, graph in self._modules.items()}
        self.facts = {"embodiment": processor.embodiment, "graphs": graphs}

    def load_graph(self, name):
        graph = self._modules[name]

        @torch.no_grad()
        def run(inputs):
            outputs = graph(*(inputs[name] for name in graph.inputs))
            return dict(zip(graph.outputs, outputs, strict=True))

        return run


class UntracedSession:
    """A graph before any export, in place of the session of ONNX Runtime that has its file."""

    def __init__(self, graph):
        self.graph = graph

    @torch.no_grad()
    def run(self, names, inputs):
        assert names is None and set(inputs) == set(self.graph.inputs)
        tensors = [torch.from_numpy(inputs[name]) for name in self.graph.inputs]
        assert [tensor.dtype for tensor in tensors] == [dtype for dtype, _ in self.graph.inputs.values()]
        return [output.numpy() for output in self.graph(*tensors)]


@pytest.fixture
def run_onnx(tmp_path, monkeypatch):
    """What `examples/run_onnx.py` defines, and the folder of a policy for it, which is not traced."""

    def write(model, processor):
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `export`")
        graphs = {}

        def keep(program, graph, path, opset):
            graphs[path.name] = graph

        monkeypatch.setattr("modeling_foresight.export.trace_graph", lambda graph: None)
        monkeypatch.setattr("modeling_foresight.export.write_onnx", keep)
        monkeypatch.setattr(runtime, "InferenceSession", lambda path, _: UntracedSession(graphs[path.name]))
        write_policy(tmp_path, model, processor, "onnx")
        return runpy.run_path(str(RUN_ONNX)), tmp_path

    return write


@pytest.fixture
def act_by(run_onnx):
    """What acts for one robot: a model's stream, that of its export, or the code for a robot's computer."""

    def make(way, model, processor):
        if way == "run_onnx":
            script, folder = run_onnx(model, processor)
            return script["Policy"](folder)
        return (model if way == "model" else UntracedPolicy(model, processor)).stream(processor)

    return make


def build_variant(name):
    fields = VARIANTS[name]
    if "embodiments" not in fields:
        return build(**fields)
    config = tiny_config(**fields)
    statistics = {
        robot: {kind: statistics_of(len(places)) for kind, places in kinds.items()}
        for robot, kinds in fields["embodiments"].items()
    }
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval()
    processor = type(tiny_processor(tiny_config())).from_config(
        config, tiny_tokenizer(), statistics=statistics
    )
    return model, processor.for_embodiment("hand")


def statistics_of(size):
    return {"mean": [0.3] * size, "std": [0.5] * size, "min": [-2.0] * size, "max": [2.0] * size}


def largest_difference(ours, theirs, steps=STEPS, robots=ROBOTS):
    """Of actions over an instruction, in which cameras fail, a goal comes, and one robot starts again."""
    rng, processor, config = np.random.default_rng(0), theirs.processor, theirs.model.config

    def restart(envs):
        for stream in (ours, theirs):
            if "text" in config.towers:
                stream.reset([TASKS[robot] for robot in envs], envs=envs)
            else:
                stream.reset(
                    text_features=torch.ones(len(envs), config.text_config.projection_dim), envs=envs
                )

    restart(list(range(robots)))
    difference = 0.0
    for step in range(steps):
        images = {view: np.stack([draw_image(rng) for _ in range(robots)]) for view in processor.views}
        present = rng.random((robots, len(processor.views))) < 0.8
        if step % 7 == 3:
            images.pop(processor.views[-1])
        state = rng.normal(size=(robots, ours.state_dim)).astype(np.float32) if ours.state_dim else None
        if step == 4 and config.goal_image:
            for stream in (ours, theirs):
                stream.set_goal(images[processor.views[0]])
        if step == 13:
            restart([robots - 1])
        again = step % 11 == 5
        chunks = [stream.step_chunk(images, state, None, present, again) for stream in (ours, theirs)]
        assert chunks[0].shape == chunks[1].shape == (robots, config.chunk_size, chunks[0].shape[-1])
        difference = max(difference, (chunks[0] - chunks[1]).abs().max().item())
    return difference


@pytest.mark.parametrize(
    "variant", ["goals, pose changes and relative states", "a robot without a state among others"]
)
def test_the_graphs_give_the_actions_of_the_stream(variant):
    model, processor = build_variant(variant)
    policy = UntracedPolicy(model, processor)
    streams = [one.stream(processor, num_envs=2) for one in (policy, model)]
    assert largest_difference(*streams, steps=8, robots=2) < PARITY


def test_the_outputs_are_of_the_types_and_shapes_that_are_described():
    for variant in ("goals, pose changes and relative states", "several robots"):
        for name, graph in build_graphs(*build_variant(variant)).items():
            described = describe_graph(graph, "")["outputs"]
            with torch.no_grad():
                outputs = dict(zip(described, graph(*graph.example()), strict=True))
            for output, tensor in outputs.items():
                batch, *sizes = described[output]["shape"]
                assert (batch, sizes) == ("batch", list(tensor.shape[1:])), (name, output)
                assert f"torch.{described[output]['dtype']}" == str(tensor.dtype), (name, output)


@pytest.fixture
def export(tmp_path, capsys):
    """Saves a policy and runs the command: the folder that it writes, and what it prints."""

    def export(model, processor, form, *options):
        if form == "onnx":
            for package in ("onnx", "onnxscript", "onnxruntime"):
                pytest.importorskip(package, reason=f"{package} is in the extra `export`")
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        arguments = [
            "--checkpoint",
            tmp_path / "model",
            "--format",
            form,
            "--output",
            tmp_path / form,
            *options,
        ]
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (code, printed.err.count("error: ")) == (0, 0), printed.err
        return tmp_path / form, printed.out

    return export


EVERYWHERE = "goals, pose changes and relative states"  # exported under the newest and lowest versions too
EXPORTS = [("onnx", variant) for variant in VARIANTS if variant != EVERYWHERE]
EXPORTS += [pytest.param(form, EVERYWHERE, marks=pytest.mark.exports) for form in ("onnx", "torch-export")]


@pytest.mark.slow  # tracing takes half a minute
@pytest.mark.parametrize(("form", "variant"), EXPORTS)
def test_exported_files_give_the_actions_of_the_stream_over_fifty_steps(export, form, variant):
    model, processor = build_variant(variant)
    robot = ["--embodiment", "hand"] if processor.embodiment else []
    folder, _ = export(model, processor, form, *robot)
    policy = ExportedPolicy(folder)
    for robots in (ROBOTS, 1):
        streams = [one.stream(processor, num_envs=robots) for one in (policy, model)]
        assert largest_difference(*streams, robots=robots) < PARITY


@pytest.mark.slow  # tracing takes seconds
def test_torch_export_files_need_torch_alone(export):
    folder, _ = export(*build(), "torch-export")
    script = """
import json, sys, torch
graph = json.load(open("policy.json"))["graphs"]["step"]
step = torch.export.load(graph["file"]).module()
sizes = [[axis if isinstance(axis, int) else 9 for axis in x["shape"]] for x in graph["inputs"].values()]
dtypes = [getattr(torch, x["dtype"]) for x in graph["inputs"].values()]
outputs = step(*(torch.zeros(size, dtype=dtype) for size, dtype in zip(sizes, dtypes)))
assert len(outputs) == len(graph["outputs"]) and outputs[0].numpy().shape == (9, 4, 7)
assert not {"transformers", "timm", "modeling_foresight"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)


@pytest.mark.slow  # tracing takes seconds
@pytest.mark.parametrize("opset", [18, 23])
def test_every_opset_on_offer_runs(export, opset):
    folder, _ = export(*build(), "onnx", "--opset", str(opset))
    import onnx

    written = onnx.load(folder / "step.onnx")
    assert {imported.version for imported in written.opset_import if not imported.domain} == {opset}
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow  # tracing takes seconds
def test_int8_files_are_smaller_and_act_alike(export):
    model, processor = build()
    folder, printed = export(model, processor, "onnx", "--int8")
    import onnx

    kinds = {node.op_type for node in onnx.load(folder / "step.onnx").graph.node}
    assert "MatMulInteger" in kinds and "ConvInteger" not in kinds
    assert json.loads((folder / "policy.json").read_text())["int8"]
    streams = [one.stream(processor, num_envs=ROBOTS) for one in (ExportedPolicy(folder), model)]
    assert 0 < largest_difference(*streams) < 1


def refusal(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, (model, processor) = tmp_path_factory.mktemp("saved"), build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "--format onnx --opset 17": "--opset 17 is not supported: choose 18 to 23",
        "--format torch-export --opset 18": "--opset belongs to --format onnx",
        "--format torch-export --int8": "--int8 belongs to --format onnx",
        "--format torch-export --embodiment hand": "embodiment='hand', but this policy has one robot",
    }.items(),
)
def test_options_that_do_not_fit_are_refused(saved, tmp_path, capsys, options, message):
    given = ["--checkpoint", saved, "--output", tmp_path / "out", *options.split()]
    assert message in refusal(capsys, *given)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_touched(saved, tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    line = refusal(capsys, "--checkpoint", saved, "--format", "torch-export", "--output", tmp_path)
    assert line == f"error: --output {tmp_path} exists: delete it, or choose another one"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    given = ("--format", "torch-export", "--output", tmp_path / "out", "--checkpoint")
    assert f"{tmp_path} has no config.json: give the folder" in refusal(capsys, *given, tmp_path)
    assert "nowhere/at/all cannot be used" in refusal(capsys, *given, "nowhere/at/all")
    (tmp_path / "adapter_config.json").write_text("{}")
    for remedy in ("--lora.merge true", "python -m lerobot_policy_foresight ADAPTER --merge FOLDER"):
        assert remedy in refusal(capsys, *given, tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    assert f"{tmp_path} is an exported policy" in refusal(capsys, *given, tmp_path)


def test_a_model_that_does_not_act_is_refused(tmp_path, capsys):
    config = tiny_config(objectives=("depth",))
    ForesightForActionPrediction(config).save_pretrained(tmp_path / "model")
    tiny_processor(config).save_pretrained(tmp_path / "model")
    given = ("--checkpoint", tmp_path / "model", "--format", "torch-export", "--output", tmp_path / "out")
    assert "model cannot be used: it has no action head, its objectives are ['depth']" in refusal(
        capsys, *given
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mean", "std", "shift", "bound"),
    [
        (0.0, 2e-5, 4e-5, (1.9, 2.1)),  # meters of a small step, beside which 1e-4 is a wrong action
        (100.0, 1e-3, 2e-5, (0.0, 0.0)),  # what float32 rounds away of a joint in degrees
    ],
)
def test_actions_are_compared_in_the_units_of_each_entry(monkeypatch, tmp_path, mean, std, shift, bound):
    statistics = {
        "mean": [mean, 0.0],
        "std": [std, 50.0],
        "min": [mean - 9 * std, -99],
        "max": [mean + 9, 99],
    }
    model, processor = build(action_dim=2, binary_action_indices=())
    processor.action_stats = statistics

    class Shifted(UntracedPolicy):
        def stream(self, *arguments, **options):
            stream = super().stream(*arguments, **options)
            act = stream.step_chunk
            stream.step_chunk = lambda *inputs: act(*inputs) + torch.tensor([shift, 0.0])
            return stream

    monkeypatch.setattr("modeling_foresight.export.ExportedPolicy", lambda _: Shifted(model, processor))
    assert bound[0] <= compare_actions(model, processor, tmp_path, steps=3) <= bound[1]


def test_an_error_is_one_line_however_long_its_text_is(tmp_path, capsys, monkeypatch):
    def fail(args):
        raise ValueError("the tokenizer is damaged:\n\n  line 3")

    monkeypatch.setattr("modeling_foresight.export.export_policy", fail)
    line = refusal(capsys, "--checkpoint", tmp_path, "--format", "onnx", "--output", tmp_path / "out")
    assert line == "error: the tokenizer is damaged: line 3"


def test_what_pytorch_cannot_follow_is_one_line_and_leaves_nothing(saved, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("advice") from NotImplementedError("no rule for this layer\nmany more lines")

    monkeypatch.setattr("torch.export.export", fail)
    line = refusal(capsys, "--checkpoint", saved, "--format", "torch-export", "--output", tmp_path / "out")
    assert line == "error: PyTorch cannot export TextGraph of this model: no rule for this layer"
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named_with_the_command(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modeling_foresight.export.WRITERS", ("onnxscript_",))
    given = ("--checkpoint", saved, "--format", "onnx", "--output", tmp_path / "out")
    line = refusal(capsys, *given)
    assert "ONNX needs onnxscript_: pip install 'lerobot_policy_foresight[export]'" in line


WAYS = ("model", "exported", "run_onnx")
FRAME, STATE = np.zeros((44, 52, 3), np.uint8), np.zeros(11, np.float32)
REFUSED = {  # what a robot does after its first step -> what it is told
    "an unknown view": (
        lambda robot: robot.step({"front": FRAME}, STATE),
        r"images has the views \['front'\]; the \w+ knows \['main', 'wrist'\]",
    ),
    "no view": (lambda robot: robot.step({}, STATE), r"images has the views \[\]; the \w+ knows"),
    "two frames": (
        lambda robot: robot.step({"main": np.stack([FRAME] * 2)}, STATE),
        r"image of 'main' (holds 2 frames|is uint8 of shape \(2, 44, 52, 3\))",
    ),
    "an image of floats": (
        lambda robot: robot.step({"main": FRAME / 255}, STATE),
        "'main'.*float64.*expected .*uint8 RGB",
    ),
    "a state of another size": (
        lambda robot: robot.step({"main": FRAME}, STATE[:3]),
        r"state has shape \((1, )?3,?\); expected",
    ),
    "a state that is no number": (
        lambda robot: robot.step({"main": FRAME}, np.full(11, np.nan)),
        "state (holds NaN|.* finite numbers)",
    ),
    "no instruction": (lambda robot: robot.reset(), "(Give|takes nothing but) an instruction"),
    "two instructions": (
        lambda robot: robot.reset("close it", text_features=np.ones(22, np.float32)),
        "(Give|takes nothing but) an instruction",
    ),
    "a goal": (lambda robot: robot.set_goal(FRAME), "takes no goal images"),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_a_policy_acts_wrong_input_is_named_and_changes_nothing(act_by, way):
    model, processor = build()
    robot, undisturbed = act_by(way, model, processor), model.stream(processor)
    with pytest.raises(ValueError, match="no instruction: call reset"):
        robot.step({"main": FRAME}, STATE)
    for one in (robot, undisturbed):
        one.reset("close it")
        one.step({"main": FRAME}, STATE)
    for act, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            act(robot)
    if way != "model":  # which also acts without a state, for a whole instruction
        with pytest.raises(ValueError, match="state.* at every (step|call)"):
            robot.step({"main": FRAME})
    assert_acts_alike(robot, undisturbed)


def assert_acts_alike(robot, stream):
    action = np.asarray(robot.step({"main": FRAME}, STATE))
    action = action[0] if action.ndim == 2 else action  # run_onnx gives the whole chunk
    assert np.allclose(action, stream.step({"main": FRAME}, STATE), rtol=0, atol=PARITY)


@pytest.mark.parametrize("way", WAYS)
def test_however_a_policy_without_a_text_tower_acts_it_takes_features(act_by, way):
    robot, features = act_by(way, *build(towers=("vision",))), np.ones((1, 22), np.float32)
    with pytest.raises(ValueError, match="no text tower|text_features, it has no text tower"):
        robot.reset("close it")
    robot.reset(text_features=features[0] if way == "run_onnx" else features)
    assert np.isfinite(robot.step({"main": FRAME}, STATE)).all()


@pytest.mark.parametrize("way", ["exported", "run_onnx"])
def test_an_exported_policy_follows_a_goal_image(act_by, way):
    model, processor = build(goal_image=True)
    robot, stream = act_by(way, model, processor), model.stream(processor)
    for one in (robot, stream):
        one.reset("close it")
        one.set_goal(FRAME + np.uint8(90))
    assert_acts_alike(robot, stream)


def test_an_exported_policy_with_goals_warns_when_it_acts_without_one(monkeypatch):
    said = []
    logger = SimpleNamespace(warning_once=said.append)
    monkeypatch.setattr("modeling_foresight.modeling_foresight.logger", logger)
    model, processor = build(goal_image=True)
    stream = UntracedPolicy(model, processor).stream(processor)
    stream.reset("close it")
    stream.set_goal(FRAME)
    stream.step({"main": FRAME}, STATE)
    assert not said
    stream.reset("close it")
    stream.step({"main": FRAME}, STATE)
    assert "acts without one" in said[0]


@pytest.mark.parametrize("exported", [False, True])
def test_a_stream_of_several_robots_refuses_what_is_for_another_number(exported):
    model, processor = build()
    policy = UntracedPolicy(model, processor) if exported else model
    for options, message in {
        ("num_envs", 0): "num_envs=0 must be a whole number of at least 1",
        ("embodiment", "hand"): "embodiment='hand', but this policy has one robot",
    }.items():
        with pytest.raises(ValueError, match=message):
            policy.stream(processor, **dict([options]))
    stream = policy.stream(processor, num_envs=2)
    with pytest.raises(ValueError, match="There are 1 instructions for 2 robots"):
        stream.reset(["close it"])
    stream.reset("close it")
    with pytest.raises(ValueError, match="holds 1 frames of 1 robots"):
        stream.step({"main": FRAME[None]}, np.stack([STATE] * 2))


def test_an_exported_stream_refuses_what_it_cannot_do():
    model, processor = build()
    policy = UntracedPolicy(model, processor)
    with pytest.raises(ValueError, match="predicts no progress"):
        policy.stream(processor, with_progress=True)
    stream = policy.stream(processor)
    with pytest.raises(ValueError, match="has a text tower: give an instruction"):
        stream.reset(text_features=torch.ones(1, 22))
    hand = build_variant("several robots")
    with pytest.raises(ValueError, match="exported for hand, not for arm"):
        UntracedPolicy(*hand).stream(hand[1], embodiment="arm")


def test_the_example_refuses_other_formats_and_more_pictures_than_views(run_onnx, monkeypatch):
    script, folder = run_onnx(*build())
    monkeypatch.setattr("sys.argv", ["run_onnx.py", "--policy", str(folder), "--images", "a", "b", "c"])
    with pytest.raises(ValueError, match=r"names 3 pictures; the policy has the views \['main', 'wrist'\]"):
        script["main"]()
    facts = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(facts | {"format": "torch-export"}))
    with pytest.raises(ValueError, match="holds torch-export files: export with --format onnx"):
        script["Policy"](folder)
