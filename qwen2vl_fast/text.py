"""The decoder: Qwen2 with three-axis rotary positions, over packed sequences (MODEL.md section 3).

Shape letters: T packed tokens, B sequences, H/Hk query/key heads, D head dim, E hidden size, F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import ops
from .cache import KVCache, Step
from .config import TextConfig
from .modules import Linear, RMSNorm
from .ops.attention import cache_attention
from .ops.gated import gated
from .positions import AttentionSchedule


@dataclass(frozen=True)
class TextPack:
    """What every layer needs to know of a forward. position_ids: [3, T]. inv_freq: [D/2] float32. schedule: B sequences."""

    position_ids: torch.Tensor
    inv_freq: torch.Tensor
    attention_scaling: float
    schedule: AttentionSchedule
    cache: KVCache | None = None
    step: Step | None = None


class Decoder(nn.Module):
    """embeddings [T, E] -> layers -> final norm [T, E]."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, pack: TextPack) -> torch.Tensor:
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch, pack)
        return self.norm(x, branch)[0]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each addition is fused with the norm that follows it."""

    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None, pack: TextPack) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, E] and what the layer before still has to add to it -> the same pair."""
        normed, x = self.input_layernorm(x, branch)
        normed, x = self.post_attention_layernorm(x, self.self_attn(normed, pack))
        return x, self.mlp(normed)


class Attention(nn.Module):
    """Causal grouped-query attention inside each sequence."""

    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.sections = config.mrope_section
        width, width_kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, width_kv)
        self.v_proj = Linear(config.hidden_size, width_kv)
        self.o_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, pack: TextPack) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        rotation = {"sections": self.sections, "inv_freq": pack.inv_freq, "attention_scaling": pack.attention_scaling}
        if torch.is_grad_enabled():
            q, k = ops.mrope(q, k, pack.position_ids, **rotation)
        else:
            ops.mrope_(q, k, pack.position_ids, **rotation)
        bounds_k = None
        if pack.cache is not None:
            k, v = pack.cache.append(self.index, k, v, pack.step)
            bounds_k = pack.step.cu_seqlens_k
        if pack.step is not None and pack.step.decode:
            o = cache_attention(q, k, v, pack.step.lengths)
        else:
            o = ops.varlen_attention(
                q, k, v, pack.schedule.cu_seqlens, cu_seqlens_k=bounds_k, causal=True, schedule=pack.schedule
            )
        return self.o_proj(o.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
