"""SwiGLU where gate and up come from two products, as in a model that is not ours: joining them first would cost a copy."""

from __future__ import annotations

import functools

import torch

from . import checks
from .activation import gate_rows, gate_rows_backward
from .backends import choose, define


def gated(gate, up, *, backend: str | None = None):
    """gate sigmoid(gate) up.

    Args:
        gate, up: [..., F], floating, any strides, the same dtype and device.
        backend: None for the fastest that can run the tensors.
    Returns: [..., F] in their dtype.
    Raises: TypeError, ValueError for a dtype, device or shape that doesn't fit; RuntimeError for an unusable backend.
    Precision: as `quick_gelu`.
    Source: MODEL.md section 3. Definition: `reference.swiglu` of the two side by side.
    """
    if up is None or not checks.fit(gate, up):
        checks.rows("gate", gate)
        checks.same("up", up, "gate", gate)
        checks.shape("up", up, tuple(gate.shape), "gate's shape")
    return _gated(gate, up, choose("swiglu", backend, gate.device))


@functools.cache
def _kernels():
    """Imported when they are first needed: triton may be missing. Once, since even a repeated import costs a microsecond."""
    from ..kernels import gated

    return gated


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _gated_impl(gate, up, backend="torch"):
    if backend == "triton":
        return _kernels().launch(gate, up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate_rows(*map(_rows, (out, gate, up)))
    return out


def _gated_backward_impl(grad, gate, up, backend="torch"):
    if backend == "triton":
        return _kernels().launch_backward(grad, gate, up)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up)]
    gate_rows_backward(*map(_rows, (grad, gate, up, *grads)))
    return tuple(grads)


def _setup(ctx, inputs, output):
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad):
    return *_gated_grad(grad, *ctx.saved_tensors, ctx.backend), None


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_gated = define(
    "gated(Tensor gate, Tensor up, str backend='torch') -> Tensor", _gated_impl, _fake, setup_context=_setup, backward=_backward
)
_gated_grad = define(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str backend='torch') -> (Tensor, Tensor)",
    _gated_backward_impl,
    lambda grad, gate, up, *_: (_fake(gate), _fake(up)),
)
