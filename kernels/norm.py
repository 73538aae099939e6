"""RMSNorm and LayerNorm of rows, with the addition before them and a gather of rows, forward and backward.

Shape letters: T rows, C width. A row stays in registers between its statistics and its result.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import sums
from .offsets import LIMIT, blocks_of, offset, power_of_two, refuse, wide
from .starting import start

TILE, PER_WARP = 4096, 512  # elements a program, when rows are shorter, and elements a warp: 16 a thread
BACKWARD_TILE, BACKWARD_PER_WARP, BACKWARD_STAGES = 2048, 512, 2  # stages: tiles under way while one is worked on
PROGRAMS = 512  # of a backward pass on many rows: each leaves one row of partial sums
ROWS = 4  # tiles at least that share one row of partial sums
# Of a backward pass in 16 bits, by width: rows, columns of a part of a row, warps. No column idles, and a row's sums cross one
# warp or two and not four.
PARTED = {1280: (2, 256, 2), 1536: (1, 512, 2)}


@triton.jit
def _unit_rows(x, mask, C: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr):
    """(normalised rows, 1 / standard deviation) of x [BLOCK_T, BLOCK_C], zero outside the mask."""
    if IS_LAYER:
        x = tl.where(mask, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / C + EPS)
    return x * scale[:, None], scale


@triton.jit(do_not_specialize=["T"])
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, row_ptr, y_ptr, total_ptr,
    T, stride_x_t, stride_residual_t,
    C: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    mask = (t < T)[:, None] & (c < C)[None, :]
    source = t
    if HAS_ROWS:
        source = tl.load(row_ptr + t, mask=t < T, other=0)
    x = tl.load(x_ptr + (offset(source, stride_x_t)[:, None] + c[None, :]), mask=mask, other=0.0)
    target = offset(t, C)[:, None] + c[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + (offset(t, stride_residual_t)[:, None] + c[None, :]), mask=mask, other=0.0)
        x = (wide(x) + wide(residual)).to(x.dtype)
        tl.store(total_ptr + target, x, mask=mask)
    y, _ = _unit_rows(wide(x), mask, C, EPS, IS_LAYER)
    y = y * wide(tl.load(weight_ptr + c, mask=c < C, other=0.0))[None, :]
    if IS_LAYER:
        y = y + wide(tl.load(bias_ptr + c, mask=c < C, other=0.0))[None, :]
    tl.store(y_ptr + target, y, mask=mask)


@triton.jit
def _mean(parts, C: tl.constexpr, PARTS: tl.constexpr):
    """The means of rows of C columns, [BLOCK_T, 1], whose columns come in parts."""
    total = parts[0]
    for i in tl.static_range(1, PARTS):
        total += parts[i]
    return (tl.sum(total, 1) / C)[:, None]


@triton.jit(do_not_specialize=["T", "rows"])
def _norm_backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, row_ptr, grad_x_ptr, partial_ptr,
    T, rows, stride_x_t,
    C: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows` rows, and their share of the gradients of weight and bias, [programs, 1 or 2, C].

    A row is PARTS tensors of BLOCK_C columns, since a tensor's width is a power of two: 1280 columns are five of 256.
    """
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    weight, grad_weight, grad_bias = (), (), ()
    for i in tl.static_range(PARTS):
        weight += (wide(tl.load(weight_ptr + i * BLOCK_C + c, mask=i * BLOCK_C + c < C, other=0.0))[None, :],)
        grad_weight += (tl.zeros((BLOCK_T, BLOCK_C), weight[0].dtype),)
        grad_bias += (tl.zeros((BLOCK_T, BLOCK_C), weight[0].dtype),)
    for first in tl.range(0, rows, BLOCK_T, num_stages=STAGES):
        t = program * rows + first + tl.arange(0, BLOCK_T)
        source = t
        if HAS_ROWS:
            source = tl.load(row_ptr + t, mask=t < T, other=0)
        place, place_x = offset(t, C)[:, None] + c[None, :], offset(source, stride_x_t)[:, None] + c[None, :]
        target = offset(source, C)[:, None] + c[None, :]
        known, mask, x, grad, weighted = (), (), (), (), ()
        for i in tl.static_range(PARTS):
            known += ((i * BLOCK_C + c < C)[None, :],)
            mask += ((t < T)[:, None] & known[i],)
            x += (wide(tl.load(x_ptr + i * BLOCK_C + place_x, mask=mask[i], other=0.0)),)
            grad += (wide(tl.load(grad_ptr + i * BLOCK_C + place, mask=mask[i], other=0.0)),)
            weighted += (grad[i] * weight[i],)
        if IS_LAYER:  # two rounds of sums over a row, each of sums that do not wait for one another
            mean, mean_weighted = _mean(x, C, PARTS), _mean(weighted, C, PARTS)
            centred = ()
            for i in tl.static_range(PARTS):  # a row beyond T is zero, and so is its mean
                centred += (tl.where(known[i], x[i] - mean, 0.0),)
            x = centred
        squares, products = (), ()
        for i in tl.static_range(PARTS):
            squares += (x[i] * x[i],)
            products += (weighted[i] * x[i],)
        square, along = _mean(squares, C, PARTS), _mean(products, C, PARTS)
        scale = tl.rsqrt(square + EPS)
        if EPS < 1e-37:  # a row beyond T has an infinite scale then, and its 0 * inf must not reach the sums
            scale = tl.where((t < T)[:, None], scale, 0.0)
        next_weight, next_bias = (), ()
        for i in tl.static_range(PARTS):
            unit = x[i] * scale
            grad_x = weighted[i]
            if IS_LAYER:
                grad_x = grad_x - mean_weighted
                next_bias += (grad_bias[i] + grad[i],)
            next_weight += (grad_weight[i] + grad[i] * unit,)
            grad_x = (grad_x - unit * (along * scale)) * scale
            if HAS_TOTAL:
                grad_x = grad_x + wide(tl.load(grad_total_ptr + i * BLOCK_C + target, mask=mask[i], other=0.0))
            tl.store(grad_x_ptr + i * BLOCK_C + target, grad_x, mask=mask[i])
        grad_weight = next_weight
        if IS_LAYER:
            grad_bias = next_bias
    share = partial_ptr + offset(program, C * (1 + IS_LAYER)) + c
    for i in tl.static_range(PARTS):
        tl.store(share + i * BLOCK_C, tl.sum(grad_weight[i], 0), mask=i * BLOCK_C + c < C)
        if IS_LAYER:
            tl.store(share + C + i * BLOCK_C, tl.sum(grad_bias[i], 0), mask=i * BLOCK_C + c < C)


@functools.cache
def tile(width: int, size: int, elements: int, per_warp: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program, for elements of `size` bytes.

    By width and dtype alone, so that a row has the same bits in every pack.
    """
    columns, most = power_of_two(width), 32
    if size == 8:  # which takes two registers; a thread of more than 8 warps has too few
        elements, per_warp, most = elements // 2, per_warp // 2, 8
    rows = max(1, min(elements // columns, 16))
    return rows, columns, max(1, min(rows * columns // per_warp, most))


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, x + residual or None), both contiguous: RMSNorm without a bias, else LayerNorm, of x [..., C] or x + residual.

    rows: [T] int64, row t of y comes from row rows[t] of x [T, C].
    """
    given, x = x, _rows(x)
    count, width = x.shape
    if count >= LIMIT:
        refuse(count)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty_like(given, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    residual = x if residual is None else _rows(residual)
    if count:
        block_t, block_c, warps = tile(width, x.element_size(), TILE, PER_WARP)
        start(
            _norm_kernel, blocks_of(count, block_t),
            (
                x, residual, weight, weight if bias is None else bias, x if rows is None else rows,
                y, y if total is None else total,
            ),
            (count,), (x.stride(0), residual.stride(0)),
            {
                "C": width, "EPS": eps, "IS_LAYER": bias is not None, "HAS_RESIDUAL": total is not None,
                "HAS_ROWS": rows is not None, "BLOCK_T": block_t, "BLOCK_C": block_c,
            },
            warps,
        )  # fmt: skip
    return y, total


def launch_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    grad_total: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of x (what was normalised), weight and bias. grad_total: what reaches x besides, when x was a sum."""
    given, x = x, _rows(x)
    count, width = x.shape
    if count >= LIMIT:
        refuse(count)
    weight = weight.contiguous()
    grad_x = torch.empty_like(given, memory_format=torch.contiguous_format)
    grad = grad.contiguous()
    has_total = grad_total is not None
    grad_total = grad_total.contiguous() if has_total else grad
    block_t, block_c, warps = (PARTED.get(width) if x.element_size() == 2 else None) or tile(
        width, x.element_size(), BACKWARD_TILE, BACKWARD_PER_WARP
    )
    # Each program takes the same number of rows whatever the device, so that sums over them are the same everywhere.
    per_program = block_t * max(ROWS, blocks_of(count, block_t * PROGRAMS))
    programs = blocks_of(count, per_program)
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in (weight, bias) if p is not None]
    compute = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty((programs, len(grads), width), dtype=compute, device=x.device)
    if count:
        start(
            _norm_backward_kernel, programs,
            (grad, grad_total, x, weight, x if rows is None else rows, grad_x, partial),
            (count, per_program), (x.stride(0),),
            {
                "C": width, "EPS": eps, "IS_LAYER": bias is not None, "HAS_TOTAL": has_total, "HAS_ROWS": rows is not None,
                "BLOCK_T": block_t, "BLOCK_C": block_c, "PARTS": blocks_of(width, block_c), "STAGES": BACKWARD_STAGES,
            },
            warps,
        )  # fmt: skip
    sums.launch(partial, grads)
    return grad_x, grads[0], None if bias is None else grads[1]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [T, C] with a contiguous last dim; a copy only where no view will do."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
