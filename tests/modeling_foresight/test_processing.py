"""The processor: every form of images, resizing, numbers there and back, text, saving, bad input."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor, build_small_tokenizer
from modeling_foresight.action_codec import encode_local_delta, relative_state, to_simulator_action
from modeling_foresight.embodiments import find_still_entries
from tests.tiny import TASKS, tiny_config, tiny_processor, tiny_tokenizer

B, T, AHEAD = 2, 5, 3
SIZES = {"main": (24, 36), "wrist": (50, 44)}  # height, width: one to enlarge, one to shrink

# Entry 2 of the actions is a gripper at -1 or 1; entry 5 never moves.
ACTION_STATS = {
    "mean": [0.5, -2.0, 0.1, 0.0, 10.0, 3.0, 0.0],
    "std": [2.0, 0.1, 0.9, 1.0, 5.0, 1e-7, 0.01],
    "min": [-4.0, -2.5, -1.0, -2.0, 0.0, 3.0, -0.1],
    "max": [5.0, -1.0, 1.0, 2.0, 20.0, 3.0, 0.1],
}
STATE_STATS = {
    "mean": list(np.arange(11.0)),
    "std": list(1 + np.arange(11.0)),
    "min": [0.0] * 11,
    "max": [4.0] * 11,
}


@pytest.fixture(scope="module")
def config():
    return tiny_config()


@pytest.fixture(scope="module")
def processor(config):
    return tiny_processor(config, action_stats=ACTION_STATS, state_stats=STATE_STATS)


def pixels(*lead: int, view: str = "main", seed: int = 0) -> torch.Tensor:
    """Random uint8 images, channels first."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*lead, 3, *SIZES[view]), dtype=torch.uint8, generator=draw)


def raw_batch(config) -> dict:
    draw = torch.Generator().manual_seed(1)
    actions = torch.randn(B, T, 4, 7, generator=draw)
    actions[..., 2] = actions[..., 2].sign()
    return {
        "images": {view: pixels(B, T + AHEAD, view=view) for view in SIZES},
        "depth": {
            view: 0.5 + torch.rand(B, T + AHEAD, *size, generator=draw) for view, size in SIZES.items()
        },
        "view_mask": torch.tensor([[True, True], [True, False]]),
        "frame_mask": torch.arange(T + AHEAD).expand(B, -1) < torch.tensor([[8], [6]]),
        "state": torch.rand(B, T, 11, generator=draw) * 4,
        "actions": actions,
        "action_mask": torch.rand(B, T, 4, generator=draw) > 0.3,
        "track_start": torch.rand(B, T, 16, 2, generator=draw),
        "track": torch.rand(B, T, 6, 16, 3, generator=draw),
        "track_weight": torch.ones(B, T, 6, 16),
        "track_moving": torch.ones(B, T, 16, dtype=torch.bool),
        "progress": torch.rand(B, T, generator=draw),
        "task": list(TASKS[:B]),
        "index": torch.arange(B),
        "episode_index": torch.zeros(B, dtype=torch.int64),
    }


# --- Images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", SIZES)
def test_images_are_resized_bicubically_without_antialiasing_and_normalized(processor, view):
    images = pixels(2, view=view)
    resized = F.interpolate(images.float() / 255, size=(40, 40), mode="bicubic", antialias=False)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    result = processor.normalize_images(images)
    torch.testing.assert_close(result, (resized - mean) / std)
    assert resized.min() < 0 or resized.max() > 1  # the overshoot of the kernel is kept


def test_images_of_the_models_size_are_not_resampled(processor):
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    undone = processor.normalize_images(images) * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    undone = (undone + torch.tensor([0.485, 0.456, 0.406])[:, None, None]) * 255
    assert torch.equal(undone.round().to(torch.uint8), images)


@pytest.mark.parametrize("view", SIZES)
def test_depth_takes_the_nearest_pixel(processor, view):
    height, width = SIZES[view]
    depth = torch.rand(2, height, width)
    resized = processor.resize_depth(depth)
    for y in range(40):
        for x in range(40):
            source = depth[:, int((y + 0.5) * height / 40), int((x + 0.5) * width / 40)]
            assert torch.equal(resized[:, y, x], source)


def forms(image: torch.Tensor) -> dict:
    """The same image `(3, h, w)` in every form that is accepted."""
    last = image.movedim(0, -1)
    return {
        "array, channels last": last.numpy(),
        "array, channels first": image.numpy(),
        "tensor, channels last": last,
        "tensor, channels first": image,
        "PIL": Image.fromarray(last.numpy()),
    }


@pytest.mark.parametrize("form", list(forms(torch.zeros(3, 2, 4, dtype=torch.uint8))))
def test_one_observation_may_come_in_any_form(processor, form):
    images = {view: pixels(view=view) for view in SIZES}
    batch = processor({view: forms(image)[form] for view, image in images.items()}, TASKS[0], np.zeros(11))
    assert batch["pixel_values"].shape == (1, 1, 2, 3, 40, 40)
    for v, image in enumerate(images.values()):
        torch.testing.assert_close(batch["pixel_values"][0, 0, v], processor.normalize_images(image[None])[0])
    assert batch["state"].shape == (1, 1, 11)
    assert batch["frame_mask"].tolist() == [[True]] and batch["view_mask"].tolist() == [[True, True]]


@pytest.mark.parametrize("form", list(forms(torch.zeros(3, 2, 4, dtype=torch.uint8))))
def test_a_window_and_a_batch_may_come_as_lists_or_arrays(processor, form):
    def stacked(images: torch.Tensor):
        parts = [forms(image)[form] for image in images]
        return torch.stack(parts) if isinstance(parts[0], torch.Tensor) else parts

    frames = pixels(3)
    expected = processor.normalize_images(frames)
    window = processor({"main": stacked(frames)}, TASKS[0], np.zeros((3, 11)))
    torch.testing.assert_close(window["pixel_values"][0, :, 0], expected)
    robots = processor({"main": stacked(frames)}, list(TASKS), np.zeros((3, 11)))
    torch.testing.assert_close(robots["pixel_values"][:, 0, 0], expected)
    assert robots["state"].shape == (3, 1, 11)
    assert robots["view_mask"].tolist() == [[True, False]] * 3
    assert (robots["pixel_values"][:, :, 1] == 0).all()


def test_windows_of_several_robots_keep_their_frame_masks(processor):
    mask = [[True, True], [True, False]]
    batch = processor({"main": pixels(2, 2)}, list(TASKS[:2]), np.zeros((2, 2, 11)), frame_mask=mask)
    assert batch["pixel_values"].shape == (2, 2, 2, 3, 40, 40)
    assert batch["frame_mask"].tolist() == mask and batch["state"].shape == (2, 2, 11)


def test_a_goal_image_is_prepared_like_any_other(processor):
    goal = pixels(seed=5)
    batch = processor({"main": pixels()}, TASKS[0], goal_image=goal.movedim(0, -1).numpy())
    torch.testing.assert_close(batch["goal_pixel_values"], processor.normalize_images(goal[None]))
    both = processor({"main": pixels(2)}, list(TASKS[:2]), goal_image=torch.stack([goal, goal]))
    assert both["goal_pixel_values"].shape == (2, 3, 40, 40)


# --- Batches -----------------------------------------------------------------------------------------------


def test_a_raw_batch_becomes_a_model_batch_with_its_lookahead_split_off(config, processor):
    raw = raw_batch(config)
    batch = processor.prepare_batch(raw)
    for v, view in enumerate(SIZES):
        images = processor.normalize_images(raw["images"][view])
        depth = processor.resize_depth(raw["depth"][view])
        torch.testing.assert_close(batch["pixel_values"][:, :, v], images[:, :T])
        torch.testing.assert_close(batch["lookahead_pixel_values"][:, :, v], images[:, T:])
        assert torch.equal(batch["depth"][:, :, v], depth[:, :T])
        assert torch.equal(batch["lookahead_depth"][:, :, v], depth[:, T:])
    assert batch["frame_mask"].tolist() == [[True] * 5] * 2
    assert batch["lookahead_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(batch["view_mask"], raw["view_mask"])
    for name in ("track_start", "track", "track_weight", "progress", "action_mask"):
        assert torch.equal(batch[name], raw[name])
    assert not {"index", "episode_index", "track_moving", "task"} & set(batch)
    assert (batch["actions"][~raw["action_mask"]] == 0).all()
    kept = raw["action_mask"]
    torch.testing.assert_close(batch["actions"][kept], processor.normalize_actions(raw["actions"])[kept])


def test_a_prepared_batch_trains_the_model():
    config = tiny_config(future_targets="lookahead")
    batch = tiny_processor(config, action_stats=ACTION_STATS, state_stats=STATE_STATS).prepare_batch(
        raw_batch(config)
    )
    output = ForesightForActionPrediction(config)(**batch)
    assert set(output.losses) == {"action", "gripper", "kl", "depth", "future", "flow", "progress"}
    assert output.loss.isfinite()


def test_nan_in_masked_actions_does_not_survive(config, processor):
    raw = raw_batch(config)
    raw["actions"][~raw["action_mask"]] = float("nan")
    assert processor.prepare_batch(raw)["actions"].isfinite().all()


def test_a_view_without_depth_gets_invalid_depth(config, processor):
    raw = raw_batch(config)
    del raw["depth"]["wrist"], raw["images"]["wrist"]
    batch = processor.prepare_batch(raw)
    assert (batch["depth"][:, :, 1] == 0).all() and (batch["depth"][:, :, 0] > 0).all()
    assert batch["view_mask"].tolist() == [[True, False], [True, False]]


def test_cameras_may_be_present_in_some_frames_only(config, processor):
    raw = raw_batch(config)
    raw["view_mask"] = torch.rand(B, T, 2, generator=torch.Generator().manual_seed(3)) > 0.5
    assert torch.equal(processor.prepare_batch(raw)["view_mask"], raw["view_mask"])
    del raw["images"]["wrist"]
    without = processor.prepare_batch(raw)["view_mask"]
    assert torch.equal(without[..., 0], raw["view_mask"][..., 0]) and not without[..., 1].any()


# --- Numbers -----------------------------------------------------------------------------------------------


def test_actions_survive_normalizing_and_decoding(config, processor):
    actions = raw_batch(config)["actions"]
    actions[..., 5] = 3.0
    normalized = processor.normalize_actions(actions)
    torch.testing.assert_close(normalized[..., 0], (actions[..., 0] - 0.5) / 2)
    assert set(normalized[..., 2].unique().tolist()) == {0.0, 1.0}
    assert (normalized[..., 5] == 0).all()  # and not 0 / 1e-7
    torch.testing.assert_close(processor.decode_actions(normalized), actions)
    normalized[..., 2] = 2 * normalized[..., 2] - 1.9  # logits
    assert torch.equal(processor.decode_actions(normalized)[..., 2], actions[..., 2])


def test_a_constant_entry_is_not_blown_up_by_noise(processor):
    action = torch.tensor(ACTION_STATS["mean"]) + 1e-6
    assert processor.normalize_actions(action)[5].abs() < 1e-5


def test_an_action_entry_that_never_moved_stays_where_it_was(processor):
    decoded = processor.decode_actions(torch.randn(3, 4, 7))
    assert (decoded[..., 5] == ACTION_STATS["mean"][5]).all()


def statistics_of(values) -> dict:
    values = np.asarray(values, dtype=np.float32)
    found = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    return {name: value.tolist() for name, value in found.items()}


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_what_moves_does_not_depend_on_the_unit(config, unit):
    rng = np.random.default_rng(0)
    deviations = np.array([5e-5, 1.0, 1.0, 2e-6, 1.0, 1.0, 1.0])  # 5e-5: meters per step at a high rate
    actions = torch.tensor(unit * deviations * rng.standard_normal((200, 7)), dtype=torch.float32)
    processor = tiny_processor(config, action_stats=statistics_of(actions))
    moving = [0, 1, 3, 4, 5, 6]  # 2 is binary
    normalized = processor.normalize_actions(actions)
    torch.testing.assert_close(normalized.std(0, correction=0)[moving], torch.ones(6), atol=1e-3, rtol=0)
    decoded = processor.decode_actions(normalized)
    torch.testing.assert_close(decoded[:, moving], actions[:, moving], rtol=1e-4, atol=1e-7 * unit)


@pytest.mark.parametrize("ticks", [4096, 2**16])
def test_small_motions_beside_an_entry_in_ticks_of_an_encoder_are_motion(ticks):
    rng = np.random.default_rng(0)
    actions = 5e-5 * rng.standard_normal((200, 2))
    stats = statistics_of(np.column_stack([actions, rng.integers(0, ticks, 200), np.full(200, 0.3)]))
    assert find_still_entries(stats) == (False, False, False, True)


@pytest.mark.parametrize("value", [0.0, 0.3, -250.0])
def test_float_noise_around_a_constant_is_not_motion(config, value):
    rng = np.random.default_rng(0)
    actions = rng.standard_normal((200, 7)).astype(np.float32)
    noise = np.spacing(np.float32(value)) * rng.integers(-2, 3, 200) if value else 1e-9 * actions[:, 1]
    actions[:, 0] = np.float32(value) + noise
    processor = tiny_processor(config, action_stats=statistics_of(actions))
    assert processor.normalize_actions(torch.from_numpy(actions))[:, 0].abs().max() < 1e-3
    decoded = processor.decode_actions(torch.randn(20, 7))[:, 0]
    assert (decoded == decoded[0]).all() and decoded[0].item() == pytest.approx(value, abs=1e-4)


def test_the_state_is_normalized_with_its_binary_entries_as_bits(processor):
    state = torch.rand(2, 11) * 4
    result = processor.normalize_state(state)
    for i in range(11):
        expected = (state[:, i] > 2).float() if i in (4, 9) else (state[:, i] - i) / (1 + i)
        torch.testing.assert_close(result[:, i], expected)


def test_without_statistics_numbers_pass_and_logits_become_bits(config):
    processor = tiny_processor(config)
    actions = torch.tensor([0.3, 0.2, 1.0, 5.0, 0.0, 0.1, -1.0])
    assert torch.equal(processor.normalize_actions(actions), actions)
    decoded = processor.decode_actions(actions)
    assert decoded[2] == 1 and processor.decode_actions(-actions)[2] == 0
    assert torch.equal(decoded[[0, 1, 3, 4, 5, 6]], actions[[0, 1, 3, 4, 5, 6]])


def test_decoding_leaves_its_input_alone(processor):
    actions = torch.rand(2, 4, 7)
    before = actions.clone()
    processor.decode_actions(actions)
    assert torch.equal(actions, before)


# --- CALVIN's form: relative states, local deltas -----------------------------------------------------------


def calvin_config(**overrides):
    """A gripper at entry 6 of a state of 9 numbers, actions of 7."""
    fields = {
        "action_codec": "local_delta",
        "state_representation": "relative",
        "action_dim": 7,
        "binary_action_indices": [6],
        "state_dim": 9,
        "binary_state_indices": [6],
    }
    return tiny_config(**(fields | overrides))


CALVIN_STATS = {
    "mean": [0.0, 0.1, 0.5, 3.0, 0.0, 1.5, 0.2, 5.0, 2.0],
    "std": [0.1] * 7 + [2.0, 4.0],
    "min": [-1.0] * 9,
    "max": [1.0] * 9,
}


def calvin_states(*lead: int) -> torch.Tensor:
    """Poses around roll = pi with a gripper at -1 or 1."""
    draw = torch.Generator().manual_seed(7)
    states = 0.3 * torch.randn(*lead, 9, generator=draw)
    states[..., 3] += 3.1
    states[..., 6] = states[..., 6].sign()
    return states


def test_relative_states_keep_meters_and_radians_and_normalize_the_rest():
    states = calvin_states(B, T)
    processor = tiny_processor(calvin_config(), state_stats=CALVIN_STATS)
    result = processor.normalize_state(states)
    assert torch.equal(result[..., :6], relative_state(states)[..., :6])
    assert (result[:, 0, :6] == 0).all() and result[:, 1:, :6].abs().min() > 0
    assert torch.equal(result[..., 6], (states[..., 6] > 0).float())
    torch.testing.assert_close(result[..., 7], (states[..., 7] - 5) / 2)
    torch.testing.assert_close(result[..., 8], (states[..., 8] - 2) / 4)


@pytest.mark.parametrize("closed", [-1.0, 0.0])
def test_without_statistics_a_gripper_of_a_relative_state_still_becomes_a_bit(closed):
    states = calvin_states(T)
    states[..., 6] = torch.where(states[..., 6] > 0, 1.0, closed)
    result = tiny_processor(calvin_config()).normalize_state(states)
    assert torch.equal(result[..., 6], (states[..., 6] == 1).float())
    assert torch.equal(result[..., 7:], states[..., 7:])


def test_a_relative_state_depends_on_its_own_window_only_and_not_on_padding():
    states = calvin_states(B, T)
    processor = tiny_processor(calvin_config())
    batch = processor({"main": pixels(B, T)}, list(TASKS[:B]), states)
    torch.testing.assert_close(batch["state"], processor.normalize_state(states))
    slid = processor({"main": pixels(B, T - 1)}, list(TASKS[:B]), states[:, 1:])
    assert (slid["state"][:, 0, :6] == 0).all()
    padded = states.clone()
    padded[:, 3:] = 1e6
    torch.testing.assert_close(processor.normalize_state(padded)[:, :3], batch["state"][:, :3])
    single = processor({"main": pixels()}, TASKS[0], states[0, 0])
    assert single["state"].shape == (1, 1, 9) and (single["state"][..., :6] == 0).all()


def test_local_deltas_pass_unscaled_whatever_the_statistics():
    processor = tiny_processor(calvin_config(), action_stats=ACTION_STATS, state_stats=CALVIN_STATS)
    assert processor.action_stats is None
    chunks = encode_local_delta(calvin_states(B, T + 1))
    assert torch.equal(processor.normalize_actions(chunks), chunks)
    assert torch.equal(processor.denormalize_actions(chunks), chunks)


def test_local_deltas_are_decoded_from_the_current_state_to_the_simulators_actions():
    processor = tiny_processor(calvin_config(), state_stats=CALVIN_STATS)
    states = calvin_states(B, 4 + 1)
    chunks = encode_local_delta(states)
    chunks[..., 6] = torch.where(chunks[..., 6] > 0, 1.4, -0.9)  # logits
    decoded = processor.decode_actions(chunks, states[:, 0])
    assert torch.equal(decoded, to_simulator_action(chunks, states[:, 0]))
    torch.testing.assert_close(decoded[..., :3], 50 * states[..., :3].diff(dim=1), atol=1e-4, rtol=0)
    assert torch.equal(decoded[..., 6], states[:, 1:, 6])
    assert torch.equal(processor.decode_actions(chunks[0], states[0, 0].numpy()), decoded[0])


def test_local_deltas_without_a_state_are_refused_with_the_remedy():
    processor = tiny_processor(calvin_config())
    with pytest.raises(ValueError, match=r"pass the current state .*decode_actions\(actions, state\)"):
        processor.decode_actions(torch.zeros(B, 4, 7))
    with pytest.raises(ValueError, match=r"actions have shape \(2, 4, 7\) and state \(5, 9\)"):
        processor.decode_actions(torch.zeros(B, 4, 7), torch.zeros(5, 9))


def test_recorded_actions_do_not_mind_a_state(processor):
    actions = torch.rand(B, 4, 7)
    assert torch.equal(
        processor.decode_actions(actions, torch.zeros(B, 11)), processor.decode_actions(actions)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"action_codec": "global_delta"}, r"'global_delta' is unknown; .*'recorded', 'local_delta'"),
        ({"state_representation": "rel"}, r"'rel' is unknown; .*'absolute', 'relative'"),
    ],
)
def test_unknown_forms_of_action_and_state_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        ForesightProcessor(tiny_tokenizer(), **overrides)


ONE = {"mean": [0.0], "std": [1.0], "min": [-1.0], "max": [1.0]}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 0, "image_size=0 must be a whole number from 1 to 8192"),
        ("image_size", True, "image_size=True must"),
        ("image_size", "96", "image_size='96' must"),
        ("image_size", 10**6, "image_size=1000000 must"),
        ("max_text_length", -1, "max_text_length=-1 must be a whole number"),
        ("image_mean", [float("nan"), 0.0, 0.0], "image_mean=.*nan.* must be three finite numbers"),
        ("image_mean", 0.5, "image_mean=0.5 must be three finite numbers"),
        ("image_std", [1.0, 1.0, 0.0], "image_std=.* must be three finite numbers above 0"),
        ("image_std", [1.0, 1.0], "image_std=.* must be three finite numbers above 0"),
        ("action_stats", ONE | {"mean": [float("nan")]}, "statistics of action are not finite"),
        ("state_stats", ONE | {"std": [float("inf")]}, "statistics of state are not finite"),
        ("state_stats", ONE | {"max": [1e39]}, "statistics of state are not finite"),
        ("action_stats", ONE | {"std": [-1.0]}, "action_stats has a negative std"),
        ("action_stats", ONE | {"min": [2.0]}, "action_stats has .* a min above its max"),
        ("action_stats", ONE | {"mean": [0.0, 0.0]}, "action_stats must hold one number per entry"),
        ("action_stats", ONE | {"mean": ["0"]}, "action_stats must hold one number per entry"),
        ("state_stats", {"mean": [0.0]}, "state_stats must hold one number per entry"),
        ("views", "main", "views='main' must be a list of names"),
        ("views", ["main", "main"], "views=.* must name at least one camera, each once"),
        ("binary_action_indices", [-1], r"binary_action_indices=\[-1\] exceeds"),
        ("binary_state_indices", [2, 2], r"binary_state_indices=\[2, 2\] must name each entry once"),
    ],
)
def test_numbers_that_would_break_every_image_state_or_action_are_refused_at_loading(field, value, message):
    with pytest.raises(ValueError, match=message):
        ForesightProcessor(tiny_tokenizer(), **{field: value})


@pytest.mark.parametrize("name", ["processor_config.json", "audio_tokenizer_config.json"])
def test_a_processor_that_names_another_model_to_load_is_refused(tmp_path, name):
    tiny_processor(tiny_config()).save_pretrained(tmp_path)
    named = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "somebody/model"}
    content = named
    if name == "processor_config.json":
        content = json.loads((tmp_path / name).read_text()) | {"audio_tokenizer": named}
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names an audio_tokenizer, a model that would be loaded"):
        ForesightProcessor.from_pretrained(tmp_path)


def test_a_saved_processor_keeps_its_forms_of_action_and_state(tmp_path):
    processor = tiny_processor(calvin_config(), state_stats=CALVIN_STATS)
    processor.save_pretrained(tmp_path)
    loaded = ForesightProcessor.from_pretrained(tmp_path)
    states = calvin_states(B, 4 + 1)
    assert torch.equal(loaded.normalize_state(states), processor.normalize_state(states))
    chunks = encode_local_delta(states)
    decoded = processor.decode_actions(chunks, states[:, 0])
    assert torch.equal(loaded.decode_actions(chunks, states[:, 0]), decoded)


# --- Text --------------------------------------------------------------------------------------------------


def test_instructions_begin_and_end_like_clips_and_are_padded_after_the_end(processor):
    batch = processor({"main": pixels(3)}, list(TASKS))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (ids[:, 0] == 0).all()
    for row, real in zip(ids, mask.sum(1), strict=True):
        assert row[real - 1] == 1 and (row[real:] == 2).all() and not (row[: real - 1] == 1).any()


def test_an_instruction_that_nobody_would_write_is_refused_before_it_costs_seconds(processor, monkeypatch):
    monkeypatch.setattr(type(processor.tokenizer), "__call__", None)  # not even called
    with pytest.raises(ValueError, match=r"1000000 characters \('xxx.*use fewer words"):
        processor.tokenize(["open", "x" * 1_000_000])


def test_a_long_instruction_is_cut_with_a_warning_and_still_ends(processor):
    with pytest.warns(UserWarning, match="'open the drawer .* 213 tokens, but the text tower reads 16"):
        batch = processor({"main": pixels()}, "open the drawer and " * 30)
    assert batch["input_ids"].shape == (1, 16)
    assert batch["input_ids"][0, -1] == 1


def test_unknown_words_fall_back_to_pieces_that_spell_them():
    tokenizer = build_small_tokenizer(list(TASKS))
    ids = tokenizer("Zaubere, café!")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "Zaubere, café!"
    assert len(tokenizer("drawer")["input_ids"]) == 3  # a word of the dataset is one token


# --- Saving ------------------------------------------------------------------------------------------------


def test_a_saved_processor_gives_the_same_batches_and_actions(processor, config, tmp_path):
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)  # names the model type, as beside a model's weights
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ForesightProcessor
    assert loaded.action_stats == processor.action_stats and loaded.views == processor.views
    raw = raw_batch(config)
    ours, theirs = processor.prepare_batch(raw), loaded.prepare_batch(raw)
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    actions = torch.rand(2, 4, 7)
    assert torch.equal(loaded.decode_actions(actions), processor.decode_actions(actions))


# --- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            {"main": np.zeros((24, 36, 3), np.float32)},
            r"images\['main'\] has dtype torch.float32; expected uint8",
        ),
        (
            {"main": np.zeros((24, 36), np.uint8)},
            r"images\['main'\] has shape .*expected \(batch, time, height",
        ),
        (
            {"front": np.zeros((24, 36, 3), np.uint8)},
            r"images has the views \['front'\]; the model knows \['main'",
        ),
        *(
            (
                {"main": pictures},
                r"images\['main'\] \(uint8 RGB, all of one size, none missing\) is not one array",
            )
            for pictures in (
                "a.png",
                [np.zeros((24, 36, 3), np.uint8), None],
                [np.zeros((24, 36, 3), np.uint8), np.zeros((36, 24, 3), np.uint8)],
                [torch.zeros(3, 24, 36, dtype=torch.uint8), torch.zeros(3, 36, 24, dtype=torch.uint8)],
            )
        ),
        *(
            ({"main": np.zeros(shape, np.uint8)}, r"images\['main'\] has shape \(1, 1, .*0.* expected")
            for shape in ((0, 0, 3), (3, 0, 5))
        ),
        ({"main": None}, r"images\['main'\] is None: leave a missing view out"),
        ({}, r"Give images as a dict from view name \(\['main', 'wrist'\]\)"),
        (np.zeros((24, 36, 3), np.uint8), "Give images as a dict"),
        (
            {"main": np.zeros((2, 24, 36, 3), np.uint8), "wrist": np.zeros((24, 36, 3), np.uint8)},
            r"differ in \(batch, frames\): \{.images\['main'\].: \(1, 2\), .images\['wrist'\].: \(1, 1\)\}",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images, TASKS[0])


def test_targets_may_be_lists_and_arrays_as_images_and_states_may(config, processor):
    image = {view: np.zeros((24, 36, 3), np.uint8) for view in processor.views}
    given = {
        "view_mask": [[True, False]],
        "progress": [[0.5]],
        "depth": {"main": np.ones((1, 1, 24, 36), np.float32)},
    }
    batch = processor(image, TASKS[0], **given)
    tensors = {"view_mask": torch.tensor([[True, False]]), "progress": torch.tensor([[0.5]])}
    same = processor(image, TASKS[0], **tensors, depth={"main": torch.ones(1, 1, 24, 36)})
    assert batch.keys() == same.keys() and {"depth", "view_mask", "progress"} <= batch.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": 5}, "An instruction is 5; give text"),
        ({"text": [None]}, "An instruction is None; give text"),
        ({"state": "abcd"}, "state is not one array of numbers: 'abcd'"),
        ({"state": {"a": 1}}, "state is not one array of numbers: {'a': 1}"),
        ({"view_mask": [[True], [True, False]]}, "view_mask is not one array of numbers"),
        ({"depth": {"main": "near"}}, r"depth\['main'\] is not one array of numbers: 'near'"),
    ],
)
def test_what_is_no_text_and_what_are_no_numbers_is_named(processor, given, message):
    image = {"main": np.zeros((24, 36, 3), np.uint8)}
    with pytest.raises(ValueError, match=message):
        processor(**{"images": image, "text": TASKS[0], **given})


def test_float_images_of_a_raw_batch_are_refused(config, processor):
    raw = raw_batch(config)
    raw["images"]["main"] = raw["images"]["main"].float() / 255
    with pytest.raises(ValueError, match="dtype torch.float32 .*expected uint8 RGB"):
        processor.prepare_batch(raw)


def test_another_number_of_instructions_than_samples_is_refused(processor):
    with pytest.raises(ValueError, match="3 instructions for 2 samples"):
        processor({"main": pixels(2)}, list(TASKS))


def test_statistics_of_standardized_data_are_not_taken_for_flags(config):
    # Zeros and ones equal False and True, also as keys of a cache.
    stats = {"mean": [0.0] * 11, "std": [1.0] * 11, "min": [0.0] * 11, "max": [1.0] * 11}
    processor = tiny_processor(tiny_config(binary_state_indices=()), state_stats=stats)
    state = np.linspace(-1, 1, 11, dtype=np.float32)
    out = processor({"main": pixels()}, TASKS[0], state)["state"]
    torch.testing.assert_close(out[0, -1], torch.from_numpy(state))


def test_a_state_of_another_size_is_refused(processor):
    with pytest.raises(ValueError, match=r"state has 8 entries .*expected 11"):
        processor({"main": pixels()}, TASKS[0], np.zeros(8))


def test_a_frame_mask_of_another_size_is_refused(processor):
    with pytest.raises(ValueError, match=r"frame_mask has shape \(1, 3\); images ask for \(1, 2\)"):
        processor({"main": pixels(2)}, TASKS[0], frame_mask=[True] * 3)


@pytest.mark.parametrize("mask", [[0, 1], [0, 0]])
def test_padding_before_the_frames_of_a_window_is_refused(processor, mask):
    with pytest.raises(ValueError, match=r"frame_mask is \[\[0, .\]\]; each window begins with a real frame"):
        processor({"main": pixels(2)}, TASKS[0], frame_mask=mask)


@pytest.mark.parametrize("mask", [[[True, False]], [[True], [False], [True]], [True, False]])
def test_a_mask_of_cameras_that_would_be_broadcast_is_refused(processor, mask):
    images = {view: np.stack([pixels()] * 3) for view in ("main", "wrist")}
    with pytest.raises(ValueError, match=r"view_mask has shape .*; expected \(3, 2\), or 1 frames between"):
        processor(images, [TASKS[0]] * 3, view_mask=mask)


def test_binary_entries_beyond_the_statistics_are_refused():
    with pytest.raises(ValueError, match=r"binary_action_indices=\[1\] exceeds the size of the action=1"):
        ForesightProcessor(tiny_tokenizer(), action_stats=ONE, binary_action_indices=[1])


def test_statistics_may_be_arrays_and_tensors(tmp_path):
    tensors = {key: torch.tensor(values) for key, values in ONE.items()}
    arrays = {key: np.array(values) for key, values in ONE.items()}
    ForesightProcessor(tiny_tokenizer(), action_stats=tensors, state_stats=arrays).save_pretrained(tmp_path)
    loaded = ForesightProcessor.from_pretrained(tmp_path)
    assert loaded.action_stats == loaded.state_stats == ONE


def test_without_statistics_binary_entries_become_bits_too():
    processor = ForesightProcessor(tiny_tokenizer(), binary_action_indices=[1])
    assert processor.normalize_actions(torch.tensor([[3.0, -1.0], [-2.0, 1.0]])).tolist() == [[3, 0], [-2, 1]]


def test_statistics_of_another_size_are_refused_with_the_remedy(config):
    stats = {name: values[:4] for name, values in ACTION_STATS.items()}
    with pytest.raises(
        ValueError, match="action has 4 entries, but the config says action_dim=7: set action_dim=4"
    ):
        tiny_processor(config, action_stats=stats)


def test_statistics_with_nan_are_refused(config):
    stats = ACTION_STATS | {"mean": [float("nan")] * 7}
    with pytest.raises(ValueError, match="statistics of action are not finite"):
        tiny_processor(config, action_stats=stats)


def test_a_misspelled_argument_is_refused_with_the_one_that_is_meant(processor):
    images = {"main": pixels().numpy()}
    for wrong, meant in (("goal_images", "goal_image"), ("stat", "state"), ("action", "actions")):
        with pytest.raises(TypeError, match=f"no argument '{wrong}': did you mean '{meant}'"):
            processor(images, TASKS[0], **{wrong: np.zeros(11)})
    processor(images, TASKS[0], return_tensors="pt")


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"Main": torch.ones(B, T, 8, 8)}, r"depth has the views \['Main'\]; the model knows"),
        ({"main": torch.ones(1, T, 8, 8)}, r"differ in \(batch, frames\).*depth\['main'\].: \(1, 5\)"),
        ({"main": torch.full((B, T, 8, 8), 1500)}, "has dtype torch.int64; expected meters"),
    ],
)
def test_depth_that_would_train_nothing_or_another_unit_is_refused(processor, depth, message):
    raw = {"images": {"main": pixels(B, T)}, "task": list(TASKS[:B]), "depth": depth}
    with pytest.raises(ValueError, match=message):
        processor.prepare_batch(raw)


def test_a_camera_of_one_sample_can_be_masked_in_a_prepared_batch(processor):
    batch = processor({"main": pixels(B).numpy()}, list(TASKS[:B]))
    batch["view_mask"][0, 0] = False
    assert batch["view_mask"][:, 0].tolist() == [False, True]


def test_a_model_without_a_text_tower_gets_the_features_that_are_given():
    config = tiny_config(towers=["vision"])
    processor, model = tiny_processor(config), ForesightForActionPrediction(config).eval()
    features = torch.randn(B, config.text_config.projection_dim)
    batch = processor({"main": pixels(B).numpy()}, list(TASKS[:B]), text_features=features)
    assert "input_ids" not in batch and torch.equal(batch["text_features"], features)
    assert model.predict_action(**batch).isfinite().all()
