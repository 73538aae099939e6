"""Bugs planted into the sm_80 forward: each is caught by the checks that guard it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare import same_bits
from tests.host import build
from tests.host.cases import BF16, FP16, Case, check_alone, check_isolation, check_rule, check_schedules
from tests.host.planted import Mutant, outcome, sanitized_forward
from tests.host.runner import Kernel
from tests.host.test_forward_sm80 import NAMED, SEEDS

F = "fwd_sm80.cuh"


def kernels(library: Path, **options) -> list[Kernel]:
    return [Kernel(library, "sm_80", rows, **options) for rows in (64, 128)]


def values(library: Path) -> None:
    """The rule, without the race detector."""
    for kernel in kernels(library, races=False):
        for name in NAMED:
            check_rule(kernel, NAMED[name])


def orders(library: Path) -> None:
    """The rule with the race detector, and five shuffled schedules without it."""
    for dim in (80, 128):
        for kernel in kernels(library):
            check_rule(kernel, Case((1, 63, 130, 0, 17), dim=dim))
            check_schedules(replace(kernel, races=False), Case((130, 65), dim=dim), SEEDS)


def isolation(library: Path) -> None:
    for kernel in kernels(library):
        for poisoned in (0, 1, 2):
            check_isolation(kernel, Case((65, 30, 40)), poisoned)
        check_alone(kernel, Case((65, 30, 40), causal=True))


LOOP_BARRIER = "      barrier();  // this step's keys are here for all, and nobody reads the last step's any more\n"
Q_BARRIER = "        barrier();  // before keys replace q\n"
OUT_BARRIER = "    if (Q_IN_REGISTERS) barrier();  // o goes where other warps may still read keys\n"

FEW = [
    Mutant("mask one key too far", F, "if (column + n * 8 + e >= end)", "if (column + n * 8 + e > end)", values),
    Mutant("mask one key too early", F, "if (column + n * 8 + e >= end)", "if (column + n * 8 + e + 1 >= end)", values),
    Mutant("causal diagonal one short", F, "tile.diagonal + 1) : tile.keys", "tile.diagonal) : tile.keys", values),
    Mutant("no barrier before a stage is read", F, LOOP_BARRIER, "", orders),
    Mutant("no barrier before keys replace q", F, Q_BARRIER, "", orders),
    Mutant("the wait leaves one copy under way", F, "copy_async_wait<0>();", "copy_async_wait<1>();", values),
    Mutant("the next keys into the same stage", F, "memory + (step + 1) % STAGES * STAGE, lane",
           "memory + step % STAGES * STAGE, lane", values),
    Mutant("V past the segment is loaded", F, "v, args.v_stride_t, left, lane", "v, args.v_stride_t, BLOCK_N, lane", isolation),
    Mutant("no warp barrier before rows are written out", F, "    warp_barrier();\n    if (lane >= PIECES",
           "    if (lane >= PIECES", orders),
]  # fmt: skip
MORE = [
    Mutant("rows of V at another padding", F, "values + lane % 16 * ROW", "values + lane % 16 * (ROW - 16)", values),
    Mutant("lse of a row without keys", F, "total == 0.0f ? -INFINITY : (top", "total == 0.0f ? 0.0f : (top", values),
    Mutant("query heads map to key heads by remainder", F, "tile.head / (args.H / args.Hk)", "tile.head % args.Hk", values),
    Mutant("o with q's stride", F, "row * args.o_stride_t) + lane", "row * args.q_stride_t) + lane", values),
    Mutant("no barrier before o replaces keys", F, OUT_BARRIER, "", orders),
    Mutant("o is not rescaled", F, "          o[i][n][2 * half] *= shrink;\n", "", values),
    Mutant("the sum is not rescaled", F, "fmaf(sum[i][half], shrink, added)", "sum[i][half] + added", values),
    Mutant("-inf minus -inf", F, "after == -INFINITY ? 0.0f : after", "after", values),
    Mutant("division by an empty sum", F, "total == 0.0f ? 0.0f : 1.0f / total", "1.0f / total", values),
    Mutant("a row too many is written", F, "row < tile.rows) {\n        *re", "row <= tile.rows) {\n        *re", values),
    Mutant("halves of P swapped", F, "a[i][1] = pack<BF16>(p[i][2 * k][2], p[i][2 * k][3]);",
           "a[i][1] = pack<BF16>(p[i][2 * k][3], p[i][2 * k][2]);", values),
    Mutant("lse in units of log2", F, " * 0.693147180559945309f", "", values),
    Mutant("lse of another row", F, "(top[i][half] + log2f", "(top[i][0] + log2f", values),
    Mutant("the mask is skipped too early", F, "end > warp_row + tile.diagonal + 1)",
           "end > warp_row + tile.diagonal + 33)", values),
    Mutant("the maximum of half a row", F, "highest = fmaxf(highest, shuffle_xor(highest, 2));",
           "highest = fmaxf(highest, shuffle_xor(highest, 1));", values),
    Mutant("lse of another head", F, "static_cast<int64_t>(tile.head) * args.T",
           "static_cast<int64_t>(tile.head / 2) * args.T", values),
    Mutant("q one row off", F, "* 16 + lane % 16) * ROW + k * 32", "* 16 + (lane + 1) % 16) * ROW + k * 32", values),
]  # fmt: skip


def caught(mutant: Mutant, folder: Path) -> str:
    library = build.library(build.altered(folder, mutant.file, mutant.old, mutant.new))
    return outcome(mutant.check, library)


@pytest.mark.parametrize("check", [values, orders, isolation])
def test_the_kernel_itself_passes(check):
    assert outcome(check, build.library()) == "passed"


@pytest.mark.parametrize("mutant", FEW, ids=lambda m: m.name)
def test_mutants(mutant, tmp_path):
    assert caught(mutant, tmp_path) != "passed"


@pytest.mark.full
@pytest.mark.parametrize("mutant", MORE, ids=lambda m: m.name)
def test_more_mutants(mutant, tmp_path):
    assert caught(mutant, tmp_path) != "passed"


def test_sanitized(tmp_path):
    """With the address and undefined-behaviour sanitizers, on buffers without a byte to spare; the same bits as without."""
    program = build.program()
    plain = build.library()
    for rows, case in ((64, Case((65, 0, 3, 130))), (128, Case((33, 97), (40, 30), dim=128, causal=True, dtype=FP16)),
                       (64, Case((1, 64), dim=64, dtype=BF16))):  # fmt: skip
        case = replace(case, layout="contiguous")
        call = case.call()
        for seed in (0, 3):
            found = sanitized_forward(program, tmp_path, "sm_80", rows, case, seed)
            expected = Kernel(plain, "sm_80", rows)(**call.tensors, **call.rest)
            assert all(map(same_bits, found, expected))


def test_sanitizers_see_a_read_past_the_end(tmp_path):
    """K of the keys past a segment are masked: only an address tells that they were read."""
    source = build.altered(tmp_path, F, "k, args.k_stride_t, left, lane", "k, args.k_stride_t, BLOCK_N, lane")
    folder = tmp_path / "call"
    folder.mkdir()
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        program = build.program(source)
        sanitized_forward(program, folder, "sm_80", 64, Case((65,), layout="contiguous"))
