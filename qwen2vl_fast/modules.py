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


def plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is what its class says: no adapter in its place, no hook, no forward of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and "forward" not in vars(layer)


def without_bias(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x W^T, b) for an op that adds the bias itself. A layer that is more than its weights is called: (layer(x), None)."""
    if plain(layer, Linear):
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
