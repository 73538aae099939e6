"""The few layers that the tower and the decoder share: torch's parameters, this package's ops."""

from __future__ import annotations

import torch
from torch import nn

from . import ops
from .ops.linear import linear


class Linear(nn.Linear):
    """[..., in] -> [..., out]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def without_bias(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x W^T, b) for an op that adds the bias itself. A layer put in the place of a Linear, such as an adapter that holds it,
    is not looked into: (layer(x), None).
    """
    if type(layer) is Linear:
        return linear(x, layer.weight), layer.bias
    return layer(x), None


class LayerNorm(nn.Module):
    """LayerNorm of x [T, C], or with a branch of x + branch: -> (normed, x + branch)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if branch is None:
            return ops.layer_norm(x, self.weight, self.bias, eps=self.eps), x
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=branch)


class RMSNorm(nn.Module):
    """RMSNorm of x [T, C], or with a branch of x + branch: -> (normed, x + branch)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if branch is None:
            return ops.rms_norm(x, self.weight, eps=self.eps), x
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=branch)
