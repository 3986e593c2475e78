# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Shapes of everything that goes into the model, checked before anything is computed."""

from torch import Tensor

from .configuration_foresight import ForesightConfig


def check_shapes(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuses a tensor of another shape than `name=(tensor, shape)` says, where it would be broadcast.

    Raises:
        ValueError: The message names the tensor, its shape and the expected one.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")


def check_targets(config: ForesightConfig, image_shape: tuple[int, ...], **targets: Tensor | None) -> None:
    """Checks the shapes of all targets of heads that exist.

    Args:
        config (`ForesightConfig`): Sizes and objectives.
        image_shape (`tuple[int, ...]`): `(B, T, V, 3, H, W)` of `pixel_values`.
        **targets (`torch.Tensor`): Targets of [`ForesightForActionPrediction.forward`] by name.

    Raises:
        ValueError: The message names the target, its shape and the expected one.
    """
    window, (views, channels, height, width) = tuple(image_shape[:2]), tuple(image_shape[2:])
    images, chunk = targets.get("lookahead_pixel_values"), (*window, config.chunk_size)
    later = (window[0], config.future_shift if images is None else images.shape[1])
    steps = (*window, config.flow_length, config.num_flow_points)
    expected = {
        "action": {
            "actions": (*chunk, config.action_dim),
            "action_mask": chunk,
            "style_noise": (*window, config.latent_dim),
        },
        "depth": {"depth": (*window, views, height, width)},
        "future": {
            "depth": (*window, views, height, width),
            "lookahead_pixel_values": (*later, views, channels, height, width),
            "lookahead_depth": (*later, views, height, width),
            "lookahead_mask": later,
        },
        "flow": {"track": (*steps, 3), "track_weight": steps},
        "progress": {"progress": window},
    }
    for objective, shapes in expected.items():
        if config.has(objective):
            check_shapes(**{name: (targets.get(name), shape) for name, shape in shapes.items()})


def check_inputs(
    config: ForesightConfig,
    vision_width: int,
    pixel_values: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    state: Tensor | None = None,
    frame_mask: Tensor | None = None,
    view_mask: Tensor | None = None,
    state_mask: Tensor | None = None,
    goal_pixel_values: Tensor | None = None,
    goal_mask: Tensor | None = None,
    text_features: Tensor | None = None,
    vision_features: tuple[Tensor, Tensor] | None = None,
    goal_features: tuple[Tensor, Tensor] | None = None,
) -> tuple[int, int]:
    """Checks the inputs of [`ForesightModel.forward`], which documents them.

    Args:
        config (`ForesightConfig`): Sizes.
        vision_width (`int`): Width of the vision tower's features.
        pixel_values, input_ids, attention_mask, state, frame_mask, view_mask, state_mask, goal_pixel_values,
            goal_mask, text_features, vision_features, goal_features: The inputs.

    Returns:
        `tuple[int, int]`: B and T.

    Raises:
        ValueError: If something is missing, given twice or unknown to the config, or a shape does not fit;
            the message names it, its shape and the expected one.
    """
    for name, given in {
        "pixel_values or vision_features": (pixel_values, vision_features),
        "input_ids or text_features": (input_ids, text_features),
    }.items():
        if sum(x is not None for x in given) != 1:
            raise ValueError(f"Give one of {name}.")
    if goal_pixel_values is not None and goal_features is not None:
        raise ValueError("Give one of goal_pixel_values or goal_features.")
    if not config.goal_image and (goal_pixel_values is not None or goal_features is not None):
        raise ValueError("A goal was given, but config.goal_image is false: leave it out.")
    if state is not None and not config.state_dim:
        raise ValueError("state was given, but config.state_dim is 0: leave it out.")
    if pixel_values is not None:
        batch, frames = _check_images(config, pixel_values)
    else:
        batch, frames = _check_features(config, vision_width, vision_features)
    views, side = len(config.views), config.image_size
    per_frame = view_mask is not None and view_mask.ndim == 3
    expected = {
        "state": (state, (batch, frames, config.state_dim)),
        "frame_mask": (frame_mask, (batch, frames)),
        "view_mask": (view_mask, (batch, frames, views) if per_frame else (batch, views)),
        "state_mask": (state_mask, (batch,)),
        "goal_pixel_values": (goal_pixel_values, (batch, 3, side, side)),
        "goal_mask": (goal_mask, (batch,)),
        "text_features": (text_features, (batch, config.text_config.projection_dim)),
    }
    if input_ids is not None:
        expected["input_ids"] = (input_ids, (batch, input_ids.shape[-1]))
        expected["attention_mask"] = (attention_mask, tuple(input_ids.shape))
    if goal_features is not None:
        cls, patches = goal_features
        expected["goal_features[0]"] = (cls, (batch, vision_width))
        expected["goal_features[1]"] = (patches, (batch, patches.shape[-2], vision_width))
    check_shapes(**expected)
    return batch, frames


def _check_images(config: ForesightConfig, pixel_values: Tensor) -> tuple[int, int]:
    size = (3, config.image_size, config.image_size)
    if pixel_values.ndim != 6 or tuple(pixel_values.shape[3:]) != size:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, frames, views, "
            f"{', '.join(map(str, size))}). ForesightProcessor builds it from images."
        )
    batch, frames, views = pixel_values.shape[:3]
    if views != len(config.views):
        raise ValueError(f"pixel_values has {views} views; the config names {list(config.views)}.")
    if not 1 <= frames <= config.history_length:
        raise ValueError(f"pixel_values has {frames} frames; the config takes 1 to {config.history_length}.")
    return batch, frames


def _check_features(config: ForesightConfig, width: int, features: tuple[Tensor, Tensor]) -> tuple[int, int]:
    cls, patches = features
    views = len(config.views)
    if cls.ndim != 4 or not 1 <= cls.shape[1] <= config.history_length:
        raise ValueError(
            f"vision_features[0] has shape {tuple(cls.shape)}; expected (batch, 1 to "
            f"{config.history_length} frames, {views} views, {width})."
        )
    lead = (*cls.shape[:2], views)
    check_shapes(
        **{
            "vision_features[0]": (cls, (*lead, width)),
            "vision_features[1]": (patches, (*lead, patches.shape[-2], width)),
        }
    )
    return cls.shape[0], cls.shape[1]


__all__ = ["check_inputs", "check_shapes", "check_targets"]
