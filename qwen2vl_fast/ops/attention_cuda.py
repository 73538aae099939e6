"""Variable-length attention by the CUDA extension: work lists, pointers and strides, torch.library."""

from __future__ import annotations

import math

import torch

from ..positions import block_rows
from .backends import define

HEAD_DIMS = (64, 80, 128)
DTYPES = (torch.float16, torch.bfloat16)
BACKWARD_ROWS = 64  # of the backward's blocks of keys; queries come in blocks of 128


def refuses(q: torch.Tensor) -> str | None:
    """Why the kernels can't take tensors like q [T, H, D] on any device, or None if they can."""
    if q.dtype not in DTYPES:
        return f"the kernels take float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the kernels take head dims 64, 80 and 128, not {q.shape[-1]}"
    return None


def attention(q, k, v, bounds, bounds_k, schedule, scale, causal, deterministic):
    """(o, lse) of checked arguments; differentiable. schedule: None, or one whose tiles fit this call."""
    if not scale > 0:  # the running maximum is that of the scaled scores only if the scale is positive
        q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
    tiles, rows = (None, 0) if schedule is None else (schedule.tiles, schedule.block_m)
    return _attention(q, k, v, bounds, bounds_k, tiles, rows, scale, causal, deterministic)


def fits(schedule, heads: int, causal: bool) -> bool:
    """Whether a schedule's tiles are those of a call with this many query heads."""
    return schedule.tiles is not None and schedule.heads == heads and schedule.causal == causal


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows are not at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(x.stride(i) % 8 == 0 for i in (0, 1)) and x.stride(-1) == 1
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _tiles(bounds, bounds_k, total: int, total_k: int, heads: int, rows: int, causal: bool, by_keys: bool) -> torch.Tensor:
    """The list of work [M, 8] int32, built on the device; M is an upper bound, and entries of no rows fill it up."""
    from .. import _C

    count = bounds.numel() - 1
    size = ((total_k if by_keys else total) // rows + count) * heads
    if size >= 2**31:
        raise ValueError(f"cu_seqlens: {size} blocks of {rows} rows; expected fewer than 2^31")
    tiles = torch.empty((size, 8), dtype=torch.int32, device=bounds.device)
    bounds, bounds_k = bounds.contiguous(), bounds_k.contiguous()
    _C.varlen_attention_tiles(
        bounds.data_ptr(), bounds_k.data_ptr(), tiles.data_ptr(), count, total, total_k, heads, rows, causal, by_keys,
        *_place(bounds),
    )  # fmt: skip
    return tiles


def _place(x: torch.Tensor) -> tuple[int, int]:
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _problem(q, k, v, o, lse, tiles, scale: float, causal: bool):
    from .. import _C

    return _C.VarlenAttention(
        *(x.data_ptr() for x in (q, k, v, o, lse, tiles)), tiles.shape[0],
        q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2],
        *map(_strides, (q, k, v, o)), scale, causal, q.dtype == torch.bfloat16,
    )  # fmt: skip


def _attention_impl(q, k, v, bounds, bounds_k, tiles, rows, scale, causal, deterministic):
    from .. import _C

    q, k, v = map(_readable, (q, k, v))
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if tiles is None:
        count = max(bounds.numel() - 1, 1)
        capability = torch.cuda.get_device_capability(q.device)
        rows = block_rows((math.ceil(q.shape[0] / count),) * count, q.shape[1], q.shape[2], capability, causal)
        tiles = _tiles(bounds, bounds_k, q.shape[0], k.shape[0], q.shape[1], rows, causal, False)
    kernel = "sm_90" if torch.cuda.get_device_capability(q.device) == (9, 0) else "sm_80"
    _C.varlen_attention_forward(_problem(q, k, v, o, lse, tiles, scale, causal), kernel, rows, *_place(q))
    return o, lse


def _attention_backward_impl(grad, q, k, v, o, lse, bounds, bounds_k, scale, causal, deterministic):
    from .. import _C

    grad, q, k, v, o = map(_readable, (grad, q, k, v, o))
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    workspace = lse.new_empty((2, *lse.shape))
    dq_sum = None if deterministic else lse.new_empty(q.shape)
    rows = 128
    lengths = (bounds, bounds_k, q.shape[0], k.shape[0])
    tiles = _tiles(*lengths, q.shape[1], rows, causal, False)
    key_tiles = _tiles(*lengths, k.shape[1], BACKWARD_ROWS, causal, True)
    _C.varlen_attention_backward(
        _problem(q, k, v, o, lse, tiles, scale, causal), key_tiles.data_ptr(), key_tiles.shape[0],
        *(x.data_ptr() for x in (grad, *grads)), workspace[0].data_ptr(), workspace[1].data_ptr(),
        0 if dq_sum is None else dq_sum.data_ptr(), *map(_strides, (grad, *grads)), rows, BACKWARD_ROWS, *_place(q),
    )  # fmt: skip
    return tuple(grads)


def _attention_fake(q, k, v, *_):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _setup(ctx, inputs, output):
    q, k, v, bounds, bounds_k, _, _, ctx.scale, ctx.causal, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, bounds_k)


def _backward(ctx, grad, grad_lse):
    grads = _attention_grad(grad, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.deterministic)
    return *grads, None, None, None, None, None, None, None


def _no_second(ctx, *grads):
    raise RuntimeError(
        "varlen_attention: the cuda backend has no second derivative; qwen2vl_fast.reference.varlen_attention has one"
    )


_attention = define(
    "varlen_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor bounds_k, Tensor? tiles, int rows,"
    " float scale, bool causal, bool deterministic) -> (Tensor, Tensor)",
    _attention_impl,
    _attention_fake,
    setup_context=_setup,
    backward=_backward,
)
_attention_grad = define(
    "varlen_attention_cuda_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor bounds,"
    " Tensor bounds_k, float scale, bool causal, bool deterministic) -> (Tensor, Tensor, Tensor)",
    _attention_backward_impl,
    lambda grad, q, k, v, *_: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)),
    setup_context=lambda ctx, inputs, output: None,
    backward=_no_second,
)
