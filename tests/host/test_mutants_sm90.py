"""Bugs planted into the Hopper forward: each is caught by the checks that guard it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.host import build, test_bwd_mutants, test_launches, test_mutants_sm80
from tests.host.cases import FP16, Case, check_alone, check_isolation, check_rule, check_schedules
from tests.host.planted import Mutant, outcome
from tests.host.test_forward_sm80 import NAMED
from tests.host.test_forward_sm90 import EXTREMES, SHAPES, VOTES, kernel

F = "fwd_sm90.cuh"
PACKS = ("edges", "edges, causal", "chunked prefill", "no keys", "six heads share one")


def values(library: Path) -> None:
    """The rule in order, with the race detector; scores that outgrow their reference."""
    for dim, rows in SHAPES:
        for name in PACKS:
            check_rule(kernel(library, rows), replace(NAMED[name], dim=dim))
        for name in ("scores of hundreds", "scores of hundreds, causal"):
            check_rule(kernel(library, rows), replace(EXTREMES[name], dim=dim))


def orders(library: Path) -> None:
    """The rule with the race detector, in order and in three schedules; long segments, so that every ring turns."""
    for dim, rows in SHAPES:
        for seed in range(4):
            check_rule(kernel(library, rows, seed=seed, grid=2), Case((420, 65, 193), heads=2, dim=dim))
        check_schedules(kernel(library, rows, races=False), Case((300, 65), heads=1, dim=dim, causal=True, dtype=FP16), (1, 2))


def isolation(library: Path) -> None:
    for dim, rows in SHAPES:
        for case in (Case((65, 200, 40), dim=dim), replace(VOTES, dim=dim)):
            for poisoned in range(len(case.lengths)):
                check_isolation(kernel(library, rows), case, poisoned)
            check_alone(kernel(library, rows), case)


V_FREED = "      wgmma_wait<0>();\n      if (lane == 0) mbarrier_arrive(smem + V_EMPTY + 8 * used);\n"
PRODUCTS_FENCE = "      wgmma_fence();\n      scores(s, smem, slot.at, k.at, warpgroup);\n"
ARRIVAL = "        warp_barrier();\n        if (thread_index() % 32 == 0) mbarrier_arrive(smem + V_FULL"

FEW = [
    Mutant("the producer's first parity", F, "K_EMPTY + 8 * stage.at, stage.parity ^ 1)",
           "K_EMPTY + 8 * stage.at, stage.parity)", orders),
    Mutant("too few bytes announced", F, "mbarrier_arrive_expect(k_full, KLayout::BYTES)",
           "mbarrier_arrive_expect(k_full, KLayout::BYTES - 16)", orders),
    Mutant("no fence before the products", F, PRODUCTS_FENCE, PRODUCTS_FENCE.split("\n", 1)[1], orders),
    Mutant("zeros without their proxy fence", F, "        fence_proxy_async();\n", "", orders),
    Mutant("V is freed before the wait", F, V_FREED, "\n".join(V_FREED.split("\n")[1::-1]) + "\n", orders),
    Mutant("K is freed while S is under way", F, "      wgmma_wait<1>();\n", "      wgmma_wait<2>();\n", orders),
    Mutant("the swizzle of narrow columns", "layout_sm90.cuh", "(8 * 32 >> 4) | (3u << 30)",
           "(8 * 32 >> 4) | (2u << 30)", values),
    Mutant("distance of V's column groups", F, "(v | (KEYS * V_ROW >> 4 << 16))", "(v | (KEYS * 64 >> 4 << 16))", values),
    Mutant("rows that are nobody's vote", F, "((row < work.rows) & first)", "(first)", isolation),
    Mutant("V past the segment is not zeroed", F, "(KEYS - valid) * V_ROW);", "0);", isolation),
]  # fmt: skip
MORE = [
    Mutant("rows of the accumulator swapped", F, "pack<BF16>(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1]",
           "pack<BF16>(o[4 * i + 2 * (1 - r)] * inverse, o[4 * i + 2 * (1 - r) + 1]", values),
    Mutant("one lane arrives before the others' zeros", F, ARRIVAL, ARRIVAL.split("\n", 1)[1], orders),
    Mutant("parity of a ring stays", F, "if (++at == SIZE) at = 0, parity ^= 1;", "if (++at == SIZE) at = 0;", orders),
    Mutant("mask one key too far", F, "8 * (i / 4) + i % 2 >= limit", "8 * (i / 4) + i % 2 > limit", values),
    Mutant("an arrival too few frees a stage", F, "mbarrier_init(smem + V_EMPTY + 8 * i, 4 * CONSUMERS);",
           "mbarrier_init(smem + V_EMPTY + 8 * i, 4 * CONSUMERS - 1);", orders),
    Mutant("causal diagonal one short", F, "row + 8 * r + work.diagonal + 1 - column",
           "row + 8 * r + work.diagonal - column", values),
    Mutant("the mask is skipped too early", F, "(block + 1) * KEYS > first_masked", "block * KEYS > first_masked", values),
    Mutant("initialised mbarriers are not fenced", F, "      fence_mbarrier_init();\n", "", orders),
    Mutant("no barrier after mbarriers", F, "    barrier();\n    const int warp", "    const int warp", orders),
    Mutant("query heads map to key heads by remainder", F, "tile.head / group", "tile.head % problem.Hk", values),
    Mutant("o of the next tile's rows", F, "store(args, work, row, o, done);", "store(args, ahead, row, o, done);", values),
    Mutant("sums of the next tile", F, "store(args, work, row, o, done);", "store(args, work, row, o, state);", values),
    Mutant("more registers than there are", F, "CONSUMERS == 3 ? 160 :", "CONSUMERS == 3 ? 168 :", orders),
    Mutant("registers that were not there at the launch", F, "CONSUMERS == 3 ? 32 : 40", "CONSUMERS == 3 ? 32 : 48", orders),
    Mutant("the tail's V is announced as whole", F, "(partial ? V_TAIL : V_FULL)", "(partial ? V_FULL : V_FULL)", orders),
    Mutant("o is not rescaled", F, "            rescale(o, factor);\n", "", values),
    Mutant("sums of a block that is done again", F, "            state.sum[0] = before[0];\n", "", values),
    Mutant("a box one row off", F, "barrier, 64 * i, row, head);", "barrier, 64 * i, row + 1, head);", values),
    Mutant("lse of a row without keys", F, "problem.T) + token] = -INFINITY;", "problem.T) + token] = 0.0f;", values),
    Mutant("a turn that is never passed on", F,
           "if (TURNS) named_barrier_arrive(TURN + (warpgroup + 1) % CONSUMERS, 256);", "", orders),
    Mutant("o with q's stride", F, "token * problem.o_stride_t + work.head * problem.o_stride_h;\n      // Four",
           "token * problem.q_stride_t + work.head * problem.o_stride_h;\n      // Four", values),
    Mutant("the other row's reference", "softmax_sm90.cuh", "-top[i / 2 % 2]), i);", "-top[i % 2]), i);", values),
    Mutant("a sum that is not rescaled", "softmax_sm90.cuh", "      sum[r] *= factor[r];\n", "", values),
    Mutant("halves of P swapped", F, "pack<BF16>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1])",
           "pack<BF16>(s[8 * i + 2 * j + 1], s[8 * i + 2 * j])", values),
    Mutant("keys of the second half a row off", F, "lane / 16 * 8 + lane % 8, step, lane / 8 % 2)",
           "lane / 16 * 8 + (lane + 1) % 8, step, lane / 8 % 2)", values),
]  # fmt: skip


def caught(mutant: Mutant, folder: Path) -> str:
    library = build.library(build.altered(folder, mutant.file, mutant.old, mutant.new))
    return outcome(mutant.check, library)


def test_every_planted_bug_has_its_place():
    """Those of the long tests too: each text stands once in its file, so that a change of the source does not go by unseen."""
    forward = [*test_mutants_sm80.FEW, *test_mutants_sm80.MORE]
    backward, launches = test_bwd_mutants.MUTANTS, test_launches.MUTANTS
    places = [(m.file, m.old) for m in (*forward, *FEW, *MORE)]
    places += [(file, old) for file, old, *_ in (*backward.values(), *launches.values())]
    wrong = [(file, old) for file, old in places if (build.CSRC / file).read_text().count(old) != 1]
    assert not wrong
    counts = len(forward), len(FEW + MORE), len(backward), len(launches)
    told = "{} bugs in the sm_80 forward, {} in the Hopper forward, {} in the sm_80 backward, {} in the launches"
    assert told.format(*counts) in (build.ROOT / "docs" / "host-execution.md").read_text()


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
