"""Variable-length attention: segments, masks, grouped heads, strided views, exact cases, long segments."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from qwen2vl_fast import ops, positions, reference
from tests import oracle
from tests.compare import FORWARD, GRADIENT, Call, bounds_of, check, check_lse, error, evaluate, judge, same_bits, upstream_of
from tests.samples import PEERS
from tests.test_ops_every import dtypes, usable
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")


def packed(
    lengths, *, heads=4, heads_k=2, dim=16, keys=None, seed=0, device="cpu", dtype=torch.float32
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(q, k, v) and (cu_seqlens, and cu_seqlens_k where keys are given) of these lengths."""
    other = lengths if keys is None else keys
    shapes = {"q": (sum(lengths), heads, dim), "k": (sum(other), heads_k, dim), "v": (sum(other), heads_k, dim)}
    tensors = {n: randn(*s, seed=seed + i, device=device, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    bounds = {"cu_seqlens": lengths} | ({} if keys is None else {"cu_seqlens_k": keys})
    return tensors, {n: torch.tensor(bounds_of(v), dtype=torch.int32, device=device) for n, v in bounds.items()}


CASES = {
    "one token": {"lengths": [1], "causal": True},
    "one 2x2 image": {"lengths": [4]},
    "empty segments": {"lengths": [0, 5, 0, 0, 3, 0]},
    "all empty": {"lengths": [0, 0]},
    "no segments": {"lengths": []},
    "no keys": {"lengths": [3, 4], "keys": [0, 5]},
    "no queries": {"lengths": [0, 4], "keys": [6, 5]},
    "no keys at all": {"lengths": [3, 4], "keys": [0, 0], "causal": True},
    "chunk": {"lengths": [3, 1, 4], "keys": [9, 7, 4], "causal": True},
    "blind rows": {"lengths": [5, 6, 2], "keys": [2, 5, 2], "causal": True},
    "blind rows, equal lengths": {"lengths": [4, 4, 4], "keys": [2, 2, 2], "causal": True},
    "equal lengths": {"lengths": [7] * 5, "causal": True},
    "one query head a key head": {"lengths": [6, 3], "heads": 2, "heads_k": 2, "causal": True},
    "one key head": {"lengths": [6, 3], "heads": 6, "heads_k": 1},
}


def check_case(name: str, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Against the oracle, with gradients against the definition; rows without keys give 0, -inf and no gradient."""
    case = dict(CASES[name])
    causal = case.pop("causal", False)
    tensors, bounds = packed(**case, device=device, dtype=dtype)
    rest = {**bounds, "causal": causal, "return_lse": True}
    lists = [bounds[n].tolist() if n in bounds else bounds["cu_seqlens"].tolist() for n in ("cu_seqlens", "cu_seqlens_k")]
    truth, truth_lse = oracle.attention(*tensors.values(), *lists, 16**-0.5, causal)
    for backend in usable("varlen_attention", device):
        function = functools.partial(ops.varlen_attention, backend=backend)
        call = Call(tensors, rest)
        definition, peers = reference.varlen_attention, PEERS["varlen_attention"]
        (o, lse), grads = judge(function, definition, call, peers=peers, without=(1,), name=f"{name} {backend}")
        peer, _ = evaluate(definition, call)[0]
        check(o.cpu(), truth, [error(peer.cpu(), truth)], k=FORWARD, name=f"{name} {backend}")
        check_lse(lse.cpu(), truth_lse, f"{name} {backend}")  # torch's own, in half precision, is 5e-5 off on AVX2
        blind = truth_lse[0] == -torch.inf
        assert not o.cpu()[blind].any() and (lse.cpu()[:, blind] == -torch.inf).all()
        assert not grads["q"].cpu()[blind].any()
        assert lse.dtype == torch.float32


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype, device):
    check_case(name, dtype, device)


def test_lse_has_no_gradient(device):
    tensors, bounds = packed([5, 3], device=device)
    for backend in usable("varlen_attention", device):
        leaves = [x.requires_grad_() for x in tensors.values()]
        o, lse = ops.varlen_attention(*leaves, **bounds, return_lse=True, backend=backend)
        assert o.requires_grad and not lse.requires_grad
        assert not isinstance(ops.varlen_attention(*tensors.values(), **bounds, backend=backend), tuple)


def check_exact(dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """One key far ahead of the others: its weight is 1, the others' underflow, and its value comes out bit for bit.

    Every query of a segment picks another key, so that a mask or a boundary shifted by one shows.
    """
    lengths, dim = [5, 3, 8, 1], 16
    tensors, bounds = packed(lengths, heads=2, heads_k=2, dim=dim, device=device, dtype=dtype)
    starts = bounds["cu_seqlens"].tolist()
    total = sum(lengths)
    codes = torch.zeros(total, dim, dtype=torch.float64)
    for start, length in zip(starts, lengths, strict=False):
        codes[torch.arange(start, start + length), torch.arange(length)] = 64
    tensors["q"].copy_(codes[:, None].expand(-1, 2, -1) * 64)
    tensors["k"].copy_(codes[:, None].expand(-1, 2, -1))
    rows = torch.arange(total, device=device)
    for backend in usable("varlen_attention", device):
        for causal in (False, True):
            o = ops.varlen_attention(**tensors, **bounds, scale=0.25, causal=causal, backend=backend)
            assert torch.equal(o, tensors["v"]), f"{backend} causal={causal}"
        picks = torch.cat([torch.arange(s, s + n).flip(0) for s, n in zip(starts, lengths, strict=False)]).to(device)
        o = ops.varlen_attention(tensors["q"][picks], tensors["k"], tensors["v"], **bounds, scale=0.25, backend=backend)
        assert torch.equal(o, tensors["v"][picks]), backend
        single = torch.arange(total + 1, dtype=torch.int32, device=device)
        assert torch.equal(ops.varlen_attention(**tensors, cu_seqlens=single, backend=backend), tensors["v"][rows])


@dtypes
def test_exact(dtype, device):
    check_exact(dtype, device)


@dtypes
def test_fused_qkv_views(dtype, device):
    """q, k, v as views of one [T, 3, H, 80]: the bits of contiguous ones, forward and backward."""
    lengths = [24, 40, 4]
    qkv = randn(68, 3, 2, 80, device=device, dtype=dtype)
    bounds = torch.tensor(bounds_of(lengths), dtype=torch.int32, device=device)
    upstream = randn(68, 2, 80, seed=1, device=device, dtype=dtype)
    for backend in usable("varlen_attention", device):
        found = []
        for views in (qkv.unbind(1), [x.contiguous() for x in qkv.unbind(1)]):
            leaves = [x.detach().requires_grad_() for x in views]
            o = ops.varlen_attention(*leaves, bounds, backend=backend)
            assert o.is_contiguous()
            found.append((o.detach(), *torch.autograd.grad(o, leaves, upstream)))
        assert all(map(same_bits, *found)), backend
        one = qkv.clone().requires_grad_()  # and through the views into the gradient of the fused tensor
        ops.varlen_attention(*one.unbind(1), bounds, backend=backend).backward(upstream)
        assert same_bits(one.grad, torch.stack(found[0][1:], 1)), backend


def test_schedule_and_longest_change_nothing(device):
    grid = torch.tensor([[2, 4, 4], [1, 2, 6]])
    bounds = positions.vision_cu_seqlens(grid).to(device)
    schedule = positions.attention_schedule(grid, heads=4, device=device)
    tensors, _ = packed([44], device=device)
    for backend in usable("varlen_attention", device):
        expected = ops.varlen_attention(**tensors, cu_seqlens=bounds, backend=backend)
        for extra in ({"schedule": schedule}, {"max_seqlen": 16}, {"max_seqlen": 16, "max_seqlen_k": 16}):
            assert same_bits(ops.varlen_attention(**tensors, cu_seqlens=bounds, **extra, backend=backend), expected)


@dtypes
def test_grouped_heads_are_repeated_heads(dtype, device):
    tensors, bounds = packed([9, 30], heads=6, heads_k=2, dim=64, device=device, dtype=dtype)
    repeated = {n: x if n == "q" else x.repeat_interleave(3, 1) for n, x in tensors.items()}
    for backend in usable("varlen_attention", device):
        for causal in (False, True):
            outs = [ops.varlen_attention(**t, **bounds, causal=causal, backend=backend) for t in (tensors, repeated)]
            assert same_bits(*outs), backend


def check_chunks(dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Causal attention of a sequence in chunks over its growing keys equals that of the whole (prefill in pieces)."""
    tensors, bounds = packed([23], device=device, dtype=dtype)
    wide = {n: x.double() for n, x in tensors.items()}
    truth = reference.varlen_attention(**wide, **bounds, causal=True)
    peers = [error(peer(**tensors, **bounds, causal=True), truth) for peer in PEERS["varlen_attention"]]
    for backend in usable("varlen_attention", device):
        pieces, start = [], 0
        for size in (9, 1, 6, 7):
            end = start + size
            ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (size, end)]
            k, v = (tensors[n][:end] for n in "kv")
            chunk = tensors["q"][start:end]
            pieces.append(ops.varlen_attention(chunk, k, v, ends[0], cu_seqlens_k=ends[1], causal=True, backend=backend))
            start = end
        check(torch.cat(pieces), truth, peers, name=f"chunks {backend}")


@dtypes
def test_chunks(dtype, device):
    check_chunks(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(dtype, device):
    """Scores of thousands overflow no exponential."""
    tensors, bounds = packed([12, 5], device=device, dtype=dtype)
    tensors["q"] *= 1000
    for backend in usable("varlen_attention", device):
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        o, lse = ops.varlen_attention(**leaves, **bounds, return_lse=True, backend=backend)
        o.float().sum().backward()
        assert all(x.isfinite().all() for x in (o, lse, *(leaf.grad for leaf in leaves.values())))


def test_more_than_65535_segments(device):
    """70 000 frame pairs of one token, and some longer ones among them."""
    lengths = [1] * 70_000 + [3, 4]
    tensors, bounds = packed(lengths, heads=1, heads_k=1, dim=8, device=device)
    for backend in usable("varlen_attention", device):
        o = ops.varlen_attention(**tensors, **bounds, backend=backend)
        assert torch.equal(o[:70_000], tensors["v"][:70_000])
        tail = {n: x[70_000:] for n, x in tensors.items()}
        small = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
        assert same_bits(o[70_000:], ops.varlen_attention(**tail, cu_seqlens=small, backend=backend))


def check_long(lengths: list[int], dtype: torch.dtype, causal: bool, device: str = "cpu", dim: int = 80) -> None:
    """Lengths around the library's block sizes: by the rule, and the same bits alone as in the pack."""
    tensors, bounds = packed(lengths, heads=2, heads_k=2, dim=dim, device=device, dtype=dtype)
    segments = {n: (0, bounds_of(lengths)) for n in ("0", "q", "k", "v")} | {"1": (1, bounds_of(lengths))}
    rest = {**bounds, "causal": causal, "return_lse": True}
    definition, peers = reference.varlen_attention, PEERS["varlen_attention"]
    for backend in usable("varlen_attention", device):
        function = functools.partial(ops.varlen_attention, backend=backend)
        call = Call(tensors, rest, segments)
        (o, _), grads = judge(function, definition, call, peers=peers, without=(1,), name=f"{lengths} {dtype} {backend}")
        upstream = upstream_of((o,), 0)[0]
        starts = bounds_of(lengths)
        for start, end in zip(starts, starts[1:], strict=False):
            alone = {n: x[start:end] for n, x in tensors.items()}
            small = {"cu_seqlens": torch.tensor([0, end - start], dtype=torch.int32, device=device), "causal": causal}
            (piece,), piece_grads = evaluate(function, Call(alone, small), (upstream[start:end],))
            assert same_bits(piece, o[start:end]), f"{start}:{end} {dtype} {backend}"
            for n, g in piece_grads.items():
                assert same_bits(g, grads[n][start:end]), f"gradient of {n} {start}:{end} {dtype} {backend}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_long_segments(dtype, causal, device):
    check_long([200, 33, 31, 200], dtype, causal, device)


@pytest.mark.full
@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_longer_segments(dtype, causal, device):
    check_long([767, 768, 769, 64, 191, 192, 193, 769], dtype, causal, device)
    check_long([2048, 1, 16], dtype, causal, device, dim=128)


def test_gradients_are_held_more_loosely_than_outputs():
    assert (FORWARD, GRADIENT) == (2.0, 3.0)


@pytest.fixture
def varlen_attn(monkeypatch):
    """The way of torch's varlen_attn on the CPU: in its place our torch backend, which says +inf of a row without keys."""
    module = importlib.import_module("qwen2vl_fast.ops.attention")

    def stand_in(q, k, v, bounds, bounds_k, *_, return_aux, scale, window_size):
        o, lse = module._attention(q, k, v, bounds, bounds_k, scale, window_size[1] == 0)
        return o, lse.masked_fill(lse == -torch.inf, torch.inf)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(module, "has_varlen", lambda q: True)


def test_rows_without_keys_where_the_library_says_infinity(varlen_attn):
    tensors, bounds = packed([5, 6, 2], keys=[2, 0, 2], heads=2)
    o, lse = ops.varlen_attention(**tensors, **bounds, causal=True, return_lse=True, backend="torch")
    truth, truth_lse = reference.varlen_attention(**tensors, **bounds, causal=True, return_lse=True)
    assert (truth_lse == -torch.inf).any() and torch.equal(lse == -torch.inf, truth_lse == -torch.inf)
    assert not (lse == torch.inf).any() and not o[truth_lse[0] == -torch.inf].any()


def test_determinism_that_the_library_does_not_give_is_refused(varlen_attn, monkeypatch):
    tensors, bounds = packed([5, 6], heads=2)
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    run = functools.partial(ops.varlen_attention, **leaves, **bounds, backend="torch")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with pytest.raises(RuntimeError, match="deterministic: torch's varlen_attn"):
        run(deterministic=True)
    with torch.no_grad():
        run(deterministic=True)
    run(deterministic=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run(deterministic=True)
