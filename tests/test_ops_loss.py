"""Cross entropy without logits in memory."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_fast import ops, reference
from qwen2vl_fast.ops import loss
from tests.compare import Call, judge, same_bits
from tests.test_ops_every import dtypes, usable
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")


def inputs(rows: int, vocabulary: int = 50, width: int = 24, device: str = "cpu", dtype: torch.dtype = torch.float32):
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    return randn(rows, width, device=device, dtype=dtype), randn(vocabulary, width, seed=1, device=device, dtype=dtype), labels


def check_blocks(dtype, words: int, device: str = "cpu", ops=ops, module=loss, backend: str = "torch") -> None:
    """Any number of words a block, the last one shorter: still the definition, gradients included."""
    hidden, weight, labels = inputs(37, device=device, dtype=dtype)
    labels[::5] = -100
    before = module._BLOCK_BYTES
    module._BLOCK_BYTES = words * 4 * hidden.shape[0]
    try:
        function = functools.partial(ops.linear_cross_entropy, backend=backend)
        call = Call({"hidden": hidden, "weight": weight}, {"labels": labels})
        judge(function, reference.linear_cross_entropy, call, name=f"blocks of {words}")
    finally:
        module._BLOCK_BYTES = before


@dtypes
@pytest.mark.parametrize("words", [1, 8, 49, 50, 1000])
def test_blocks(dtype, words, device):
    for backend in usable("linear_cross_entropy", device):
        check_blocks(dtype, words, device, backend=backend)


@dtypes
def test_ignored_rows(dtype, device):
    """They count for nothing: not in the mean, no gradient, and what they hold can't be seen."""
    hidden, weight, labels = inputs(12, device=device, dtype=dtype)
    labels[3:6] = -7
    for backend in usable("linear_cross_entropy", device):
        leaf = hidden.detach().requires_grad_()
        value = ops.linear_cross_entropy(leaf, weight, labels, ignore_index=-7, backend=backend)
        (grad,) = torch.autograd.grad(value, leaf)
        assert not grad[3:6].any() and grad[:3].any()
        other = hidden.clone()
        other[3:6] = 100
        assert same_bits(ops.linear_cross_entropy(other, weight, labels, ignore_index=-7, backend=backend), value.detach())


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counts(rows, device):
    """The mean of nothing is nan, and it moves no weight."""
    hidden, weight, _ = inputs(rows, device=device)
    labels = torch.full((rows,), -100, device=device)
    for backend in usable("linear_cross_entropy", device):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        value = ops.linear_cross_entropy(*leaves, labels, backend=backend)
        assert value.isnan() and value.shape == ()
        for grad in torch.autograd.grad(value, leaves):
            assert not grad.any()


def test_a_certain_answer_costs_nothing(device):
    """Logits far apart: the loss is exactly 0, not the rounding of a large log-sum-exp."""
    weight = torch.eye(8, device=device) * 32
    hidden = torch.eye(8, device=device) * 32
    for backend in usable("linear_cross_entropy", device):
        assert ops.linear_cross_entropy(hidden, weight, torch.arange(8, device=device), backend=backend) == 0
        value = ops.linear_cross_entropy(hidden, weight, (torch.arange(8, device=device) + 1) % 8, backend=backend)
        assert value == 1024


@pytest.mark.parametrize("words", [1, 3, 8])
def test_words_of_rising_and_falling_logits(words, monkeypatch, device):
    """The largest logit moves from block to block, in either direction, over more than exp can span."""
    hidden, labels = torch.tensor([[1.0], [-1.0]], device=device), torch.tensor([2, 5], device=device)
    weight = torch.arange(8, device=device).float()[:, None] * 40 - 140
    monkeypatch.setattr(loss, "_BLOCK_BYTES", words * 4 * 2)
    call = Call({"hidden": hidden, "weight": weight}, {"labels": labels})
    judge(ops.linear_cross_entropy, reference.linear_cross_entropy, call)


@pytest.mark.parametrize("words", [1, 2])
def test_a_block_of_overflown_logits(words, monkeypatch, device):
    """float16 makes -inf of -90000; a row whose first blocks hold nothing else has a loss and gradients all the same."""
    hidden, labels = torch.tensor([[300.0], [1.0]], device=device).half(), torch.tensor([2, 3], device=device)
    weight = torch.tensor([[-300.0], [-300.0], [0.01], [0.02]], device=device).half()
    monkeypatch.setattr(loss, "_BLOCK_BYTES", words * 4 * 2)

    def torchs(hidden, weight, labels):
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)

    def steps(function):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        value = function(*leaves, labels)
        return value.detach(), *torch.autograd.grad(value, leaves)

    for backend in usable("linear_cross_entropy", device):
        found = steps(functools.partial(ops.linear_cross_entropy, backend=backend))
        for ours, theirs in zip(found, steps(torchs), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_label_that_is_no_word(device):
    """On a device nothing looks at labels, and the loss is nan; so is that of the op that is called past the check here."""
    hidden, weight, labels = inputs(9, device=device)
    labels[4] = len(weight)
    for backend in usable("linear_cross_entropy", device):
        assert torch.ops.qwen2vl_fast.linear_cross_entropy(hidden, weight, labels, -100, backend)[0].isnan()


def test_many_blocks_add_up_in_float32(monkeypatch, device):
    """The gradient of hidden is a sum over blocks, in bfloat16 rounded once at the end."""
    hidden, weight, labels = inputs(100, vocabulary=400, device=device, dtype=torch.bfloat16)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 4 * 100)
    for backend in usable("linear_cross_entropy", device):
        function = functools.partial(ops.linear_cross_entropy, backend=backend)
        call = Call({"hidden": hidden, "weight": weight}, {"labels": labels})
        judge(function, reference.linear_cross_entropy, call)


def test_autocast_changes_nothing(device):
    """Products are in the dtype of hidden, also where the backward pass is under autocast or forward alone was."""
    hidden, weight, labels = inputs(9, device=device)
    for backend in usable("linear_cross_entropy", device):
        found = []
        for forward, backward in ((False, False), (True, True), (True, False)):
            leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
            with torch.autocast(device, torch.bfloat16, enabled=forward):
                value = ops.linear_cross_entropy(*leaves, labels, backend=backend)
            with torch.autocast(device, torch.bfloat16, enabled=backward):
                found.append((value.detach(), *torch.autograd.grad(value, leaves)))
        assert all(same_bits(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_second_derivative_is_refused(device):
    hidden, weight, labels = inputs(9, device=device)
    leaf = hidden.requires_grad_()
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(leaf, weight, labels), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_upstream_gradient_scales(device):
    hidden, weight, labels = inputs(9, device=device)
    for backend in usable("linear_cross_entropy", device):
        leaf = hidden.requires_grad_()
        one, four = (
            torch.autograd.grad(ops.linear_cross_entropy(leaf, weight, labels, backend=backend) * factor, leaf)[0]
            for factor in (1, 4)
        )
        assert same_bits(one * 4, four)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_nothing(frozen, monkeypatch, device):
    """No gradient is made of what takes none, and the other one keeps its bits."""
    hidden, weight, labels = inputs(9, device=device)
    both = [x.detach().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(ops.linear_cross_entropy(*both, labels), both)
    made = []
    backward = loss._loss_grad
    monkeypatch.setattr(loss, "_loss_grad", lambda *arguments: made.append(backward(*arguments)) or made[-1])
    trained = int(frozen == "hidden")
    tensors = [hidden, weight]
    tensors[trained] = both[trained]
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(*tensors, labels), both[trained])
    assert same_bits(grad, expected[trained])
    assert made[0][1 - trained].numel() == 0


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_logits_in_memory(monkeypatch, device):
    """Forward and backward of 400 rows and 1000 words never hold [T, V]; the implementations are watched directly."""
    hidden, weight, labels = inputs(400, vocabulary=1000, device=device)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 16 * 4 * 400)
    with Largest() as largest:
        value, *statistics = loss._loss_impl(hidden, weight, labels, -100)
        loss._loss_backward_impl(torch.ones_like(value), hidden, weight, labels, *statistics, -100, True, True)
    assert largest.elements <= max(16 * 400, weight.numel())
    with Largest() as control:
        reference.linear_cross_entropy(hidden, weight, labels)
    assert control.elements == 400 * 1000
