"""Residual addition and norm at the widths of the tower (LayerNorm 1280) and of the 2B and 7B decoder (RMSNorm 1536, 3584).

qwen2vl-fast bench norms [--peers NAME ...] [--repeats 30] [--json] [--save]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from bench.passes import (
    COMPILED,
    Case,
    compiled,
    compiled_with_gradients,
    device,
    dtype,
    main,
    peer,
    random,
    tokens,
    with_gradients,
)
from qwen2vl_fast import ops, reference

PEERS = ("torch", "transformers", COMPILED, "Liger")
EPS = 1e-6
NORMS = (("layer_norm", 1280), ("rms_norm", 1536), ("rms_norm", 3584))


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, EPS), total


def rms_module(module: Qwen2RMSNorm, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' module with this weight."""
    total = x + residual
    return functional_call(module, {"weight": weight}, (total,)), total


def rms_rows(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The arithmetic of transformers' module as a function, for torch.compile."""
    total = x + residual
    wide = total.float()
    wide = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return weight * wide.to(total.dtype), total


def liger(function: Any, x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
    """Its fused addition and RMSNorm; it has none with a LayerNorm."""
    if bias:
        total = x + residual
        return function.apply(total, weight, *bias, EPS), total
    return function.apply(x, residual, weight, EPS, 0.0, "llama", False)


def definition(op: Callable[..., Any], x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """In float64, of the sum as it is rounded in the tensors' dtype."""
    total = (x + residual).double()
    return op(total, *(p.double() for p in parameters), eps=EPS), total


def cases() -> Iterator[Case]:
    for op, width in NORMS:
        for count in tokens():
            yield from _cases(op, width, count)


def _cases(op: str, width: int, count: int) -> Iterator[Case]:
    x, residual, grad, grad_total = (random(count, width, seed=i) for i in range(4))
    parameters = [random(width, seed=4 + i) for i in range(2 if op == "layer_norm" else 1)]

    def ours(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(ops, op)(x, *parameters, eps=EPS, residual=residual)

    if op == "layer_norm":
        name, other, plain = "torch", add_layer_norm, add_layer_norm
    else:
        name, plain = "transformers", rms_rows
        other = functools.partial(rms_module, Qwen2RMSNorm(width, EPS).to(device(), dtype()))
    leaves = (x, residual, *parameters)

    def forward(rows: slice) -> tuple[Tensor, ...]:
        return definition(getattr(reference, op), x[rows], residual[rows], *parameters)

    def both(rows: slice) -> tuple[Tensor, ...]:
        total = (x[rows] + residual[rows]).double()
        found = with_gradients(
            lambda total, *parameters: (getattr(reference, op)(total, *parameters, eps=EPS), total * 1),
            (total, *(p.double() for p in parameters)),
            (grad[rows].double(), grad_total[rows].double()),
        )()
        y, total, grad_x, *grads = found
        return y, total, grad_x, grad_x, *grads

    upstream = (grad, grad_total)
    title = f"add + {'LayerNorm' if op == 'layer_norm' else 'RMSNorm'} {width}"
    size = 4 * x.numel() * x.element_size()
    missing: dict[str, str] = {}
    contenders = {"qwen2vl_fast": lambda: ours(*leaves), name: lambda: other(*leaves), **compiled(plain, *leaves)}
    training = {
        "qwen2vl_fast": with_gradients(ours, leaves, upstream),
        name: with_gradients(other, leaves, upstream),
        **compiled_with_gradients(plain, leaves, upstream),
    }
    if op == "layer_norm":
        function = peer(missing, "Liger", "liger_kernel.ops.layer_norm", "LigerLayerNormFunction", "liger-kernel")
    else:
        function = peer(missing, "Liger", "liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", "liger-kernel")
    if function:
        call = functools.partial(liger, function)
        contenders["Liger"], training["Liger"] = lambda: call(*leaves), with_gradients(call, leaves, upstream)
    yield Case(title, count, size, contenders, forward, group=title, missing=missing)
    sums = len(parameters)
    yield Case(
        f"{title}, forward and backward", count, 2 * size, training, both, sums=sums, group=title, missing=missing
    )


if __name__ == "__main__":
    main(("norms",), __doc__)
