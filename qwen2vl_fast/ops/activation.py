"""Activations with the bias that precedes them, and the gated one of the decoder."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .. import reference
from . import checks
from .backends import choose, define, differentiated


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

    Arguments, result, errors and precision as `quick_gelu`; for fp16 and bf16 the triton backend has a fit in the place of erf
    (a test takes every number). Source: MODEL.md section 2 (merger). Definition: `reference.gelu`.
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


def _quick_gelu_rows(z, t, out):
    torch.mul(z, checks.in_vectors(torch.sigmoid_, torch.mul(z, 1.702, out=t)), out=out)


def _quick_gelu_grad(z, s, t, grad):
    """QuickGELU is silu(1.702 z) / 1.702."""
    return checks.in_vectors(_silu_backward_, z.mul_(1.702), t.copy_(grad))


def _silu_backward_(x, grad):
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=x)


def _gelu_rows(z, t, out):
    """Not torch's gelu: its vectorised erf has 1.7 times the error in float32."""
    torch.mul(z, math.sqrt(0.5), out=t).erf_()
    torch.addcmul(z.mul_(0.5), z, t, out=out)


def _gelu_grad(z, s, t, grad):
    """The slope is (1 + erf(z / sqrt 2)) / 2 + z exp(-z^2 / 2) / sqrt(2 pi)."""
    torch.mul(z, math.sqrt(0.5), out=t).erf_().add_(1).mul_(0.5)
    density = torch.mul(z, z, out=s).mul_(-0.5).exp_()
    return t.addcmul_(z, density, value=1 / math.sqrt(2 * math.pi)).mul_(grad)


def _shifted(x, bias, out):
    """x + bias in the dtype of out, which is wider than theirs or the same."""
    return out.copy_(x) if bias is None else torch.add(x, bias, out=out)


def _pointwise(function, is_quick):
    """function(x + bias), one cache-sized block of rows at a time, so that its passes don't go to memory."""

    def implementation(x, bias, backend="torch"):
        if backend == "triton":
            return _kernels().launch(x, bias, is_quick)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, rows_out = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        wide_bias = None if bias is None else bias.to(torch.promote_types(x.dtype, torch.float32))
        for block, z, t in checks.row_blocks(rows, 2):
            function(_shifted(rows[block], wide_bias, z), t, rows_out[block])
        return out

    return implementation


def _pointwise_backward(grad, x, bias, is_quick):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    upstream, rows, rows_out = (y.reshape(-1, x.shape[-1]) for y in (grad, x, out))
    wide_bias = None if bias is None else bias.to(torch.promote_types(x.dtype, torch.float32))
    function, sums = _quick_gelu_grad if is_quick else _gelu_grad, []
    for block, z, s, t in checks.row_blocks(rows, 3):
        grad_z = function(_shifted(rows[block], wide_bias, z), s, t, upstream[block])
        rows_out[block].copy_(grad_z)
        if bias is not None:
            sums.append(grad_z.sum(0))
    return out, x.new_empty(0) if bias is None else checks.total(sums, bias)


def _backward(is_quick):
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        function = _launched_backward if ctx.backend == "triton" else _pointwise_grad
        grad_x, grad_bias = function(grad, x, bias, is_quick)
        return grad_x, None if bias is None else grad_bias, None

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


# Backward passes are ops of their own: under torch.compile a backward is traced with fake tensors.
_launched_backward = define(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, bool is_quick) -> (Tensor, Tensor)",
    _launch_backward,
    lambda grad, x, bias, is_quick: (_fake(x), x.new_empty(0) if bias is None else torch.empty_like(bias)),
)
_launched_swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor", _launch_swiglu_backward, lambda grad, gate_up: _fake(gate_up)
)

_pointwise_grad = define(
    "pointwise_backward(Tensor grad, Tensor x, Tensor? bias, bool is_quick) -> (Tensor, Tensor)",
    _pointwise_backward,
    lambda grad, x, bias, is_quick: (_fake(x), x.new_empty(0) if bias is None else torch.empty_like(bias)),
    **differentiated(lambda x, bias, is_quick: ((reference.quick_gelu if is_quick else reference.gelu)(x, bias),)),
)


_quick_gelu = define(
    "quick_gelu(Tensor x, Tensor? bias, str backend='torch') -> Tensor",
    _pointwise(_quick_gelu_rows, True),
    _fake,
    setup_context=_save,
    backward=_backward(True),
)
_gelu = define(
    "gelu(Tensor x, Tensor? bias, str backend='torch') -> Tensor",
    _pointwise(_gelu_rows, False),
    _fake,
    setup_context=_save,
    backward=_backward(False),
)


_silu_ = functools.partial(F.silu, inplace=True)


def gate_rows(out, gate, up) -> None:
    """out = gate sigmoid(gate) up, all [T, F] with any strides."""
    for block, t in checks.row_blocks(gate, 1):
        torch.mul(checks.in_vectors(_silu_, t.copy_(gate[block])), up[block], out=out[block])


def gate_rows_backward(grad, gate, up, out_gate, out_up) -> None:
    """With s = sigmoid(gate): out_gate = grad up s (1 + gate (1 - s)), out_up = grad gate s."""
    for block, s, t in checks.row_blocks(gate, 2):
        torch.mul(checks.in_vectors(torch.sigmoid_, s.copy_(gate[block])), gate[block], out=t)
        torch.mul(t, grad[block], out=out_up[block])
        t.addcmul_(t, s, value=-1).add_(s).mul_(grad[block])
        torch.mul(t, up[block], out=out_gate[block])


def _halves(x):
    return x.reshape(-1, x.shape[-1]).chunk(2, -1)


def _swiglu_impl(gate_up, backend="torch"):
    if backend == "triton":
        return _kernels().launch_swiglu(gate_up)
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    gate_rows(out.view(-1, out.shape[-1]), *_halves(gate_up))
    return out


def _swiglu_rows_backward(grad, gate_up):
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    gate_rows_backward(grad.reshape(-1, grad.shape[-1]), *_halves(gate_up), *_halves(out))
    return out


def _swiglu_backward(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    return (_launched_swiglu_backward if ctx.backend == "triton" else _swiglu_grad)(grad, gate_up), None


_swiglu_grad = define(
    "swiglu_rows_backward(Tensor grad, Tensor gate_up) -> Tensor",
    _swiglu_rows_backward,
    lambda grad, gate_up: _fake(gate_up),
    **differentiated(lambda gate_up: (reference.swiglu(gate_up),)),
)
_swiglu = define(
    "swiglu(Tensor gate_up, str backend='torch') -> Tensor",
    _swiglu_impl,
    lambda gate_up, *_: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    setup_context=_save,
    backward=_swiglu_backward,
)
