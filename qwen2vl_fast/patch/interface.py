"""attn_implementation="qwen2vl_fast": this package's attention under a name that transformers' AttentionInterface knows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .. import ops
from ..positions import AttentionSchedule, attention_schedule

NAME = "qwen2vl_fast"


def register() -> None:
    """Makes the name known to transformers: the attention, and masks as its sdpa takes them."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:  # 4.52 makes its masks itself
        return
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, S, D], key and value [B, Hk, Sk, D] -> [B, S, H, D].

    Without a mask every sequence is a segment of variable-length attention, causal as the module says. A mask, dropout or a
    sequence shorter than its keys is transformers' sdpa.
    """
    batch, _, length, _ = query.shape
    if attention_mask is not None or dropout or length != key.shape[2] or not query.numel():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and length > 1
    shape = (batch, length, query.shape[1], key.shape[1], query.shape[3])
    schedule = _schedule(*shape, causal, torch.is_grad_enabled(), query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    o = ops.varlen_attention(q, k, v, schedule.cu_seqlens, schedule=schedule, scale=scaling, causal=causal)
    return o.unflatten(0, (batch, length)), None


@functools.lru_cache(maxsize=8)
def _schedule(
    batch: int, length: int, heads: int, heads_k: int, head_dim: int, causal: bool, backward: bool, device: torch.device
) -> AttentionSchedule:
    """Of equal segments: every layer of a forward asks for the same one."""
    with torch.inference_mode(False):  # a training step may ask next, and saves these for its backward pass
        bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
        return attention_schedule(
            bounds, heads=heads, heads_k=heads_k, head_dim=head_dim, causal=causal, backward=backward, device=device
        )
