"""QuickGELU and GELU of x + bias, and SwiGLU, forward and backward. The backward recomputes from the inputs.

Shape letters: T rows, F width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import sums
from .offsets import LIMIT, blocks_of, offset, refuse, wide
from .starting import start

BLOCK_T, BLOCK_F, NUM_WARPS = 4, 1024, 4  # 8 columns of 4 rows a thread: 4 loads of 16 bytes in fp16 at a time
ODD_T = 2  # of a width that is no multiple of 16: columns that are loaded singly have an address each, and would spill
DOUBLE_T, DOUBLE_F = 1, 512  # in float64: 4 columns a thread, since the backward passes, erf above all, would spill
CHUNKS = 128  # of the rows in a backward pass with a bias: each leaves one row of partial sums
GELU_BACKWARD_T = 2  # with a bias: by 4 its registers would leave no place for all 640 programs of 5120 columns at once


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tail(z):
    """(|z|, m, e): em is the chance that a normal number lies above |z|, e = exp(-z^2 / 2).

    m comes from six terms in 1 / (1 + 0.295 |z|), a least maximum fit on 0 <= |z| <= 6, there 1.1e-6 of itself apart in float32
    (3e-5 at 8): for results of 16 bits, by two thirds of the instructions of erf and with one exponential for a gradient.
    """
    a = tl.abs(z)
    t = 1.0 / (1.0 + 0.295 * a)
    m = 0.17347906529903412 + t * (-0.07356896996498108 + t * (0.2653045058250427 + t * -0.08776256442070007))
    m = t * (0.11890729516744614 + t * (0.10364025831222534 + t * m))
    return a, m, tl.exp2(z * z * -0.7213475204444817)


@triton.jit
def _activate(z, IS_QUICK: tl.constexpr, IS_NARROW: tl.constexpr):
    if IS_QUICK:
        y = z * _sigmoid(1.702 * z)
    elif IS_NARROW:
        _, m, e = _tail(z)
        y = z * tl.where(z >= 0.0, 1.0 - m * e, m * e)
    else:
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return y


@triton.jit
def _slope(z, IS_QUICK: tl.constexpr, IS_NARROW: tl.constexpr):
    if IS_QUICK:
        s = _sigmoid(1.702 * z)
        slope = s * (1.0 + 1.702 * z * (1.0 - s))
    elif IS_NARROW:
        a, m, e = _tail(z)
        below = e * (m - a * 0.3989422804014327)  # the slope at -|z|
        slope = tl.where(z >= 0.0, 1.0 - below, below)
    else:
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    return slope


@triton.jit
def _load(ptr, t, f, stride_t, mask):
    return wide(tl.load(ptr + (offset(t, stride_t)[:, None] + f[None, :]), mask=mask, other=0.0))


@triton.jit(do_not_specialize=["T"])
def _activation_kernel(
    x_ptr, bias_ptr, y_ptr, T, stride_x_t,
    F: tl.constexpr, IS_QUICK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    narrow: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth < 32
    blocks = tl.cdiv(F, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (t < T)[:, None] & (f < F)[None, :]
    z = _load(x_ptr, t, f, stride_x_t, mask)
    if HAS_BIAS:
        z = z + wide(tl.load(bias_ptr + f, mask=f < F, other=0.0))[None, :]
    tl.store(y_ptr + (offset(t, F)[:, None] + f[None, :]), _activate(z, IS_QUICK, narrow), mask=mask)


@triton.jit(do_not_specialize=["T", "rows"])
def _activation_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_x_ptr, grad_bias_ptr, T, rows, stride_grad_t, stride_x_t,
    F: tl.constexpr, IS_QUICK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows` rows, and with a bias their share of its gradient, [chunks, F]."""
    narrow: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth < 32
    blocks = tl.cdiv(F, BLOCK_F)
    chunk = tl.program_id(0) // blocks
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    grad_bias = tl.zeros((BLOCK_T, BLOCK_F), tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    if HAS_BIAS:
        bias = wide(tl.load(bias_ptr + f, mask=f < F, other=0.0))[None, :]
    for first in range(0, rows, BLOCK_T):
        t = chunk * rows + first + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & (f < F)[None, :]
        z = _load(x_ptr, t, f, stride_x_t, mask)
        if HAS_BIAS:
            z = z + bias
        grad = _load(grad_ptr, t, f, stride_grad_t, mask) * _slope(z, IS_QUICK, narrow)
        tl.store(grad_x_ptr + (offset(t, F)[:, None] + f[None, :]), grad, mask=mask)
        if HAS_BIAS:
            grad_bias += grad
    if HAS_BIAS:
        tl.store(grad_bias_ptr + (offset(chunk, F) + f), tl.sum(grad_bias, 0), mask=f < F)


@triton.jit(do_not_specialize=["T"])
def _swiglu_kernel(
    x_ptr, y_ptr, T, stride_x_t, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (t < T)[:, None] & (f < F)[None, :]
    gate = _load(x_ptr, t, f, stride_x_t, mask)
    up = _load(x_ptr + F, t, f, stride_x_t, mask)
    tl.store(y_ptr + (offset(t, F)[:, None] + f[None, :]), gate * _sigmoid(gate) * up, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _swiglu_backward_kernel(
    grad_ptr, x_ptr, grad_x_ptr, T, stride_grad_t, stride_x_t,
    F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (t < T)[:, None] & (f < F)[None, :]
    gate = _load(x_ptr, t, f, stride_x_t, mask)
    up = _load(x_ptr + F, t, f, stride_x_t, mask)
    grad = _load(grad_ptr, t, f, stride_grad_t, mask)
    s = _sigmoid(gate)
    out = grad_x_ptr + (offset(t, 2 * F)[:, None] + f[None, :])
    tl.store(out, grad * up * s * (1.0 + gate * (1.0 - s)), mask=mask)
    tl.store(out + F, grad * gate * s, mask=mask)


def launch(x: torch.Tensor, bias: torch.Tensor | None, is_quick: bool) -> torch.Tensor:
    """QuickGELU or GELU of x [..., F] + bias [F], contiguous."""
    given, x = x, _rows(x)
    rows, width = x.shape
    if rows >= LIMIT or width >= LIMIT:
        refuse(max(rows, width))
    y = torch.empty_like(given, memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.contiguous()
    if rows:
        tile = _tile(x, width)
        start(
            _activation_kernel, _blocks(rows, width, tile),
            (x, x if bias is None else bias, y), (rows,), (x.stride(0),),
            {"F": width, "IS_QUICK": is_quick, "HAS_BIAS": bias is not None, **tile}, NUM_WARPS,
        )  # fmt: skip
    return y


def launch_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, is_quick: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x and bias."""
    given, grad, x = x, _rows(grad), _rows(x)
    rows, width = x.shape
    if rows >= LIMIT or width >= LIMIT:
        refuse(max(rows, width))
    grad_x = torch.empty_like(given, memory_format=torch.contiguous_format)
    tile = _tile(x, width)
    if bias is not None and not is_quick:
        tile["BLOCK_T"] = min(tile["BLOCK_T"], GELU_BACKWARD_T)
    block_t = tile["BLOCK_T"]
    per_chunk = block_t * (1 if bias is None else max(4, blocks_of(rows, block_t * CHUNKS)))
    chunks = blocks_of(rows, per_chunk)
    grad_bias = partial = None
    if bias is not None:
        bias = bias.contiguous()
        grad_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        partial = torch.empty((chunks, 1, width), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if rows:
        start(
            _activation_backward_kernel, chunks * blocks_of(width, tile["BLOCK_F"]),
            (grad, x, x if bias is None else bias, grad_x, x if partial is None else partial),
            (rows, per_chunk), (grad.stride(0), x.stride(0)),
            {"F": width, "IS_QUICK": is_quick, "HAS_BIAS": bias is not None, **tile}, NUM_WARPS,
        )  # fmt: skip
    if partial is not None:
        sums.launch(partial, [grad_bias])
    return grad_x, grad_bias


def launch_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2F] -> [..., F], contiguous."""
    x = _rows(gate_up)
    rows, width = x.shape[0], x.shape[1] // 2
    if rows >= LIMIT or width >= LIMIT:
        refuse(max(rows, width))
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    if rows:
        tile = _tile(x, width)
        blocks = _blocks(rows, width, tile)
        start(_swiglu_kernel, blocks, (x, y), (rows,), (x.stride(0),), {"F": width, **tile}, NUM_WARPS)
    return y


def launch_swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient of gate_up."""
    grad, x = _rows(grad), _rows(gate_up)
    rows, width = grad.shape
    if rows >= LIMIT or width >= LIMIT:
        refuse(max(rows, width))
    grad_x = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    if rows:
        tile = _tile(x, width)
        start(
            _swiglu_backward_kernel, _blocks(rows, width, tile),
            (grad, x, grad_x), (rows,), (grad.stride(0), x.stride(0)), {"F": width, **tile}, NUM_WARPS,
        )  # fmt: skip
    return grad_x


def _tile(x: torch.Tensor, width: int) -> dict[str, int]:
    if x.dtype == torch.float64:
        return {"BLOCK_T": DOUBLE_T, "BLOCK_F": DOUBLE_F}
    return {"BLOCK_T": ODD_T if width % 16 else BLOCK_T, "BLOCK_F": BLOCK_F}


def _blocks(rows: int, width: int, tile: dict[str, int]) -> int:
    return blocks_of(rows, tile["BLOCK_T"]) * blocks_of(width, tile["BLOCK_F"])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [T, F] with a contiguous last dim; a copy only where no view will do."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
