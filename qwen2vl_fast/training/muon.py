"""Muon for matrices in float32: momentum, made orthogonal by a Newton-Schulz iteration, scaled to AdamW's size of step.

torch.optim.Muon iterates in bfloat16, which a processor without such instructions emulates many times slower (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

# The quintic of Keller Jordan's Muon: five steps bring singular values of 0.01 and more near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def orthogonal(matrix: torch.Tensor, steps: int = _STEPS) -> torch.Tensor:
    """About U V^T of matrix = U S V^T, [M, N] float32: singular values within about 0.3 of 1."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """w <- (1 - lr decay) w - lr 0.2 sqrt(max(M, N)) orthogonal(gradient + momentum m), m <- momentum m + gradient.

    Args:
        params: matrices [M, N], or convolutions [M, ...] that are one matrix product.
        lr: the root mean square of a step is 0.2 lr, about AdamW's at that rate.
    """

    def __init__(self, params: Iterable[torch.Tensor], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                moment = state.setdefault("momentum_buffer", torch.zeros_like(weight))
                moment.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonal(weight.grad.add(moment, alpha=group["momentum"]).flatten(1))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))
