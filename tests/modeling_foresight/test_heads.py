"""Heads: what they count, how losses of parts add up to the whole, what leaves them in float32."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.heads import HEADS
from modeling_foresight.inputs import INPUT_SHAPES, TARGET_SHAPES, ForesightBatch, ForesightInputs
from modeling_foresight.losses import depth_loss, future_loss
from modeling_foresight.targets import (
    Target,
    depth_targets,
    draw_training,
    future_targets,
    newest_trained_future,
)
from tests.tiny import BATCH, tiny_batch, tiny_config, tiny_inputs

LOSSES = {"depth", "flow", "action", "gripper", "kl", "future", "progress"}
LOSSES |= {"depth_scale", "future_depth_scale"}  # 0 of 0 in the paper's form
OTHER_FORMS = {"flow_form": "displacement", "depth_form": "metric"}


def build(config, dropout: float = 0.0) -> ForesightForActionPrediction:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.embd_pdrop = config.attention_dropout = config.resid_pdrop = dropout
    return ForesightForActionPrediction(config).train()


def uneven_batch(config) -> dict:
    """Every mask differs between samples; the last sample has nothing to supervise but its style."""
    batch = tiny_batch(config) | {"style_noise": torch.randn(BATCH, 5, config.latent_dim)}
    batch["frame_mask"][0, 4:] = False
    batch["view_mask"][1, 1] = False
    batch["depth"][0, :, :, :11] = 0
    batch["track_weight"][0, :, 2:] = 0.3
    batch["track_weight"][1, :, 0, 0] = 0  # a point whose place now is not known
    batch["action_mask"][1, 2:] = False
    batch["frame_mask"][2] = False
    return batch


def parts_of(batch: dict) -> list[dict]:
    return [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 3))]


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(("future_targets", "forms"), [("window", {}), ("lookahead", OTHER_FORMS)])
def test_targets_are_counted_exactly_as_the_losses_count_them(future_targets, forms, share):
    config = tiny_config(future_targets=future_targets, supervised_share=share, **forms)
    model, batch = build(config), uneven_batch(config)
    batch |= draw_training(config, batch, seeds=range(3))
    counted = model.count_targets(batch)
    assert set(counted) == LOSSES
    seen = {}
    layout = model.model.layout(5)
    hidden = model.model(**{k: v for k, v in batch.items() if k in ForesightInputs.__annotations__})

    def read(kind, group=0):
        return hidden.last_hidden_state[:, layout.positions(kind, group)].unflatten(1, (5, -1))

    for head in HEADS:
        predicted = head.decode(model, read, batch)
        seen |= {name: loss.count for name, loss in head.loss(config, predicted, batch).items()}
    assert len(seen) == len(LOSSES) - (0 if forms else 2)
    for name, count in seen.items():
        assert torch.equal(counted[name], count), name
    assert counted["kl"] == BATCH * 5  # of all frames, padded too


def test_counting_without_targets_gives_zero_for_every_loss():
    config = tiny_config()
    counts = build(config).count_targets(tiny_inputs(config, frames=3))  # too few for a future
    assert {name: tuple(count.shape) for name, count in counts.items()} == {
        name: (2,) if name in ("depth", "future") else () for name in LOSSES
    }
    assert all((count == 0).all() for count in counts.values())


@pytest.mark.parametrize(("future_targets", "forms"), [("window", {}), ("lookahead", OTHER_FORMS)])
def test_parts_with_the_counts_of_the_whole_sum_to_its_loss_and_gradient(future_targets, forms):
    config = tiny_config(future_targets=future_targets, **forms)
    whole, parted = build(config), build(config)
    batch = uneven_batch(config)
    output = whole(**batch)
    output.loss.backward()
    counts = [parted.count_targets(part) for part in parts_of(batch)]
    total = {name: sum(count[name] for count in counts) for name in LOSSES}
    loss, single = 0.0, dict.fromkeys(output.losses, 0.0)
    for part in parts_of(batch):
        result = parted(**part, loss_counts=total)
        result.loss.backward()
        loss += result.loss.item()
        for name, value in result.losses.items():
            single[name] += value.item()
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)
    assert single == {name: pytest.approx(value.item(), rel=1e-5) for name, value in output.losses.items()}
    gradients = dict(parted.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_losses_of_drawn_images_are_those_of_all_images_restricted_to_them():
    config = tiny_config(supervised_share=0.4, future_targets="lookahead")
    model, batch = build(config), uneven_batch(config)
    draw = {"supervision_order": draw_training(config, batch, seeds=range(3))["supervision_order"]}
    partial, whole = model(**batch, **draw), model.eval()(**batch, **draw)
    assert partial.depth.shape == partial.future_depth.shape == (1, 6, 2, 25, 64)  # 0.4 of 3 * 5 frames
    assert whole.depth.shape == whole.future_depth.shape == (3, 5, 2, 25, 64)  # evaluation decodes all
    order = draw["supervision_order"]
    drawn = order >= order.flatten(0, 1).sort(0, descending=True).values[5]  # (B, T, V)

    def restrict(target: Target) -> Target:
        return Target(target.values, target.weight & drawn[..., None, None])

    future = {name: restrict(target) for name, target in future_targets(config, batch).items()}
    expected = {
        "depth": depth_loss(whole.depth, restrict(depth_targets(config, batch))),
        "future": future_loss(whole.future_rgb, whole.future_depth, future),
    }
    for name, loss in expected.items():
        torch.testing.assert_close(partial.losses[name], loss.mean(), rtol=1e-5, atol=0)


def test_a_samples_draws_are_a_function_of_its_seed_alone():
    config = tiny_config(supervised_share=0.4, goal_image=True, goal_dropout=0.5)
    batch, state = tiny_batch(config, 3), torch.get_rng_state()
    draws, turned = draw_training(config, batch, [5, 6, 7]), draw_training(config, batch, [7, 6, 5])
    assert draws.keys() == {"supervision_order", "style_noise", "goal_draw"}
    for name, drawn in draws.items():
        assert torch.equal(drawn, turned[name].flip(0)) and not torch.equal(drawn, turned[name]), name
    assert draw_training(tiny_config(objectives=["depth"]), batch, [5, 6, 7]) == {}
    without_actions = {name: value for name, value in batch.items() if name != "actions"}
    assert draw_training(tiny_config(), without_actions, [5, 6, 7]) == {}, "there is no style to draw"
    assert torch.equal(state, torch.get_rng_state())


def test_with_dropout_the_average_over_processes_is_one_mean_over_all_elements():
    """Two processes average their gradients, so each divides by half of the global count."""
    config = tiny_config()
    model, batch = build(config, dropout=0.1), uneven_batch(config)
    parts = parts_of(batch)
    counts = [model.count_targets(part) for part in parts]
    half = {name: sum(count[name] for count in counts) / 2 for name in LOSSES}
    shared, own = [], []
    for seed, part in enumerate(parts):
        torch.manual_seed(seed)
        shared.append(model(**part, loss_counts=half).losses)
        torch.manual_seed(seed)
        own.append(model(**part).losses)
    for name in ("action", "gripper", "kl", "flow", "progress"):
        sums = sum(losses[name] * count[name] for losses, count in zip(own, counts, strict=True))
        expected = sums / sum(count[name] for count in counts)
        torch.testing.assert_close(sum(losses[name] for losses in shared) / 2, expected, rtol=1e-5, atol=1e-7)


def test_a_part_without_any_target_adds_zero_to_loss_and_gradients():
    config = tiny_config(depth_form="metric")
    model = build(config)
    counts = model.count_targets(tiny_batch(config))
    without_depth = tiny_batch(config)
    del without_depth["depth"]  # but with images to come
    assert model(**without_depth, loss_counts=counts).losses["future_depth_scale"] == 0
    output = model(**tiny_inputs(config, frames=3), loss_counts=counts)
    assert output.loss == 0 and output.losses is None
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and (parameter.grad == 0).all(), name


# --- What is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("future_targets", ["window", "lookahead"])
def test_the_newest_trained_future_is_the_last_frame_whose_query_learns(future_targets):
    config = tiny_config(future_targets=future_targets, objectives=["future"])
    model = build(config)
    hidden = []

    def keep(module, args, output):
        output.retain_grad()
        hidden.append(output)

    model.model.norm.register_forward_hook(keep)
    model(**tiny_batch(config)).loss.backward()
    layout = model.model.layout(5)
    of_future = hidden[0].grad[:, layout.kind == 6].abs().sum((0, 2))
    frames = layout.frame[layout.kind == 6]
    learned = [frame for frame in range(5) if of_future[frames == frame].sum() > 0]
    assert learned == list(range(newest_trained_future(config) + 1))


def test_every_head_names_the_modules_that_it_adds():
    config = tiny_config()
    with torch.device("meta"):
        model = ForesightForActionPrediction(config)
        bare = ForesightForActionPrediction(tiny_config(objectives=["action"], auxiliary_heads=False))
    for head in HEADS:
        assert all(hasattr(model.model, name) for name in head.queries)
        assert all(hasattr(model, name) for name in head.decoders)
        for name in (*head.queries, *head.decoders):
            assert (hasattr(bare, name) or hasattr(bare.model, name)) == (name in head.control_parts), name


def test_the_schema_names_everything_that_is_checked():
    fields = set(ForesightBatch.__annotations__)
    checked = set(INPUT_SHAPES).union(*TARGET_SHAPES.values())
    assert fields >= {name.partition("[")[0] for name in checked}  # "vision_features[0]"
    assert fields >= set(tiny_batch(tiny_config(goal_image=True, future_targets="lookahead")))


# --- Precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["autocast", "bfloat16 weights"])
def test_meters_pixels_and_actions_are_not_rounded_to_bfloat16(mode):
    config = tiny_config(depth_form="metric")
    model, inputs = build(config).eval(), tiny_inputs(config)
    with torch.no_grad():  # points some 6 m away: bfloat16 has steps of 3 cm there
        model.flow_decoder.predict.bias.view(-1, 3)[:, 2] = 6.0
        nn.init.normal_(model.flow_decoder.predict.weight, std=0.02)
        model.action_decoder.predict_continuous.bias += 6.0
        model.depth_decoder.predict_scale.bias += 2.0
    if mode == "autocast":
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**inputs)
    else:
        with torch.no_grad():
            output = model.bfloat16()(**inputs)
    meters = (output.flow, output.depth_scale, output.predicted_depth, output.predicted_future_depth)
    for values in (*meters, output.actions, output.progress):
        assert values.dtype == torch.float32
        rounded = (values == values.bfloat16().float()).float().mean()
        assert rounded < 0.1, "the values lie on the grid of bfloat16"


@torch.no_grad()
def test_the_last_layer_of_the_flow_is_exact_below_a_millimeter_under_autocast():
    config = tiny_config()
    model = build(config).eval()
    predict = model.flow_decoder.predict
    nn.init.normal_(predict.weight, std=0.05)
    predict.bias.view(-1, 3)[:, 2] = 6.0
    x = torch.randn(7, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flow = predict(x)
    torch.testing.assert_close(flow, x @ predict.weight.T + predict.bias, atol=1e-5, rtol=0)


# --- Initial weights ---------------------------------------------------------------------------------------


def test_initial_deviations_follow_their_formulas():
    """Also with the newest transformers, where an initialization of whole blocks never runs."""
    config = tiny_config(
        hidden_size=96, intermediate_size=384, initializer_range=0.15, embedding_initializer_range=0.3
    )
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config)
    residual = 0.15 / (2 * config.num_hidden_layers) ** 0.5
    normal = {
        r"layers.0.self_attn.q_proj": 0.15,
        r"layers.1.self_attn.k_proj": 0.15,
        r"layers.1.self_attn.v_proj": 0.15,
        r"layers.0.up_proj": 0.15,
        r"layers.0.self_attn.o_proj": residual,
        r"layers.1.down_proj": residual,
    }
    modules = dict(model.model.named_modules())
    for name, std in normal.items():
        assert modules[name].weight.std().item() == pytest.approx(std, rel=0.05), name
        assert (modules[name].bias == 0).all(), name
    predict = model.flow_decoder.predict
    assert predict.weight.std().item() == pytest.approx(1e-4, rel=0.1) and (predict.bias == 0).all()
    for name in ("embed_timestep", "flow_query", "future_queries.0", "future_queries.1"):
        assert modules[name].weight.std().item() == pytest.approx(0.3, rel=0.15), name
    assert model.model.resampler.latents.std().item() == pytest.approx(0.3, rel=0.15)
    marked = {id(modules[name]) for name in modules if hasattr(modules[name], "init_std")} | {id(predict)}
    towers = {
        id(m) for e in (model.model.text_encoder, model.model.vision_encoder) for m in e.tower.modules()
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in marked | towers:
            bound = module.in_features**-0.5  # PyTorch's own start: uniform, deviation bound / sqrt(3)
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.25), name
        elif isinstance(module, nn.LayerNorm) and id(module) not in towers:
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
    for decoder in (model.depth_decoder, model.image_decoder, model.flow_decoder):
        assert (decoder.mask_token == 0).all()
    assert (model.depth_decoder.positions != 0).any()


# --- Goals -------------------------------------------------------------------------------------------------


def seen_goals(model, inputs) -> torch.Tensor:
    return model.model.embed_inputs(**inputs).goal_mask


def test_training_hides_the_goal_from_some_samples_and_evaluation_from_none():
    config = tiny_config(goal_image=True, goal_dropout=0.5)
    model, inputs = build(config), tiny_inputs(config, batch=64, frames=1)
    inputs["goal_mask"][:8] = False
    torch.manual_seed(0)
    seen = seen_goals(model, inputs)
    assert not seen[:8].any() and 0.3 < seen[8:].float().mean() < 0.7
    assert torch.equal(seen_goals(model.eval(), inputs), inputs["goal_mask"])
    model.train().config.goal_dropout = 0.0
    assert torch.equal(seen_goals(model, inputs), inputs["goal_mask"])


def test_a_policy_with_goals_warns_once_when_it_acts_without_one(monkeypatch):
    said = []
    monkeypatch.setattr(
        "modeling_foresight.modeling_foresight.logger", SimpleNamespace(warning_once=said.append)
    )
    config = tiny_config(goal_image=True)
    model, inputs = build(config).eval(), tiny_inputs(config)
    model.predict_action(**inputs)
    assert not said
    del inputs["goal_pixel_values"], inputs["goal_mask"]
    model.predict_action(**inputs)
    assert "acts without one" in said[0] and "set_goal" in said[0]
    plain = tiny_config()
    build(plain).eval().predict_action(**tiny_inputs(plain))
    assert len(said) == 1
