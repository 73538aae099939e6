"""The Hopper forward on the host: TMA, wgmma and mbarriers as their twins, in order and in shuffled schedules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl_fast.positions import dealt_tiles
from tests.compare import same_bits
from tests.host import build
from tests.host.cases import BF16, FP16, Case, check_alone, check_isolation, check_rule, check_schedules, drawn
from tests.host.planted import sanitized_forward
from tests.host.runner import Kernel, tiles
from tests.host.test_forward_sm80 import NAMED, SEEDS

SHAPES = [(80, 192), (80, 128), (80, 64), (64, 128), (128, 128)]  # head dim, rows of a tile: what launch_sm90.cu launches
shapes = pytest.mark.parametrize(("dim", "rows"), SHAPES)
EDGES = (64, 96, 128, 192)  # rows of a warpgroup, keys of a block, rows of a tile

EXTREMES = {
    # Scores that outgrow the reference that exponents are taken from, in the first block, later ones, single rows.
    "scores of hundreds": Case((200, 33, 300), scale=4.0, seed=5),
    "scores of hundreds, causal": Case((200, 33, 300), scale=4.0, seed=5, causal=True, dtype=FP16),
    "scores of thousands": Case((130, 300), scale=60.0, seed=7, dtype=FP16),
    "tiny scores": Case((130, 300), scale=1e-4, seed=7),
}
# Tiles with three rows of their own in a warp and the next segment's behind them; scores that grow by more than 2^8 from block
# to block, for which a new reference changes the last bits, and by less than what forces one.
VOTES = Case((259, 323, 40), heads=1, scale=1.0, seed=0)


@pytest.fixture(scope="module")
def library() -> Path:
    return build.library()


def kernel(path: Path, rows: int, **options) -> Kernel:
    return Kernel(path, "sm_90", rows, **options)


@shapes
@pytest.mark.parametrize("name", NAMED)
def test_named(library, name, dim, rows):
    check_rule(kernel(library, rows), replace(NAMED[name], dim=dim))


@shapes
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_scores(library, name, dim, rows):
    check_rule(kernel(library, rows), replace(EXTREMES[name], dim=dim))


@shapes
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_tiles(library, dim, rows, dtype, causal):
    case = Case((95, 96, 97, 0, 127, 129, 191, 193, 1), heads=2, dim=dim, dtype=dtype, causal=causal)
    check_rule(kernel(library, rows), case)


def random_call(library: Path, seed: int, schedule: int = 0) -> tuple[Kernel, Case]:
    dim, rows = SHAPES[seed % len(SHAPES)]
    return kernel(library, rows, grid=1 + seed % 5, seed=schedule), replace(drawn(seed, EDGES, (dim,), longest=420), dim=dim)


@pytest.mark.parametrize("seed", range(24))
def test_random_packs(library, seed):
    check_rule(*random_call(library, seed))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(24, 1024))
def test_many_random_packs(library, seed):
    """random_call(library, seed, seed % 3 * seed) is the failing call; every tenth has all other checks too."""
    own, case = random_call(library, seed, seed % 3 * seed)
    check_rule(own, case)
    if seed % 10 == 0:
        check_alone(own, case)
        check_schedules(own, case, SEEDS)
        for poisoned, length in enumerate(case.lengths):
            if length:
                check_isolation(own, case, poisoned)
                break


@pytest.mark.full
@pytest.mark.parametrize("rows", [192, 128])
def test_thousands_of_tiny_segments_and_a_huge_one(library, rows):
    lengths = (*(1 + n % 3 for n in range(1100)), 1100, *(1 + n % 2 for n in range(1100)))
    check_rule(kernel(library, rows, grid=5, races=False), Case(lengths, heads=1))


@shapes
def test_isolation_and_bits(library, dim, rows):
    case = Case((65, 30, 0, 200, 1), heads=2, dim=dim, causal=dim == 64)
    for poisoned in (0, 1, 3, 4):
        check_isolation(kernel(library, rows), case, poisoned)
    check_alone(kernel(library, rows), case)


@shapes
def test_isolation_where_scores_grow(library, dim, rows):
    """NaN of a neighbour must not enter the vote by which a warp takes a new reference (VOTES)."""
    for poisoned in (0, 1, 2):
        check_isolation(kernel(library, rows), replace(VOTES, dim=dim), poisoned)
    check_alone(kernel(library, rows), replace(VOTES, dim=dim))


@shapes
def test_shuffled_schedules(library, dim, rows):
    for causal in (False, True):
        check_schedules(kernel(library, rows), Case((65, 300, 0, 33), heads=1, dim=dim, causal=causal), SEEDS)


@shapes
def test_one_block_or_many(library, dim, rows):
    """A block that takes all tiles and blocks with one each write the same."""
    call = Case((65, 70, 3, 200), dim=dim).call()
    one, many = (kernel(library, rows, grid=grid)(**call.tensors, **call.rest) for grid in (1, 40))
    assert all(map(same_bits, one, many))


@shapes
def test_dealt_lists(library, dim, rows):
    """A list with entries of no rows among its tiles and at its end writes what the list as it comes writes."""
    case = Case((64, *6 * (40,)), keys=(1200, *6 * (40,)), heads=1, dim=dim)
    call, work = case.call(), tiles(case.lengths, case.key_lengths, 1, rows, False)
    assert (dealt_tiles(work, 2)[:-2, 1] == 0).any(), "no entry of no rows before the last round"
    came, dealt = (kernel(library, rows, grid=2, dealt=x)(**call.tensors, **call.rest) for x in (False, True))
    assert all(map(same_bits, came, dealt))


def test_sanitized(library, tmp_path):
    """With the address and undefined-behaviour sanitizers, on buffers without a byte to spare; the same bits as without."""
    program = build.program()
    for dim, rows in SHAPES:
        case = Case((65, 0, 3, 200), dim=dim, causal=dim == 128, layout="contiguous")
        call = case.call()
        for seed in (0, 3):
            found = sanitized_forward(program, tmp_path, "sm_90", rows, case, seed)
            expected = kernel(library, rows)(**call.tensors, **call.rest)
            assert all(map(same_bits, found, expected))
