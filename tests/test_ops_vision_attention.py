"""The tower's attention from its fused qkv: the bits of the two ops one after another, one gradient without a copy."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_fast import ops, positions
from qwen2vl_fast.ops.vision_attention import vision_attention
from qwen2vl_fast.reference import inverse_frequencies
from tests.compare import same_bits
from tests.test_ops_every import dtypes
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")
GRID = torch.tensor([[1, 4, 6], [3, 2, 4], [1, 8, 8]])
TOKENS, HEADS, DIM = 112, 2, 80


def pack(device: str, heads: int = HEADS):
    return (
        positions.vision_position_ids(GRID).to(device),
        inverse_frequencies(DIM // 2, 1e4).to(device),
        positions.attention_schedule(GRID, heads=heads, device=device),
    )


def two_ops(qkv, position_ids, inv_freq, schedule):
    q, k, v = qkv.unbind(1)
    q, k = ops.vision_rope(q, k, position_ids, inv_freq=inv_freq)
    return ops.varlen_attention(q, k, v, schedule.cu_seqlens, schedule=schedule)


def with_gradient(function, qkv: torch.Tensor, rest) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = qkv.clone().requires_grad_()
    o = function(leaf, *rest)
    (grad,) = torch.autograd.grad(o, leaf, randn(*o.shape, seed=1, device=qkv.device.type, dtype=o.dtype))
    return o.detach(), grad


@dtypes
def test_the_bits_of_the_two_ops(dtype, device):
    qkv, rest = randn(TOKENS, 3, HEADS, DIM, device=device, dtype=dtype), pack(device)
    expected = with_gradient(two_ops, qkv, rest)
    o, grad = with_gradient(vision_attention, qkv, rest)
    assert same_bits(o, expected[0]) and same_bits(grad, expected[1]) and grad.is_contiguous()
    with torch.no_grad():
        assert same_bits(vision_attention(qkv.clone(), *rest), expected[0])
    assert same_bits(vision_attention(qkv.clone(), *rest), expected[0])  # a frozen tower in a training step


class Calls(TorchDispatchMode):
    """Names of the ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_gradient_is_not_copied(device):
    """From attention to the backward of the product that made qkv there is one op; the two ops take a stack."""
    x = randn(TOKENS, 64, device=device).requires_grad_()
    weight = randn(3 * HEADS * DIM, 64, device=device).requires_grad_()
    rest = pack(device)

    def backward(function) -> list[str]:
        o = function((x @ weight.t()).unflatten(-1, (3, HEADS, DIM)), *rest)
        with Calls() as calls:
            torch.autograd.grad(o, (x, weight), torch.ones_like(o))
        return calls.names

    copies = {f"aten.{name}.default" for name in ("stack", "cat", "select_backward", "clone", "copy_", "add")}
    assert copies & set(backward(two_ops))
    assert not copies & set(backward(vision_attention))


def test_no_second_derivative(device):
    leaf, rest = randn(TOKENS, 3, HEADS, DIM, device=device).requires_grad_(), pack(device)
    (grad,) = torch.autograd.grad(vision_attention(leaf, *rest).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()

