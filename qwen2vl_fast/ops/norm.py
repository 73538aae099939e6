"""Normalisation over the last dim, with the residual addition that precedes it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .. import reference
from . import checks
from .backends import choose, define, differentiated


def rms_norm(x, weight, *, eps: float, residual=None, backend: str | None = None):
    """RMSNorm of x, or of x + residual.

    y = z / sqrt(mean(z^2) + eps) * weight, z = x or x + residual.

    Args:
        x: [..., C], floating, any strides.
        weight: [C], the dtype and device of x.
        eps: added to the mean square.
        residual: None, or a tensor like x.
    Returns: y [..., C] in x's dtype; with residual (y, x + residual).
    Raises: TypeError, ValueError for a dtype, device or shape that doesn't fit; RuntimeError for an unusable backend.
    Precision: the sum z is rounded to x's dtype; the rest in float32 (float64 for float64), one rounding at the end.
    Source: MODEL.md section 3. Definition: `reference.rms_norm`.
    """
    name = _check("rms_norm", x, residual, eps, backend, weight)
    return _rms_norm(x, weight, eps, name) if residual is None else _add_rms_norm(x, residual, weight, eps, name)


def layer_norm(x, weight, bias, *, eps: float, residual=None, backend: str | None = None):
    """LayerNorm of x, or of x + residual.

    y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias, z = x or x + residual.

    Args:
        x: [..., C], floating, any strides.
        weight, bias: [C], the dtype and device of x.
        eps: added to the variance.
        residual: None, or a tensor like x.
    Returns: y [..., C] in x's dtype; with residual (y, x + residual).
    Raises: as `rms_norm`.
    Precision: as `rms_norm`.
    Source: MODEL.md section 2. Definition: `reference.layer_norm`.
    """
    name = _check("layer_norm", x, residual, eps, backend, weight, bias)
    if residual is None:
        return _layer_norm(x, weight, bias, eps, name)
    return _add_layer_norm(x, residual, weight, bias, eps, name)


def _check(op: str, x, residual, eps, backend, *parameters) -> str:
    if type(eps) is not float or not checks.fit(x, residual, *parameters):
        checks.rows("x", x)
        checks.number("eps", eps)
        for name, parameter in zip(("weight", "bias"), parameters, strict=False):
            checks.same(name, parameter, "x", x)
            checks.shape(name, parameter, (x.shape[-1],), "[C]")
        if residual is not None:
            checks.same("residual", residual, "x", x)
            checks.shape("residual", residual, tuple(x.shape), "x's shape")
    return choose(op, backend, x.device, too_wide(x))


def too_wide(x) -> str | None:
    """Why the triton backend can't take these rows, which it keeps in the registers of one multiprocessor, if it can't."""
    width, most = x.shape[-1], 2048 if x.dtype == torch.float64 else 4096
    if width <= most or width <= 2 * most and width % 16 == 0:
        return None
    return f"it takes {most} columns of {x.dtype}, or {2 * most} in multiples of 16, and these are {width}"


@functools.cache
def _kernels():
    """Imported when they are first needed: triton may be missing. Once, since even a repeated import costs a microsecond."""
    from ..kernels import norm

    return norm


def _launched(x, residual, weight, bias, eps):
    y, total = _kernels().launch(x, weight, bias, eps, residual=residual)
    return y if residual is None else (y, total)


def _launch_backward(grad, grad_total, x, weight, bias, rows, eps):
    grad_x, grad_weight, grad_bias = _kernels().launch_backward(grad, x, weight, bias, eps, grad_total=grad_total, rows=rows)
    return grad_x, grad_weight, x.new_empty(0) if grad_bias is None else grad_bias


# An op of its own: under torch.compile a backward is traced with fake tensors.
_launched_backward = define(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor? bias, Tensor? rows, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    lambda grad, grad_total, x, weight, bias, rows, eps: (
        _fake_one(x), _fake_one(weight), x.new_empty(0) if bias is None else _fake_one(bias)
    ),
)  # fmt: skip


def _rms_norm_impl(x, weight, eps, backend="torch"):
    if backend == "triton":
        return _launched(x, None, weight, None, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rms_norm_rows(out, x, None, None, weight, eps)
    return out


def _add_rms_norm_impl(x, residual, weight, eps, backend="torch"):
    if backend == "triton":
        return _launched(x, residual, weight, None, eps)
    out, total = _fake_sum(x)
    _rms_norm_rows(out, x, residual, total, weight, eps)
    return out, total


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _rms_norm_rows(out, x, residual, total, weight, eps) -> None:
    """out = the norm of x, or of total = x + residual, a block of rows at a time."""
    out, rows = _rows(out), _rows(x)
    wide_weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    if residual is not None:
        residual, total = _rows(residual), _rows(total)
    for block, z, t in checks.row_blocks(rows, 2):
        x = rows[block] if residual is None else torch.add(rows[block], residual[block], out=total[block])
        x = checks.wide(x, z)
        torch.mul(torch.mul(x, _inverse_rms(x, t, eps), out=t), wide_weight, out=out[block])


def _inverse_rms(z, t, eps):
    return torch.mul(z, z, out=t).mean(-1, keepdim=True).add_(eps).rsqrt_()


def _rms_norm_backward(grad, grad_total, x, weight, eps):
    """Gradients of x, weight: r (g w - u mean(g w u)) + grad_total, sum(g u), with r = rsqrt(mean(x^2) + eps), u = x r."""
    out = _fake_one(x)
    rows, upstream, rows_out = map(_rows, (x, grad, out))
    besides = None if grad_total is None else _rows(grad_total)
    wide_weight, sums = weight.to(torch.promote_types(x.dtype, torch.float32)), []
    for block, u, g, t in checks.row_blocks(rows, 3):
        x = checks.wide(rows[block], u)
        scale = _inverse_rms(x, t, eps)
        torch.mul(x, scale, out=u)
        sums.append(torch.mul(upstream[block], u, out=t).sum(0))
        mean = t.mul_(wide_weight).mean(-1, keepdim=True)
        torch.mul(upstream[block], wide_weight, out=g).addcmul_(u, mean, value=-1)
        torch.mul(g, scale, out=rows_out[block])
        if besides is not None:  # an addition of its own, so that the bits are those of a norm and a sum apart
            rows_out[block].add_(besides[block])
    return out, checks.total(sums, weight)


def _layer_norm_impl(x, weight, bias, eps, backend="torch"):
    if backend == "triton":
        return _launched(x, None, weight, bias, eps)
    return F.layer_norm(x.contiguous(), weight.shape, weight, bias, eps)


def _add_layer_norm_impl(x, residual, weight, bias, eps, backend="torch"):
    if backend == "triton":
        return _launched(x, residual, weight, bias, eps)
    total = torch.add(x, residual).contiguous()
    return _layer_norm_impl(total, weight, bias, eps, backend), total


def _layer_norm_backward(grad, grad_total, x, weight, bias, eps):
    """Gradients of x, weight, bias: the library's, in float32, of blocks of rows.

    Of the whole it would sum rows one after another, and of bf16 tensors it keeps mean and 1/std, and sums, in bf16.
    """
    out = _fake_one(x)
    rows, upstream, rows_out = map(_rows, (x, grad, out))
    besides = None if grad_total is None else _rows(grad_total)
    parameters = [p.to(torch.promote_types(x.dtype, torch.float32)) for p in (weight, bias)]
    sums, sums_bias = [], []
    for block, z, g in checks.row_blocks(rows, 2):
        x = checks.wide(rows[block], z)
        _, *moments = torch.native_layer_norm(x, weight.shape, None, None, eps)
        arguments = checks.wide(upstream[block], g), x, weight.shape, *moments, *parameters, (True, True, True)
        inner, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(*arguments)
        rows_out[block].copy_(inner)
        if besides is not None:
            rows_out[block].add_(besides[block])
        sums.append(grad_weight)
        sums_bias.append(grad_bias)
    return out, checks.total(sums, weight), checks.total(sums_bias, bias)


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _save_sum(ctx, inputs, output):
    _, _, *parameters, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(output[1], *parameters)


def _alone(op):
    """Backward of an op on x."""

    def backward(ctx, grad):
        x, weight, *bias = ctx.saved_tensors
        if ctx.backend == "triton":
            grads = _launched_backward(grad, None, x, weight, *(bias or [None]), None, ctx.eps)[: 2 + len(bias)]
        else:
            grads = op(grad, None, x, weight, *bias, ctx.eps)
        return *grads, None, None

    return backward


def _with_sum(op):
    """Backward of an op on x + residual: both get the norm's gradient plus what reaches the sum directly."""

    def backward(ctx, grad, grad_sum):
        x, weight, *bias = ctx.saved_tensors
        if ctx.backend == "triton":
            grads = _launched_backward(grad, grad_sum, x, weight, *(bias or [None]), None, ctx.eps)
            grad_x, *grads = grads[: 2 + len(bias)]
        else:
            grad_x, *grads = op(grad, grad_sum, x, weight, *bias, ctx.eps)
        return grad_x, grad_x, *grads, None, None

    return backward


def _fake_sum(x, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


def _fake_one(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_rms_norm_grad = define(
    "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_backward,
    lambda grad, grad_total, x, weight, eps: (_fake_one(x), _fake_one(weight)),
    **differentiated(lambda x, weight, eps: (reference.rms_norm(x, weight, eps=eps), x * 1), 2),
)
_layer_norm_grad = define(
    "layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    lambda grad, grad_total, x, weight, bias, eps: (_fake_one(x), _fake_one(weight), _fake_one(bias)),
    **differentiated(lambda x, weight, bias, eps: (reference.layer_norm(x, weight, bias, eps=eps), x * 1), 2),
)
_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend='torch') -> Tensor",
    _rms_norm_impl,
    _fake_one,
    setup_context=_save_inputs,
    backward=_alone(_rms_norm_grad),
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str backend='torch') -> (Tensor, Tensor)",
    _add_rms_norm_impl,
    _fake_sum,
    setup_context=_save_sum,
    backward=_with_sum(_rms_norm_grad),
)
_layer_norm = define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, str backend='torch') -> Tensor",
    _layer_norm_impl,
    _fake_one,
    setup_context=_save_inputs,
    backward=_alone(_layer_norm_grad),
)
_add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, str backend='torch') -> (Tensor, Tensor)",
    _add_layer_norm_impl,
    _fake_sum,
    setup_context=_save_sum,
    backward=_with_sum(_layer_norm_grad),
)
