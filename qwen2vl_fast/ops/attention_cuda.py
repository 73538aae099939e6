"""Variable-length attention by the CUDA extension: work lists, pointers and strides, torch.library."""

from __future__ import annotations

import math

import torch

from ..positions import AttentionSchedule, backward_rows, block_rows
from .backends import define

HEAD_DIMS = (64, 80, 128)
DTYPES = (torch.float16, torch.bfloat16)


def refuses(q: torch.Tensor) -> str | None:
    """Why the kernels can't take tensors like q [T, H, D] on any device, or None if they can."""
    if q.dtype not in DTYPES:
        return f"the kernels take float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the kernels take head dims 64, 80 and 128, not {q.shape[-1]}"
    return None


def attention(q, k, v, bounds, bounds_k, schedule, scale, causal, deterministic):
    """(o, lse) of checked arguments; differentiable. schedule: None, or that of these very boundaries."""
    if not scale > 0:  # the running maximum is that of the scaled scores only if the scale is positive
        q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
    lists = lists_of(schedule, q, k, causal)
    return _attention(q, k, v, bounds, bounds_k, *lists, scale, causal, deterministic)


def lists_of(schedule: AttentionSchedule | None, q: torch.Tensor, k: torch.Tensor, causal: bool):
    """(tiles, their rows, key_tiles, query_tiles, rows of both) of the schedule as far as they are those of such a call, else
    None and 0."""
    if schedule is None or (schedule.heads, schedule.head_dim, schedule.causal) != (*q.shape[1:], causal):
        return None, 0, None, None, 0
    if schedule.tiles is None or schedule.tiles.device != q.device:  # a kernel can't read another device's memory
        return None, 0, None, None, 0
    key_tiles = schedule.key_tiles if schedule.heads_k == k.shape[1] else None
    return schedule.tiles, schedule.block_m, key_tiles, schedule.query_tiles, schedule.backward_m


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


def forward(q, k, v, bounds, bounds_k, tiles, rows, scale, causal):
    """(o [T, H, D], lse [H, T]); tiles None: the list is built on the device."""
    from .. import _C

    q, k, v = map(_readable, (q, k, v))
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    capability = torch.cuda.get_device_capability(q.device)
    if tiles is None:
        count = max(bounds.numel() - 1, 1)
        rows = block_rows((math.ceil(q.shape[0] / count),) * count, q.shape[1], q.shape[2], capability, causal)
        tiles = _tiles(bounds, bounds_k, q.shape[0], k.shape[0], q.shape[1], rows, causal, False)
    kernel = "sm_90" if capability == (9, 0) else "sm_80"
    _C.varlen_attention_forward(_problem(q, k, v, o, lse, tiles, scale, causal), kernel, rows, *_place(q))
    return o, lse


def backward(
    grads, grad, q, k, v, o, lse, bounds, bounds_k, key_tiles, query_tiles, rows, scale, causal, deterministic
) -> None:  # fmt: skip
    """Writes dq, dk, dv into `grads`, whose rows start at multiples of 16 bytes; a list that is None is built on the device.

    rows: of the lists' blocks; 0, where there is none, is chosen as for equal lengths, since the host knows no others.
    deterministic: dq is added in turn or, under a causal mask, made by a second pass; else it is added as blocks come. In turn
    the size of blocks may change bits; else it changes none but dq's as blocks come.
    """
    from .. import _C

    grad, q, k, v, o = map(_readable, (grad, q, k, v, o))
    workspace = lse.new_empty((2, *lse.shape))
    dq_sum = None if deterministic and causal else lse.new_empty(q.shape)
    turns = lse.new_empty(lse.numel() + 1, dtype=torch.int32) if deterministic and not causal and lse.numel() else None
    lengths = (bounds, bounds_k, q.shape[0], k.shape[0])
    if not rows:
        count = max(bounds.numel() - 1, 1)
        length = (math.ceil(k.shape[0] / count),)
        if causal and bounds.data_ptr() != bounds_k.data_ptr():
            length = ()  # the size alone: a block may begin at any query, and so decides which of them an mma adds at once
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        rows = backward_rows(length, count * k.shape[1], q.shape[2], processors, causal)
    if query_tiles is None:
        query_tiles = _tiles(*lengths, q.shape[1], rows, causal, False)
    if key_tiles is None:
        key_tiles = _tiles(*lengths, k.shape[1], rows, causal, True)
    _C.varlen_attention_backward(
        _problem(q, k, v, o, lse, query_tiles, scale, causal), key_tiles.data_ptr(), key_tiles.shape[0],
        *(x.data_ptr() for x in (grad, *grads)), workspace[0].data_ptr(), workspace[1].data_ptr(),
        *(0 if x is None else x.data_ptr() for x in (dq_sum, turns)), *map(_strides, (grad, *grads)), rows, rows, *_place(q),
    )  # fmt: skip


def _attention_impl(
    q, k, v, bounds, bounds_k, tiles, rows, key_tiles, query_tiles, backward_m, scale, causal, deterministic
):
    return forward(q, k, v, bounds, bounds_k, tiles, rows, scale, causal)


def _attention_backward_impl(grad, q, k, v, *rest):
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    backward(grads, grad, q, k, v, *rest)
    return grads


def _attention_fake(q, k, v, *_):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _setup(ctx, inputs, output):
    q, k, v, bounds, bounds_k, _, _, key_tiles, query_tiles, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, bounds_k, key_tiles, query_tiles)


def _backward(ctx, grad, grad_lse):
    return *_attention_grad(grad, *ctx.saved_tensors, *ctx.rest), *(None for _ in range(10))


def no_second(ctx, *grads):
    raise RuntimeError(
        "varlen_attention has no second derivative on this backend; qwen2vl_fast.reference.varlen_attention has one"
    )


_attention = define(
    "varlen_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor bounds_k, Tensor? tiles, int rows,"
    " Tensor? key_tiles, Tensor? query_tiles, int backward_m, float scale, bool causal, bool deterministic)"
    " -> (Tensor, Tensor)",
    _attention_impl,
    _attention_fake,
    setup_context=_setup,
    backward=_backward,
)
_attention_grad = define(
    "varlen_attention_cuda_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor bounds,"
    " Tensor bounds_k, Tensor? key_tiles, Tensor? query_tiles, int backward_m, float scale, bool causal, bool deterministic)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_backward_impl,
    lambda grad, q, k, v, *_: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)),
    setup_context=lambda ctx, inputs, output: None,
    backward=no_second,
)
