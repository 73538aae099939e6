"""The tolerance rule rejects what it should: a judge that can't say no proves nothing."""

from __future__ import annotations

import pytest
import torch

from tests.compare import (
    DTYPES,
    GRADIENT,
    HALVES,
    Call,
    check,
    check_definition,
    check_pair_units,
    check_units,
    error,
    guard,
    judge,
    poisoned,
    same_bits,
    unit,
)


def truth(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(ref: torch.Tensor, dtype: torch.dtype = torch.float32, noise: float = 4.0):
    """(a right output, the errors of a peer with a little more of the same noise)."""
    ulp = torch.finfo(dtype).eps
    right, peer = (ref + ref.abs() * ulp * noise * truth(*ref.shape, seed=s).clamp(-2, 2) for s in (1, 2))
    return right.to(dtype), [error(peer.to(dtype), ref)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_output_passes(dtype):
    ref = truth(64, 64)
    right, peers = outcome(ref, dtype)
    check(right, ref, peers)
    check(right, ref, peers, bounds=[0, 1, 1, 40, 64])


def test_wrong_outputs_are_rejected():
    ref = truth(64, 64)
    right, peers = outcome(ref)
    wrong = {
        "one element": right.clone().index_fill_(0, torch.tensor([3]), 0.0),
        "NaN": right.clone().masked_fill_(torch.eye(64, dtype=torch.bool), torch.nan),
        "infinite": right.clone().masked_fill_(torch.eye(64, dtype=torch.bool), torch.inf),
        "rolled": right.roll(1, 0),
        "rounded to fp16": right.half().float(),
    }
    for name, out in wrong.items():
        with pytest.raises(AssertionError):
            check(out, ref, peers, name=name)
    with pytest.raises(AssertionError, match="shape"):
        check(right[:1], ref, peers)


def test_a_small_segment_is_not_hidden_by_a_loud_one():
    """Errors of a pack with values of 1000 would cover a whole image of ordinary values; per segment they don't."""
    ref = torch.cat((truth(60, 64) * 1e6, truth(4, 64)))
    right, peers = outcome(ref)
    check(right, ref, peers, bounds=[0, 60, 64])
    quiet = right.clone()
    quiet[60:] *= 1.3
    check(quiet, ref, peers)
    with pytest.raises(AssertionError, match=r"output\[60:64\]"):
        check(quiet, ref, peers, bounds=[0, 60, 64])


def test_a_bias_within_the_maximum_fails_by_its_root_mean_square():
    ref = truth(64, 64)
    right, peers = outcome(ref)
    shifted = ref + 1.4 * peers[0].square().mean().sqrt()
    with pytest.raises(AssertionError, match="rms error"):
        check(shifted.float(), ref, peers)
    check(shifted.float()[:8], ref[:8], [peers[0][:8]])  # too few elements for it to mean anything


def test_gradients_have_more_room():
    ref = truth(100)
    peers = [torch.full_like(ref, 1e-3)]
    out = (ref + 2.5e-3).float()
    check(out, ref, peers, k=GRADIENT)
    with pytest.raises(AssertionError):
        check(out, ref, peers)


def test_infinities_must_be_the_same():
    ref = torch.tensor([1.0, -torch.inf, torch.inf, torch.nan], dtype=torch.float64)
    peers = [torch.zeros(4, dtype=torch.float64)]
    check(ref.float(), ref, peers)
    inf, nan = torch.inf, torch.nan
    for wrong in ([1.0, inf, inf, nan], [1.0, -1e30, inf, nan], [1.0, -inf, inf, 0.0]):
        with pytest.raises(AssertionError):
            check(torch.tensor(wrong), ref, peers)


def test_the_floor_is_finite_and_small():
    """Zeros: a unit of 0.3 passes, more does not."""
    ref = torch.zeros(100, dtype=torch.float64)
    for dtype in DTYPES:
        step = torch.finfo(dtype).eps / 4
        check(torch.full((100,), step, dtype=dtype), ref, [ref])
        with pytest.raises(AssertionError):
            check(torch.full((100,), 2.5 * step, dtype=dtype), ref, [ref])


def test_an_overflowing_peer_is_no_judge():
    ref = torch.full((10,), 7e4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check(torch.full((10,), 6.5e4, dtype=torch.float16), ref, [error(torch.full((10,), torch.inf), ref)])


def test_judge_sees_wrong_gradients_and_dtypes():
    def definition(x, w):
        return x * w

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(w)
            return x * w

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0], grad.sum(0)

    call = Call({"x": truth(40, 8).float(), "w": truth(8, seed=1).float()})
    judge(definition, definition, call)
    with pytest.raises(AssertionError, match="gradient of w"):
        judge(lambda x, w: WrongGradient.apply(x, w), definition, call)
    with pytest.raises(AssertionError, match="torch.float64, expected torch.float32"):
        judge(lambda x, w: (x * w).double(), definition, call)


def test_units():
    for dtype in HALVES:
        ones = torch.tensor([1.0, 1.5, 1.999, 2.0, 0.75], dtype=torch.float64)
        eps = torch.finfo(dtype).eps
        assert unit(ones, dtype).tolist() == [eps, eps, eps, 2 * eps, eps / 2]
        assert unit(torch.zeros(1), dtype) == torch.finfo(dtype).tiny * eps
        value = torch.tensor([1.0], dtype=dtype)
        check_units(value + eps, value.double(), value.double())
        with pytest.raises(AssertionError, match="2 units"):
            check_units(value + 2 * eps, value.double(), value.double())
        pair = torch.tensor([[0.01, 3.0]], dtype=torch.float64)  # the small one has the room of the pair's length
        check_pair_units((pair + torch.tensor([[eps, 0.0]])).to(dtype), pair)
        with pytest.raises(AssertionError):
            check_pair_units((pair + torch.tensor([[4 * eps, 0.0]])).to(dtype), pair)


def test_definition_is_held_by_the_floor_alone():
    ref = truth(50)
    check_definition(ref * (1 + 1e-9), ref)
    with pytest.raises(AssertionError):
        check_definition(ref * (1 + 1e-6), ref)


def test_same_bits():
    for dtype in DTYPES:
        x = torch.tensor([0.0, torch.nan, 1.0], dtype=dtype)
        assert same_bits(x, x.clone())
        assert not same_bits(x, torch.tensor([-0.0, torch.nan, 1.0], dtype=dtype))
        assert not same_bits(x, x[:2])
    assert not same_bits(torch.ones(2), torch.ones(2).half())
    assert same_bits(torch.ones(4, 2).t(), torch.ones(2, 4))


@pytest.mark.parametrize("strided", [False, True])
def test_guard_bands(strided):
    x = truth(3, 4, 8).float()
    for write in (None, "inside", "before", "after"):
        g = guard(x, strided)
        assert same_bits(g.view, x) and g.view.is_contiguous() != strided and g.view.stride(-1) == 1
        if write is None:
            g.check("x")
            continue
        {"inside": g.view[1, 2], "before": g.buffer.view(-1)[:1], "after": g.buffer.view(-1)[-1:]}[write].fill_(7.0)
        with pytest.raises(AssertionError, match="was written|were written"):
            g.check("x")


def test_poisoned_memory():
    with poisoned():
        assert torch.empty(100).isnan().all()
        assert torch.empty_like(torch.ones(3, 4).t()).isnan().all()
        assert torch.ones(2).new_empty(50).isnan().all()
        assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
