"""The decoder of transformers: M-RoPE, norms, SwiGLU.

The instance's own rotary module hands position ids to the layers instead of cos and sin; the layers are called as the modules
that they are. Shape letters: B batch, S length, H/Hk query/key heads, D head dim, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.checks import INTEGERS
from ..ops.gated import gated
from ..ops.rope import mrope_as_given
from .hooks import bare, hook_of, hooked, original, project, unknown_activation
from .norms import add_norm
from .vision import frequencies


class Rotation(NamedTuple):
    """In the place of (cos, sin); four fields, so that code which expects those two fails instead of taking them.

    position_ids: [3, B, S]. bits: [D/2] int32, the float32 frequencies bit by bit (see vision.Pack). scaling: of cos and sin.
    library: (x, position_ids) -> (cos, sin), the class's.
    """

    position_ids: torch.Tensor
    bits: torch.Tensor
    scaling: float
    library: Callable


def rotary(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """position_ids: [3, B or 1, S]. Ids below zero are rotated by like others: padding has them, and stale rope deltas."""
    hook = hook_of(self)
    if not hook.part.enabled:
        return original(self, x, position_ids)
    if reason := _unfit(x, position_ids, hook.more["decoder"].layers):
        hook.part.fell_back(reason)
        return original(self, x, position_ids)
    hook.part.ran()
    table = frequencies(self, hook.more["exact"]).to(x.device)
    ids, library = position_ids.expand(3, x.shape[0], -1), functools.partial(original, self)  # which dynamo can trace
    return Rotation(ids, table.view(torch.int32), float(self.attention_scaling), library)


def _unfit(x: torch.Tensor, position_ids: torch.Tensor, layers: nn.ModuleList) -> str | None:
    """Why the layers have to get cos and sin."""
    if position_ids.dim() != 3 or position_ids.shape[-1] != x.shape[1] or position_ids.dtype not in INTEGERS:
        return "position ids of another shape or type"
    for layer in layers:
        if not hooked(getattr(layer, "self_attn", layer)):
            return "a layer has an attention that patch did not see"
    return None


def attention(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
    """As the class's forward; the attention itself is the implementation that the config names."""
    hook = hook_of(self)
    kwargs = hook.bind((hidden_states, *args), {**kwargs}) if args else kwargs
    kwargs.pop("hidden_states", None)
    rotation = kwargs.get("position_embeddings")
    if not isinstance(rotation, Rotation):
        return original(self, hidden_states, **kwargs)
    interface = hook.more["interface"](self, kwargs)
    if interface is None:
        hook.part.fell_back("attention weights were asked for, or an implementation without AttentionInterface")
        kwargs["position_embeddings"] = rotation.library(hidden_states, rotation.position_ids)
        return original(self, hidden_states, **kwargs)
    hook.part.ran()
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = [project(layer, hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj)]
    table, backend = rotation.bits.view(torch.float32), hook.options.backends["mrope"]
    q, k = mrope_as_given(q, k, rotation.position_ids, table, hook.more["sections"], rotation.scaling, backend)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
    if cache is not None:
        place = kwargs.get("cache_position")
        k, v = cache.update(k, v, self.layer_idx, *(() if place is None else ({"cache_position": place},)))
    mask = kwargs.get("attention_mask")
    o, weights = interface(
        self, q, k, v, mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=getattr(self, "scaling", self.head_dim**-0.5),
        **hook.more["mask_options"](self, q, mask, kwargs),
        **{name: value for name, value in kwargs.items() if name not in hook.names},
    )  # fmt: skip
    o = project(self.o_proj, o.reshape(*hidden_states.shape[:-1], -1).contiguous())
    return (o, weights, cache) if hook.more["returns_cache"] else (o, weights)


def layer(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """x + attention(norm(x)), then x + mlp(norm(x)), the first addition fused with the second norm."""
    hook = hook_of(self)
    if args:
        kwargs = hook.bind((hidden_states, *args), kwargs)
        kwargs.pop("hidden_states")
    if not hook.part.enabled or hook.more["checkpoints"] and self.gradient_checkpointing and self.training:
        return original(self, hidden_states, **kwargs)
    attended, *more = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    normed, x = add_norm(self.post_attention_layernorm, hook, hidden_states, attended)
    x = x + self.mlp(normed)
    if not hook.more["returns_tuple"]:
        return x
    weights, *cache = more
    outputs = (x, weights) if kwargs.get("output_attentions") else (x,)
    return (*outputs, *cache) if kwargs.get("use_cache") else outputs


def mlp(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    hook = hook_of(self)
    known = type(self.act_fn) in hook.more["activations"] and bare(self.act_fn, type(self.act_fn))
    if not hook.part.enabled or not known:
        if hook.part.enabled:
            hook.part.fell_back(unknown_activation(self.act_fn, hook.more["activations"]))
        return original(self, x)
    hook.part.ran()
    y = gated(project(self.gate_proj, x), project(self.up_proj, x), backend=hook.options.backends["swiglu"])
    return project(self.down_proj, y)
