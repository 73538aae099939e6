"""The vision tower's attention from its fused qkv: rotation and attention with one gradient tensor. No public op."""

from __future__ import annotations

import torch

from . import attention, attention_cuda, rope
from .attention import varlen_attention
from .backends import choose, define
from .rope import vision_rope, vision_rope_


def vision_attention(qkv, position_ids, inv_freq, schedule, *, rope_backend=None, backend=None):
    """o = varlen_attention(*vision_rope(q, k), v), q, k, v the three of qkv.

    Without a gradient q and k are rotated in place, inside qkv. With one, and where the backend's backward is ours, it
    comes as one tensor: the attention writes dq, dk, dv into [T, 3, H, D], and dq and dk are turned back in place. So the
    product that made qkv gets its gradient without a copy, and one tensor of that size is all that the backward allocates.
    Bit for bit the gradients of the two ops one after another.

    Args:
        qkv: [T, 3, H, D], owned by the caller: nobody else may read it afterwards.
        position_ids: [2, T], row and column. inv_freq: [D/4] float32.
        schedule: positions.attention_schedule(...) of the pack.
        rope_backend, backend: of the rotation and of the attention, as `vision_rope` and `varlen_attention` take them.
    Returns: o [T, H, D].
    Raises, Precision: as `vision_rope` and `varlen_attention`.
    """
    q, k, v = qkv.unbind(1)
    bounds = schedule.cu_seqlens
    if not (torch.is_grad_enabled() and qkv.requires_grad):
        vision_rope_(q, k, position_ids, inv_freq=inv_freq, backend=rope_backend)
        return varlen_attention(q, k, v, bounds, schedule=schedule, backend=backend)
    backend = choose("varlen_attention", backend, qkv.device, attention_cuda.refuses(q))
    if backend == "flash" or backend == "torch" and attention.has_varlen(q):
        q, k = vision_rope(q, k, position_ids, inv_freq=inv_freq, backend=rope_backend)
        return varlen_attention(q, k, v, bounds, schedule=schedule, backend=backend)
    deterministic = torch.are_deterministic_algorithms_enabled()
    lists = attention_cuda.lists_of(schedule, q, k, False)
    rotation = choose("vision_rope", rope_backend, qkv.device)
    return _vision_attention(
        qkv, position_ids, inv_freq, bounds, *lists, q.shape[-1] ** -0.5, deterministic, rotation, backend
    )[0]


def _impl(
    qkv, position_ids, inv_freq, bounds, tiles, rows, key_tiles, query_tiles, backward_m, scale, deterministic, rotation,
    backend="torch",
):  # fmt: skip
    q, k, v = qkv.unbind(1)
    q, k = rope.rotated(q, k, position_ids, inv_freq, 1.0, rotation)
    if backend == "cuda":
        o, lse = attention_cuda.forward(q, k, v, bounds, bounds, tiles, rows, scale, False)
    else:
        o, lse = attention.forward(q, k, v, bounds, bounds, scale, False)
    return o, lse, q, k


def _backward_impl(
    grad, qkv, o, lse, q, k, position_ids, inv_freq, bounds, key_tiles, query_tiles, backward_m, scale, deterministic,
    rotation, backend="torch",
):  # fmt: skip
    grads = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dq, dk, dv = grads.unbind(1)
    inputs = (grad.contiguous(), q, k, qkv[:, 2], o, lse, bounds, bounds)
    if backend == "cuda":
        attention_cuda.backward((dq, dk, dv), *inputs, key_tiles, query_tiles, backward_m, scale, False, deterministic)
    else:
        attention.backward_into((dq, dk, dv), *inputs, scale, False)
    rope.rotate(dq, dk, position_ids, inv_freq, -1.0, rotation)
    return grads


def _fake(qkv, *_):
    q = qkv.new_empty((qkv.shape[0], *qkv.shape[2:]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q, lse, torch.empty_like(q), torch.empty_like(q)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of lse, q and k there are none
    qkv, position_ids, inv_freq, bounds, _, _, key_tiles, query_tiles, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output, position_ids, inv_freq, bounds, key_tiles, query_tiles)


def _backward(ctx, grad, *_):
    return _vision_attention_grad(grad, *ctx.saved_tensors, *ctx.rest), *(None for _ in range(12))


_REST = (
    "Tensor? key_tiles, Tensor? query_tiles, int backward_m, float scale, bool deterministic, str rotation,"
    " str backend='torch')"
)
_vision_attention = define(
    "vision_attention(Tensor qkv, Tensor position_ids, Tensor inv_freq, Tensor bounds, Tensor? tiles, int rows, "
    f"{_REST} -> (Tensor, Tensor, Tensor, Tensor)",
    _impl,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_vision_attention_grad = define(
    "vision_attention_backward(Tensor grad, Tensor qkv, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor position_ids,"
    f" Tensor inv_freq, Tensor bounds, {_REST} -> Tensor",
    _backward_impl,
    lambda grad, qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
    setup_context=lambda ctx, inputs, output: None,
    backward=attention_cuda.no_second,
)
