"""The whole model: what may influence what, losses and gradients, skips, checkpoints, sizes of the paper."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightModel
from modeling_foresight.attention_mask import Kind, allowed_pairs
from modeling_foresight.losses import depth_loss, flow_loss, future_loss
from modeling_foresight.targets import Target, depth_target, rgb_target
from tests.tiny import BATCH, tiny_batch, tiny_config, tiny_inputs, tiny_targets

OUTPUTS = ("actions", "depth", "future_rgb", "future_depth", "flow", "progress")
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def build(config: ForesightConfig, seed: int = 0, **attention) -> ForesightForActionPrediction:
    """A model in evaluation mode, its weights large enough that influences can be told from rounding."""
    torch.manual_seed(seed)
    model = ForesightForActionPrediction._from_config(copy.deepcopy(config), **attention).eval()
    weights = [p for p in model.model.layers.parameters() if p.ndim == 2]
    if config.has("flow"):
        weights.append(model.flow_decoder.predict.weight)
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.15)
    return model


@pytest.fixture(scope="module")
def config():
    return tiny_config(goal_image=True)


@pytest.fixture(scope="module")
def model(config):
    return build(config)


@pytest.fixture(scope="module")
def inputs(config):
    return tiny_inputs(config)


@torch.no_grad()
def predict(model, inputs) -> dict[str, torch.Tensor]:
    output = model(**inputs)
    return {name: output[name] for name in OUTPUTS if name in output}


def changed(before: dict, after: dict, frames=slice(None)) -> set[str]:
    """Names of the predictions that differ at these frames by more than rounding."""
    return {
        name
        for name in before
        if not torch.allclose(before[name][:, frames], after[name][:, frames], **TOLERANCE)
    }


def replaced(inputs: dict, **values) -> dict:
    return inputs | values


# --- Who influences whom -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [0, 2, 3])
def test_predictions_do_not_depend_on_later_frames(model, inputs, frame):
    later = {name: inputs[name].clone() for name in ("pixel_values", "state")}
    for tensor in later.values():
        tensor[:, frame + 1 :] += 1
    before, after = predict(model, inputs), predict(model, inputs | later)
    assert changed(before, after, slice(frame + 1)) == set()
    assert changed(before, after, slice(frame + 1, None)) == set(before)


def test_padded_frames_influence_nothing_whatever_they_hold(model, inputs):
    mask = inputs["frame_mask"].clone()
    mask[0, 3:], mask[1, 1:] = False, False
    padded = replaced(inputs, frame_mask=mask)
    other = replaced(
        padded,
        pixel_values=torch.where(mask[..., None, None, None, None], inputs["pixel_values"], 7.0),
        state=torch.where(mask[..., None], inputs["state"], 7.0),
    )
    before, after = predict(model, padded), predict(model, other)
    for name in set(before) - {"depth"}:
        for sample in range(BATCH):
            real = slice(int(mask[sample].sum()))
            torch.testing.assert_close(
                before[name][sample, real], after[name][sample, real], **TOLERANCE, msg=name
            )
    for sample in range(BATCH):
        real = slice(int(mask[sample].sum()))
        torch.testing.assert_close(before["depth"][sample, real], after["depth"][sample, real], **TOLERANCE)


def test_masked_inputs_may_be_nan_and_poison_neither_predictions_nor_gradients(config, inputs):
    model, batch = build(config), inputs | tiny_targets(config)
    masks = {
        "frame_mask": torch.ones(BATCH, config.history_length, dtype=torch.bool),
        "view_mask": torch.tensor([[True, False], [True, True], [True, True]]),
        "state_mask": torch.tensor([False, True, True]),
        "goal_mask": torch.tensor([True, False, True]),
    }
    masks["frame_mask"][2, 3:] = False
    clean = batch | masks
    broken = {name: clean[name].clone() for name in ("pixel_values", "state", "goal_pixel_values")}
    broken["pixel_values"][0, :, 1] = torch.nan
    broken["state"][0] = broken["goal_pixel_values"][1] = torch.nan
    broken["pixel_values"][2, 3:] = broken["state"][2, 3:] = torch.nan
    found = []
    for given in (clean, clean | broken):
        model.zero_grad()
        output = model(**given, style_noise=torch.zeros(BATCH, config.history_length, config.latent_dim))
        output.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert output.loss.isfinite() and output.actions[:, :3].isfinite().all()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_padded_sample_equals_the_same_frames_alone(model, inputs, frames):
    mask = torch.zeros_like(inputs["frame_mask"])
    mask[:, :frames] = True
    alone = {name: inputs[name][:, :frames] for name in ("pixel_values", "state", "frame_mask")}
    whole, short = predict(model, replaced(inputs, frame_mask=mask)), predict(model, inputs | alone)
    for name in whole:
        torch.testing.assert_close(whole[name][:, :frames], short[name], **TOLERANCE, msg=name)


@pytest.mark.parametrize("missing", ["view", "state", "goal"])
def test_what_is_masked_out_influences_nothing(model, inputs, missing):
    name, mask_name, mask, where = {
        "view": (
            "pixel_values",
            "view_mask",
            torch.tensor([[True, False]] * BATCH),
            (slice(None), slice(None), 1),
        ),
        "state": ("state", "state_mask", torch.zeros(BATCH, dtype=torch.bool), ...),
        "goal": ("goal_pixel_values", "goal_mask", torch.zeros(BATCH, dtype=torch.bool), ...),
    }[missing]
    other = inputs[name].clone()
    other[where] += 1
    masked = inputs | {mask_name: mask}
    before, after = predict(model, masked), predict(model, masked | {name: other})
    if missing == "view":  # its own depth is still computed from its tokens, and ignored by the loss
        before["depth"], after["depth"] = before["depth"][:, :, :1], after["depth"][:, :, :1]
    assert changed(before, after) == set()
    assert changed(predict(model, inputs), before) >= {"actions", "progress"}


def test_a_missing_input_equals_a_masked_one(model, inputs):
    none = torch.zeros(BATCH, dtype=torch.bool)
    masked = predict(model, inputs | {"state_mask": none, "goal_mask": none})
    left_out = {k: v for k, v in inputs.items() if k not in ("state", "goal_pixel_values", "goal_mask")}
    assert changed(masked, predict(model, left_out)) == set()


def test_changing_the_flow_query_changes_flow_and_actions_only(config, inputs):
    model = build(config)
    before = predict(model, inputs)
    torch.nn.init.normal_(model.model.flow_query.weight)
    assert changed(before, predict(model, inputs)) == {"flow", "actions"}


def test_changing_the_start_points_changes_flow_and_actions_only(model, inputs, config):
    start = tiny_targets(config)["track_start"]
    before, after = predict(model, inputs), predict(model, inputs | {"track_start": start})
    assert changed(before, after) == {"flow", "actions"}


def test_the_action_query_reads_the_flow_of_its_own_frame_only(model, inputs, config):
    start = tiny_targets(config)["track_start"]
    other = start.clone()
    other[:, 2] = 1 - other[:, 2]
    before = predict(model, inputs | {"track_start": start})
    after = predict(model, inputs | {"track_start": other})
    for frame in range(5):
        expected = {"flow", "actions"} if frame == 2 else set()
        assert changed(before, after, slice(frame, frame + 1)) == expected


def test_without_action_sees_flow_the_flow_query_changes_flow_only(inputs):
    model = build(tiny_config(goal_image=True, action_sees_flow=False))
    before = predict(model, inputs)
    torch.nn.init.normal_(model.model.flow_query.weight)
    assert changed(before, predict(model, inputs)) == {"flow"}


def test_without_vision_sees_state_the_state_changes_actions_and_progress_only(inputs):
    model = build(tiny_config(goal_image=True, vision_sees_state=False))
    before = predict(model, inputs)
    after = predict(model, inputs | {"state": inputs["state"].flip(0)})
    assert changed(before, after) == {"actions", "progress"}


def test_with_vision_sees_state_the_state_reaches_every_head(model, inputs):
    after = predict(model, inputs | {"state": inputs["state"].flip(0)})
    assert changed(predict(model, inputs), after) == set(OUTPUTS)


def test_future_sees_state_adds_the_state_to_the_future_queries_only(inputs):
    flags = {"goal_image": True, "vision_sees_state": False, "future_sees_state": True}
    model = build(tiny_config(**flags))
    after = predict(model, inputs | {"state": inputs["state"].flip(0)})
    assert changed(predict(model, inputs), after) == {"actions", "progress", "future_rgb", "future_depth"}


def test_removing_future_and_progress_leaves_the_actions_unchanged(model, inputs, config):
    smaller = build(tiny_config(goal_image=True, objectives=["action", "flow", "depth"]), seed=1)
    missing = smaller.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == []
    before, after = predict(model, inputs), predict(smaller, inputs)
    assert set(after) == {"actions", "depth", "flow"}
    assert changed(after, before) == set()


def test_language_and_goal_change_every_prediction(model, inputs):
    before = predict(model, inputs)
    assert changed(
        before, predict(model, inputs | {"goal_pixel_values": -inputs["goal_pixel_values"]})
    ) == set(OUTPUTS)
    text = {name: inputs[name].flip(0) for name in ("input_ids", "attention_mask")}
    assert changed(before, predict(model, inputs | text)) == set(OUTPUTS)


def test_each_image_is_encoded_on_its_own(model, inputs):
    cls, patches = model.model.encode_images(inputs["pixel_values"])
    assert cls.shape == (BATCH, 5, 2, 40) and patches.shape == (BATCH, 5, 2, 16, 40)
    one_cls, one_patches = model.model.encode_images(inputs["pixel_values"][1:2, 3, 1])
    torch.testing.assert_close(cls[1:2, 3, 1], one_cls, **TOLERANCE)
    torch.testing.assert_close(patches[1:2, 3, 1], one_patches, **TOLERANCE)


def plain_tokens(trunk, inputs, start) -> dict[tuple[int, int, int, int], torch.Tensor]:
    """The tokens of the first sample before the embedding LayerNorm, one by one, by their record."""
    tokens = {}

    def image(pixels, embed, record, timestep):
        cls, patches = trunk.vision_encoder(pixels[None])
        for rank, latent in enumerate(trunk.resampler(patches)[0]):
            tokens[*record, rank] = embed.latents(latent) + timestep
        tokens[*record, 9] = embed.cls(cls[0]) + timestep

    image(inputs["goal_pixel_values"][0], trunk.embed_goal, (Kind.GOAL, -1, 0), 0)
    text = trunk.text_encoder(inputs["input_ids"][:1], inputs["attention_mask"][:1])[0]
    for frame in range(5):
        timestep = trunk.embed_timestep.weight[frame]
        unit = text / (text.norm() + 1e-6)
        tokens[Kind.LANGUAGE, frame, 0, 0] = trunk.embed_language(unit) + timestep
        tokens[Kind.STATE, frame, 0, 0] = trunk.embed_state(inputs["state"][0, frame]) + timestep
        for view in range(2):
            pixels = inputs["pixel_values"][0, frame, view]
            image(pixels, trunk.embed_views[view], (Kind.IMAGE, frame, view), timestep)
            for rank in range(10):
                tokens[Kind.FUTURE, frame, view, rank] = trunk.future_queries[view].weight[rank]
        points = torch.cat([2 * xy - 1 for xy in start[0, frame]])  # x, y of node 0, x, y of node 1, ...
        for rank in range(3):
            query = trunk.flow_query.weight[rank] + trunk.embed_flow_points(points)
            tokens[Kind.FLOW, frame, 0, rank] = query
        tokens[Kind.ACTION, frame, 0, 0] = trunk.action_query.weight[0]
        tokens[Kind.PROGRESS, frame, 0, 0] = trunk.progress_query.weight[0]
    return tokens


@torch.no_grad()
def test_the_trunk_equals_a_plain_rewrite(model, config, inputs):
    trunk, start = model.model, tiny_targets(config)["track_start"]
    layout = trunk.layout(5)
    columns = (layout.kind, layout.frame, layout.group, layout.rank)
    records = list(zip(*(column.tolist() for column in columns), strict=True))
    tokens = plain_tokens(trunk, inputs, start)
    assert len(tokens) == len(records)
    x = trunk.embed_norm(torch.stack([tokens[record] for record in records]))
    mask = allowed_pairs(config, layout)
    for layer in trunk.layers:
        attention, normed = layer.self_attn, layer.norm1(x)
        query, key, value = (p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        heads = []
        for head in range(4):
            cut = slice(12 * head, 12 * (head + 1))
            scores = (query[:, cut] @ key[:, cut].T / 12**0.5).masked_fill(~mask, -torch.inf)
            heads.append(scores.softmax(-1) @ value[:, cut])
        x = x + attention.o_proj(torch.cat(heads, -1))
        x = x + layer.down_proj(layer.up_proj(layer.norm2(x)).clamp(min=0))
    result = trunk(**inputs, track_start=start).last_hidden_state[0]
    torch.testing.assert_close(result, trunk.norm(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_decoder_reads_its_own_tokens(model, config, inputs):
    batch = inputs | tiny_targets(config)
    noise = torch.randn(BATCH, 5, 6)
    output = model(**batch, style_noise=noise)
    states = model.model(**inputs, track_start=batch["track_start"]).last_hidden_state
    layout, sample, frame, view = model.model.layout(5), 2, 3, 1

    def tokens(kind: Kind, group: int = 0) -> torch.Tensor:
        chosen = (layout.kind == kind) & (layout.frame == frame) & (layout.group == group)
        return states[sample, chosen]

    image, future = tokens(Kind.IMAGE, view), tokens(Kind.FUTURE, view)
    mean, log_var = model.action_encoder(batch["actions"][sample, frame][None])
    style = mean + log_var.exp().sqrt() * noise[sample, frame]
    start = batch["track_start"][None, None, sample, frame]
    expected = {
        "depth": model.depth_decoder(image[None])[0],
        "future_rgb": model.image_decoder(future[None])[0],
        "future_depth": model.depth_decoder(future[None])[0],
        "flow": model.flow_decoder(tokens(Kind.FLOW)[None, None], start)[0, 0],
        "actions": model.action_decoder(tokens(Kind.ACTION), style)[0],
        "progress": model.progress_decoder(tokens(Kind.PROGRESS))[0],
    }
    for name, value in expected.items():
        given = output[name][sample, frame]
        given = given[view] if name in ("depth", "future_rgb", "future_depth") else given
        torch.testing.assert_close(given, value, **TOLERANCE, msg=name)
    torch.testing.assert_close(output.style_mean[sample, frame], mean[0], **TOLERANCE)


# --- The skips of control ----------------------------------------------------------------------------------


@pytest.mark.parametrize("goal_image", [True, False])
@pytest.mark.parametrize("case", ["full", "padded", "short", "missing view", "missing goal", "missing state"])
def test_predict_action_equals_the_newest_action_of_the_whole_window(model, goal_image, case):
    config = tiny_config(goal_image=goal_image)
    model = model if goal_image else build(config)
    inputs = tiny_inputs(config, frames=2 if case == "short" else 5)
    newest = torch.full((BATCH,), inputs["pixel_values"].shape[1] - 1)
    if case == "padded":
        newest = torch.tensor([0, 2, 4])
        inputs["frame_mask"] = torch.arange(5) <= newest[:, None]
    elif case == "missing view":
        inputs["view_mask"] = torch.tensor([[True, False], [False, True], [True, True]])
    elif case == "missing state":
        inputs["state_mask"] = torch.tensor([True, False, True])
    elif case == "missing goal":
        inputs.pop("goal_mask", None)
        inputs.pop("goal_pixel_values", None)
    whole = predict(model, inputs)["actions"][torch.arange(BATCH), newest]
    actions = model.predict_action(**inputs)
    assert actions.shape == (BATCH, 4, 7) and actions.dtype == torch.float32
    torch.testing.assert_close(actions, whole, **TOLERANCE)


@pytest.mark.parametrize("name", ["pixel_values", "state", "goal_pixel_values"])
def test_predict_action_returns_no_nan_but_names_the_input_that_holds_one(model, inputs, name):
    broken = {**inputs, name: inputs[name].clone()}
    broken[name][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"The actions would be NaN or infinite, because of {name}."):
        model.predict_action(**broken)


def test_predict_action_names_weights_that_became_nan(model, inputs):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"because of weights that hold NaN or .* \(model.norm.weight\)"):
        broken.predict_action(**inputs)


@pytest.mark.slow  # the model and the stream's step are compiled in the quick tests
def test_predict_action_compiles_without_a_graph_break():
    small = {"num_hidden_layers": 1, "resampler_depth": 1, "action_decoder_depth": 1, "history_length": 1}
    model = build(tiny_config(towers=[], views=["main"], objectives=["action"], **small))
    vision = torch.randn(2, 1, 1, 40), torch.randn(2, 1, 1, 16, 40)
    inputs = {"vision_features": vision, "text_features": torch.randn(2, 22)}
    compiled = torch.compile(model.predict_action, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), model.predict_action(**inputs))


def test_predict_action_works_without_binary_entries_and_without_flow(inputs):
    config = tiny_config(goal_image=True, objectives=["action"], binary_action_indices=[])
    model = build(config)
    whole = predict(model, inputs)["actions"][:, -1]
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(model.predict_action(**inputs), whole, **TOLERANCE)


def test_the_style_is_zero_in_evaluation_and_drawn_in_training(config, inputs):
    model, targets = build(config), tiny_targets(config)
    with torch.no_grad():
        first, second = (model(**inputs, actions=targets["actions"] + shift).actions for shift in (0, 1))
        assert torch.equal(first, second)
        noise = torch.zeros(BATCH, 5, 6)
        output = model(**inputs, actions=targets["actions"], style_noise=noise)
        assert not torch.allclose(output.actions, first, **TOLERANCE)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        model.train()
        first, second = (model(**inputs, actions=targets["actions"]).actions for _ in range(2))
        assert not torch.allclose(first, second, **TOLERANCE)
        again = model(**inputs, actions=targets["actions"], style_noise=noise).actions
        torch.testing.assert_close(again, output.actions, **TOLERANCE)


# --- Losses of the whole model -----------------------------------------------------------------------------


def losses_of(model, batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: loss.item() for name, loss in model(**batch).losses.items()}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("actions", {"action", "gripper", "kl"}),
        ("depth", {"depth", "future"}),
        ("track", {"flow"}),
        ("track_weight", {"flow"}),
        ("progress", {"progress"}),
        ("action_mask", {"action", "gripper", "kl"}),
    ],
)
def test_each_loss_reacts_to_its_own_targets_only(model, config, target, expected):
    batch = tiny_batch(config)
    before = losses_of(model, batch)
    assert set(before) == {"action", "gripper", "kl", "depth", "future", "flow", "progress"}
    other = batch[target].clone()
    other[1] = ~other[1] if other.dtype == torch.bool else other[1].flip(0) * 0.5
    if target == "actions":
        other[..., 2] = 1 - batch[target][..., 2]
    after = losses_of(model, batch | {target: other})
    assert {name for name in before if before[name] != after[name]} == expected


def test_a_target_that_is_not_given_switches_only_its_loss_off(model, config):
    batch = tiny_batch(config)
    whole = losses_of(model, batch)
    for target, lost in {
        "actions": {"action", "gripper", "kl"},
        "track": {"flow"},
        "progress": {"progress"},
    }.items():
        part = losses_of(model, {k: v for k, v in batch.items() if k != target})
        assert part == {k: pytest.approx(v) for k, v in whole.items() if k not in lost}
    actor = build(tiny_config(objectives=["action"]))
    with torch.no_grad():
        output = actor(**tiny_inputs(actor.config))
    assert output.loss is None and output.losses is None


def test_the_loss_is_the_weighted_sum(config):
    weights = dict(
        zip(("action", "gripper", "depth", "future", "flow", "kl", "progress"), range(2, 9), strict=True)
    )
    config = copy.deepcopy(config)
    for name, weight in weights.items():
        setattr(config, f"{name}_loss_weight", weight)
    with torch.no_grad():
        output = build(config)(**tiny_batch(config))
    expected = sum(weights[name] * loss for name, loss in output.losses.items())
    torch.testing.assert_close(output.loss, expected)


def test_the_default_weights_are_those_of_the_paper():
    config = ForesightConfig()
    names = ("gripper", "depth", "future", "flow", "action", "kl", "progress")
    assert [getattr(config, f"{n}_loss_weight") for n in names] == [0.01, 0.05, 0.1, 0.1, 1, 1, 1]


def masked_depth(depth, mask) -> Target:
    values, valid = depth_target(depth, 8)
    return Target(values, valid & mask[..., None, None])


def rgbd_targets(pixels, depth, mask) -> dict[str, Target]:
    rgb = Target(rgb_target(pixels, 8), mask[..., None, None])
    return {"future_rgb": rgb, "future_depth": masked_depth(depth, mask)}


def test_future_targets_stay_inside_the_window(model, config):
    batch = tiny_batch(config)
    batch["frame_mask"][1, 4:] = False
    with torch.no_grad():
        output = model(**batch)
    assert output.future_rgb.shape == (BATCH, 5, 2, 25, 192)
    assert output.future_depth.shape == (BATCH, 5, 2, 25, 64)
    real = batch["frame_mask"][:, 3:, None].expand(-1, -1, 2)  # target frames 3 and 4
    targets = rgbd_targets(batch["pixel_values"][:, 3:], batch["depth"][:, 3:], real)
    expected = future_loss(output.future_rgb[:, :2], output.future_depth[:, :2], targets)
    torch.testing.assert_close(output.losses["future"], expected.mean())


@pytest.mark.parametrize("history_length", [2, 5])
def test_lookahead_gives_every_frame_a_future_target(history_length):
    config = tiny_config(history_length=history_length, future_targets="lookahead")
    model, batch = build(config), tiny_batch(config)
    batch["lookahead_mask"][0, 1:] = False
    batch["view_mask"][2, 1] = False
    with torch.no_grad():
        output = model(**batch)
    images, depth = (
        torch.cat([batch[name], batch[f"lookahead_{name}"]], dim=1)[:, 3:]
        for name in ("pixel_values", "depth")
    )
    real = torch.cat([batch["frame_mask"], batch["lookahead_mask"]], dim=1)[:, 3:]
    mask = real[..., None] & batch["view_mask"][:, None]
    expected = future_loss(output.future_rgb, output.future_depth, rgbd_targets(images, depth, mask))
    torch.testing.assert_close(output.losses["future"], expected.mean())


def test_training_decodes_only_the_frames_that_have_a_future_target(config):
    model = build(config).train()
    assert model(**tiny_batch(config)).future_rgb.shape[1] == 2


def test_depth_and_flow_losses_use_frame_and_view_masks(model, config):
    batch = tiny_batch(config)
    batch["frame_mask"][0, 2:] = False
    batch["view_mask"][1, 0] = False
    with torch.no_grad():
        output = model(**batch)
    present = batch["frame_mask"][:, :, None] & batch["view_mask"][:, None]
    expected = depth_loss(output.depth, masked_depth(batch["depth"], present))
    torch.testing.assert_close(output.losses["depth"], expected.mean())
    weight = batch["track_weight"] * batch["frame_mask"][:, :, None, None]
    expected = flow_loss(output.flow, Target(batch["track"], weight))
    torch.testing.assert_close(output.losses["flow"], expected.mean())


def test_targets_of_padded_frames_and_missing_views_may_be_anything(model, config):
    batch = tiny_batch(config)
    batch["frame_mask"][0, 2:] = False
    batch["view_mask"][1, 0] = False
    broken = {name: batch[name].clone() for name in ("actions", "depth", "track", "progress")}
    for tensor in broken.values():
        tensor[0, 2:] = float("nan")
    broken["depth"][1, :, 0] = float("nan")
    batch["actions"][0, 2:] = 0  # what NaN is read as; the CVAE's KL counts padded frames, as in GR-MG
    before = losses_of(model, batch)
    assert losses_of(model, batch | broken) == before
    for loss in before.values():
        assert 0 < loss < 10


def emptied(batch: dict) -> dict:
    """The batch with every mask that does not hide frames set to nothing, and NaN for what is hidden."""
    empty = dict(batch)
    empty["action_mask"] = torch.zeros_like(batch["action_mask"])
    empty["actions"] = torch.full_like(batch["actions"], float("nan"))
    empty["depth"] = torch.full_like(batch["depth"], float("nan"))
    empty["track_weight"] = torch.zeros_like(batch["track_weight"])
    empty["track"] = torch.full_like(batch["track"], float("nan"))
    empty["view_mask"] = torch.zeros_like(batch["view_mask"])
    empty["state_mask"] = torch.zeros(BATCH, dtype=torch.bool)
    empty["goal_mask"] = torch.zeros_like(batch["goal_mask"])
    return empty


def test_empty_masks_give_zero_losses_and_every_parameter_still_a_gradient(config):
    model = build(config).train()
    output = model(**emptied(tiny_batch(config)))
    zero = {name for name, loss in output.losses.items() if loss == 0}
    assert zero == {"action", "gripper", "depth", "future", "flow"}
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("given", ["actions", "depth", "track", "progress"])
def test_heads_without_a_target_still_give_every_parameter_a_gradient(config, given):
    model = build(config).train()
    batch = tiny_inputs(config, frames=3) | {given: tiny_targets(config, frames=3)[given]}
    model(**batch).loss.backward()  # 3 frames leave no future target either
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


SUBSETS = [
    ["action"],
    ["depth"],
    ["future"],
    ["flow"],
    ["progress"],
    ["action", "future", "progress"],
    ["depth", "future", "flow"],
    ["action", "depth", "flow"],
    ["action", "depth", "future", "flow", "progress"],
]
HEAD_PARAMETERS = {
    "depth_decoder": {"depth", "future"},
    "image_decoder": {"future"},
    "flow_decoder": {"flow"},
    "action_encoder": {"action"},
    "action_decoder": {"action"},
    "progress_decoder": {"progress"},
    "model.flow_query": {"flow"},
    "model.embed_flow_points": {"flow"},
    "model.action_query": {"action"},
    "model.future_queries": {"future"},
    "model.progress_query": {"progress"},
}


@pytest.mark.parametrize("objectives", SUBSETS, ids="+".join)
@pytest.mark.parametrize("goal_image", [True, False])
def test_every_parameter_gets_a_gradient_and_a_head_that_is_off_has_none(objectives, goal_image):
    config = tiny_config(objectives=objectives, goal_image=goal_image)
    model = build(config).train()
    output = model(**tiny_batch(config))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    names = [name for name, _ in model.named_parameters()]
    for prefix, needed_by in HEAD_PARAMETERS.items():
        assert any(n.startswith(prefix) for n in names) == bool(needed_by & set(objectives)), prefix
    assert any("embed_goal" in name for name in names) == goal_image
    given = {name for name in OUTPUTS if name in output}
    fields = {"action": {"actions"}, "future": {"future_rgb", "future_depth"}}
    assert given == set().union(*(fields.get(o, {o}) for o in objectives))


def test_overfitting_one_window_drives_every_loss_down():
    small = {"num_hidden_layers": 1, "resampler_depth": 1, "decoder_depth": 1, "action_decoder_depth": 1}
    no_dropout = dict.fromkeys(("embd_pdrop", "attention_dropout", "resid_pdrop"), 0.0)
    config = tiny_config(**no_dropout, kl_loss_weight=0.01, **small)
    for name in ("depth", "future", "flow", "gripper"):
        setattr(config, f"{name}_loss_weight", 1.0)
    model, batch = build(config).train(), tiny_batch(config, batch=1)
    noise = torch.zeros(1, 5, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    first = None
    for _ in range(40):
        output = model(**batch, style_noise=noise)
        first = first or {name: loss.item() for name, loss in output.losses.items()}
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for name, loss in output.losses.items():
        assert loss < 0.8 * first[name], (name, first[name], loss.item())


# --- Towers ------------------------------------------------------------------------------------------------


def tower_parameters(model):
    return [*model.model.vision_encoder.parameters(), *model.model.text_encoder.parameters()]


def test_frozen_towers_stay_in_evaluation_mode_and_get_no_gradient(config):
    model = ForesightForActionPrediction(copy.deepcopy(config))
    for _ in range(2):
        assert not model.model.vision_encoder.tower.training and not model.model.text_encoder.tower.training
        model.train()
    assert model.training and model.model.layers.training
    model(**tiny_batch(config)).loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in tower_parameters(model))


@pytest.mark.parametrize("towers", [("vision",), ("text",), ("vision", "text")])
def test_towers_that_the_config_unfreezes_are_trained(towers):
    config = tiny_config(**{f"freeze_{tower}": False for tower in towers})
    model = build(config).train()
    model(**tiny_batch(config)).loss.backward()
    for tower in ("vision", "text"):
        encoder = getattr(model.model, f"{tower}_encoder")
        assert encoder.tower.training == (tower in towers)
        trained = [p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters()]
        # The pixels of ViT's and CLIP's own unused parts aside, most of a tower learns.
        assert (sum(trained) > 0.9 * len(trained)) if tower in towers else not any(trained)


# --- Saving, loading, attention implementations ------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-foresight-checkpoint")
    model.save_pretrained(folder)
    return folder


def test_auto_classes_give_the_same_model_back(model, checkpoint, inputs):
    loaded = AutoModel.from_pretrained(checkpoint)
    assert type(loaded) is ForesightForActionPrediction and not loaded.training
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is ForesightConfig and config.to_json_string() == model.config.to_json_string()
    assert changed(predict(model, inputs), predict(loaded, inputs)) == set()
    for (name, ours), (other, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other and torch.equal(ours, theirs), name
    for tensor, other in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)


def test_frozen_towers_are_still_frozen_after_loading(checkpoint):
    loaded, report = ForesightForActionPrediction.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(not p.requires_grad for p in tower_parameters(loaded))
    assert all(p.requires_grad for p in loaded.model.layers.parameters())


def test_the_trunk_loads_from_the_checkpoint_of_the_policy(model, checkpoint, inputs):
    trunk = ForesightModel.from_pretrained(checkpoint)
    assert all(not p.requires_grad for p in trunk.vision_encoder.parameters())
    with torch.no_grad():
        ours, theirs = model.model(**inputs), trunk(**inputs)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **TOLERANCE)


def test_weights_that_a_checkpoint_lacks_are_initialized_and_not_garbage(checkpoint, tmp_path):
    smaller = build(tiny_config(goal_image=True, objectives=["action"]))
    smaller.save_pretrained(tmp_path / "smaller")
    config = tiny_config(goal_image=True)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=r"lacks weights of this .*: depth_decoder\.blocks.* more.*strict"):
        ForesightForActionPrediction.from_pretrained(tmp_path / "smaller", config=config)
    loaded = ForesightForActionPrediction.from_pretrained(tmp_path / "smaller", config=config, strict=False)
    fresh = ForesightForActionPrediction(config)
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), fresh.named_parameters(), strict=True):
        if name.startswith(("flow_decoder", "depth_decoder", "image_decoder", "model.future_queries")):
            assert (ours == 0).all() == (theirs == 0).all(), name
            assert ours.std() < 2 * theirs.std() + 1e-6 or ours.numel() < 100, name
            assert ours.abs().max() < 6, name


def test_bfloat16_loading_runs_close_to_float32(model, checkpoint, inputs, config):
    loaded = AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.depth_decoder.positions.dtype == torch.float32
    before, after = predict(model, inputs), predict(loaded, inputs)
    assert (before["actions"] - after["actions"]).abs().max() < 0.1
    assert (before["flow"] - after["flow"]).abs().max() < 0.1
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_batch(config).items()}
    output = loaded.train()(**batch)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad)


def test_autocast_gives_finite_gradients_and_float32_outputs(config):
    model = build(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**tiny_batch(config))
    assert output.loss.dtype == output.flow.dtype == output.actions.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def padded_inputs(inputs: dict) -> dict:
    mask = inputs["frame_mask"].clone()
    mask[0, 2:] = False
    view_mask = inputs["view_mask"].clone()
    view_mask[1, 0] = False
    goal_mask = torch.tensor([False, True, True])
    return inputs | {"frame_mask": mask, "view_mask": view_mask, "goal_mask": goal_mask}


def real_frames(predictions: dict, inputs: dict) -> dict:
    return {name: value[inputs["frame_mask"]] for name, value in predictions.items() if name != "depth"}


@pytest.mark.parametrize(
    "implementation",
    # Flex attention compiles its kernel first, which takes a minute or two on a CPU.
    ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)],
)
def test_attention_implementations_agree(model, config, inputs, implementation):
    inputs = padded_inputs(inputs)
    other = build(config, attn_implementation=implementation)
    assert other.config._attn_implementation == implementation
    other.load_state_dict(model.state_dict())
    ours, theirs = (real_frames(predict(m, inputs), inputs) for m in (model, other))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


def test_the_attention_implementation_can_be_changed_later(config, inputs):
    model = build(config)
    before = predict(model, inputs)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    after = predict(model, inputs)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-5, msg=name)


def test_flash_attention_is_refused(config):
    with pytest.raises((ValueError, ImportError), match="[Ff]lash"):
        ForesightForActionPrediction._from_config(
            copy.deepcopy(config), attn_implementation="flash_attention_2"
        )


def test_hidden_states_and_attentions_come_when_asked_for(config, inputs):
    model = build(config, attn_implementation="eager")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        plain = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
    tokens = len(model.model.layout(5))
    assert [h.shape for h in output.hidden_states] == [(BATCH, tokens, 48)] * 3
    assert [a.shape for a in output.attentions] == [(BATCH, 4, tokens, tokens)] * 2
    assert plain.hidden_states is None and plain.attentions is None
    assert isinstance(as_tuple, tuple)
    # The weights obey the mask: nobody attends to a query but the action query to its flow.
    layout = model.model.layout(5)
    weights = output.attentions[1].amax((0, 1))
    rows, columns = layout.kind != Kind.ACTION, layout.kind >= Kind.FLOW
    assert (weights[rows][:, columns] == 0).all()


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(config):
    results = []
    for checkpointing in (False, True):
        model = build(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        torch.manual_seed(5)
        output = model(**tiny_batch(config))
        output.loss.backward()
        results.append((output.loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (other_loss, other_gradients) = results
    torch.testing.assert_close(loss, other_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], msg=name)


def test_a_first_call_in_inference_mode_does_not_hinder_training(config):
    model = build(config)
    with torch.inference_mode():
        model.predict_action(**tiny_inputs(config))
        model(**tiny_inputs(config))
    model.train()(**tiny_batch(config)).loss.backward()


def test_the_model_compiles_without_a_graph_break(config):
    small = {"num_hidden_layers": 1, "resampler_depth": 1, "decoder_depth": 1, "history_length": 4}
    small |= {
        "views": ["main"],
        "action_encoder_depth": 1,
        "action_decoder_depth": 1,
        "progress_decoder_depth": 1,
    }
    config = tiny_config(goal_image=True, supervised_share=0.5, **small)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    model, batch = build(config).train(), tiny_batch(config)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(**batch)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.manual_seed(0)
        output = compiled(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.actions, expected.actions)


# --- Sizes of the paper ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper_model():
    with torch.device("meta"):
        return ForesightForActionPrediction(ForesightConfig(goal_image=True))


def count(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts_of_the_paper_size(paper_model):
    m, trunk = paper_model, paper_model.model
    assert count(trunk.layers, trunk.norm) == 21_294_336
    assert count(trunk.resampler) == 18_897_408
    embeddings = [trunk.embed_language, trunk.embed_state, trunk.embed_views, trunk.embed_goal]
    assert count(*embeddings, trunk.embed_timestep, trunk.embed_norm) == 2_272_512
    assert count(trunk.action_query, trunk.future_queries, trunk.progress_query) == 8_448
    assert count(m.image_decoder) == 3_993_600
    assert count(m.action_encoder) == 836_288
    assert count(m.action_decoder) == 848_263
    assert count(m.progress_decoder) == 446_081
    assert count(m.depth_decoder) == 3_796_480
    assert count(m.flow_decoder, trunk.flow_query, trunk.embed_flow_points) == pytest.approx(3.86e6, rel=5e-3)
    assert count(trunk.vision_encoder) == 85_798_656
    gr_mg = 48_596_936
    added = count(m.depth_decoder, m.flow_decoder, trunk.flow_query, trunk.embed_flow_points)
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == gr_mg + added


def test_the_paper_size_lays_out_550_tokens(paper_model):
    assert len(ForesightModel.layout(paper_model.model, 10)) == 550


def test_initial_weights_follow_gr_mg(config):
    torch.manual_seed(0)
    model = ForesightForActionPrediction(tiny_config(hidden_size=96, intermediate_size=384))
    block = model.model.layers[1]
    assert block.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.down_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)
    assert block.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)
    assert (block.up_proj.bias == 0).all()
    assert model.model.embed_timestep.weight.std().item() == pytest.approx(1, rel=0.2)
    bound = 96**-0.5  # PyTorch's own start of a linear layer
    assert 0.9 * bound < model.depth_decoder.embed.weight.abs().max() <= bound
    assert (model.depth_decoder.mask_token == 0).all()


# --- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pixel_values", (40,), r"pixel_values has shape \(40,\); expected \(B, T, 2, 3, 40, 40\)"),
        (
            "pixel_values",
            (3, 40, 40),
            r"pixel_values has shape \(3, 40, 40\); expected \(B, T, 2, 3, 40, 40\)",
        ),
        (
            "pixel_values",
            (3, 5, 3, 40, 40),
            r"pixel_values has shape \(3, 5, 3, 40, 40\); expected \(B, T, 2, .*\(B, T, V, 3, H, H\)",
        ),
        ("pixel_values", (3, 5, 2, 3, 40, 48), r"40, 48\); expected \(3, 5, 2, 3, 40, 40\), .*\(B, T, V, 3"),
        ("pixel_values", (3, 5, 1, 3, 40, 40), r"has 1 views; the config names \['main', 'wrist'\]"),
        ("pixel_values", (3, 6, 2, 3, 40, 40), r"pixel_values has 6 frames; the config takes 1 to 5"),
        ("state", (3, 5, 8), r"state has shape \(3, 5, 8\); expected \(3, 5, 11\)"),
        ("frame_mask", (3, 4), r"frame_mask has shape \(3, 4\); expected \(3, 5\)"),
        ("view_mask", (3, 5), r"view_mask has shape \(3, 5\); expected \(3, 2\)"),
        ("goal_mask", (3, 1), r"goal_mask has shape \(3, 1\); expected \(3,\)"),
        ("goal_pixel_values", (3, 3, 20, 20), r"goal_pixel_values has shape .*expected \(3, 3, 40, 40\)"),
        ("track_start", (3, 1, 16, 2), r"track_start has shape \(3, 1, 16, 2\); expected \(3, 5, 16, 2\)"),
        ("actions", (3, 5, 4, 6), r"actions has shape \(3, 5, 4, 6\); expected \(3, 5, 4, 7\)"),
        ("action_mask", (3, 5), r"action_mask has shape \(3, 5\); expected \(3, 5, 4\)"),
        ("depth", (3, 5, 2, 1, 40, 40), r"depth has shape .*expected \(3, 5, 2, 40, 40\)"),
        ("track", (3, 5, 16, 6, 3), r"track has shape \(3, 5, 16, 6, 3\); expected \(3, 5, 6, 16, 3\)"),
        ("track_weight", (3, 5, 6), r"track_weight has shape .*expected \(3, 5, 6, 16\)"),
        ("progress", (3, 1), r"progress has shape \(3, 1\); expected \(3, 5\)"),
        ("lookahead_depth", (3, 2, 2, 40, 40), r"lookahead_depth has shape .*expected \(3, 3, 2, 40, 40\)"),
    ],
)
def test_a_wrong_shape_is_refused_with_what_was_expected_and_what_came(model, config, name, shape, message):
    batch = tiny_batch(config) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize("name", ["pixel_values", "goal_pixel_values"])
def test_pixels_that_are_not_normalized_are_refused(model, inputs, name):
    raw = torch.zeros_like(inputs[name], dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{name} has dtype torch.uint8; expected normalized pixels"):
        model.predict_action(**inputs | {name: raw})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((40,), r"vision_features\[0\] has shape \(40,\); expected \(B, T, 2, 40\)"),
        ((3, 5, 1, 40), r"vision_features\[0\] has 1 views; the config names \['main', 'wrist'\]"),
    ],
)
def test_features_of_another_shape_are_refused_with_what_was_expected(model, config, shape, message):
    inputs = tiny_inputs(config) | {"pixel_values": None}
    with pytest.raises(ValueError, match=message):
        model(**inputs, vision_features=(torch.zeros(shape), torch.zeros(*shape[:-1], 25, 40)))


def test_a_state_for_a_model_without_state_is_refused():
    config = tiny_config(state_dim=0, binary_state_indices=[])
    with pytest.raises(ValueError, match="state_dim is 0"):
        build(config)(**tiny_inputs(config), state=torch.zeros(BATCH, 5, 3))


def test_a_goal_for_a_model_without_goals_is_refused():
    config = tiny_config()
    with pytest.raises(ValueError, match="goal_image is false"):
        build(config)(**tiny_inputs(config), goal_pixel_values=torch.zeros(BATCH, 3, 40, 40))


def test_predicting_actions_without_an_action_head_is_refused():
    config = tiny_config(objectives=["flow"])
    with pytest.raises(ValueError, match=r"no action head.*\['flow'\]"):
        build(config).predict_action(**tiny_inputs(config))
