"""The sm_80 backward on the CPU: the tolerance rule, isolation, races, order, planted bugs."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import random

import pytest
import torch

from qwen2vl_fast import reference
from tests.compare import Call, bounds_of, evaluate, judge, same_bits
from tests.host import build
from tests.host.backward import WAYS, Attention, key_tiles, ways
from tests.host.extension import TileList
from tests.host.runner import call, load, packed_bounds, place
from tests.samples import PEERS, enough_rows

EDGES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65)
DTYPES = (torch.bfloat16, torch.float16)


def sample(
    lengths, *, keys=None, heads=2, heads_k=2, dim=80, dtype=torch.bfloat16, seed=0, scale=None, causal=False
) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors (q, k, v; views of one where the lengths are shared) and the rest of a call."""
    generator = torch.Generator().manual_seed(seed)
    total, total_k = sum(lengths), sum(lengths if keys is None else keys)
    if keys is None:
        qkv = torch.randn(total, heads + 2 * heads_k, dim, generator=generator).to(dtype)
        q, k, v = qkv.split((heads, heads_k, heads_k), 1)
    else:
        q = torch.randn(total, heads, dim, generator=generator).to(dtype)
        k, v = (torch.randn(total_k, heads_k, dim, generator=generator).to(dtype) for _ in range(2))
    rest = {"cu_seqlens": packed_bounds(lengths), "causal": causal}
    if keys is not None:
        rest["cu_seqlens_k"] = packed_bounds(keys)
    if scale is not None:
        rest["scale"] = scale
    return {"q": q, "k": k, "v": v}, rest


def hold(op: Attention, lengths, *, keys=None, name="", **options) -> dict[str, torch.Tensor]:
    """Gradients (and outputs) by the rule, per segment."""
    tensors, rest = sample(lengths, keys=keys, **options)
    bounds, bounds_k = bounds_of(lengths), bounds_of(lengths if keys is None else keys)
    segments = {"0": (0, bounds), "1": (1, bounds), "q": (0, bounds), "k": (0, bounds_k), "v": (0, bounds_k)}
    made = Call(tensors, {**rest, "return_lse": True}, segments)
    label = f"{name} {op} {lengths} {keys} {options}"
    _, grads = judge(op, reference.varlen_attention, made, peers=PEERS["varlen_attention"], without=(1,),
                     rms=enough_rows(tensors), name=label)  # fmt: skip
    return grads


def random_case(seed: int) -> dict:
    rng = random.Random(seed)
    heads_k = rng.choice((1, 2))
    count = rng.randint(1, 5)
    lengths = [rng.choice((*EDGES, rng.randint(1, 200))) for _ in range(count)]
    keys = None if rng.random() < 0.6 else [rng.choice((*EDGES, rng.randint(1, 200))) for _ in range(count)]
    return {
        "lengths": lengths, "keys": keys, "heads": heads_k * rng.choice((1, 2, 3)), "heads_k": heads_k,
        "dim": rng.choice((64, 80, 80, 128)), "dtype": rng.choice(DTYPES), "causal": rng.random() < 0.5, "seed": seed,
    }  # fmt: skip


def check_random(seed: int, csrc=build.CSRC) -> None:
    case = random_case(seed)
    rows = random.Random(seed).choice((64, 128))
    for way in ways(case["causal"]):
        hold(Attention(rows, way, grid=1 + seed % 8, seed=seed, csrc=csrc), name=f"seed {seed}", **case)


@pytest.mark.parametrize("seed", range(12))
def test_random_lengths(seed):
    check_random(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12, 600))
def test_more_random_lengths(seed):
    check_random(seed)


CASES = {
    "edges": {"lengths": EDGES},
    "edges of large blocks, causal": {"lengths": (127, 128, 129), "causal": True, "heads": 2, "heads_k": 1},
    "no queries, no keys": {"lengths": (0, 5, 3), "keys": (4, 0, 3)},
    "blind rows": {"lengths": (70, 40), "keys": (3, 33), "causal": True},
    "chunk": {"lengths": (5, 1, 70), "keys": (90, 67, 130), "causal": True},
    "one key head": {"lengths": (33, 20), "heads": 6, "heads_k": 1},
    "empty": {"lengths": (0, 0)},
}


@pytest.mark.parametrize(("name", "way"), [(n, w) for n, case in CASES.items() for w in ways(case.get("causal", False))])
def test_cases(name, way):
    for dim, rows in ((80, 64), (80, 128), (64, 128), (128, 64), (128, 128)):
        hold(Attention(rows, way), dim=dim, name=name, **CASES[name])


def test_rows_without_keys_have_no_gradient():
    for way in WAYS:
        if way in ways(causal=True):
            grads = hold(Attention(64, way), (70, 9, 4), keys=(3, 9, 0), causal=True)
            assert not grads["q"][:67].any() and not grads["q"][79:].any()
        grads = hold(Attention(64, way), (4, 9), keys=(0, 9))
        assert not grads["q"][:4].any()
        grads = hold(Attention(64, way), (0, 9), keys=(3, 9))
        assert not grads["k"][:3].any() and not grads["v"][:3].any()


def gradients(op: Attention, tensors, rest) -> dict[str, torch.Tensor]:
    total = tensors["q"].shape
    upstream = torch.randn(total, generator=torch.Generator().manual_seed(1)).to(tensors["q"].dtype)
    return evaluate(op, Call(tensors, rest), (upstream, None))[1]


def check_low_scores(csrc=build.CSRC) -> None:
    """A log-sum-exp far below zero: what pads a block of keys must not reach dq as an infinite weight."""
    tensors, rest = sample([9, 40])
    tensors["q"][:] = 20
    tensors["k"][:] = -20 + tensors["k"] / 8
    for rows, way in itertools.product((64, 128), WAYS):
        assert all(g.isfinite().all() for g in gradients(Attention(rows, way, csrc=csrc), tensors, rest).values())


def test_low_scores():
    check_low_scores()


def check_isolation(csrc=build.CSRC) -> None:
    """NaN in one segment, or another neighbour, changes no bit of another's gradients; alone as in the pack."""
    lengths = [70, 1, 33]
    starts = bounds_of(lengths)
    for rows, causal, way in itertools.product((64, 128), (False, True), WAYS):
        if way not in ways(causal):
            continue
        tensors, rest = sample(lengths, causal=causal)
        op = Attention(rows, way, grid=8 if way == "in turn" else 1, csrc=csrc)
        expected = gradients(op, tensors, rest)
        for sick, (start, end) in enumerate(itertools.pairwise(starts)):
            ill = {n: x.clone() for n, x in tensors.items()}
            for x in ill.values():
                x[start:end] = torch.nan
            for name, x in gradients(op, ill, rest).items():
                for other, (a, b) in enumerate(itertools.pairwise(starts)):
                    assert other == sick or same_bits(x[a:b], expected[name][a:b]), f"{name}: {sick} reached {other}"


def test_isolation():
    check_isolation()


def check_order(csrc=build.CSRC) -> None:
    """The deterministic mode: the same bits in any order of tiles, on any number of blocks, in any schedule of threads."""
    tensors, rest = sample([150, 64, 20], causal=True)
    expected = gradients(Attention(64, grid=1, csrc=csrc), tensors, rest)
    for seed in range(1, 4):
        op = Attention(64, grid=1 + seed, seed=seed, shuffled=True, csrc=csrc)
        for name, x in gradients(op, tensors, rest).items():
            assert same_bits(x, expected[name]), f"{name}, seed {seed}"
        for rows in (64, 128):
            hold(Attention(rows, "added", grid=1, seed=seed, csrc=csrc), [150, 64, 20], causal=True)


def test_order():
    check_order()


def check_turns(csrc=build.CSRC) -> None:
    """In turn: no addition without its place in the order, hence the same bits in any schedule of threads and blocks.

    Around the steps where all blocks of a segment run at once (5 of 20 resident ones), one behind the other where they may not.
    """
    for lengths, keys, heads, dim, sizes in (
        ([270, 64, 20, 1], None, 4, 80, ((64, 20), (64, 3), (128, 12))),
        ([33, 70], [180, 3], 2, 64, ((64, 20), (64, 3), (128, 12))),
        ([70, 70, 1, 1, 1, 1, 70, 70, 70], None, 2, 64, ((64, 4),)),  # short ones: a block may take two of a segment at once
    ):
        tensors, rest = sample(lengths, keys=keys, heads=heads, heads_k=heads // 2, dim=dim)
        for rows, grid in sizes:
            op = Attention(rows, "in turn", grid=grid, csrc=csrc)
            expected = gradients(op, tensors, rest)
            assert all(x.isfinite().all() for x in expected.values())
            for seed in range(1, 4):
                for name, x in gradients(dataclasses.replace(op, seed=seed), tensors, rest).items():
                    assert same_bits(x, expected[name]), f"{name}, seed {seed}, {op}"


def test_turns():
    check_turns()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_block_sizes_change_no_bit(dim, causal):
    """Of dk, dv and of dq in two passes: a segment may get blocks of 64 alone and of 128 in a pack. In turn they do."""
    tensors, rest = sample([150, 64, 20, 1, 0, 129], dim=dim, heads_k=1, causal=causal)
    for way in WAYS[:2]:
        small, large = (gradients(Attention(rows, way, races=False), tensors, rest) for rows in (64, 128))
        for name in "qkv" if way == "two passes" else "kv":
            assert same_bits(small[name], large[name]), name


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("seed", range(40))
def test_key_tiles_from_boundaries(seed, rows):
    """The list by keys that the device builds is the one of the description, head after head and with idle tiles."""
    case = random_case(seed)
    lengths, heads = case["lengths"], case["heads_k"]
    keys = lengths if case["keys"] is None else case["keys"]
    bounds, bounds_k = packed_bounds(lengths), packed_bounds(keys)
    total, total_k = sum(lengths), sum(keys)
    found = torch.full(((total_k // rows + len(keys)) * heads + 2, 8), -1, dtype=torch.int32)
    pointers = (x.data_ptr() for x in (bounds, bounds_k, found))
    arguments = TileList(*pointers, len(lengths), total, total_k, heads, rows, case["causal"], True)
    call(load(build.library()).build_tiles, ctypes.byref(arguments), *place(2), seed=seed)
    assert (found[-2:] == -1).all()
    real = [tile for tile in found[:-2].tolist() if tile[3] > 0]
    assert real == sorted(key_tiles(lengths, keys, heads, rows, case["causal"]).tolist(), key=lambda tile: tile[4])
