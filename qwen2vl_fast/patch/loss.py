"""The loss of a training step without its [B, S, V] logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from .hooks import autocast, bare, hook_of, original

IGNORE = -100
_OF_THE_LOSS = ("labels", "logits_to_keep", "num_items_in_batch", "shift_labels", "return_dict")


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As the class's forward; in training mode with labels the output has no logits."""
    hook = hook_of(self)
    kwargs = hook.bind(args, kwargs)
    if not hook.part.enabled or not self.training or kwargs.get("labels") is None:
        return original(self, **kwargs)
    inner = {name: value for name, value in kwargs.items() if name not in _OF_THE_LOSS}
    reason = _unfit(self, kwargs)
    if reason is not None:
        hook.part.fell_back(reason)
        return original(self, **kwargs)
    hook.part.ran()
    outputs = self.model(**inner, return_dict=True)
    given = {name: kwargs[name] for name in ("labels", "num_items_in_batch", "shift_labels") if kwargs.get(name) is not None}
    loss = _loss(self, outputs.last_hidden_state, hook.options.backends["linear_cross_entropy"], **given)
    return hook.more["output"](loss=loss, logits=None, **{name: outputs.get(name) for name in hook.more["fields"]})


def _unfit(self: nn.Module, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("return_dict") is False or not getattr(self.config, "return_dict", True):
        return "a tuple was asked for"
    if not bare(self.lm_head, nn.Linear) or self.lm_head.bias is not None:
        return "lm_head is not a plain Linear"
    if type(self.lm_head.weight) is not nn.Parameter or hasattr(self.lm_head.weight, "ds_id"):
        return "the head's weight is sharded or quantized"
    if kwargs.get("ignore_index", IGNORE) != IGNORE:
        return "another ignore_index"
    if getattr(self.loss_function, "__name__", "") != "ForCausalLMLoss":
        return "another loss_function"
    if isinstance(kwargs.get("logits_to_keep"), torch.Tensor) or kwargs.get("logits_to_keep"):
        return "logits_to_keep was given"
    return None


def _loss(
    self: nn.Module,
    hidden: torch.Tensor,
    backend: str | None,
    *,
    labels: torch.Tensor,
    num_items_in_batch: Any = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden [B, S, E], labels [B, S]: each scored by the position before it; over num_items_in_batch instead of their number
    where the trainer gives that.
    """
    targets = shift_labels
    if targets is None:
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    hidden, weight = hidden.flatten(0, 1).to(self.lm_head.weight.device), self.lm_head.weight
    if autocast(weight):  # which the op, unlike lm_head, knows nothing of
        dtype = torch.get_autocast_dtype(weight.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = targets.reshape(-1).to(weight.device)
    mean = ops.linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE, backend=backend)
    if num_items_in_batch is None:
        return mean
    count = (targets != IGNORE).sum()
    items = num_items_in_batch.to(mean.device) if isinstance(num_items_in_batch, torch.Tensor) else num_items_in_batch
    return torch.where(count > 0, mean, 0.0) * count / items
