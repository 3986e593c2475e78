"""GR-MG's policy re-stated in plain PyTorch, apart from `modeling_foresight`: what conversion is judged by.

Module names give exactly GR-MG's state dict at any size; the forward pass computes everything in GR-MG's own
sequence order under one flat triangular mask. Evaluation only: there is no dropout here.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes and switches; the defaults are the small configuration for tests, `FULL` is the published one."""

    width: int = 48
    layers: int = 2
    heads: int = 4
    frames: int = 5
    chunk: int = 4
    latents: int = 9
    resampler_depth: int = 2
    resampler_heads: int = 3
    resampler_head_dim: int = 12
    action_width: int = 24
    action_encoder_width: int | None = None  # None: as `action_width`
    latent: int = 6
    state_dim: int = 7
    action_dim: int = 7
    image: int = 40
    patch: int = 8
    vision_width: int = 40
    vision_depth: int = 2
    vision_heads: int = 5
    vision_patch: int = 8
    text_feature: int = 20
    text_width: int = 12
    text_depth: int = 2
    text_heads: int = 3
    text_context: int = 11
    text_vocab: int = 61
    clip_vision: tuple = (28, 1, 20, 10)  # width, depth, image, patch of CLIP's own image side, never used
    state: bool = True
    wrist: bool = True
    action: bool = True
    future: bool = True
    progress: bool = True
    text_tower: bool = True
    vision_tower: bool = True

    def grmg_json(self, **policy) -> dict:
        """The configuration file that GR-MG would have been trained with."""
        return {
            "policy": {
                "resampler_params": {
                    "depth": self.resampler_depth,
                    "dim_head": self.resampler_head_dim,
                    "heads": self.resampler_heads,
                    "num_latents": self.latents,
                    "num_media_embeds": 1,
                },
                "seq_len": self.frames,
                "act_len": self.chunk,
                "act_latent_dim": self.latent,
                "act_encoder_dim": self.action_encoder_width or self.action_width,
                "act_decoder_dim": self.action_width,
                "progress_decoder_dim": self.action_width,
                "patch_feat_dim": self.vision_width,
                "img_feat_dim": self.vision_width,
                "lang_feat_dim": self.text_feature,
                "embed_dim": self.width,
                "use_resampler": True,
                "n_layer": self.layers,
                "n_head": self.heads,
                "activation_function": "relu",
                "dropout": 0.1,
            }
            | policy,
            "trainer": {
                "without_norm_pix_loss": False,
                "gripper_loss_ratio": 0.02,
                "fwd_loss_ratio": 0.3,
                "kl_loss_ratio": 0.7,
                "progress_loss_ratio": 0.9,
                "act_pred": self.action,
                "fwd_pred": self.future,
                "progress_pred": self.progress,
                "fwd_pred_hand": self.future and self.wrist,
                "fwd_pred_next_n": 2,
            },
            "input": {
                "state_dim": self.state_dim,
                "act_dim": self.action_dim,
                "use_hand_rgb": self.wrist,
                "use_state": self.state,
            },
        }


FULL = Sizes(
    width=384,
    layers=12,
    heads=12,
    frames=10,
    chunk=5,
    resampler_depth=3,
    resampler_heads=4,
    resampler_head_dim=128,
    action_width=128,
    latent=32,
    image=224,
    patch=16,
    vision_width=768,
    vision_depth=12,
    vision_heads=12,
    vision_patch=16,
    text_feature=512,
    text_width=512,
    text_depth=12,
    text_heads=8,
    text_context=77,
    text_vocab=49408,
    clip_vision=(768, 12, 224, 32),
)
PRETRAINING = {"state": False, "wrist": False, "action": False, "progress": False}


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of `(..., L, heads * dim)`; heads are the slow axis of the columns."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(-2, -3).flatten(-2)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads))


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=eps), FusedAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=eps), Mlp(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Mae(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, patches = sizes.vision_width, (sizes.image // sizes.vision_patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.patch_embed = PatchEmbed(width, sizes.vision_patch)
        self.blocks = nn.ModuleList(
            VitBlock(width, sizes.vision_heads, eps=1e-6) for _ in range(sizes.vision_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


class ClipAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask):
        joined = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attend(*joined.chunk(3, dim=-1), self.heads, mask))


class ClipMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn, self.ln_1 = ClipAttention(width, heads), nn.LayerNorm(width)
        self.mlp, self.ln_2 = ClipMlp(width), nn.LayerNorm(width)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads) for _ in range(depth))

    def forward(self, x, mask):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ClipVisual(nn.Module):
    """Only its names matter: GR-MG stores it and never runs it."""

    def __init__(self, width: int, depth: int, image: int, patch: int, feature: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, feature))
        self.conv1 = nn.Conv2d(3, width, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = ClipTransformer(width, depth, heads=1)


class Clip(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.text_width
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.text_context, width))
        self.text_projection = nn.Parameter(torch.zeros(width, sizes.text_feature))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        self.visual = ClipVisual(*sizes.clip_vision, sizes.text_feature)
        self.transformer = ClipTransformer(width, sizes.text_depth, sizes.text_heads)
        self.token_embedding = nn.Embedding(sizes.text_vocab, width)
        self.ln_final = nn.LayerNorm(width)

    def encode_text(self, ids):
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, torch.ones(length, length, dtype=torch.bool).tril()))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


class ResamplerAttention(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, inner = sizes.vision_width, sizes.resampler_heads * sizes.resampler_head_dim
        self.heads = sizes.resampler_heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, media, latents):
        latents = self.norm_latents(latents)
        key, value = self.to_kv(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), key, value, self.heads))


class Resampler(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.vision_width
        self.latents = nn.Parameter(torch.zeros(sizes.latents, width))
        self.media_pos_emb = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    ResamplerAttention(sizes),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(sizes.resampler_depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, patches):
        media = patches + self.media_pos_emb[0]
        latents = self.latents.expand(len(patches), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(media, latents)
            latents = latents + feed_forward(latents)
        return self.norm(latents)


class Conv1D(nn.Module):
    """GPT-2's linear layer: weights are (in, out)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class GptAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = Conv1D(width, 3 * width), Conv1D(width, width)

    def forward(self, x, mask):
        return self.c_proj(attend(*self.c_attn(x).chunk(3, dim=-1), self.heads, mask))


class GptMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)))


class GptBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), GptAttention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), GptMlp(width)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.h = nn.ModuleList(GptBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)


def position_table(side: int, width: int) -> Tensor:
    """`(1, side * side, width)`: columns in the first half, rows in the second; each `[sin, cos]`."""
    quarter = width // 4
    table = torch.zeros(side * side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                for k in range(quarter):
                    angle = place / 10000 ** (k / quarter)
                    table[side * row + column, 2 * quarter * half + k] = math.sin(angle)
                    table[side * row + column, 2 * quarter * half + quarter + k] = math.cos(angle)
    return table.float()[None]


class GrmgReference(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        width, small, vision = sizes.width, sizes.action_width, sizes.vision_width
        if sizes.vision_tower:
            self.model_mae = Mae(sizes)
        if sizes.text_tower:
            self.text_encoder = Clip(sizes)
        self.perceiver_resampler = Resampler(sizes)
        self.transformer = Gpt(width, sizes.layers, sizes.heads)
        self.embed_lang = nn.Linear(sizes.text_feature, width)
        if sizes.state:
            self.embed_arm_state = nn.Linear(sizes.state_dim - 1, width)
            self.embed_gripper_state = nn.Linear(2, width)
            self.embed_state = nn.Linear(2 * width, width)
        names = ["embed_img", "embed_patch", "embed_goal_image", "embed_goal_patch"]
        for name in names + (["embed_hand_img", "embed_hand_patch"] if sizes.wrist else []):
            setattr(self, name, nn.Linear(vision, width))
        self.embed_timestep = nn.Embedding(sizes.frames, width)
        self.embed_ln = nn.LayerNorm(width)
        if sizes.action:
            self.action_queries = nn.Embedding(1, width)
            encoder = sizes.action_encoder_width or small
            self.embed_arm_action = nn.Linear(sizes.action_dim - 1, encoder)
            self.embed_gripper_action = nn.Embedding(2, encoder)
            self.embed_action = nn.Linear(2 * encoder, encoder)
            self.action_encoder_cls_token = nn.Embedding(1, encoder)
            self.action_encoder_positional_embeddings = nn.Embedding(sizes.chunk + 1, encoder)
            self.encode_action = nn.ModuleList(VitBlock(encoder, 8) for _ in range(4))
            self.pred_style_vector = nn.Linear(encoder, 2 * sizes.latent)
            self.embed_style_vector = nn.Linear(sizes.latent, small)
            self.proj_action_output_embed = nn.Linear(width, small)
            self.action_mask_token_embedding = nn.Embedding(1, small)
            self.action_decoder_positional_embeddings = nn.Embedding(sizes.chunk, small)
            self.decode_action = nn.ModuleList(VitBlock(small, 8) for _ in range(4))
            self.pred_arm_act = nn.Linear(small, sizes.action_dim - 1)
            self.pred_gripper_act = nn.Linear(small, 1)
        if sizes.future:
            self.obs_queries = nn.Embedding(sizes.latents + 1, width)
            if sizes.wrist:
                self.obs_hand_queries = nn.Embedding(sizes.latents + 1, width)
            self.decoder_embed = nn.Linear(width, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, width))
            side = sizes.image // sizes.patch
            self.decoder_pos_embed = nn.Parameter(torch.zeros(1, side * side, width), requires_grad=False)
            self.decoder_blocks = nn.ModuleList(VitBlock(width, 16) for _ in range(2))
            self.decoder_norm = nn.LayerNorm(width)
            self.decoder_pred = nn.Linear(width, sizes.patch**2 * 3)
        if sizes.progress:
            self.progress_queries = nn.Embedding(1, width)
            self.proj_progress_output_embed = nn.Linear(width, small)
            self.progress_mask_token_embedding = nn.Embedding(1, small)
            self.decode_progress = nn.ModuleList(VitBlock(small, 8) for _ in range(2))
            self.pred_progress = nn.Linear(small, 1)

    @torch.no_grad()
    def randomize(self, seed: int = 0) -> "GrmgReference":
        """Every tensor at a scale that matters to the outputs; the position table stays what it is."""
        draw = torch.Generator().manual_seed(seed)
        for name, value in self.state_dict().items():
            if name == "decoder_pos_embed":
                value.copy_(position_table(self.sizes.image // self.sizes.patch, self.sizes.width))
                continue
            noise = torch.randn(value.shape, generator=draw)
            is_norm = value.ndim == 1 and name.endswith("weight")
            scale = 1 / math.sqrt(value.shape[-1]) if value.ndim == 2 else 0.3
            value.copy_(1 + 0.1 * noise if is_norm else scale * noise)
        return self.eval()

    @torch.no_grad()
    def forward(
        self,
        vision: list[tuple[Tensor, Tensor]],
        goal: tuple[Tensor, Tensor],
        text: Tensor,
        arm_state: Tensor | None = None,
        gripper_state: Tensor | None = None,
        arm_action: Tensor | None = None,
        gripper_action: Tensor | None = None,
        frame_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Everything that GR-MG computes.

        Args:
            vision: Per view (main, wrist) CLS `(B, T, C)` and patches `(B, T, N, C)`.
            goal: CLS `(B, C)` and patches `(B, N, C)`.
            text: `(B, text feature)`, projected, of any length.
            arm_state, gripper_state: `(B, T, state_dim - 1)` and one-hot `(B, T, 2)`, column 1 is open.
            arm_action, gripper_action: `(B, T, K, action_dim - 1)` and 0/1 `(B, T, K)`.
            frame_mask: 0/1 `(B, T)`.
            noise: `(B, T, latent)` of the CVAE; its latent is zero without.
        """
        sizes = self.sizes
        batch, frames = vision[0][0].shape[:2]
        if frame_mask is None:
            frame_mask = torch.ones(batch, frames)
        time = self.embed_timestep.weight[:frames]

        text = text / (text.norm(dim=1, keepdim=True) + 1e-6)
        parts = [(self.embed_lang(text)[:, None] + time)[:, :, None]]
        if sizes.state:
            joined = torch.cat(
                [self.embed_arm_state(arm_state), self.embed_gripper_state(gripper_state)], dim=-1
            )
            parts.append((self.embed_state(joined) + time)[:, :, None])
        names = [("embed_patch", "embed_img"), ("embed_hand_patch", "embed_hand_img")]
        for (cls, patches), (embed_latents, embed_cls) in zip(vision, names, strict=False):
            latents = self.perceiver_resampler(patches.flatten(0, 1)).unflatten(0, (batch, frames))
            parts.append(getattr(self, embed_latents)(latents) + time[:, None])
            parts.append((getattr(self, embed_cls)(cls) + time)[:, :, None])
        inputs = sum(part.shape[2] for part in parts)
        queries = []
        if sizes.action:
            queries.append(("action", self.action_queries))
        if sizes.future:
            queries.append(("future_main", self.obs_queries))
            if sizes.wrist:
                queries.append(("future_wrist", self.obs_hand_queries))
        if sizes.progress:
            queries.append(("progress", self.progress_queries))
        place, per_frame = {}, inputs
        for name, query in queries:
            count = len(query.weight)
            place[name] = slice(per_frame, per_frame + count)
            parts.append(query.weight.expand(batch, frames, -1, -1))
            per_frame += count
        goal_tokens = [self.embed_goal_patch(self.perceiver_resampler(goal[1]))]
        goal_tokens.append(self.embed_goal_image(goal[0])[:, None])
        sequence = torch.cat([*goal_tokens, torch.cat(parts, dim=2).flatten(1, 2)], dim=1)

        real = frame_mask.bool()[:, :, None].expand(-1, -1, per_frame).clone()
        real[:, :, inputs:] = False  # no query is ever a key
        front = sizes.latents + 1
        columns = torch.cat([torch.ones(batch, front, dtype=torch.bool), real.flatten(1)], dim=1)
        length = sequence.shape[1]
        mask = (torch.ones(length, length, dtype=torch.bool).tril() & columns[:, None])[:, None]
        x = self.embed_ln(sequence)
        result = {"embeddings": sequence, "hidden_states": [x]}
        for block in self.transformer.h:
            x = block(x, mask)
            result["hidden_states"].append(x)
        result["last_hidden_state"] = x = self.transformer.ln_f(x)
        x = x[:, front:].unflatten(1, (frames, per_frame))

        if sizes.action:
            style = torch.zeros(batch, frames, sizes.latent)
            if arm_action is not None:
                steps = torch.cat(
                    [self.embed_arm_action(arm_action), self.embed_gripper_action(gripper_action.long())], -1
                )
                cls = self.action_encoder_cls_token.weight.expand(batch, frames, -1, -1)
                z = torch.cat([cls, self.embed_action(steps)], dim=2)
                z = (z + self.action_encoder_positional_embeddings.weight).flatten(0, 1)
                for block in self.encode_action:
                    z = block(z)
                mean, log_var = self.pred_style_vector(z[:, 0]).unflatten(0, (batch, frames)).chunk(2, -1)
                result["mean"], result["log_var"] = mean, log_var
                if noise is not None:
                    style = mean + (log_var / 2).exp() * noise
            query = self.proj_action_output_embed(x[:, :, place["action"]])
            steps = self.action_mask_token_embedding.weight + self.action_decoder_positional_embeddings.weight
            y = [self.embed_style_vector(style)[:, :, None], query, steps.expand(batch, frames, -1, -1)]
            y = torch.cat(y, dim=2).flatten(0, 1)
            for block in self.decode_action:
                y = block(y)
            y = y[:, 2:].unflatten(0, (batch, frames))
            result["arm"], result["gripper"] = self.pred_arm_act(y), self.pred_gripper_act(y)
        if sizes.future:
            masks = self.mask_token + self.decoder_pos_embed
            for view in ("main", "wrist")[: 1 + sizes.wrist]:
                context = self.decoder_embed(x[:, :, place[f"future_{view}"]])
                y = torch.cat([context, masks.expand(batch, frames, -1, -1)], dim=2).flatten(0, 1)
                for block in self.decoder_blocks:
                    y = block(y)
                y = self.decoder_pred(self.decoder_norm(y))[:, context.shape[2] :]
                result[f"future_{view}"] = y.unflatten(0, (batch, frames))
        if sizes.progress:
            query = self.proj_progress_output_embed(x[:, :, place["progress"]])
            y = torch.cat([query, self.progress_mask_token_embedding.weight.expand_as(query)], dim=2)
            y = y.flatten(0, 1)
            for block in self.decode_progress:
                y = block(y)
            result["progress"] = self.pred_progress(y[:, 1]).sigmoid().view(batch, frames)
        return result

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`(..., 3, H, W)` -> CLS `(..., C)` and patches `(..., N, C)`."""
        cls, patches = self.model_mae(pixels.flatten(0, -4))
        return cls.unflatten(0, pixels.shape[:-3]), patches.unflatten(0, pixels.shape[:-3])
