"""SwiGLU of a gate and an up projection that are tensors of their own, forward and backward.

Shape letters: T rows, F width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import _META, BLOCK_T, _grid, _load, _rows, _sigmoid
from .offsets import offset


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
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    a, b = _rows(gate), _rows(up)
    rows, width = a.shape
    if rows:
        with torch.cuda.device_of(gate):
            _gated_kernel[_grid(triton.cdiv(rows, BLOCK_T), width)](a, b, y, rows, a.stride(0), b.stride(0), F=width, **_META)
    return y


def launch_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up."""
    grad_gate, grad_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    g, a, b = _rows(grad), _rows(gate), _rows(up)
    rows, width = a.shape
    if rows:
        with torch.cuda.device_of(gate):
            _gated_backward_kernel[_grid(triton.cdiv(rows, BLOCK_T), width)](
                g, a, b, grad_gate, grad_up, rows, g.stride(0), a.stride(0), b.stride(0), F=width, **_META
            )
    return grad_gate, grad_up
