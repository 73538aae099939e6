"""LayerNorm and 2x2 merge.

In merge order the four rows of a square lie side by side already, so [T, C] is [T/4, 4C] and the whole op is LayerNorm's
kernel. From raster order that kernel gathers: `rows` names the row of x for each row of the result.
"""

from __future__ import annotations

import torch

from . import norm


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """x [T, C], rows [T] int64 or None (merge order) -> [T/4, 4C]."""
    return norm.launch(x, weight, bias, eps, rows=rows)[0].view(-1, 4 * x.shape[1])


def launch_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias from grad [T/4, 4C]."""
    return norm.launch_backward(grad.reshape(-1, x.shape[1]), x, weight, bias, eps, rows=rows)
