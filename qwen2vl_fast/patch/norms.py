"""Norms alone, and fused with the residual addition before them inside a block."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from .hooks import Hook, Part, autocast, bare, hook_of, original, readable


def layer_norm(self: nn.LayerNorm, input: torch.Tensor) -> torch.Tensor:
    hook = hook_of(self)
    weight, bias = self.weight, self.bias
    if not _usable(self, hook, input, weight, bias):
        return original(self, input)
    hook.part.ran()
    return ops.layer_norm(input, weight, bias, eps=self.eps, backend=hook.options.backends["layer_norm"])


def rms_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    hook = hook_of(self)
    weight = self.weight
    if not _usable(self, hook, hidden_states, weight):
        return original(self, hidden_states)
    hook.part.ran()
    return ops.rms_norm(hidden_states, weight, eps=self.variance_epsilon, backend=hook.options.backends["rms_norm"])


def add_norm(norm: nn.Module, hook: Hook, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + branch), x + branch): in one op where the norm is one that patch knows and nobody watches its calls."""
    same = x.dtype == branch.dtype and x.device == branch.device
    if not same or not bare(norm, hook.more["kind"]):
        x = x + branch
        return norm(x), x
    parameters = (norm.weight, norm.bias) if hook.more["kind"] is nn.LayerNorm else (norm.weight,)
    if not _usable(norm, hook, x, *parameters):
        x = x + branch
        return norm(x), x
    hook.part.ran()
    if hook.more["kind"] is nn.LayerNorm:
        return ops.layer_norm(branch, *parameters, eps=norm.eps, residual=x, backend=hook.options.backends["layer_norm"])
    backend = hook.options.backends["rms_norm"]
    return ops.rms_norm(branch, *parameters, eps=norm.variance_epsilon, residual=x, backend=backend)


def _usable(norm: nn.Module, hook: Hook, x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    if not hook.part.enabled:
        return False
    for parameter in parameters:
        if not readable(parameter, x):
            break
    else:
        if not autocast(x):
            return True
    _say(hook.part, norm, x)
    return False


def _say(part: Part, norm: nn.Module, x: torch.Tensor) -> None:
    if autocast(x):
        part.fell_back("autocast")
    elif norm.weight is None or norm.weight.dtype != x.dtype:
        part.fell_back("its weight has another dtype than its input")
    else:
        part.fell_back("its weight is sharded, quantized or on another device")


def layer_norm_refusal(norm: nn.Module) -> str | None:
    """Why a LayerNorm of the model can't be replaced."""
    if type(norm) is not nn.LayerNorm:
        return f"the norm is a {type(norm).__name__}"
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return "the LayerNorm has no weight or bias"
    return None
