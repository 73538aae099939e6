"""What random packs do not bring to the attention kernels: offsets past 2^31, infinities, boundaries that are none."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace

import pytest
import torch

from qwen2vl_fast import ops, reference
from tests.compare import Call, evaluate, same_bits
from tests.host import build
from tests.host import extension as host
from tests.host.backward import UNTAKEN, WAYS, Attention, VarlenAttentionBackward, key_tiles
from tests.host.cases import BF16, FP16, Case, check_rule
from tests.host.extension import TileList
from tests.host.runner import HostError, Kernel, call, load, packed_bounds, place, tiles
from tests.host.test_bwd_sm80 import sample

FAR = 2**30 + 8  # elements: the third of anything is past 2^31


def kernels(dim: int) -> list[Kernel]:
    hopper = [Kernel(build.library(), "sm_90", rows) for rows in ((64, 128, 192) if dim == 80 else (128,))]
    return [*(Kernel(build.library(), "sm_80", rows) for rows in (64, 128)), *hopper]


def far_apart(x: torch.Tensor, axis: int, buffer: torch.Tensor, place: int) -> torch.Tensor:
    """x in the buffer with FAR elements from one index of the axis to the next; `place` tells tensors in it apart."""
    strides = list(x.stride())
    strides[axis] = FAR
    view = buffer.as_strided(x.shape, strides, place * 8192)
    view.copy_(x)
    return view


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_2_31(axis):
    """Tokens, or heads, so far apart that 32 bits don't count the elements between them; only touched pages are memory."""
    buffer = torch.empty(2 * FAR + 2**17, dtype=BF16)
    shape = (3, 2, 80) if axis == 0 else (9, 3, 80)
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(shape, generator=generator).to(BF16) for _ in range(4)]
    far = [far_apart(x, axis, buffer, i) for i, x in enumerate(near)]
    results = []
    for q, k, v, grad in (near, far):
        place = iter(range(4, 8))

        def output(q=q, place=place):
            empty = torch.full(shape, torch.nan, dtype=BF16)
            return empty if q.is_contiguous() else far_apart(empty, axis, buffer, next(place))

        op, heads, length = Attention(64, races=False), shape[1], shape[0]
        o, lse = output(), torch.full((heads, length), torch.nan)
        work, by_keys = tiles([length], [length], heads, 64, False), key_tiles([length], [length], heads, 64, False)
        problem = op.problem(q, k, v, o, lse, work, 80**-0.5, False)
        op.launch("forward", ctypes.byref(problem), b"sm_80", 64)
        found = [o.clone(), lse]
        grads = {name: output() for name in ("dq", "dk", "dv")}
        workspace = [torch.full(size, torch.nan) for size in (lse.shape, lse.shape, shape)]
        turns = torch.full((lse.numel() + 1,), UNTAKEN, dtype=torch.int32)
        views = {"grad": grad, **grads}
        for way in WAYS:
            args = VarlenAttentionBackward(
                problem=problem, key_tiles=by_keys.data_ptr(), key_tile_count=len(by_keys),
                **{name: x.data_ptr() for name, x in views.items()},
                shift=workspace[0].data_ptr(), delta=workspace[1].data_ptr(),
                dq_sum=None if way == "two passes" else workspace[2].data_ptr(),
                turns=turns.data_ptr() if way == "in turn" else None,
                **{f"{n}_stride_{a}": x.stride(i) for n, x in views.items() for i, a in enumerate("th")},
            )  # fmt: skip
            op.launch("backward", ctypes.byref(args), 64, 64)
            found += [x.clone() for x in grads.values()]
        results.append(found)
    assert all(x.isfinite().all() for x in results[0]) and all(map(same_bits, *results))
    bounds = packed_bounds([shape[0]])
    for kernel in kernels(80)[1:]:
        assert all(map(same_bits, kernel(*near[:3], bounds), kernel(*far[:3], bounds)))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_stays_where_it_is(name, value):
    """One element of q spoils its own row, one of k or v every row that sees it, and none hides. Nothing else is touched, but
    by v what shares its segment: under a mask 0 * NaN is NaN, as in PyTorch.
    """
    for causal in (False, True):
        case = Case((70, 40), heads=2, heads_k=1, causal=causal)
        clean = case.call()
        values = case.values()
        values[name][30, 0, 5] = value
        ill = case.call(values)
        seeing = torch.zeros(110, 2, dtype=torch.bool)
        if name == "q":
            seeing[30, 0] = True
        else:
            seeing[30 if causal else 0 : 70] = True
        touched = seeing.clone()
        touched[:70] |= name == "v"
        for kernel in kernels(80):
            expected, (o, lse) = kernel(**clean.tensors, **clean.rest), kernel(**ill.tensors, **ill.rest)
            assert same_bits(o[~touched], expected[0][~touched]) and same_bits(lse.T[~touched], expected[1].T[~touched])
            if value != value or name == "v":
                assert (~o[seeing].isfinite()).any(-1).all(), f"{kernel.name} {name} {value}"
            # An infinity in q or k makes a score of plus or minus infinity: the row is spoilt, or the key has no weight.
            wide = {n: x.double() for n, x in ill.tensors.items()}
            truth = reference.varlen_attention(**wide, **{**ill.rest, "return_lse": False})
            sound = truth.isfinite().all(-1) & seeing
            what = f"{kernel.name} {name} {value}"
            assert o[sound].isfinite().all() and not o[seeing & ~sound].isfinite().all(-1).any(), what


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_extreme_sizes(dtype):
    """Scores of 1e5 and of 1e-3, 64 heads of queries on one of keys: by the rule. Scores of 5e7: finite, no larger than v."""
    for case in (
        Case((33, 70), dtype=dtype, scale=1e4 if dtype == BF16 else 60.0, seed=1),
        Case((33, 70), dtype=dtype, scale=1e-4, seed=1),
        Case((5, 0, 9), heads=64, heads_k=1, dtype=dtype, causal=True),
        Case((3, 130), (200, 1), heads=8, heads_k=1, dtype=dtype),
    ):  # fmt: skip
        for kernel in kernels(80):
            check_rule(kernel, case)
    tensors, rest = sample([20, 40], dtype=FP16)
    tensors["q"][:], tensors["k"][:] = 2500, tensors["k"].sign() * 2500
    for kernel in kernels(80):
        o, lse = kernel(**tensors, **rest)
        assert o.isfinite().all() and lse.isfinite().all() and o.abs().max() <= tensors["v"].abs().max()


def test_no_tokens_or_no_keys(monkeypatch):
    """Nothing to read is nothing to launch, and gradients of what nobody sees are 0."""
    host.install(monkeypatch)
    for lengths, keys in (([0, 0], [4, 5]), ([4, 5], [0, 0]), ([0], [0]), ([], [])):
        tensors, rest = sample(lengths, keys=keys)
        for deterministic in (False, True):
            made = Call(tensors, {**rest, "backend": "cuda", "deterministic": deterministic, "return_lse": True})
            (o, lse), grads = evaluate(ops.varlen_attention, made, (torch.ones_like(tensors["q"]), None))
            assert not o.any() and (lse == -torch.inf).all() and not any(g.any() for g in grads.values())


@pytest.mark.parametrize("by_keys", [False, True])
def test_boundaries_that_are_none(by_keys):
    """A list on a device is checked by nobody: whatever it holds, no tile leaves the tensors."""
    source = random.Random(0)
    for turn in range(60):
        count, rows = source.randint(1, 9), source.choice((64, 128))
        total, total_k = source.randint(0, 500), source.randint(0, 500)
        wild = [-(2**31), -1, 0, 1, 2**31 - 1, total, total + 1]
        bounds, bounds_k = (
            torch.tensor([source.choice((*wild, source.randint(-50, 600))) for _ in range(count + 1)], dtype=torch.int32)
            for _ in range(2)
        )
        slots = ((total_k if by_keys else total) // rows + count) * 2
        found = torch.full((slots + 2, 8), -1, dtype=torch.int32)
        arguments = TileList(bounds.data_ptr(), bounds_k.data_ptr(), found.data_ptr(), count, total, total_k, 2, rows,
                             turn % 2 == 0, by_keys)  # fmt: skip
        call(load(build.library()).build_tiles, ctypes.byref(arguments), *place(1), seed=0)
        assert (found[slots:] == -1).all()
        for q_row, count_q, k_row, count_k, head, *_ in found[:slots].tolist():
            assert 0 <= q_row and 0 <= count_q and q_row + count_q <= total and 0 <= k_row and 0 <= count_k
            assert k_row + count_k <= total_k and head in (0, 1) and (count_k if by_keys else count_q) <= rows


def test_more_than_65535_segments():
    """The list that the device builds of 66 000 segments of one token, two longer ones and empty ones between."""
    lengths = [1] * 33_000 + [0, 130, 0] + [1] * 33_000 + [65]
    bounds, total = packed_bounds(lengths), sum(lengths)
    for by_keys, expected in ((False, tiles(lengths, lengths, 1, 64, True)), (True, key_tiles(lengths, lengths, 1, 64, True))):
        slots = total // 64 + len(lengths)
        found = torch.zeros(slots, 8, dtype=torch.int32)
        pointers = (bounds.data_ptr(), bounds.data_ptr(), found.data_ptr())
        arguments = TileList(*pointers, len(lengths), total, total, 1, 64, True, by_keys)
        call(load(build.library()).build_tiles, ctypes.byref(arguments), *place(4), seed=0, races=False)
        real = [tile for tile in found.tolist() if tile[3 if by_keys else 1] > 0]
        assert sorted(real) == sorted(expected.tolist())


def test_what_no_kernel_takes_is_refused_by_its_host_too():
    """The checks of csrc/checks.h stand before the kernels on the CPU as before those on a device."""
    case = Case((9,))
    kernel = kernels(80)[0]
    made = case.call()
    with pytest.raises(HostError, match="rows: expected 64 or 128 for the sm_80 kernel, got 32"):
        replace(kernel, rows=32)(**made.tensors, **made.rest)
    with pytest.raises(HostError, match="D: expected 64, 80 or 128, got 96"):
        wide = {n: x.new_zeros(9, x.shape[1], 96) for n, x in made.tensors.items()}
        kernel(**wide, **made.rest)
    with pytest.raises(HostError, match="scale: expected a finite positive number"):
        kernel(**made.tensors, **{**made.rest, "scale": -1.0})
