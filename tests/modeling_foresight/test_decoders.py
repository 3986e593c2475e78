"""Decoders: shapes, order of entries, what starts where, and blocks against the equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.decoders import (
    ActionDecoder,
    ActionEncoder,
    DisplacementFlowDecoder,
    FlowDecoder,
    MetricDepthDecoder,
    PatchDecoder,
    ProgressDecoder,
    vit_blocks,
)
from modeling_foresight.encoders import sincos_2d
from tests.tiny import tiny_config

BATCH, FRAMES, TOKENS = 2, 3, 5


@pytest.fixture
def config():
    torch.manual_seed(0)
    return tiny_config()


@torch.no_grad()
def test_blocks_are_pre_norm_vit_blocks_with_exact_gelu(config):
    block = vit_blocks(config, 48, 16, 1)[0].train()  # no dropout even in training
    x = torch.randn(BATCH, TOKENS, 48)
    normed = F.layer_norm(x, (48,), block.norm1.weight, block.norm1.bias, eps=1e-5)
    query, key, value = F.linear(normed, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
    heads = []
    for head in range(16):
        columns = slice(3 * head, 3 * (head + 1))
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 3**0.5
        heads.append(scores.softmax(-1) @ value[..., columns])
    y = x + F.linear(torch.cat(heads, -1), block.attn.proj.weight, block.attn.proj.bias)
    normed = F.layer_norm(y, (48,), block.norm2.weight, block.norm2.bias, eps=1e-5)
    hidden = F.gelu(F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias), approximate="none")
    assert hidden.shape[-1] == 4 * 48
    expected = y + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_the_patch_decoder_reads_its_mask_tokens_out(config, channels):
    decoder = PatchDecoder(config, channels)
    torch.nn.init.normal_(decoder.mask_token)
    context = torch.randn(BATCH, FRAMES, 2, 10, 48)
    patches = decoder(context)
    assert patches.shape == (BATCH, FRAMES, 2, 25, 64 * channels)
    one = decoder.embed(context[1, 2, 1])
    masks = decoder.mask_token[0] + sincos_2d(5, 5, 48)
    hidden = decoder.norm(decoder.blocks(torch.cat([one, masks])[None])[0, 10:])
    torch.testing.assert_close(patches[1, 2, 1], decoder.predict(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_metric_depth_decoder_starts_from_patches_one_meter_away_with_a_deviation_of_3_percent():
    config = tiny_config(depth_form="metric", objectives=["depth"])
    decoder = ForesightForActionPrediction(config).depth_decoder
    patches, scale = decoder(torch.randn(BATCH, FRAMES, 2, 10, 48))
    assert isinstance(decoder, MetricDepthDecoder) and patches.shape == (BATCH, FRAMES, 2, 25, 64)
    assert scale.shape == (BATCH, FRAMES, 2, 25, 2) and scale.dtype == torch.float32
    torch.testing.assert_close(scale.exp(), torch.tensor([1, 0.03]).expand_as(scale), rtol=0.01, atol=0)


@torch.no_grad()
def test_flow_starts_from_points_that_stay_put(config):
    model = ForesightForActionPrediction(config)
    start = torch.rand(BATCH, FRAMES, 16, 2)
    flow = model.flow_decoder(torch.randn(BATCH, FRAMES, 3, 48), start)
    assert flow.shape == (BATCH, FRAMES, 6, 16, 3) and flow.dtype == torch.float32
    torch.testing.assert_close(flow[..., :2], start[:, :, None].expand_as(flow[..., :2]), rtol=0, atol=1e-2)
    assert flow[..., 2].abs().max() < 1e-2


@torch.no_grad()
def test_the_flow_decoder_reads_a_mask_token_at_each_start_point():
    decoder = FlowDecoder(tiny_config(flow_xy_residual=False))
    torch.nn.init.normal_(decoder.mask_token)
    context, start = torch.randn(BATCH, FRAMES, 3, 48), torch.rand(BATCH, FRAMES, 16, 2)
    points = decoder.mask_token[0] + decoder.embed_start(2 * start[1, 2] - 1)  # from [0, 1] to [-1, 1]
    hidden = decoder.blocks(torch.cat([decoder.embed(context[1, 2]), points])[None])[0, 3:]
    expected = decoder.predict(decoder.norm(hidden)).view(16, 6, 3).transpose(0, 1)
    torch.testing.assert_close(decoder(context, start)[1, 2], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_residual_shifts_x_and_y_by_the_start_and_nothing_else():
    absolute, residual = (FlowDecoder(tiny_config(flow_xy_residual=flag)) for flag in (False, True))
    residual.load_state_dict(absolute.state_dict())
    context, start = torch.randn(BATCH, FRAMES, 3, 48), torch.rand(BATCH, FRAMES, 16, 2)
    difference = residual(context, start) - absolute(context, start)
    torch.testing.assert_close(difference[..., :2], start[:, :, None].expand(-1, -1, 6, -1, -1))
    assert (difference[..., 2] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("objective", ["flow", "flow_2d"])
def test_the_displacement_form_starts_at_the_start_and_from_points_that_stay_put(
    objective,
):
    config = tiny_config(flow_form="displacement", objectives=[objective])
    decoder = ForesightForActionPrediction(config).flow_decoder
    start, dim = torch.rand(BATCH, FRAMES, 16, 2), 3 if objective == "flow" else 2
    flow = decoder(torch.randn(BATCH, FRAMES, 3, 48), start)
    assert flow.shape == (BATCH, FRAMES, 6, 16, dim) and flow.dtype == torch.float32
    assert torch.equal(flow[:, :, 0, :, :2], start)
    assert (flow[:, :, 1:] - flow[:, :, :1]).abs().max() < 1e-3


@torch.no_grad()
def test_in_the_displacement_form_a_start_point_enters_with_waves_of_four_octaves():
    decoder = DisplacementFlowDecoder(tiny_config(flow_form="displacement"))
    features = decoder._describe_places(torch.tensor([0.25, -0.5]))
    phases = [torch.pi * 2**octave * u for octave in range(4) for u in (0.25, -0.5)]
    expected = [0.25, -0.5, *(math.sin(p) for p in phases), *(math.cos(p) for p in phases)]
    torch.testing.assert_close(features, torch.tensor(expected))
    assert decoder.embed_start.in_features == len(expected)


@torch.no_grad()
def test_displacements_are_predicted_in_units_of_their_scale_and_added_to_the_start():
    config = tiny_config(flow_form="displacement", flow_scales=(1.0, 0.5))
    decoder = DisplacementFlowDecoder(config)
    for layer in (decoder.predict, decoder.predict_start):
        layer.weight.zero_()
    decoder.predict.bias.copy_(torch.arange(15.0))
    decoder.predict_start.bias.fill_(7.0)
    start = torch.rand(1, 1, 16, 2)
    flow = decoder(torch.randn(1, 1, 3, 48), start)[0, 0, :, 4]  # (L, 3)
    here = torch.tensor([*start[0, 0, 4].tolist(), 7.0])
    torch.testing.assert_close(flow[0], here)
    torch.testing.assert_close(flow[1:], here + 0.5 * torch.arange(15.0).view(5, 3))


@torch.no_grad()
def test_each_flow_point_is_decoded_from_its_own_start(config):
    decoder = FlowDecoder(config)
    context, start = torch.randn(1, 1, 3, 48), torch.rand(1, 1, 16, 2)
    order = torch.randperm(16)
    torch.testing.assert_close(
        decoder(context, start[:, :, order]), decoder(context, start)[:, :, :, order], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_flow_entries_are_steps_of_x_y_z(config):
    decoder = FlowDecoder(tiny_config(flow_xy_residual=False))
    decoder.predict.weight.zero_()
    decoder.predict.bias.copy_(torch.arange(18.0))
    flow = decoder(torch.randn(1, 1, 3, 48), torch.rand(1, 1, 16, 2))
    assert torch.equal(flow[0, 0, :, 7], torch.arange(18.0).view(6, 3))


@torch.no_grad()
def test_flow_keeps_float32_coordinates_in_a_bfloat16_model(config):
    decoder = FlowDecoder(config).to(torch.bfloat16)
    decoder.predict.weight.zero_()
    decoder.predict.bias.zero_()
    start = torch.rand(1, 1, 16, 2)
    flow = decoder(torch.randn(1, 1, 3, 48, dtype=torch.bfloat16), start)
    assert torch.equal(flow[:, :, 2, :, :2], start)


@torch.no_grad()
def test_actions_come_back_in_the_order_of_the_config():
    config = tiny_config(action_dim=5, binary_action_indices=[3, 1])
    decoder = ActionDecoder(config)
    for layer in (decoder.predict_continuous, decoder.predict_binary):
        layer.weight.zero_()
    decoder.predict_continuous.bias.copy_(torch.tensor([0.0, 2.0, 4.0]))
    decoder.predict_binary.bias.copy_(torch.tensor([3.0, 1.0]))
    actions = decoder(torch.randn(BATCH, 48), torch.zeros(BATCH, 6))
    assert actions.shape == (BATCH, 4, 5)
    assert torch.equal(actions[1, 2], torch.arange(5.0))


@torch.no_grad()
def test_the_action_decoder_reads_style_query_and_positions(config):
    decoder = ActionDecoder(config)
    query, style = torch.randn(BATCH, 48), torch.randn(BATCH, 6)
    steps = decoder.mask_token.weight + decoder.positions.weight
    tokens = torch.cat([decoder.embed_style(style[1:]), decoder.embed_query(query[1:]), steps])
    hidden = decoder.blocks(tokens[None])[0, 2:]  # no final LayerNorm
    actions = decoder(query, style)[1]
    torch.testing.assert_close(actions[:, 2:3], decoder.predict_binary(hidden), rtol=1e-4, atol=1e-5)
    numbers = actions[:, [0, 1, 3, 4, 5, 6]]
    torch.testing.assert_close(numbers, decoder.predict_continuous(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_action_encoder_embeds_numbers_and_states_of_binary_entries():
    config = tiny_config(binary_action_indices=[2, 5])
    encoder = ActionEncoder(config)
    actions = torch.randn(1, 4, 7)
    actions[..., 2], actions[..., 5] = torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 1, 0, 0])
    rows = encoder.embed_binary.weight
    binary = torch.stack([rows[0] + rows[3], rows[1] + rows[3], rows[1] + rows[2], rows[0] + rows[2]])
    numbers = encoder.embed_continuous(actions[0][:, [0, 1, 3, 4, 6]])
    steps = encoder.join(torch.cat([numbers, binary], -1))
    tokens = torch.cat([encoder.cls_token.weight, steps]) + encoder.positions.weight
    expected = encoder.predict(encoder.blocks(tokens[None])[0, 0])
    mean, log_var = encoder(actions)
    torch.testing.assert_close(torch.cat([mean, log_var], -1)[0], expected, rtol=1e-4, atol=1e-5)
    assert mean.shape == (1, 6)


@pytest.mark.parametrize("binary", [[], [0, 1, 2, 3, 4, 5, 6]])
def test_actions_may_be_all_numbers_or_all_binary(binary):
    config = tiny_config(binary_action_indices=binary)
    mean, _ = ActionEncoder(config)(torch.ones(BATCH, 4, 7))
    assert ActionDecoder(config)(torch.randn(BATCH, 48), mean).shape == (BATCH, 4, 7)


def test_progress_lies_between_zero_and_one(config):
    progress = ProgressDecoder(config)(100 * torch.randn(20, 48))
    assert progress.shape == (20,) and progress.dtype == torch.float32
    assert (progress >= 0).all() and (progress <= 1).all()
