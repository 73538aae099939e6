"""Activations with the bias that precedes them, and the gated one of the decoder."""

from __future__ import annotations

import functools
import math

import torch

from . import checks
from .backends import choose, define


def quick_gelu(x, bias=None, *, backend: str | None = None):
    """QuickGELU: z sigmoid(1.702 z), z = x + bias.

    Args:
        x: [..., F], floating, any strides.
        bias: None, or [F] with the dtype and device of x.
        backend: None for the fastest that can run the tensors.
    Returns: [..., F] in x's dtype.
    Raises: TypeError, ValueError for a dtype, device or shape that doesn't fit; RuntimeError for an unusable backend.
    Precision: float32 inside (float64 for float64), one rounding at the end.
    Source: MODEL.md section 2. Definition: `reference.quick_gelu`.
    """
    return _quick_gelu(x, bias, _check("quick_gelu", x, bias, backend))


def gelu(x, bias=None, *, backend: str | None = None):
    """GELU by the error function, not tanh: z (1 + erf(z / sqrt 2)) / 2, z = x + bias.

    Arguments, result, errors and precision as `quick_gelu`. Source: MODEL.md section 2 (merger). Definition: `reference.gelu`.
    """
    return _gelu(x, bias, _check("gelu", x, bias, backend))


def swiglu(gate_up, *, backend: str | None = None):
    """SwiGLU: gate sigmoid(gate) up, where the last dim of gate_up holds gate, then up.

    Args:
        gate_up: [..., 2F], floating, any strides.
        backend: None for the fastest that can run the tensor.
    Returns: [..., F] in the dtype of gate_up.
    Raises: as `quick_gelu`; ValueError for an odd last dim.
    Precision: as `quick_gelu`.
    Source: MODEL.md section 3. Definition: `reference.swiglu`.
    """
    checks.rows("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dim 2F, got shape {list(gate_up.shape)}")
    return _swiglu(gate_up, choose("swiglu", backend, gate_up.device))


def _check(op: str, x, bias, backend) -> str:
    if not checks.fit(x, None, *(() if bias is None else (bias,))):
        checks.rows("x", x)
        if bias is not None:
            checks.same("bias", bias, "x", x)
            checks.shape("bias", bias, (x.shape[-1],), "[F]")
    return choose(op, backend, x.device)


@functools.cache
def _kernels():
    """Imported when they are first needed: triton may be missing. Once, since even a repeated import costs a microsecond."""
    from ..kernels import activation

    return activation


def _inverse_sigmoid(z, slope=1.0):
    """1 + exp(-slope z), of which z sigmoid(slope z) is z divided by it.

    Not torch.sigmoid: on the CPU it takes the last elements of each thread's share by another path with other bits, so that
    an image's features would depend on what it is packed with. exp has one result wherever an element stands.
    """
    return torch.mul(z, -slope).exp_().add_(1)


def _quick_gelu_rows(z):
    return z / _inverse_sigmoid(z, 1.702)


def _quick_gelu_slope(z):
    s = _inverse_sigmoid(z, 1.702).reciprocal_()
    return s * (1 + 1.702 * z * (1 - s))


def _gelu_rows(z):
    """Not torch's gelu: its vectorised erf has twice the error in float32."""
    return torch.erf(z * math.sqrt(0.5)).add_(1).mul_(z).mul_(0.5)


def _gelu_slope(z):
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _pointwise(function, is_quick):
    """function(x + bias), one cache-sized block of rows at a time, so that its passes don't go to memory."""

    def implementation(x, bias, backend="torch"):
        if backend == "triton":
            return _kernels().launch(x, bias, is_quick)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, rows_out = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        compute = torch.promote_types(x.dtype, torch.float32)
        for block in checks.row_blocks(rows):
            z = rows[block].to(compute)
            rows_out[block].copy_(function(z if bias is None else z + bias))
        return out

    return implementation


def _pointwise_backward(slope, is_quick):
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        if ctx.backend == "triton":
            grad_x, grad_bias = _launched_backward(grad, x, bias, is_quick)
            return grad_x, None if bias is None else grad_bias, None
        compute = torch.promote_types(x.dtype, torch.float32)
        z = x.to(compute) if bias is None else x.to(compute) + bias
        grad_z = grad.to(compute) * slope(z)
        grad_bias = None if bias is None else grad_z.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
        return grad_z.to(x.dtype), grad_bias, None

    return backward


def _launch_backward(grad, x, bias, is_quick):
    grad_x, grad_bias = _kernels().launch_backward(grad, x, bias, is_quick)
    return grad_x, x.new_empty(0) if grad_bias is None else grad_bias


def _launch_swiglu_backward(grad, gate_up):
    return _kernels().launch_swiglu_backward(grad, gate_up)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The kernels' backward passes are ops of their own: under torch.compile a backward is traced with fake tensors.
_launched_backward = define(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, bool is_quick) -> (Tensor, Tensor)",
    _launch_backward,
    lambda grad, x, bias, is_quick: (_fake(x), x.new_empty(0) if bias is None else torch.empty_like(bias)),
)
_launched_swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor", _launch_swiglu_backward, lambda grad, gate_up: _fake(gate_up)
)


_quick_gelu = define(
    "quick_gelu(Tensor x, Tensor? bias, str backend='torch') -> Tensor",
    _pointwise(_quick_gelu_rows, True),
    _fake,
    setup_context=_save,
    backward=_pointwise_backward(_quick_gelu_slope, True),
)
_gelu = define(
    "gelu(Tensor x, Tensor? bias, str backend='torch') -> Tensor",
    _pointwise(_gelu_rows, False),
    _fake,
    setup_context=_save,
    backward=_pointwise_backward(_gelu_slope, False),
)


def _swiglu_impl(gate_up, backend="torch"):
    if backend == "triton":
        return _kernels().launch_swiglu(gate_up)
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    rows, rows_out = gate_up.reshape(-1, 2 * width), out.view(-1, width)
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    for block in checks.row_blocks(rows):
        gate, up = rows[block].to(compute).chunk(2, -1)
        rows_out[block].copy_((gate / _inverse_sigmoid(gate)).mul_(up))
    return out


def _swiglu_backward(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    if ctx.backend == "triton":
        return _launched_swiglu_backward(grad, gate_up), None
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(compute).chunk(2, -1)
    upstream, s = grad.to(compute), _inverse_sigmoid(gate).reciprocal_()
    return torch.cat((upstream * up * s * (1 + gate * (1 - s)), upstream * gate * s), -1).to(gate_up.dtype), None


_swiglu = define(
    "swiglu(Tensor gate_up, str backend='torch') -> Tensor",
    _swiglu_impl,
    lambda gate_up, *_: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    setup_context=_save,
    backward=_swiglu_backward,
)
