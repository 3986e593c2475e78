"""Control step by step gives what the whole window gives, whatever happens to robots, cameras and goals."""

import copy
import weakref

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor, build_small_tokenizer
from modeling_foresight.configuration_foresight import PROCESSOR_FIELDS
from modeling_foresight.streaming import ForesightStream
from tests.tiny import tiny_config, tiny_processor

ROBOTS, HEIGHT, WIDTH = 3, 44, 52
TASKS = ["open the drawer", "push the red cube to the left", "close it"]
EXACT = {"rtol": 0, "atol": 1e-5}


def statistics(size: int) -> dict[str, list[float]]:
    draw = torch.Generator().manual_seed(size)
    mean, spread = torch.randn(size, generator=draw), 0.5 + torch.rand(size, generator=draw)
    return {
        "mean": mean.tolist(),
        "std": spread.tolist(),
        "min": (mean - spread).tolist(),
        "max": (mean + spread).tolist(),
    }


def build(**fields) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """A model in evaluation mode with weights large enough that a wrong token shows."""
    config = tiny_config(**fields)
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval()
    for weight in model.model.layers.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.15)
    stats = {"action_stats": statistics(config.action_dim)} if config.action_codec == "recorded" else {}
    if config.state_dim:
        stats["state_stats"] = statistics(config.state_dim)
    return model, tiny_processor(config, **stats)


class Recorder:
    """What every robot has seen since its instruction began, and what the whole window makes of it."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.frames = {}  # robot -> list of (images, state)
        self.task, self.goal = {}, {}

    def reset(self, robot, task):
        self.frames[robot], self.task[robot] = [], task
        self.goal.pop(robot, None)

    def see(self, robot, images, state):
        self.frames[robot].append((images, state))
        self.frames[robot] = self.frames[robot][-self.model.config.history_length :]

    @torch.no_grad()
    def action(self, robot) -> torch.Tensor:
        frames, views = self.frames[robot], self.processor.views
        blank = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        there = [[view in images for view in views] for images, _ in frames]
        window = {v: np.stack([images.get(v, blank) for images, _ in frames]) for v in views}
        state = None if frames[0][1] is None else np.stack([state for _, state in frames])
        batch = self.processor(
            images=window, text=self.task[robot], state=state, goal_image=self.goal.get(robot)
        )
        batch["view_mask"] = torch.tensor(there)[None]
        chunk = self.model.predict_action(**batch)
        current = None if state is None else torch.from_numpy(state[-1:])
        return self.processor.decode_actions(chunk, state=current)[0]


def draw_image(rng) -> np.ndarray:
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def draw_state(rng, size) -> np.ndarray:
    return rng.normal(size=size).astype(np.float32)


def assert_follows(model, processor, seed: int, steps: int, with_state: bool = True):
    """One robot gets the chunks of the whole window, step by step; its stream and its last images."""
    stream, truth = ForesightStream(model, processor), Recorder(model, processor)
    rng = np.random.default_rng(seed)
    stream.reset(TASKS[1])
    truth.reset(0, TASKS[1])
    for _ in range(steps):
        images = {view: draw_image(rng) for view in ("main", "wrist")}
        state = draw_state(rng, model.config.state_dim) if with_state else None
        truth.see(0, images, state)
        torch.testing.assert_close(stream.step_chunk(images, state), truth.action(0), **EXACT)
    return stream, images


@pytest.mark.parametrize(("goal_image", "steps"), [(False, 12), (True, 50)])
def test_a_robot_gets_the_actions_of_the_whole_window_for_an_episode(goal_image, steps):
    model, processor = build(goal_image=goal_image)
    stream, truth, rng = (
        ForesightStream(model, processor),
        Recorder(model, processor),
        np.random.default_rng(1),
    )
    stream.reset(TASKS[0])
    truth.reset(0, TASKS[0])
    for step in range(steps):
        if goal_image and step in (7, 27):  # none at first, then one, then another
            truth.goal[0] = draw_image(rng)
            stream.set_goal(truth.goal[0])
        images, state = {"main": draw_image(rng), "wrist": draw_image(rng)}, draw_state(rng, 11)
        truth.see(0, images, state)
        action = stream.step(images, state)
        assert action.shape == (7,)
        torch.testing.assert_close(action, truth.action(0)[0], **EXACT)


def test_relative_states_are_recomputed_as_the_window_slides():
    model, processor = build(
        state_dim=7,
        binary_state_indices=[6],
        binary_action_indices=[6],
        state_representation="relative",
        action_codec="local_delta",
    )
    _, images = assert_follows(model, processor, seed=2, steps=12)
    with pytest.raises(ValueError, match="give the state at each step"):
        again = ForesightStream(model, processor)
        again.reset(TASKS[1])
        again.step(images)


@pytest.mark.parametrize("static", [False, True])
def test_robots_that_start_and_pause_at_different_times_do_not_disturb_each_other(static):
    model, processor = build()
    stream, truth, rng = (
        ForesightStream(model, processor, num_envs=ROBOTS),
        Recorder(model, processor),
        np.random.default_rng(3),
    )
    stream.static = static  # as when compiled: the batch is always whole
    stream.reset(TASKS)
    for robot in range(ROBOTS):
        truth.reset(robot, TASKS[robot])
    for step in range(24):
        for robot in range(ROBOTS):
            if step and step % (5 + 6 * robot) == 0:
                task = TASKS[(robot + step) % 3]
                stream.reset([task], envs=[robot])
                truth.reset(robot, task)
        order = (2, 0, 1) if step % 3 else (0, 1, 2)
        acting = [r for r in order if rng.random() < 0.8] or [1]
        images = {view: np.stack([draw_image(rng) for _ in acting]) for view in ("main", "wrist")}
        states = np.stack([draw_state(rng, 11) for _ in acting])
        for i, robot in enumerate(acting):
            truth.see(robot, {view: images[view][i] for view in images}, states[i])
        actions = stream.step_chunk(images, states, envs=acting)
        expected = torch.stack([truth.action(robot) for robot in acting])
        torch.testing.assert_close(actions, expected, **EXACT)


def test_an_observation_may_take_the_place_of_the_newest():
    model, processor = build()
    rng = np.random.default_rng(5)
    once, twice = ForesightStream(model, processor), ForesightStream(model, processor)
    once.reset(TASKS[0])
    twice.reset(TASKS[0])
    for _ in range(model.config.history_length + 3):  # the window fills, then slides
        (early, *_), (images, state) = (
            ({"main": draw_image(rng), "wrist": draw_image(rng)}, draw_state(rng, 11)) for _ in range(2)
        )
        expected = once.step_chunk(images, state)
        twice.step_chunk(early, draw_state(rng, 11))
        torch.testing.assert_close(twice.step_chunk(images, state, again=True), expected, **EXACT)


def test_a_camera_may_fail_for_some_steps_or_some_robots():
    model, processor = build()
    stream, truth, rng = (
        ForesightStream(model, processor, num_envs=2),
        Recorder(model, processor),
        np.random.default_rng(4),
    )
    stream.reset(TASKS[2])
    for robot in range(2):
        truth.reset(robot, TASKS[2])
    for step in range(15):
        images = {view: np.stack([draw_image(rng), draw_image(rng)]) for view in ("main", "wrist")}
        if step % 4 == 1:
            del images["wrist"]
        mask = np.array([[view in images for view in ("main", "wrist")]] * 2)
        if step % 5 == 2:
            mask[1, 0] = False
        states = np.stack([draw_state(rng, 11) for _ in range(2)])
        for robot in range(2):
            seen = {v: images[v][robot] for i, v in enumerate(("main", "wrist")) if mask[robot, i]}
            truth.see(robot, seen, states[robot])
        actions = stream.step_chunk(images, states, view_mask=mask)
        torch.testing.assert_close(actions, torch.stack([truth.action(r) for r in range(2)]), **EXACT)


def test_a_robot_without_proprioception_can_act_with_a_model_that_knows_it():
    model, processor = build()
    stream, images = assert_follows(model, processor, seed=5, steps=7, with_state=False)
    with pytest.raises(ValueError, match="with every step of an instruction, or with none: reset"):
        stream.step(images, np.zeros(11))


@pytest.mark.parametrize("fields", [{"objectives": ["action", "progress"]}, {"action_sees_flow": False}])
def test_models_without_flow_stream_too(fields):
    assert_follows(*build(**fields), seed=6, steps=7)


def test_progress_is_that_of_the_newest_frame_of_the_window():
    model, processor = build()
    rng = np.random.default_rng(7)
    stream = ForesightStream(model, processor, with_progress=True)
    stream.reset(TASKS[0])
    frames = []
    for _ in range(8):
        frames.append(({v: draw_image(rng) for v in ("main", "wrist")}, draw_state(rng, 11)))
        stream.step(*frames[-1])
    window = {v: np.stack([images[v] for images, _ in frames[-5:]]) for v in ("main", "wrist")}
    state = np.stack([state for _, state in frames[-5:]])
    with torch.no_grad():
        whole = model(**processor(images=window, text=TASKS[0], state=state))
    torch.testing.assert_close(stream.progress, whole.progress[:, -1], **EXACT)


def test_a_step_encodes_the_new_images_only_and_the_text_once(monkeypatch):
    model, processor = build(goal_image=True)
    stream, rng = ForesightStream(model, processor, num_envs=2), np.random.default_rng(8)
    encoded = {"images": 0, "texts": 0}

    def count(module, args, output, name):
        encoded[name] += len(args[0])

    model.model.vision_encoder.register_forward_hook(lambda *a: count(*a, "images"))
    model.model.text_encoder.register_forward_hook(lambda *a: count(*a, "texts"))
    stream.reset(TASKS[:2])
    for _ in range(6):
        images = {v: np.stack([draw_image(rng), draw_image(rng)]) for v in ("main", "wrist")}
        stream.step(images, np.stack([draw_state(rng, 11), draw_state(rng, 11)]))
    assert encoded == {"images": 6 * 2 * 2, "texts": 2}
    stream.step({"main": images["main"][:1]}, draw_state(rng, 11)[None], envs=[1])
    assert encoded["images"] == 24 + 1


def test_a_policy_without_auxiliary_heads_streams_the_same_actions(tmp_path):
    model, processor = build()
    model.save_pretrained(tmp_path / "model")
    bare = ForesightForActionPrediction.from_pretrained(tmp_path / "model", auxiliary_heads=False)
    assert sum(p.numel() for p in bare.parameters()) < sum(p.numel() for p in model.parameters())
    streams, rng = [ForesightStream(m, processor) for m in (model, bare)], np.random.default_rng(9)
    for stream in streams:
        stream.reset(TASKS[0])
    for _ in range(7):
        images, state = {"main": draw_image(rng), "wrist": draw_image(rng)}, draw_state(rng, 11)
        first, second = (stream.step_chunk(images, state) for stream in streams)
        # Not to the bit: some CPUs round by where weights lie in memory, and loaded ones lie elsewhere.
        torch.testing.assert_close(first, second, **EXACT)


def test_features_of_a_text_tower_elsewhere_stand_in_for_the_instruction():
    model, processor = build()
    rng = np.random.default_rng(10)
    with torch.no_grad():
        features = model.model.encode_text(*processor.tokenize(TASKS[:1]))
    images, state = {"main": draw_image(rng), "wrist": draw_image(rng)}, draw_state(rng, 11)
    first, second = ForesightStream(model, processor), ForesightStream(model, processor)
    first.reset(TASKS[0])
    second.reset(text_features=features)
    torch.testing.assert_close(first.step(images, state), second.step(images, state), **EXACT)


def test_the_compiled_step_has_no_graph_break_and_never_compiles_twice():
    model, processor = build(goal_image=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = ForesightStream(model, processor, num_envs=2, compile=True, with_progress=True)
    compiled._compiled = torch.compile(  # inductor would only add the time of a C++ compiler
        ForesightStream._advance, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    eager = ForesightStream(model, processor, num_envs=2)
    rng = np.random.default_rng(11)
    for stream in (compiled, eager):
        stream.reset(TASKS[:2])
    for step in range(9):
        if step == 3:
            goals = np.stack([draw_image(rng), draw_image(rng)])
            for stream in (compiled, eager):
                stream.set_goal(goals)
        if step == 5:
            for stream in (compiled, eager):
                stream.reset(TASKS[2], envs=[1])
        acting = {6: [1, 0], 7: [1]}.get(step, [0, 1])
        images = {v: np.stack([draw_image(rng) for _ in acting]) for v in ("main", "wrist")}
        if step == 8:
            del images["wrist"]
        states = np.stack([draw_state(rng, 11) for _ in acting])
        got, expected = (s.step_chunk(images, states, envs=acting) for s in (compiled, eager))
        torch.testing.assert_close(got, expected, **EXACT)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def act(stream, seed: int, state=None):
    rng = np.random.default_rng(seed)
    images = {view: draw_image(rng) for view in ("main", "wrist")}
    return stream.step(images, draw_state(rng, 11) if state is None else state)


def test_reset_forgets_even_what_was_no_number():
    model, processor = build()
    stream, other = ForesightStream(model, processor), ForesightStream(model, processor)
    stream.reset(TASKS[0])
    act(stream, 1)
    stream._images[:], stream._states[:] = float("nan"), float("nan")
    for robot in (stream, other):
        robot.reset(TASKS[1])
    torch.testing.assert_close(act(stream, 2), act(other, 2), rtol=0, atol=0)


def test_a_stream_made_in_inference_mode_goes_on_outside_of_it():
    model, processor = build()
    with torch.inference_mode():
        stream = ForesightStream(model, processor, with_progress=True)
        stream.reset(TASKS[0])
        first = act(stream, 1)
    stream.reset(TASKS[0])
    torch.testing.assert_close(act(stream, 1), first.clone(), rtol=0, atol=0)
    with torch.inference_mode():
        act(stream, 2)


def test_mixed_precision_around_a_stream_costs_digits_only():
    model, processor = build(goal_image=True)
    actions = {}
    for enabled in (False, True):
        stream = ForesightStream(model, processor)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stream.reset(TASKS[0])
            stream.set_goal(FRAME)
            actions[enabled] = act(stream, seed=7)
    assert actions[True].dtype == torch.float32
    assert not torch.equal(actions[True], actions[False])
    torch.testing.assert_close(actions[True], actions[False], rtol=0.1, atol=0.1)


def test_robots_may_be_named_by_booleans():
    model, processor = build()
    stream = ForesightStream(model, processor, num_envs=3)
    stream.reset(TASKS)
    images = {view: np.zeros((3, HEIGHT, WIDTH, 3), np.uint8) for view in ("main", "wrist")}
    stream.step(images, np.zeros((3, 11)))
    stream.reset(TASKS[0], envs=np.array([False, True, False]))
    assert stream._count.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="numbers of robots, or one boolean for each of the 3"):
        stream.reset(TASKS[0], envs=np.array([True, False]))
    with pytest.raises(ValueError, match="numbers of robots"):
        stream.reset(TASKS[0], envs=3)


def test_a_step_that_fails_half_way_ends_the_instruction(monkeypatch):
    model, processor = build()
    stream, other = ForesightStream(model, processor), ForesightStream(model, processor)
    stream.reset(TASKS[0])
    act(stream, 1)
    with monkeypatch.context() as broken:
        broken.setattr(model, "decode_newest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            act(stream, 2)
    with pytest.raises(ValueError, match="no instruction: call reset"):
        act(stream, 3)
    for robot in (stream, other):
        robot.reset(TASKS[0])
    torch.testing.assert_close(act(stream, 1), act(other, 1), rtol=0, atol=0)


def test_an_adapter_streams_what_it_predicts():
    peft = pytest.importorskip("peft")
    from modeling_foresight.lora import lora_config

    model, processor = build()
    wrapped = peft.get_peft_model(model, lora_config(model, r=2)).eval()
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    stream = ForesightStream(wrapped, processor)
    stream.reset(TASKS[0])
    adapted = act(stream, 1)
    merged = ForesightStream(wrapped.merge_and_unload(), processor)
    merged.reset(TASKS[0])
    torch.testing.assert_close(act(merged, 1), adapted, **EXACT)


def test_a_stream_is_freed_with_its_model():
    model, processor = build()
    stream = ForesightStream(model, processor)
    stream.reset(TASKS[0])
    act(stream, 1)
    alive = weakref.ref(model)
    del model, stream
    assert alive() is None, "a cycle would keep the weights in memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replayed_cuda_graph_gives_the_actions_of_the_eager_step(compiled):
    model, processor = build(goal_image=True)
    model = model.cuda()
    graphed = ForesightStream(model, processor, num_envs=2, cuda_graph=True, compile=compiled)
    eager = ForesightStream(model, processor, num_envs=2)
    rng = np.random.default_rng(12)
    for stream in (graphed, eager):
        stream.reset(TASKS[:2])
    for step in range(9):
        if step == 4:
            for stream in (graphed, eager):
                stream.reset(TASKS[2], envs=[0])
        acting = {0: [1, 0], 6: [1, 0], 7: [1]}.get(step, [0, 1])
        images = {v: np.stack([draw_image(rng) for _ in acting]) for v in ("main", "wrist")}
        states = np.stack([draw_state(rng, 11) for _ in acting])
        got, expected = (s.step_chunk(images, states, envs=acting) for s in (graphed, eager))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


# --- Bad input ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream():
    stream = ForesightStream(*build())
    stream.reset(TASKS[0])
    return stream


FRAME = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"images": {"front": FRAME}},
            r"images has the views \['front'\]; the model knows \['main', 'wrist'\]",
        ),
        ({"images": {}}, "Give a dict"),
        ({"images": FRAME}, "views ndarray"),
        (
            {"images": {"main": np.stack([FRAME] * 6)}},
            "holds 6 frames of 1 robots; a step takes one new frame",
        ),
        ({"images": {"main": FRAME.astype(np.float32)}}, "dtype torch.float32; expected uint8"),
        ({"state": np.full(11, np.nan)}, "state holds NaN"),
        ({"state": np.zeros(7)}, r"state has shape \(1, 7\); expected \(1, 11\)"),
        ({"view_mask": np.ones(3, bool)}, r"view_mask has shape \(1, 3\); expected \(1, 2\)"),
        ({"envs": [1]}, r"envs=\[1\] must name robots of 0 to 0"),
        ({"envs": []}, "must name robots"),
    ],
)
def test_a_wrong_observation_is_refused_and_leaves_the_stream_as_it_was(stream, arguments, message):
    good = {"images": {"main": FRAME}, "state": np.zeros(11, np.float32)}
    names = ("_count", "_images", "_states", "_with_state", "_seen", "_instructed", "_goal_mask")
    before = [getattr(stream, name).clone() for name in names]
    with pytest.raises(ValueError, match=message):
        stream.step(**(good | arguments))
    for name, value in zip(names, before, strict=True):
        assert torch.equal(value, getattr(stream, name)), name


def test_a_stream_gives_no_nan_but_names_the_cause():
    model, processor = build()
    stream = ForesightStream(model, processor, num_envs=2)
    observation = {"images": {"main": np.stack([FRAME] * 2)}, "state": np.zeros((2, 11))}
    stream.reset(text_features=torch.full((2, 22), float("nan")))
    with pytest.raises(ValueError, match="would be NaN or infinite, because of the instruction's features"):
        stream.step(**observation)
    with pytest.raises(ValueError, match="have no instruction: call reset"):  # as after any failed step
        stream.step(**observation)
    stream.reset(TASKS[0])
    with pytest.raises(ValueError, match="because of state"):
        stream.step(**(observation | {"state": np.full((2, 11), 3e38)}))
    stream.reset(TASKS[0])
    assert stream.step(**observation).isfinite().all()
    with torch.no_grad():
        model.model.norm.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"because of weights that hold NaN or infinity \(model.norm.bias\)"):
        stream.step(**observation)


def test_a_stream_says_what_it_needs_before_it_runs():
    model, processor = build()
    with pytest.raises(ValueError, match=r"Robots \[0\] have no instruction: call reset"):
        ForesightStream(model, processor).step({"main": FRAME}, np.zeros(11))
    with pytest.raises(
        ValueError, match="cuda_graph=True needs a model on a CUDA device; this one is on cpu"
    ):
        ForesightStream(model, processor, cuda_graph=True)
    with pytest.raises(ValueError, match="takes no goal images"):
        ForesightStream(model, processor).set_goal(FRAME)
    with pytest.raises(ValueError, match="There are 2 instructions for 3 robots"):
        ForesightStream(model, processor, num_envs=3).reset(TASKS[:2])
    for instruction in (5, [None]):
        with pytest.raises(ValueError, match="An instruction is .*; give text"):
            ForesightStream(model, processor).reset(instruction)
    for count in (0, 2.0, True, "2"):
        with pytest.raises(ValueError, match=f"num_envs={count!r} must be a whole number"):
            ForesightStream(model, processor, num_envs=count)
    for other in (None, processor.tokenizer):
        with pytest.raises(ValueError, match="The processor is a .*: give the ForesightProcessor"):
            ForesightStream(model, other)
    with pytest.raises(ValueError, match="no action head"):
        ForesightStream(*build(objectives=["depth"]))
    with pytest.raises(ValueError, match="training mode"):
        ForesightStream(model.train(), processor)
    trained = ForesightStream(model.eval(), processor)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        trained.reset(TASKS[0])
    moved = ForesightStream(model.eval(), processor)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="moved or cast after this stream was made"):
        moved.reset(TASKS[0])


@pytest.mark.parametrize("name", PROCESSOR_FIELDS)
def test_a_processor_of_another_model_is_refused(name):
    model, processor = build()
    other = copy.copy(processor)
    setattr(other, name, "another")
    with pytest.raises(ValueError, match=f"processor has {name}='another', the model .* from one folder"):
        ForesightStream(model, other)


def test_a_tokenizer_of_another_tower_is_refused():
    """CLIP would read every text at its first token, which all share."""
    model, processor = build()
    other = copy.copy(processor)
    other.tokenizer = build_small_tokenizer(TASKS, vocab_size=300, max_length=16)
    ForesightStream(model, other)
    text = copy.deepcopy(model.config.text_config)
    for change in ({"eos_token_id": 99}, {"vocab_size": 100}):
        config = tiny_config(text_config=CLIPTextConfig(**{**text.to_dict(), **change}))
        with pytest.raises(ValueError, match="tokenizer does not belong to the text tower.*eos_token_id="):
            tiny_processor(config)
        model.config = config
        with pytest.raises(ValueError, match="tokenizer does not belong"):
            ForesightStream(model, processor)
    tiny_processor(tiny_config(text_config=CLIPTextConfig(**{**text.to_dict(), "eos_token_id": 2})))
    tiny_processor(tiny_config(towers=["vision"], text_config=CLIPTextConfig(projection_dim=22)))


def test_inputs_may_be_arrays_of_any_memory_layout():
    model, processor = build()
    state = np.linspace(-1, 1, 11).astype(np.float32)
    actions = []
    for given, mask in ((state[::-1], np.array([False, True])[::-1]), (state[::-1].copy(), [True, False])):
        stream = ForesightStream(model, processor)
        stream.reset(TASKS[0])
        actions.append(stream.step({"main": FRAME}, given, view_mask=mask))
    assert torch.equal(*actions)


def test_progress_of_earlier_steps_stays_as_it_was_read():
    model, processor = build()
    stream = ForesightStream(model, processor, with_progress=True)
    stream.reset(TASKS[0])
    read = []
    for state in (np.zeros(11), np.ones(11)):
        stream.step({"main": FRAME}, state)
        read.append(stream.progress)
    assert not torch.equal(*read)


def test_a_model_that_trains_between_steps_does_not_act():
    model, processor = build()
    stream = model.stream(processor)
    stream.reset("open the drawer")
    images = {view: draw_image(np.random.default_rng(0)) for view in processor.views}
    state = np.zeros(stream.state_dim) if stream.state_dim else None
    first = stream.step(images, state)
    model.train()
    with pytest.raises(ValueError, match="in training mode, where dropout acts"):
        stream.step(images, state)
    model.eval()
    assert stream.step(images, state).shape == first.shape
