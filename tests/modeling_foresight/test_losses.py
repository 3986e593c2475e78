"""Targets and losses against plain loops, with everything that may be missing or broken in a batch."""

import math

import pytest
import torch

from modeling_foresight.inputs import check_shapes
from modeling_foresight.losses import (
    action_losses,
    count_displacements,
    depth_loss,
    displacement_loss,
    flow_loss,
    future_loss,
    kl_loss,
    progress_loss,
    scale_loss,
)
from modeling_foresight.targets import (
    Target,
    depth_in_meters,
    depth_scale_target,
    depth_target,
    patchify,
    rgb_target,
    unpatchify,
)

B, T, V, K, L, P = 2, 3, 2, 4, 6, 5
PATCH, ROWS, COLS = 4, 3, 2
H, W, N = ROWS * PATCH, COLS * PATCH, ROWS * COLS
NAN = float("nan")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patches_by_loop(image: torch.Tensor) -> list[list[float]]:
    """`(C, H, W)` -> values of each patch, row-major, in it (row, column, channel)."""
    channels, height, width = image.shape
    return [
        [
            image[c, top + y, left + x].item()
            for y in range(PATCH)
            for x in range(PATCH)
            for c in range(channels)
        ]
        for top in range(0, height, PATCH)
        for left in range(0, width, PATCH)
    ]


def test_patches_are_row_major_and_ordered_row_column_channel_inside():
    image = draw(3, H, W)
    assert torch.equal(patchify(image, PATCH), torch.tensor(patches_by_loop(image)))


def test_unpatchify_undoes_patchify():
    images = draw(B, T, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(images, PATCH), PATCH, 3), images)


def test_images_that_patches_do_not_divide_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"12x8 .* 5 pixels"):
        patchify(draw(3, H, W), 5)


def test_rgb_target_divides_by_the_root_of_the_unbiased_variance_plus_floor():
    image = draw(3, H, W) * 2 + 1
    expected = []
    for values in patches_by_loop(image):
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        expected.append([(v - mean) / (math.sqrt(variance) + 1e-6) for v in values])
    torch.testing.assert_close(rgb_target(image, PATCH), torch.tensor(expected))


def test_rgb_target_of_a_flat_patch_is_zero():
    assert torch.equal(rgb_target(torch.full((3, H, W), 0.3), PATCH), torch.zeros(N, PATCH**2 * 3))


def depth_map() -> torch.Tensor:
    """Patch 0 valid, 1 flat, 2 a quarter valid, 3 less than a quarter, 4 wholly invalid, 5 partly NaN."""
    depth = 1 + draw(H, W).abs()
    patch = depth.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)  # a view of (ROWS, COLS, PATCH, PATCH)
    patch[0, 1] = 0.8
    patch[1, 0][1:] = 0
    patch[1, 1][1:] = 0
    patch[1, 1][0, 0] = 0
    patch[2, 0][:] = 0
    patch[2, 1][0, 0], patch[2, 1][1, 1], patch[2, 1][2, 2] = NAN, math.inf, -1
    return depth


def test_depth_target_has_its_variance_floor_inside_the_root_and_leaves_invalid_pixels_out():
    depth = depth_map()
    target, mask = depth_target(depth, PATCH)
    for n, values in enumerate(patches_by_loop(depth[None])):
        good = [math.isfinite(v) and v > 0 for v in values]
        kept = [v for v, ok in zip(values, good, strict=True) if ok]
        if len(kept) < PATCH**2 / 4:
            assert not mask[n].any(), n
            continue
        mean = sum(kept) / len(kept)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in kept) / (len(kept) - 1) + 1e-6)
        assert mask[n].tolist() == good
        expected = torch.tensor([(v - mean) / deviation for v in kept])
        torch.testing.assert_close(target[n][mask[n]], expected, rtol=1e-4, atol=1e-4)
    assert mask.any(-1).tolist() == [True, True, True, False, False, True]
    assert target.isfinite().all()


def test_the_scale_of_a_patch_is_the_mean_and_log_deviation_of_log_depth_over_its_valid_pixels():
    depth = depth_map()
    scale, known = depth_scale_target(depth, PATCH)
    assert known[:, 0].tolist() == [True, True, True, False, False, True]
    for n, values in enumerate(patches_by_loop(depth[None])):
        logs = [math.log(v) for v in values if math.isfinite(v) and v > 0]
        if known[n]:
            mean = sum(logs) / len(logs)
            variance = sum((v - mean) ** 2 for v in logs) / (len(logs) - 1)
            assert scale[n].tolist() == pytest.approx([mean, math.log(math.sqrt(variance + 1e-6))], abs=1e-4)
    assert scale.isfinite().all()


def test_normalized_patches_with_their_scale_are_depth_in_meters():
    depth = 0.7 * (1 + 0.02 * draw(V, H, H))  # meters
    meters = depth_in_meters(depth_target(depth, PATCH)[0], depth_scale_target(depth, PATCH)[0], PATCH)
    torch.testing.assert_close(meters, depth, rtol=0.005, atol=0)
    twice = depth_in_meters(depth_target(depth, PATCH)[0], depth_scale_target(2 * depth, PATCH)[0], PATCH)
    torch.testing.assert_close(twice, 2 * meters)


def test_scale_loss_is_the_mean_absolute_error_of_both_numbers_over_known_patches():
    target = Target(draw(B, T, V, N, 2), draw(B, T, V, N, 1, seed=1) > 0)
    prediction = draw(B, T, V, N, 2, seed=2)
    known = target.weight[..., 0].nonzero().tolist()
    errors = [(prediction - target.values)[tuple(place)].abs() for place in known]
    loss = scale_loss(prediction, target)
    assert loss.count == 2 * len(errors)
    assert loss.mean().item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_a_millimeter_of_noise_on_a_flat_patch_stays_of_unit_scale():
    depth = 1 + 1e-4 * draw(H, W)
    assert depth_target(depth, PATCH)[0].abs().max() < 0.5


def masked_depth(depth, mask) -> Target:
    values, valid = depth_target(depth, PATCH)
    return Target(values, valid & mask[..., None, None])


def future(pixels, depth, mask) -> dict[str, Target]:
    targets = {"future_rgb": Target(rgb_target(pixels, PATCH), mask[..., None, None])}
    return targets if depth is None else targets | {"future_depth": masked_depth(depth, mask)}


def test_depth_loss_is_the_sum_over_views_of_means_over_valid_elements():
    depth = 1 + draw(B, T, V, H, W, seed=1).abs()
    depth[0, 0, 0, :5] = 0
    prediction = draw(B, T, V, N, PATCH**2, seed=2)
    mask = torch.ones(B, T, V, dtype=torch.bool)
    mask[1, 2] = mask[0, :, 1] = False
    expected = 0.0
    for v in range(V):
        errors = []
        for b in range(B):
            for t in range(T):
                if mask[b, t, v]:
                    target, valid = depth_target(depth[b, t, v], PATCH)
                    errors += ((prediction[b, t, v] - target) ** 2)[valid].tolist()
        expected += sum(errors) / len(errors)
    loss = depth_loss(prediction, masked_depth(depth, mask)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("with_depth", [True, False])
def test_future_loss_is_the_mean_over_the_four_channels_summed_over_views(with_depth):
    pixels = draw(B, T, V, 3, H, W, seed=3)
    depth = 1 + draw(B, T, V, H, W, seed=4).abs()
    depth[1, 1, 0, 2:9] = 0
    rgb, deep = draw(B, T, V, N, PATCH**2 * 3, seed=5), draw(B, T, V, N, PATCH**2, seed=6)
    mask = torch.ones(B, T, V, dtype=torch.bool)
    mask[0, 1, 1] = False
    expected = 0.0
    for v in range(V):
        errors = []
        for b in range(B):
            for t in range(T):
                if not mask[b, t, v]:
                    continue
                errors += ((rgb[b, t, v] - rgb_target(pixels[b, t, v], PATCH)) ** 2).flatten().tolist()
                if with_depth:
                    target, valid = depth_target(depth[b, t, v], PATCH)
                    errors += ((deep[b, t, v] - target) ** 2)[valid].tolist()
        expected += sum(errors) / len(errors)
    loss = future_loss(rgb, deep, future(pixels, depth if with_depth else None, mask)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_flow_loss_is_the_weighted_mean_over_all_three_coordinates():
    prediction, track = draw(B, T, L, P, 3, seed=7), draw(B, T, L, P, 3, seed=8)
    weight = torch.rand(B, T, L, P, generator=torch.Generator().manual_seed(9))
    weight[weight < 0.3] = 0
    total = divisor = 0.0
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (B, T, L, P))).tolist():
        for c in range(3):
            total += weight[*index].item() * (prediction[*index, c] - track[*index, c]).item() ** 2
            divisor += weight[*index].item()
    assert flow_loss(prediction, Target(track, weight)).mean().item() == pytest.approx(
        total / divisor, rel=1e-5
    )


@pytest.mark.parametrize("dim", [2, 3])
def test_displacement_loss_measures_the_start_and_what_happened_since_in_their_own_units(dim):
    prediction, track = draw(B, T, L, P, dim, seed=7), draw(B, T, L, P, dim, seed=8)
    weight = torch.rand(B, T, L, P, generator=torch.Generator().manual_seed(9))
    weight[weight < 0.3] = 0
    total = divisor = 0.0
    for b, t, k, p in torch.cartesian_prod(*(torch.arange(n) for n in (B, T, L, P))).tolist():
        w, error = weight[b, t, k, p].item(), prediction[b, t, k, p] - track[b, t, k, p]
        if k == 0:
            total += w * (error[2:] / 0.5).square().sum().item()  # x and y of the start are given
            divisor += w * (dim - 2)
        elif weight[b, t, 0, p] > 0:
            moved = error - (prediction[b, t, 0, p] - track[b, t, 0, p])
            total += w * (moved / 0.1).square().sum().item()
            divisor += w * dim
    loss = displacement_loss(prediction, Target(track, weight), (0.5, 0.1))
    assert loss.mean().item() == pytest.approx(total / divisor, rel=1e-5)
    assert count_displacements(Target(track, weight)).item() == pytest.approx(divisor, rel=1e-5)


def test_displacement_loss_does_not_mistake_a_wrong_start_for_motion():
    track = draw(B, T, L, P, 3, seed=8)
    further_away = track + torch.tensor([0.0, 0.0, 0.2])
    target = Target(track, torch.ones(B, T, L, P))
    loss = displacement_loss(further_away, target, (0.1, 0.01))
    assert loss.total.item() == pytest.approx(B * T * P * 2**2, rel=1e-4)


@pytest.mark.parametrize("kind", ["smooth_l1", "l1"])
@pytest.mark.parametrize("binary", [[1], [0, 3], [], [0, 1, 2, 3, 4]])
def test_action_losses_are_masked_means_of_smooth_l1_and_cross_entropy(kind, binary):
    prediction, actions = 2 * draw(B, T, K, 5, seed=10), 2 * draw(B, T, K, 5, seed=11)
    actions[..., binary] = (actions[..., binary] > 0).float()
    mask = torch.rand(B, T, K, generator=torch.Generator().manual_seed(12)) > 0.4
    arm, gripper = [], []
    for p, a in zip(prediction[mask], actions[mask], strict=True):
        for i in range(5):
            x, y = p[i].item(), a[i].item()
            if i in binary:
                gripper.append(
                    -y * math.log(1 / (1 + math.exp(-x))) - (1 - y) * math.log(1 / (1 + math.exp(x)))
                )
            else:
                d = abs(x - y)
                arm.append(d if kind == "l1" else (0.5 * d * d if d < 1 else d - 0.5))
    losses = action_losses(prediction, actions, mask, binary, kind)
    for loss, errors in zip(losses, (arm, gripper), strict=True):
        assert loss.mean().item() == pytest.approx(sum(errors) / len(errors) if errors else 0, rel=1e-4)


def test_kl_loss_sums_dimensions_and_averages_all_frames():
    mean, log_var = draw(B * T, 6, seed=13), draw(B * T, 6, seed=14)
    expected = sum(
        0.5 * (m**2 + math.exp(s) - 1 - s)
        for m, s in zip(mean.flatten().tolist(), log_var.flatten().tolist(), strict=True)
    )
    assert kl_loss(mean, log_var).mean().item() == pytest.approx(expected / (B * T), rel=1e-5)
    assert kl_loss(torch.zeros(4, 6), torch.zeros(4, 6)).mean() == 0


def test_progress_loss_counts_real_frames_only():
    prediction, progress = torch.rand(B, T), torch.rand(B, T)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    errors = [(prediction[b, t] - progress[b, t]).item() ** 2 for b, t in mask.nonzero().tolist()]
    loss = progress_loss(prediction, Target(progress, mask)).mean()
    assert loss.item() == pytest.approx(sum(errors) / 3, rel=1e-5)


def all_losses(poison: float, mask_value: bool) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Every loss with targets of `poison` wherever they are masked out, and its predictions."""
    some = torch.zeros(B, T, dtype=torch.bool)
    some[0, :2] = mask_value

    def target(*shape: int) -> torch.Tensor:
        values = draw(*shape, seed=20)
        values[~some] = poison
        return values

    def prediction(*shape: int) -> torch.Tensor:
        return draw(*shape, seed=21).requires_grad_()

    views = some[..., None].expand(B, T, V)
    depth = target(B, T, V, H, W).abs()
    pixels = draw(B, T, V, 3, H, W)
    deep, rgb, rgb_depth = (prediction(B, T, V, N, PATCH**2 * c) for c in (1, 3, 1))
    flow, action, progress = prediction(B, T, L, P, 3), prediction(B, T, K, 5), prediction(B, T)
    scale = prediction(B, T, V, N, 2)
    weight = some[..., None, None].float().expand(B, T, L, P)
    steps = some[..., None].expand(B, T, K)
    actions = target(B, T, K, 5)
    arm, gripper = action_losses(action, actions.where(actions.isnan(), actions.sigmoid()), steps, [1], "l1")
    rgbd, only_rgb = future(pixels, depth, views), future(pixels, None, views)
    losses = {
        "depth": (depth_loss(deep, masked_depth(depth, views)), [deep]),
        "future": (future_loss(rgb, rgb_depth, rgbd), [rgb, rgb_depth]),
        "future without depth": (future_loss(rgb, rgb_depth, only_rgb), [rgb, rgb_depth]),
        "scale": (scale_loss(scale, Target(target(B, T, V, N, 2), views[..., None, None])), [scale]),
        "flow": (flow_loss(flow, Target(target(B, T, L, P, 3), weight)), [flow]),
        "displacement": (displacement_loss(flow, Target(target(B, T, L, P, 3), weight), (1, 0.5)), [flow]),
        "arm": (arm, [action]),
        "gripper": (gripper, [action]),
        "progress": (progress_loss(progress, Target(target(B, T), some)), [progress]),
    }
    return {name: (loss.mean(), predictions) for name, (loss, predictions) in losses.items()}


def test_masked_nan_targets_poison_neither_loss_nor_gradient():
    clean, poisoned = all_losses(0.5, True), all_losses(NAN, True)
    for name, (loss, predictions) in poisoned.items():
        assert loss.item() == pytest.approx(clean[name][0].item()), name
        assert loss > 0, name
        for gradient in torch.autograd.grad(loss, predictions):
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**100])  # of a GradScaler
def test_an_empty_mask_gives_an_exact_zero_with_a_zero_gradient(scale):
    for name, (loss, predictions) in all_losses(NAN, False).items():
        assert loss.item() == 0, name
        for gradient in torch.autograd.grad(loss * scale, predictions):
            assert (gradient == 0).all(), name


def test_losses_are_float32_for_bfloat16_predictions():
    weight = torch.ones(B, T, L, P)
    target = Target(torch.full((B, T, L, P, 3), 0.5), weight)
    loss = flow_loss(torch.zeros(B, T, L, P, 3, dtype=torch.bfloat16), target).mean()
    assert loss.dtype == torch.float32 and loss.item() == 0.25
    kl = kl_loss(torch.ones(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16))
    assert kl.mean().dtype == torch.float32


def test_a_wrong_shape_is_named_with_what_was_expected():
    with pytest.raises(ValueError, match=r"track has shape \(2, 3\); expected \(2, 5\)"):
        check_shapes(
            {"state": None, "track": torch.zeros(2, 3)}, {"state": (1,), "track": ("T", "P")}, {"P": 5}
        )


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**100])
def test_a_loss_of_entries_that_do_not_exist_is_an_exact_zero(scale):
    action, depth = draw(B, T, K, 5).requires_grad_(), draw(B, T, V, N, 2).requires_grad_()
    steps = torch.ones(B, T, K, dtype=torch.bool)
    _, gripper = action_losses(action, draw(B, T, K, 5), steps, [], "l1")
    for loss, prediction in ((gripper.mean(), action), (scale_loss(depth, None).mean(), depth)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss * scale, prediction)
        assert (gradient == 0).all()
