"""Towers of every kind, the resampler, state and text, each against its source or a plain loop."""

import json
import math

import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    CLIPTextModelWithProjection,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.encoders import (
    PerceiverResampler,
    StateEncoder,
    TextEncoder,
    VisionEncoder,
    flow_grid_points,
    normalize_length,
    sincos_2d,
    take_entries,
)
from tests.tiny import TASKS, tiny_batch, tiny_config, tiny_inputs, tiny_tokenizer

IMAGES, SIDE, WIDTH = 3, 40, 40


@pytest.fixture(scope="module")
def images():
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def timm_config(architecture: str, **model_args) -> TimmWrapperConfig:
    return TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=model_args)


def timm_vit_config(**overrides) -> TimmWrapperConfig:
    sizes = {"img_size": SIDE, "patch_size": 10, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    return timm_config("vit_tiny_patch16_224", **(sizes | overrides))


def timm_conv_config() -> TimmWrapperConfig:
    return timm_config("test_resnet", features_only=True, out_indices=[2])


def vision_encoder(vision_config, **sizes) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(tiny_config(vision_config=vision_config, **sizes)).eval()


@torch.no_grad()
def test_a_vit_gives_its_cls_token_and_its_patches(images):
    encoder = vision_encoder(tiny_config().vision_config)
    cls, patches = encoder(images)
    expected = encoder.tower(images).last_hidden_state
    assert isinstance(encoder.tower, ViTModel) and encoder.tower.pooler is None
    assert torch.equal(cls, expected[:, 0]) and torch.equal(patches, expected[:, 1:])
    assert patches.shape == (IMAGES, 16, WIDTH)


def read_by_loop(readout, patches):
    """What stands in for a CLS token: each channel summed under each of its weight maps, then mixed."""
    maps, num_patches, width = readout.maps.shape
    read = torch.zeros(len(patches), maps * width)
    for m in range(maps):
        for c in range(width):
            for n in range(num_patches):
                read[:, m * width + c] += readout.maps[m, n, c] * patches[:, n, c]
    return readout.mix(read)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_args", "prefix", "has_cls"),
    [
        ({}, 1, True),
        ({"reg_tokens": 4}, 5, True),
        ({"class_token": False, "global_pool": "avg"}, 0, False),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, 2, False),
    ],
)
def test_a_timm_vit_gives_patches_without_cls_and_registers(images, model_args, prefix, has_cls):
    encoder = vision_encoder(timm_vit_config(**model_args))
    cls, patches = encoder(images)
    features = encoder.tower.timm_model.forward_features(images)
    assert features.shape[1] == prefix + 16
    torch.testing.assert_close(patches, features[:, prefix:])
    torch.testing.assert_close(cls, features[:, 0] if has_cls else read_by_loop(encoder.readout, patches))


@torch.no_grad()
@pytest.mark.parametrize(
    "model_args",
    [{"depth": "a"}, {"num_heads": 0}, {"norm_layer": "foo"}, {"img_size": [SIDE]}, {"img_size": SIDE + 10}],
)
def test_a_tower_that_cannot_be_built_is_named_whatever_the_library_raises(model_args):
    with pytest.raises(ValueError, match="vision_config describes no tower that can be built: .*Error"):
        vision_encoder(timm_vit_config(**model_args))


@pytest.mark.parametrize("model_args", [{}, {"features_only": True, "out_indices": [1, 2]}])
def test_a_convolutional_tower_gives_its_last_map_as_patches_with_positions(images, model_args):
    encoder = vision_encoder(timm_config("test_resnet", **model_args))
    cls, patches = encoder(images)
    features = encoder.tower(images).last_hidden_state
    features = features[-1] if isinstance(features, list | tuple) else features
    _, channels, rows, cols = features.shape
    assert encoder.width == channels and patches.shape == (IMAGES, rows * cols, channels)
    position = sincos_2d(rows, cols, channels)
    for row in range(rows):
        for col in range(cols):
            n = row * cols + col
            torch.testing.assert_close(patches[:, n], features[:, :, row, col] + position[n])
    torch.testing.assert_close(cls, read_by_loop(encoder.readout, patches))


@torch.no_grad()
def test_a_channels_last_tower_is_read_the_same_way():
    sizes = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 4,
    }
    encoder = vision_encoder(timm_config("swin_tiny_patch4_window7_224", **sizes), image_size=32)
    images = torch.randn(IMAGES, 3, 32, 32)
    features = encoder.tower(images).last_hidden_state  # (images, rows, cols, channels)
    _, patches = encoder(images)
    assert features.shape == (IMAGES, 4, 4, 16)
    torch.testing.assert_close(patches[:, 6], features[:, 1, 2] + sincos_2d(4, 4, 16)[6])


@torch.no_grad()
@pytest.mark.parametrize(("kind", "prefix"), [("dinov2_with_registers", 5), ("siglip", 0), ("resnet", None)])
def test_other_image_encoders_of_transformers_serve_as_towers(images, kind, prefix):
    sizes = {
        "hidden_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 10,
    }
    config = {
        "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**sizes),
        "siglip": lambda: SiglipVisionConfig(**sizes, intermediate_size=24),
        "resnet": lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 20], depths=[1, 1], layer_type="basic"
        ),
    }[kind]()
    encoder = vision_encoder(config)
    cls, patches = encoder(images)
    features = encoder.tower(images).last_hidden_state
    if prefix is None:
        rows = features.shape[-1]
        assert patches.shape == (IMAGES, rows * rows, 20)
        return
    assert torch.equal(patches, features[:, prefix:]) and patches.shape[1] == 16
    torch.testing.assert_close(cls, features[:, 0] if prefix else read_by_loop(encoder.readout, patches))


@pytest.mark.parametrize(
    "vision_config", [timm_vit_config(), timm_conv_config()], ids=["vit", "convolutional"]
)
def test_a_policy_with_a_timm_tower_trains_saves_and_loads(vision_config, tmp_path):
    config = tiny_config(vision_config=vision_config, objectives=["action"], freeze_vision=False)
    torch.manual_seed(0)
    model, inputs = ForesightForActionPrediction(config).train(), tiny_inputs(config)
    model(**inputs, actions=torch.zeros(3, 5, 4, 7)).loss.backward()
    assert all(p.grad is not None for p in model.model.vision_encoder.parameters())
    model.eval().save_pretrained(tmp_path / "timm-policy")
    loaded = AutoModel.from_pretrained(tmp_path / "timm-policy")
    torch.testing.assert_close(loaded.predict_action(**inputs), model.predict_action(**inputs))


def test_a_frozen_tower_without_cls_token_still_learns_its_readout():
    config = tiny_config(vision_config=timm_conv_config(), objectives=["action"])
    model = ForesightForActionPrediction(config).train()
    model(**tiny_inputs(config), actions=torch.zeros(3, 5, 4, 7)).loss.backward()
    encoder = model.model.vision_encoder
    assert all(p.grad.abs().sum() > 0 for p in encoder.readout.parameters())
    assert not any(p.requires_grad for p in encoder.tower.parameters()) and not encoder.tower.training


def test_a_frozen_convolutional_tower_keeps_its_running_statistics():
    config = tiny_config(vision_config=timm_conv_config(), objectives=["action"])
    model = ForesightForActionPrediction(config)
    before = {n: b.clone() for n, b in model.model.vision_encoder.named_buffers()}
    assert before
    for _ in range(2):
        model(**tiny_inputs(config))
        model.train()
    for name, buffer in model.model.vision_encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_paper_sized_timm_tower_is_the_mae_vit():
    with torch.device("meta"):
        encoder = VisionEncoder(
            tiny_config(image_size=224, vision_config=timm_config("vit_base_patch16_224"), patch_size=16)
        )
    assert sum(p.numel() for p in encoder.parameters()) == 85_798_656 and encoder.width == 768


@torch.no_grad()
def test_the_resampler_follows_its_formula():
    config = tiny_config()
    torch.manual_seed(0)
    resampler = PerceiverResampler(config, WIDTH)
    patches = torch.randn(2, 16, WIDTH)
    for image, result in zip(patches, resampler(patches), strict=True):
        x, latents = image + resampler.media_pos_emb[0, 0], resampler.latents
        for layer in resampler.layers:
            media, normed = layer.norm_media(x), layer.norm_latents(latents)
            keys_values = torch.cat([media, normed]) @ layer.to_kv.weight.T  # media first, then latents
            attended = []
            for head in range(3):
                columns = slice(12 * head, 12 * (head + 1))
                query = (normed @ layer.to_q.weight.T)[:, columns]
                key, value = keys_values[:, :36][:, columns], keys_values[:, 36:][:, columns]
                rows = []
                for q in query:
                    scores = torch.stack([q @ k / math.sqrt(12) for k in key])
                    weights = scores.exp() / scores.exp().sum()
                    rows.append(sum(w * v for w, v in zip(weights, value, strict=True)))
                attended.append(torch.stack(rows))
            latents = latents + torch.cat(attended, dim=1) @ layer.to_out.weight.T
            norm, up, _, down = layer.feed_forward
            hidden = norm(latents) @ up.weight.T
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            latents = latents + hidden @ down.weight.T
        torch.testing.assert_close(result, resampler.norm(latents), rtol=1e-4, atol=1e-5)
    assert result.shape == (9, WIDTH)
    assert not any(
        "bias" in n and "norm" not in n and ".0." not in n for n, _ in resampler.named_parameters()
    )


def test_positions_encode_the_column_first_and_the_row_last():
    rows, cols, dim = 3, 5, 12
    table = sincos_2d(rows, cols, dim)
    assert table.dtype == torch.float32 and table.shape == (rows * cols, dim)
    for row in range(rows):
        for col in range(cols):
            expected = []
            for coordinate in (col, row):
                angles = [coordinate * 10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * cols + col], torch.tensor(expected))


def test_flow_grid_points_are_cell_centers_row_by_row():
    points = flow_grid_points(2, 4)
    expected = [[(col + 0.5) / 4, (row + 0.5) / 2] for row in range(2) for col in range(4)]
    assert torch.equal(points, torch.tensor(expected))


@torch.no_grad()
def test_the_state_enters_as_numbers_and_one_hot_pairs():
    config = tiny_config()  # entries 4 and 9 of 11 are binary
    torch.manual_seed(0)
    encoder = StateEncoder(config)
    state = torch.randn(2, 3, 11)
    state[..., 4], state[..., 9] = 1.0, 0.0
    numbers = state[..., [0, 1, 2, 3, 5, 6, 7, 8, 10]]
    one_hot = torch.tensor([0.0, 1.0, 1.0, 0.0]).expand(2, 3, 4)  # [closed, open] of each
    expected = encoder.join(torch.cat([encoder.embed_continuous(numbers), encoder.embed_binary(one_hot)], -1))
    torch.testing.assert_close(encoder(state), expected)


@pytest.mark.parametrize("binary", [(), (0, 1, 2)])
def test_a_state_may_be_all_numbers_or_all_binary(binary):
    encoder = StateEncoder(tiny_config(state_dim=3, binary_state_indices=binary))
    assert encoder(torch.ones(2, 5, 3)).shape == (2, 5, 48)


@torch.no_grad()
def test_text_features_ignore_padding_and_are_scaled_to_unit_length():
    encoder = TextEncoder(tiny_config()).eval()
    together = tiny_tokenizer()(list(TASKS), padding=True, return_tensors="pt")
    features = encoder(together["input_ids"], together["attention_mask"])
    assert features.shape == (3, 22)
    torch.testing.assert_close(
        normalize_length(7 * features).norm(dim=-1), torch.ones(3), rtol=1e-4, atol=1e-4
    )
    for task, feature in zip(TASKS, features, strict=True):
        alone = tiny_tokenizer()([task], return_tensors="pt")
        torch.testing.assert_close(encoder(alone["input_ids"])[0], feature)


@pytest.mark.parametrize("entries", [[0], [1, 2, 3], [4, 0, 2, 3], [3, 2, 1, 0, 4]])
def test_take_entries_equals_indexing(entries):
    values = torch.randn(2, 3, 5)
    assert torch.equal(take_entries(values, entries), values[..., entries])


# --- Pretrained towers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(7)
    model = CLIPTextModelWithProjection(tiny_config().text_config)
    model.save_pretrained(folder)
    return folder, model.eval()


@torch.no_grad()
def test_a_clip_checkpoint_becomes_the_text_tower(text_checkpoint):
    folder, source = text_checkpoint
    config = tiny_config(text_config=None, image_size=40)
    model = ForesightForActionPrediction.from_encoder_checkpoints(config, text=folder)
    text = tiny_tokenizer()(list(TASKS), padding=True, return_tensors="pt")
    expected = source(**text).text_embeds
    torch.testing.assert_close(model.model.encode_text(text["input_ids"], text["attention_mask"]), expected)
    assert model.config.text_config.projection_dim == 22
    assert model.model.embed_language.in_features == 22
    assert not any(p.requires_grad for p in model.model.text_encoder.parameters())


@torch.no_grad()
def test_a_vit_mae_checkpoint_becomes_a_vision_tower_that_shuffles_nothing(images, tmp_path):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 56}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    torch.manual_seed(8)
    source = ViTMAEForPreTraining(
        ViTMAEConfig(
            **sizes,
            **decoder,
            image_size=SIDE,
            patch_size=10,
            decoder_intermediate_size=16,
            layer_norm_eps=1e-6,
        )
    ).eval()
    torch.nn.init.normal_(source.vit.embeddings.position_embeddings)
    source.save_pretrained(tmp_path / "mae")
    model = ForesightForActionPrediction.from_encoder_checkpoints(
        tiny_config(vision_config=ViTConfig(image_size=SIDE)), vision=tmp_path / "mae"
    )
    source.vit.embeddings.config.mask_ratio = 0.0
    expected = source.vit(images, noise=torch.arange(16.0).expand(IMAGES, -1)).last_hidden_state
    cls, patches = model.model.vision_encoder(images)
    torch.testing.assert_close(cls, expected[:, 0])
    torch.testing.assert_close(patches, expected[:, 1:])
    assert model.config.vision_config.model_type == "vit"
    assert model.config.vision_config.layer_norm_eps == 1e-6
    # ... and it comes back from its own checkpoint.
    model.save_pretrained(tmp_path / "policy")
    loaded = AutoModel.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(loaded.model.vision_encoder(images)[1], expected[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize(
    "vision_config", [timm_vit_config(), timm_conv_config()], ids=["vit", "convolutional"]
)
def test_a_timm_checkpoint_becomes_the_vision_tower(images, tmp_path, vision_config):
    torch.manual_seed(9)
    source = AutoModel.from_config(vision_config).eval()
    source.save_pretrained(tmp_path / "timm")
    model = ForesightForActionPrediction.from_encoder_checkpoints(tiny_config(), vision=tmp_path / "timm")
    for ours, theirs in zip(
        model.model.vision_encoder.tower.state_dict().values(), source.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert model.config.vision_config.model_type == "timm_wrapper"
    assert model.model.vision_encoder(images)[1].isfinite().all()


def timm_mae(folder, **sizes):
    """A MAE encoder of random weights in a folder as timm's repositories on the Hub are laid out."""
    args = {"img_size": SIDE, "patch_size": 10, "embed_dim": WIDTH, "depth": 2, "num_heads": 4} | sizes
    torch.manual_seed(10)
    source = timm.create_model("vit_base_patch16_224.mae", **args).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    described = {"architecture": "vit_base_patch16_224", "num_features": WIDTH, "global_pool": "token"}
    described |= {"num_classes": 0, "model_args": args, "pretrained_cfg": {"tag": "mae", "num_classes": 0}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described))
    save_file(source.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return source


@torch.no_grad()
def test_the_mae_of_timm_fills_a_vit_as_the_mae_of_a_gr_mg_checkpoint_does(images, tmp_path):
    source = timm_mae(tmp_path / "mae")
    model = ForesightForActionPrediction.from_encoder_checkpoints(tiny_config(), vision=tmp_path / "mae")
    vision = model.config.vision_config
    assert (vision.model_type, vision.layer_norm_eps, vision.num_attention_heads) == ("vit", 1e-6, 4)
    expected = source.forward_features(images)  # CLS and patches after the final norm
    cls, patches = model.model.vision_encoder(images)
    torch.testing.assert_close(cls, expected[:, 0])
    torch.testing.assert_close(patches, expected[:, 1:])
    model.save_pretrained(tmp_path / "policy")
    loaded = AutoModel.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded.model.vision_encoder(images)[1], patches)


def test_a_mae_with_more_than_a_plain_vit_is_refused(tmp_path):
    timm_mae(tmp_path / "mae", reg_tokens=2)
    with pytest.raises(ValueError, match="not a plain ViT: it has or lacks .*'reg_token'"):
        ForesightForActionPrediction.from_encoder_checkpoints(tiny_config(), vision=tmp_path / "mae")


def test_every_parameter_of_a_timm_tower_that_is_trained_learns(tmp_path):
    # One that gets no gradient stops training in several processes.
    config = tiny_config(
        vision_config=timm_vit_config(class_token=False, global_pool="avg"), freeze_vision=False
    )
    ForesightForActionPrediction(config).save_pretrained(tmp_path)
    model = ForesightForActionPrediction.from_pretrained(tmp_path)  # which makes every weight trainable
    model(**tiny_batch(config)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_given_config_is_not_changed_by_loading_towers(text_checkpoint):
    config = tiny_config(text_config=None)
    ForesightForActionPrediction.from_encoder_checkpoints(config, text=text_checkpoint[0])
    assert config.text_config.projection_dim == 512


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    ViTModel(tiny_config().vision_config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="lacks weights of CLIPTextModelWithProjection"):
        ForesightForActionPrediction.from_encoder_checkpoints(tiny_config(), text=tmp_path / "vit")


def test_a_vision_checkpoint_of_another_image_size_is_refused_with_both_sizes(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit64")
    with pytest.raises(
        StrictDataclassClassValidationError, match="vision_config.image_size=64, but image_size=40"
    ):
        ForesightForActionPrediction.from_encoder_checkpoints(tiny_config(), vision=tmp_path / "vit64")
