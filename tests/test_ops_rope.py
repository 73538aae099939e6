"""Rotary embeddings: units in the last place, positions to 128k, strided heads of a fused qkv, the in-place variants."""

from __future__ import annotations

import functools

import pytest
import torch

from qwen2vl_fast import ops, reference
from qwen2vl_fast.ops import checks
from tests import oracle
from tests.compare import HALVES, check, check_pair_units, error, guard, same_bits
from tests.samples import SAMPLES, mrope, vision_rope
from tests.test_ops_every import dtypes, usable

pytestmark = pytest.mark.usefixtures("poison")
halves = pytest.mark.parametrize("dtype", HALVES)
IN_PLACE = {"mrope": "mrope_", "mrope_batch": "mrope_", "vision_rope": "vision_rope_"}


def randn(*size: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def integers(high: int, *size: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(high)).to(device)


def check_units(op: str, dtype: torch.dtype, high: int, device: str = "cpu", ops=ops) -> None:
    """Every rotated pair within one unit in the last place of its length from the correctly rounded result."""
    dim, axes = (128, 3) if op == "mrope" else (80, 2)
    q, k = (randn(300, heads, dim, seed=heads, device=device, dtype=dtype) for heads in (4, 1))
    positions = integers(high, axes, 300, device=device)
    for backend in usable(op, device):
        found = getattr(ops, op)(q, k, positions, backend=backend)
        expected = getattr(reference, op)(q.double(), k.double(), positions)
        for name, out, ref in zip("qk", found, expected, strict=True):
            check_pair_units(out, ref, f"{op} {name} to position {high} {backend}")


@halves
@pytest.mark.parametrize("op", ["mrope", "vision_rope"])
@pytest.mark.parametrize("high", [1, 100, 131072])
def test_units(op, dtype, high, device):
    check_units(op, dtype, high, device)


def check_far_positions(dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Fault 8: at position 131071 the angles are still those of float32 frequencies times integers, as the oracle has them.

    A table rounded to bf16 is wrong by up to 256 radians there.
    """
    positions = torch.tensor([131071, 131070, 65537, 32769, 257])
    table = reference.inverse_frequencies(128, 1e6).tolist()
    x = randn(5, 1, 128, dtype=dtype)
    for axis, sections in enumerate(((64, 0, 0), (0, 64, 0), (0, 0, 64))):
        ids = torch.zeros(3, 5, dtype=torch.int64)
        ids[axis] = positions
        truth = oracle.mrope(x, ids, table, sections)
        peer = reference.mrope(x, x, ids, sections=sections)[0]
        for backend in usable("mrope", device):
            out, _ = ops.mrope(x.to(device), x.to(device), ids.to(device), sections=sections, backend=backend)
            check(out.cpu(), truth, [error(peer, truth)], name=f"axis {axis} {backend}")
    ids = torch.stack((positions, positions.flip(0)))
    x = x[..., :80].contiguous()
    truth = oracle.vision_rope(x, ids, reference.inverse_frequencies(40, 1e4).tolist())
    peer = reference.vision_rope(x, x, ids)[0]
    for backend in usable("vision_rope", device):
        out, _ = ops.vision_rope(x.to(device), x.to(device), ids.to(device), backend=backend)
        check(out.cpu(), truth, [error(peer, truth)], name=f"vision {backend}")


@dtypes
def test_far_positions(dtype, device):
    check_far_positions(dtype, device)


def check_exact(op: str, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """cos 0 = 1 and sin 0 = 0 are exact: position 0 changes no bit, and attention_scaling 2 doubles."""
    dim, axes = (128, 3) if op == "mrope" else (80, 2)
    q = randn(6, 2, dim, device=device, dtype=dtype)
    positions = torch.zeros(axes, 6, dtype=torch.int64, device=device)
    for backend in usable(op, device):
        for out in getattr(ops, op)(q, q, positions, backend=backend):
            assert same_bits(out, q)
        if op == "mrope":
            assert same_bits(ops.mrope(q, q, positions, attention_scaling=2.0, backend=backend)[1], q * 2)


@dtypes
@pytest.mark.parametrize("op", ["mrope", "vision_rope"])
def test_exact(op, dtype, device):
    check_exact(op, dtype, device)


@dtypes
def test_text_is_ordinary_rope(dtype, device):
    """Three equal ids: the sections don't matter."""
    q = randn(20, 2, 128, device=device, dtype=dtype)
    positions = integers(5000, 20, device=device).expand(3, 20)
    for backend in usable("mrope", device):
        found = [ops.mrope(q, q, positions, sections=s, backend=backend)[0] for s in ((16, 24, 24), (64, 0, 0), (1, 2, 61))]
        assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@pytest.mark.parametrize("op", ["mrope", "vision_rope"])
def test_position_dtypes_and_default_table(op, device):
    """int32 and int64 ids, ids with any strides, and the table that is the default passed by hand: the same bits."""
    dim, axes = (128, 3) if op == "mrope" else (80, 2)
    q, positions = randn(9, 2, dim, device=device), integers(9000, axes, 9, device=device)
    table = reference.inverse_frequencies(*((128, 1e6) if op == "mrope" else (40, 1e4))).to(device)
    for backend in usable(op, device):

        def run(ids, backend=backend, **options):
            return getattr(ops, op)(q, q, ids, backend=backend, **options)[0]

        expected = run(positions)
        assert same_bits(run(positions.int()), expected)
        assert same_bits(run(positions.T.contiguous().T), expected)
        assert same_bits(run(positions, inv_freq=table), expected)


def check_in_place(kind: str, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """The same bits as the functional op, None, and nothing else written: not k's neighbours in a fused qkv, not v."""
    for seed in range(8):
        sample = SAMPLES[kind](seed)
        for backend in usable(IN_PLACE[kind], device):
            call, _ = sample.call(dtype, device)
            expected = getattr(ops, sample.op)(**call.tensors, **call.rest, backend=backend)
            for strided in (False, True):
                guards = {n: guard(x, strided) for n, x in call.tensors.items()}
                views = {n: g.view for n, g in guards.items()}
                assert getattr(ops, IN_PLACE[kind])(**views, **call.rest, backend=backend) is None
                assert all(same_bits(views[n], x) for n, x in zip("qk", expected, strict=True)), f"{kind} seed {seed}"
                for n, g in guards.items():
                    views[n].copy_(call.tensors[n])
                    g.check(f"{kind} {n} seed {seed}")


@dtypes
@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place(kind, dtype, device):
    check_in_place(kind, dtype, device)


def check_in_place_blocks(ops=ops, module=checks) -> None:
    """In blocks of one row: a row that two blocks shared would be turned twice."""
    before = module._BLOCK_BYTES
    module._BLOCK_BYTES = 1
    try:
        for kind in IN_PLACE:
            check_in_place(kind, torch.float32, ops=ops)
    finally:
        module._BLOCK_BYTES = before


def test_in_place_blocks():
    check_in_place_blocks()


def fused(dtype: torch.dtype, device: str, tokens: int = 37, heads: int = 3, dim: int = 80) -> torch.Tensor:
    return randn(tokens, 3, heads, dim, device=device, dtype=dtype)


@dtypes
def test_fused_qkv_views(dtype, device):
    """q and k as views of one [T, 3, H, D]: the bits of contiguous ones; in place, v keeps its own."""
    qkv = fused(dtype, device)
    positions = integers(60, 2, 37, device=device)
    for backend in usable("vision_rope", device):
        expected = ops.vision_rope(qkv[:, 0].contiguous(), qkv[:, 1].contiguous(), positions, backend=backend)
        for out, plain in zip(ops.vision_rope(qkv[:, 0], qkv[:, 1], positions, backend=backend), expected, strict=True):
            assert same_bits(out, plain) and out.is_contiguous()
        own = qkv.clone()
        ops.vision_rope_(own[:, 0], own[:, 1], positions, backend=backend)
        assert same_bits(own, torch.stack((*expected, qkv[:, 2]), 1))
    heads = qkv[:, :, :, :64].reshape(37, 9, 64)  # and query, key and value heads of one grouped projection side by side
    ids = integers(60, 3, 37, device=device)
    for backend in usable("mrope", device):
        views = ops.mrope(heads[:, :6], heads[:, 6:8], ids, sections=(8, 12, 12), backend=backend)
        plain = (x.contiguous() for x in (heads[:, :6], heads[:, 6:8]))
        assert all(map(same_bits, views, ops.mrope(*plain, ids, sections=(8, 12, 12), backend=backend)))


@pytest.mark.parametrize("op", ["mrope_", "vision_rope_"])
def test_in_place_refuses_gradients(op, device):
    dim, axes = (128, 3) if op == "mrope_" else (80, 2)
    positions = torch.ones(axes, 4, dtype=torch.int64, device=device)
    for which in range(2):
        tensors = [randn(4, 1, dim, device=device) for _ in range(2)]
        tensors[which].requires_grad_()
        before = [x.detach().clone() for x in tensors]
        with pytest.raises(RuntimeError, match=f"{op} works in place and has no gradient; use {op[:-1]}"):
            getattr(ops, op)(*tensors, positions)
        assert all(map(same_bits, (x.detach() for x in tensors), before))
        with torch.no_grad():
            assert getattr(ops, op)(*tensors, positions) is None
        assert not same_bits(tensors[which].detach(), before[which])


def check_saved_tensors(op: str, backend: str, device: str) -> None:
    """What autograd saved and an op then wrote into is an error in the backward, as with torch's own ops in place."""
    dim, axes = (128, 3) if op == "mrope_" else (80, 2)
    positions = torch.ones(axes, 4, dtype=torch.int64, device=device)
    for which in range(2):
        tensors = [randn(4, 2, dim, device=device).requires_grad_() for _ in range(2)]
        copies = [x.clone() for x in tensors]
        loss = copies[which].square().sum()
        with torch.no_grad():
            getattr(ops, op)(*copies, positions, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        getattr(ops, op)(*(x.clone() for x in tensors), positions, backend=backend)


def check_places(op: str, backend: str, device: str) -> None:
    """Elements that share their memory are refused, and nothing is written; views that lie between one another are not."""
    dim, axes = (128, 3) if op == "mrope_" else (80, 2)
    positions = torch.ones(axes, 4, dtype=torch.int64, device=device)
    row, whole, other = (randn(n, 6, dim, device=device) for n in (1, 5, 4))
    before = [x.clone() for x in (row, whole, other)]
    run = functools.partial(getattr(ops, op), position_ids=positions, backend=backend)
    for q, k in (
        (row.expand(4, -1, -1), other), (other, row.expand(4, -1, -1)), (other[:, :1].expand(-1, 3, -1), whole[1:]),
        (other, other), (other, other[:, :2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="written in place"):
            run(q, k)
    assert all(map(same_bits, (row, whole, other), before))
    run(whole[:4, :4], whole[:4, 4:])
    run(whole[1:, ::2], whole[1:, 1::2])
    run(other, other[:, :0])
    run(row[:, :0].expand(4, -1, -1), other)


@pytest.mark.parametrize("op", ["mrope_", "vision_rope_"])
def test_in_place_is_seen_by_autograd_and_owns_its_memory(op, device):
    for backend in usable(op, device):
        check_saved_tensors(op, backend, device)
        check_places(op, backend, device)


def test_a_table_made_in_inference_mode_serves_training(device):
    """The default table is kept from call to call; one of another base or size is another."""
    positions = integers(60, 3, 5, device=device)
    for dim, theta in ((16, 77.0), (24, 77.0), (16, 78.0)):
        q, sections = randn(5, 2, dim, device=device), (0, 0, dim // 2)
        with torch.inference_mode():
            expected = ops.mrope(q, q, positions, theta=theta, sections=sections)[0].clone()
        table = reference.inverse_frequencies(dim, theta).to(device)
        for rest in ({"theta": theta}, {"inv_freq": table}):
            leaf = q.clone().requires_grad_()
            out, _ = ops.mrope(leaf, q, positions, sections=sections, **rest)
            assert same_bits(out.detach(), expected)
            assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


@dtypes
@pytest.mark.parametrize("make", [mrope, vision_rope])
def test_one_token_and_none(make, dtype, device):
    for count in (0, 1):
        sample = make(3)
        segment = {n: x.narrow(sample.axes.get(n, 0), 0, 0) for n, x in sample.segments[0].items()}
        if count:
            segment = {n: torch.ones([1 if i == sample.axes.get(n, 0) else s for i, s in enumerate(x.shape)], dtype=x.dtype)
                       for n, x in segment.items()}  # fmt: skip
        sample.segments = [segment]
        call, _ = sample.call(dtype, device)
        for backend in usable(sample.op, device):
            q, k = (x.requires_grad_() for x in call.tensors.values())
            out = getattr(ops, sample.op)(q, k, **call.rest, backend=backend)
            assert [o.shape for o in out] == [q.shape, k.shape]
            sum(o.float().sum() for o in out).backward()
            assert q.grad.shape == q.shape and q.grad.isfinite().all()


def test_backward_turns_back(device):
    """The gradient of a rotation is the opposite rotation: through both, a tensor comes back (by the rule of units)."""
    q = randn(50, 2, 128, device=device).requires_grad_()
    positions = integers(3000, 3, 50, device=device)
    out, _ = ops.mrope(q, q.detach(), positions)
    (back,) = torch.autograd.grad(out, q, out.detach())
    check_pair_units(back.to(torch.bfloat16), q.detach().double())


@pytest.mark.parametrize("op", ["mrope", "vision_rope"])
def test_offsets_beyond_int32(op, device):
    """Two tokens 2^31 elements apart in a strided view; on the CPU the memory between them is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    dim, axes = (128, 3) if op == "mrope" else (80, 2)
    far = 2**31 + 64
    q = torch.empty(far + dim, dtype=torch.float16, device=device).as_strided((2, 1, dim), (far, dim, 1))
    q.copy_(randn(2, 1, dim))
    positions = integers(500, axes, 2, device=device)
    for backend in usable(op, device):
        expected, _ = getattr(ops, op)(q.contiguous(), q.contiguous(), positions, backend=backend)
        assert same_bits(getattr(ops, op)(q, q, positions, backend=backend)[0], expected)
        saved = q.clone()
        getattr(ops, op + "_")(q, q[:, :0], positions, backend=backend)
        assert same_bits(q.contiguous(), expected)
        q.copy_(saved)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["mrope", "vision_rope"])
def test_more_than_int32_elements(op):
    """Fault 20: 262 144 tokens x 64 heads x 128 are 2^31 elements; the last tokens come out as they do alone."""
    dim, axes = (128, 3) if op == "mrope" else (128, 2)
    tokens = 262_144 + 8
    q = torch.randn(tokens, 64, dim, dtype=torch.bfloat16, device="cuda")
    k = torch.randn(tokens, 1, dim, dtype=torch.bfloat16, device="cuda")
    positions = torch.randint(131072, (axes, tokens), device="cuda")
    for backend in usable(op, "cuda"):
        found = getattr(ops, op)(q, k, positions, backend=backend)
        for rows in (slice(0, 8), slice(tokens - 8, tokens), slice(131_070, 131_078)):
            alone = getattr(ops, op)(q[rows], k[rows], positions[:, rows], backend=backend)
            assert all(same_bits(x[rows], y) for x, y in zip(found, alone, strict=True))
        del found
