"""SwiGLU of a gate and an up projection that are tensors of their own, forward and backward.

Shape letters: T rows, F width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .offsets import LIMIT, blocks_of, offset, refuse, wide
from .starting import start

BLOCK_T, BLOCK_F, NUM_WARPS = 4, 1024, 4  # as the activations of one tensor
ODD_T, DOUBLE_T, DOUBLE_F = 2, 1, 512  # of a width that is no multiple of 16; in float64


@triton.jit
def _load(ptr, t, f, stride_t, mask):
    return wide(tl.load(ptr + (offset(t, stride_t)[:, None] + f[None, :]), mask=mask, other=0.0))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit(do_not_specialize=["T"])
def _gated_kernel(
    gate_ptr, up_ptr, y_ptr, T, stride_gate_t, stride_up_t, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (t < T)[:, None] & (f < F)[None, :]
    gate = _load(gate_ptr, t, f, stride_gate_t, mask)
    up = _load(up_ptr, t, f, stride_up_t, mask)
    tl.store(y_ptr + (offset(t, F)[:, None] + f[None, :]), gate * _sigmoid(gate) * up, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _gated_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, T, stride_grad_t, stride_gate_t, stride_up_t,
    F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (t < T)[:, None] & (f < F)[None, :]
    gate = _load(gate_ptr, t, f, stride_gate_t, mask)
    up = _load(up_ptr, t, f, stride_up_t, mask)
    grad = _load(grad_ptr, t, f, stride_grad_t, mask)
    s = _sigmoid(gate)
    out = offset(t, F)[:, None] + f[None, :]
    tl.store(grad_gate_ptr + out, grad * up * s * (1.0 + gate * (1.0 - s)), mask=mask)
    tl.store(grad_up_ptr + out, grad * gate * s, mask=mask)


def launch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[..., F] each -> [..., F], contiguous."""
    a, b = _rows(gate), _rows(up)
    rows, width = a.shape
    if rows >= LIMIT or width >= LIMIT:
        refuse(max(rows, width))
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if rows:
        constants = _constants(a)
        start(_gated_kernel, _blocks(rows, constants), (a, b, y), (rows,), (a.stride(0), b.stride(0)), constants, NUM_WARPS)
    return y


def launch_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up."""
    g, a, b = _rows(grad), _rows(gate), _rows(up)
    rows, width = a.shape
    if rows >= LIMIT or width >= LIMIT:
        refuse(max(rows, width))
    grad_gate, grad_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    if rows:
        constants = _constants(a)
        start(
            _gated_backward_kernel, _blocks(rows, constants), (g, a, b, grad_gate, grad_up), (rows,),
            (g.stride(0), a.stride(0), b.stride(0)), constants, NUM_WARPS,
        )  # fmt: skip
    return grad_gate, grad_up


def _constants(x: torch.Tensor) -> dict[str, int]:
    width = x.shape[1]
    if x.dtype == torch.float64:
        return {"F": width, "BLOCK_T": DOUBLE_T, "BLOCK_F": DOUBLE_F}
    return {"F": width, "BLOCK_T": ODD_T if width % 16 else BLOCK_T, "BLOCK_F": BLOCK_F}


def _blocks(rows: int, constants: dict[str, int]) -> int:
    return blocks_of(rows, constants["BLOCK_T"]) * blocks_of(constants["F"], constants["BLOCK_F"])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [T, F] with a contiguous last dim; a copy only where no view will do."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
