"""Bugs planted into the sm_80 backward: each is caught on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.host import build, test_bwd_sm80
from tests.host.backward import WAYS, Attention, ways
from tests.host.runner import HostError


def check_values(csrc, *, races: bool = False, seed: int = 0) -> None:
    """By the rule and without the race detector: lengths at the edges of blocks and steps, all ways to dq."""
    for way in WAYS:
        op = Attention(64, way, grid=8 if way == "in turn" else 1, seed=seed, races=races, csrc=csrc)
        test_bwd_sm80.hold(op, [65, 1, 0, 130], heads=4, heads_k=2)
        if way in ways(causal=True):
            test_bwd_sm80.hold(op, [65, 30], keys=[70, 150], causal=True)
            test_bwd_sm80.hold(op, [70, 64], keys=[3, 0], causal=True)
        test_bwd_sm80.hold(dataclasses.replace(op, rows=128), [129, 40], heads=4, heads_k=2)


def check_races(csrc) -> None:
    check_values(csrc, races=True)
    for seed in range(1, 4):
        check_values(csrc, races=True, seed=seed)


B, R, S = "bwd_sm80.cuh", "rows_sm80.cuh", "bwd_rows.cuh"
BARRIER = "      barrier();  // this step's rows are here for all, and nobody reads the last step's any more\n"
SLOPES = "        barrier();  // all of dS is there; the next step's first barrier keeps it until all have read it\n"
WAIT = "        if (IN_TURN && thread == THREADS - 33) wait_for_turn(args, index, step);\n"
PASS = "        if (IN_TURN && thread == THREADS - 1) pass_turn(args, index, step);\n"
TAKE = "    if (IN_TURN && thread_index() == 0) store_shared(memory + NUMBER_OFFSET, static_cast<uint32_t>(take_tile(args)));\n"
THERE = "      barrier();  // the tile is there\n"
QUERY_STAGE = "      if (step + 1 < steps) load_step(p, index"
KEY_STAGE = "      if (step + 1 < steps()) statistic = load_step(args, index"

# name -> (file, old, new, check that catches it)
MUTANTS: dict[str, tuple[str, str, str, Callable]] = {
    "dq_sum is not cleared": (S, "target[piece] = Words4{};", "(void)target;", check_values),
    "weights from the wrong scale": (
        B, "x = exp2_fast(fmaf(x, scale_log2, -shift));", "x = exp2_fast(fmaf(x, 0.693f * scale_log2, -shift));", check_values),
    "lse of another row": (
        B, "load_shared_float(stage + STATISTICS + (n * 8 + lane % 4 * 2 + e) * 4);",
        "load_shared_float(stage + STATISTICS + (n * 8 + lane % 4 * 2 + (e ^ 1)) * 4);", check_values),
    "do is read with the strides of o": (
        B, "args.grad, first, args.grad_stride_t, queries.head * args.grad_stride_h,",
        "args.grad, first, p.o_stride_t, queries.head * p.o_stride_h,", check_values),
    "a row without keys has lse -inf": (S, "lse == -INFINITY ? INFINITY : lse", "lse", check_values),
    "the group's last head is left out": (
        B, "(tile.rows + STEP - 1) / STEP * (args.problem.H / args.problem.Hk);",
        "(tile.rows + STEP - 1) / STEP * ((args.problem.H / args.problem.Hk + 1) / 2);", check_values),
    "the group's first head for all": (
        B, "head = tile.head * group + past;", "head = tile.head * group;", check_values),
    "causal mask of dk one too far": (
        B, "i * 16 + half * 8 > end) s", "i * 16 + half * 8 > end + 1) s", check_values),
    "mask of dk left out too early": (
        B, "first < BLOCK - 1)", "first < BLOCK - 9)", check_values),
    "keys past the block's end are not masked": (
        B, " && !(ADD_DQ && tile.keys < BLOCK)) return;", ") return;", test_bwd_sm80.check_low_scores),
    "mask of dq one short": (
        B, "if (n * 8 + e >= end) s", "if (n * 8 + e >= end - 1) s", check_values),
    "a tail is not masked in dq": (
        B, "first + STEP <= tile.keys && !(p.causal", "!(p.causal", test_bwd_sm80.check_low_scores),
    "dk without its scale": (
        B, "end.keys, dk, p.scale, keys);", "end.keys, dk, 1.0f, keys);", check_values),
    "one key past the end is written": (
        R, "if (within < 16 * M_TILES && row < valid) {", "if (within < 16 * M_TILES && row <= valid) {", check_values),
    "a row past the end is copied": (
        R, "row + pass < valid ? 16 : 0", "row + pass <= valid ? 16 : 0", test_bwd_sm80.check_isolation),
    "rows at another padding": (
        R, "rows + k * 16 * ROW + n * 16);", "rows + k * 16 * (ROW - 16) + n * 16);", check_values),
    "dq waits for no copy": (
        B, "      copy_async_wait<0>();\n" + BARRIER + QUERY_STAGE, BARRIER + QUERY_STAGE, check_values),
    "no barrier before a stage is read in dk": (B, BARRIER + KEY_STAGE, KEY_STAGE, check_races),
    "no barrier before a stage is read in dq": (B, BARRIER + QUERY_STAGE, QUERY_STAGE, check_races),
    "no barrier before dS is read": (
        B, SLOPES, "", check_races),
    "no barrier before dk replaces the keys": (
        B, "    if constexpr (ADD_DQ) barrier();  // all warps are done with", "    // all warps are done with", check_races),
    "the same stage twice": (
        B, "memory + STAGE_OFFSET + (step + 1) % STAGES * STAGE);\n\n      Step s, slope;",
        "memory + STAGE_OFFSET + step % STAGES * STAGE);\n\n      Step s, slope;", check_races),
    "turns are not cleared": (S, "args.turns[place] = 0;", "(void)args.turns;", test_bwd_sm80.check_turns),
    "nothing waits for its turn": (
        B, WAIT, "", test_bwd_sm80.check_turns),
    "a turn is awaited after the barrier": (
        B, WAIT + SLOPES, SLOPES + WAIT, test_bwd_sm80.check_turns),
    "a turn is passed on before all have added": (B, WAIT, WAIT + PASS, test_bwd_sm80.check_turns),
    "the last turn is not passed on": (
        B, "    if (IN_TURN && steps() > 0 && thread_index() == THREADS - 1) pass_turn(args, index, steps() - 1);\n", "",
        test_bwd_sm80.check_turns),
    "one turn too early": (
        B, "wait_for(count_of(args, tile, queries), queries.turn(tile));",
        "wait_for(count_of(args, tile, queries), queries.turn(tile) - 1);", test_bwd_sm80.check_turns),
    "turns of another head": (
        B, "static_cast<int64_t>(queries.head) * args.problem.T + tile.q_row + queries.first;",
        "static_cast<int64_t>(tile.head) * args.problem.T + tile.q_row + queries.first;", test_bwd_sm80.check_turns),
    "an order that goes on past the round's end": (
        B, "(tile.block <= last ? 0 : tile.blocks);", "(tile.block < last ? 0 : tile.blocks);", test_bwd_sm80.check_turns),
    "around the steps although blocks may start late": (
        B, "tile.blocks <= args.resident / 2 ?", "tile.blocks <= 4 * args.resident ?", test_bwd_sm80.check_turns),
    "the count of tiles is not cleared": (S, "args.turns[count] = 0;", "(void)count;", test_bwd_sm80.check_turns),
    "a tile is left out": (
        B, "block_count() + count_up(args.turns", "block_count() + 1 + count_up(args.turns", test_bwd_sm80.check_turns),
    "the next tile is taken when one is begun": (
        B, THERE, THERE + TAKE, test_bwd_sm80.check_turns),
    "no barrier before the tile is read": (
        B, THERE, "", test_bwd_sm80.check_turns),
    "no barrier before the tile is replaced": (
        B, "      barrier();  // the number is there, and no warp needs the tile before it any more\n", "",
        test_bwd_sm80.check_turns),
    "no meeting before the rows are read back": (
        R, "    warp_barrier();\n    if (lane >= PIECES", "    if (lane >= PIECES", check_races),
}  # fmt: skip
QUICK = (
    "weights from the wrong scale", "no barrier before dS is read", "a row past the end is copied",
    "nothing waits for its turn",
)


def check_caught(name: str, folder) -> None:
    file, old, new, check = MUTANTS[name]
    csrc = build.altered(folder, file, old, new)
    build.library(csrc)  # what does not compile is no planted bug
    with pytest.raises((AssertionError, HostError)):
        check(csrc)


@pytest.mark.parametrize("name", QUICK)
def test_caught(name, tmp_path):
    check_caught(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICK])
def test_all_caught(name, tmp_path):
    check_caught(name, tmp_path)


def test_unaltered_passes():
    check_races(build.CSRC)
