"""The vision tower: packed patch rows of images of any size -> visual tokens (MODEL.md section 2).

Shape letters: T patches of a pack, N attention segments (one a frame pair), H heads, D head dim, C = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import ops
from .config import VisionConfig
from .modules import LayerNorm, Linear, plain, without_bias
from .ops.linear import linear
from .ops.vision_attention import vision_attention
from .positions import AttentionSchedule, attention_schedule, vision_position_ids
from .reference import inverse_frequencies


@dataclass(frozen=True)
class Pack:
    """What every block needs to know of a pack. position_ids: [2, T] (row, column). inv_freq: [D/4] float32."""

    position_ids: torch.Tensor
    inv_freq: torch.Tensor
    schedule: AttentionSchedule


class VisionTower(nn.Module):
    """patches -> embedding -> blocks -> merger."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """pixel_values [T, patch_dim] in merge order, grid_thw [N, 3] on the host -> [T/4, hidden_size]."""
        pack = self.pack(grid_thw, pixel_values.device)
        x, branch = self.patch_embed(pixel_values), None
        for block in self.blocks:
            x, branch = block(x, branch, pack)
        return self.merger(x if branch is None else x + branch)

    def pack(self, grid_thw: torch.Tensor, device: torch.device) -> Pack:
        config = self.config
        return Pack(
            position_ids=vision_position_ids(grid_thw, config.spatial_merge_size).to(device, non_blocking=True),
            inv_freq=inverse_frequencies(config.head_dim // 2, config.rope_theta).to(device, non_blocking=True),
            schedule=attention_schedule(grid_thw, heads=config.num_heads, head_dim=config.head_dim, device=device),
        )


class PatchEmbed(nn.Module):
    """The convolution with kernel = stride = patch, as the one matrix product that it is."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if plain(self.proj, nn.Conv3d):
            return linear(pixel_values, self.proj.weight.flatten(1))
        return self.proj(pixel_values.view(-1, self.proj.in_channels, *self.proj.kernel_size)).flatten(1)


class VisionBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); each addition is fused with the norm that follows it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = VisionMLP(config)

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, C] and what the block before still has to add to it -> the same pair."""
        normed, x = self.norm1(x, branch)
        normed, x = self.norm2(x, self.attn(normed, pack))
        return x, self.mlp(normed)


class VisionAttention(nn.Module):
    """Full attention inside each frame pair, with 2-D rotary positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(vision_attention(qkv, pack.position_ids, pack.inv_freq, pack.schedule).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(ops.quick_gelu(*without_bias(self.fc1, x)))


class Merger(nn.Module):
    """LayerNorm, four patches side by side, two layers with GELU between: [T, C] -> [T/4, hidden_size]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.Identity(), Linear(width, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = ops.merge_patches(x, self.ln_q.weight, self.ln_q.bias, eps=self.ln_q.eps)
        first, _, second = self.mlp  # the names of the released checkpoint: mlp.0 and mlp.2
        return second(ops.gelu(*without_bias(first, merged)))
