"""LayerNorm and 2x2 merge: the input of the tower's merger."""

from __future__ import annotations

from ..positions import check_grid
from ..reference import raster_to_merge_order
from . import checks
from .backends import choose
from .norm import _layer_norm


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
    checks.rows("x", x)
    if x.dim() != 2 or x.shape[0] % 4:
        raise ValueError(f"x: expected [T, D] with T a multiple of 4, got shape {list(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        checks.same(name, parameter, "x", x)
        checks.shape(name, parameter, (x.shape[1],), "[D]")
    choose("merge_patches", backend, x.device)
    if grid_thw is not None:
        grid = check_grid(grid_thw, 2)
        if int(grid.prod(1).sum()) != x.shape[0]:
            raise ValueError(f"grid_thw: holds {int(grid.prod(1).sum())} patches, but x has {x.shape[0]} rows")
        x = x[raster_to_merge_order(grid).to(x.device)]
    return _layer_norm(x, weight, bias, eps).view(-1, 4 * x.shape[1])
