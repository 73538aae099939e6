"""The matrix product of the model, whichever library runs it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen2vl_fast.ops import linear as module
from qwen2vl_fast.ops.linear import linear
from tests.compare import HALVES, Call, judge, same_bits
from tests.test_ops_every import dtypes
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")


def term_by_term(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same product summed in the plainest order. oneDNN sums so; MKL, in blocks, has a third of the error at 1280 terms."""
    rows = x.reshape(-1, x.shape[-1])
    total = rows.new_zeros(rows.shape[0], weight.shape[0]) if bias is None else bias.expand(rows.shape[0], -1)
    for column, of_weight in zip(rows.unbind(1), weight.unbind(1), strict=True):
        total = total + column[:, None] * of_weight
    return total.view(*x.shape[:-1], -1)


@pytest.fixture(params=[False, True], ids=["oneDNN", "MKL"], autouse=True)
def mkl(request, monkeypatch):
    """Both ways that float32 takes on a CPU, whatever the processor."""
    monkeypatch.setattr(module, "_MKL", request.param)
    return request.param


@dtypes
@pytest.mark.parametrize("size", [(7, 48), (1, 48), (2, 5, 48), (48,), (33, 1280), (800, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_rule(size, bias, dtype, device):
    """Outputs and every gradient; PyTorch's error is that of torch's own product, or of the plainest order of summation."""
    tensors = {"x": randn(*size, device=device, dtype=dtype), "weight": randn(40, size[-1], seed=1, device=device, dtype=dtype)}
    if bias:
        tensors["bias"] = randn(40, seed=2, device=device, dtype=dtype)
    names = {"x": "input"}

    def torchs(**arguments):
        return F.linear(**{names.get(n, n): x for n, x in arguments.items()})

    judge(linear, torchs, Call(tensors), peers=(torchs,) if dtype in HALVES else (torchs, term_by_term))


@dtypes
def test_views(dtype, device):
    """Strided inputs, a weight that is a transposed view, an expanded upstream gradient: the values of contiguous ones."""
    x, weight = randn(6, 9, 32, device=device, dtype=dtype), randn(24, 32, seed=1, device=device, dtype=dtype)
    for leaf in (x.transpose(0, 1), x[:, ::2], x[..., 8:24]):
        w = weight[:, : leaf.shape[-1]]
        found = []
        for a, b in ((leaf, w), (leaf, w.t().contiguous().t()), (leaf.contiguous(), w.contiguous())):
            a, b = (t.detach().requires_grad_() for t in (a, b))
            out = linear(a, b)
            found.append((out.detach(), *torch.autograd.grad(out.sum(), (a, b))))
        for other in found[:2]:
            for got, plain in zip(other, found[2], strict=True):
                torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_bias_with_strides(rows, device):
    x, weight, bias = randn(rows, 16, device=device), randn(8, 16, seed=1, device=device), randn(8, 2, seed=2, device=device)
    for view in (bias[:, 0], bias[0, :1].expand(8)):
        torch.testing.assert_close(linear(x, weight, view), linear(x, weight) + view)


@pytest.mark.parametrize("size", [(0, 16), (2, 0, 16)])
def test_no_rows(size, device):
    x, weight, bias = (randn(*s, device=device).requires_grad_() for s in (size, (8, 16), (8,)))
    out = linear(x, weight, bias)
    assert out.shape == (*size[:-1], 8)
    for grad in torch.autograd.grad(out.sum(), (x, weight, bias)):
        assert not grad.any()


def test_only_what_is_asked_for(device):
    """A frozen weight gets no gradient computed, a frozen input neither."""
    tensors = [randn(*s, device=device) for s in ((5, 16), (8, 16), (8,))]
    full = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(linear(*full).sum(), full)
    for i in range(3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        (grad,) = torch.autograd.grad(linear(*leaves).sum(), leaves[i])
        assert same_bits(grad, expected[i])


def test_who_multiplies(mkl, monkeypatch):
    """By the number of rows; everything is oneDNN's where MKL leaves a part of the processor unused."""
    chosen = []
    monkeypatch.setattr(module.F, "linear", lambda x, *_: chosen.append(x.numel() // x.shape[-1]) or x.new_empty(0))
    for rows in (1, 2, 3, 767, 768, 2000):
        linear(randn(rows, 16), randn(8, 16))
    assert chosen == ([1, 2, 768, 2000] if mkl else [])
