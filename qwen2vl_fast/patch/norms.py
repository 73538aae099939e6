"""Norms alone, and fused with the residual addition before them inside a block."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from .hooks import Hook, Part, bare, hook_of, original, readable


def layer_norm(self: nn.LayerNorm, input: torch.Tensor) -> torch.Tensor:
    hook = hook_of(self)
    if not _usable(self, hook, input):
        return original(self, input)
    hook.part.ran()
    backend = hook.options.backend("layer_norm")
    return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, backend=backend)


def rms_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    hook = hook_of(self)
    if not _usable(self, hook, hidden_states):
        return original(self, hidden_states)
    hook.part.ran()
    backend = hook.options.backend("rms_norm")
    return ops.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon, backend=backend)


def add_norm(norm: nn.Module, hook: Hook, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + branch), x + branch): in one op where the norm is one that patch knows and nobody watches its calls."""
    same = x.dtype == branch.dtype and x.device == branch.device
    if not same or not bare(norm, hook["kind"]) or not _usable(norm, hook, x):
        x = x + branch
        return norm(x), x
    hook.part.ran()
    if isinstance(norm, nn.LayerNorm):
        backend = hook.options.backend("layer_norm")
        return ops.layer_norm(branch, norm.weight, norm.bias, eps=norm.eps, residual=x, backend=backend)
    return ops.rms_norm(branch, norm.weight, eps=norm.variance_epsilon, residual=x, backend=hook.options.backend("rms_norm"))


def _usable(norm: nn.Module, hook: Hook, x: torch.Tensor) -> bool:
    if not hook.active:
        return False
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else norm.weight
    if readable(norm.weight, x) and readable(bias, x) and not torch.is_autocast_enabled(x.device.type):
        return True
    _say(hook.part, norm, x)
    return False


def _say(part: Part, norm: nn.Module, x: torch.Tensor) -> None:
    if torch.is_autocast_enabled(x.device.type):
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
