"""LayerNorm and 2x2 merge: the input of the tower's merger."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ..positions import check_grid, check_grid_shape
from ..reference import raster_to_merge_order
from . import checks
from .backends import choose, define
from .norm import _launched_backward, _layer_norm, _layer_norm_grad, too_wide


def merge_patches(x, weight, bias, *, eps: float = 1e-6, grid_thw=None, backend: str | None = None):
    """LayerNorm of every patch row, then the four rows of a 2x2 square side by side.

    y[i] = concat(LN(x[4i]), LN(x[4i+1]), LN(x[4i+2]), LN(x[4i+3])), with x in merge order.

    Args:
        x: [T, D], floating, any strides, T a multiple of 4. Rows in merge order, or in raster order if grid_thw is given.
        weight, bias: [D], the dtype and device of x.
        eps: added to the variance.
        grid_thw: None, or [N, 3] integer (t, h, w) of the images of x in raster order. Read on the host.
        backend: None for the fastest that can run the tensors.
    Returns: [T/4, 4D] in x's dtype.
    Raises: TypeError, ValueError for a dtype, device, shape or grid that doesn't fit; RuntimeError for an unusable backend.
    Precision: float32 inside (float64 for float64), one rounding at the end.
    Source: MODEL.md section 2 (merger). Definition: `reference.merge_patches`.
    """
    fits = checks.fit(x, None, weight, bias)
    if not fits:
        checks.rows("x", x)
    if x.dim() != 2 or x.shape[0] % 4:
        raise ValueError(f"x: expected [T, D] with T a multiple of 4, got shape {list(x.shape)}")
    for name, parameter in () if fits else (("weight", weight), ("bias", bias)):
        checks.same(name, parameter, "x", x)
        checks.shape(name, parameter, (x.shape[1],), "[D]")
    checks.number("eps", eps)
    name = choose("merge_patches", backend, x.device, too_wide(x))
    if grid_thw is None:
        return _layer_norm(x, weight, bias, eps, name).view(-1, 4 * x.shape[1])
    check_grid_shape("grid_thw", grid_thw)
    return _merge_rows(x, weight, bias, grid_thw, eps, name)[0]


@functools.cache
def _kernels():
    """Imported when they are first needed: triton may be missing. Once, since even a repeated import costs a microsecond."""
    from ..kernels import merge

    return merge


def _merge_rows_impl(x, weight, bias, grid_thw, eps, backend="torch"):
    """The result, and for the backward pass the row of x for each row in merge order.

    The grid's values are read here and not by the caller: torch.compile has none while it traces.
    """
    grid = check_grid(grid_thw, 2)
    total = sum(map(math.prod, grid.tolist()))
    if total != x.shape[0]:
        raise ValueError(f"grid_thw: holds {total} patches, but x has {x.shape[0]} rows")
    rows = raster_to_merge_order(grid).to(x.device)
    with torch._C._AutoDispatchBelowADInplaceOrView():  # no view for autograd
        if backend == "triton":
            return _kernels().launch(x, weight, bias, rows, eps), rows
        return F.layer_norm(x[rows], weight.shape, weight, bias, eps).view(-1, 4 * x.shape[1]), rows


def _setup(ctx, inputs, output):
    x, weight, bias, _, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _merge_rows_backward(ctx, grad, grad_rows):
    x, weight, bias, rows = ctx.saved_tensors
    grad = grad.reshape(-1, x.shape[1])
    if ctx.backend == "triton":
        return *_launched_backward(grad, None, x, weight, bias, rows, ctx.eps), None, None, None
    grad_rows, *grads = _layer_norm_grad(grad, None, x[rows], weight, bias, ctx.eps)
    return torch.empty_like(grad_rows).index_copy(0, rows, grad_rows), *grads, None, None, None


_merge_rows = define(
    "merge_rows(Tensor x, Tensor weight, Tensor bias, Tensor grid_thw, float eps, str backend='torch') -> (Tensor, Tensor)",
    _merge_rows_impl,
    lambda x, *_: (x.new_empty((x.shape[0] // 4, 4 * x.shape[1])), x.new_empty(x.shape[0], dtype=torch.int64)),
    setup_context=_setup,
    backward=_merge_rows_backward,
)
