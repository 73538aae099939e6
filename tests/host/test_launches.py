"""The launches of csrc on the CPU: what a device would refuse comes out with the kernel's name, and planted bugs are caught."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.compare import same_bits
from tests.host import build
from tests.host.backward import UNTAKEN, Attention, VarlenAttentionBackward, key_tiles, ways
from tests.host.cases import Case, check_rule
from tests.host.extension import TileList
from tests.host.planted import outcome
from tests.host.runner import HostError, Kernel, call, load, packed_bounds, place, tiles
from tests.host.test_bwd_sm80 import gradients, hold, sample

# Of a copy with planted bugs only bfloat16 with D = 80 is compiled, which takes a quarter of the time.
NARROWED = (
    ("instances.cuh", "    if (p.D == 64) return use(bf16, std::integral_constant<int, 64>{});\n", ""),
    ("instances.cuh", "    if (p.D == 128) return use(bf16, std::integral_constant<int, 128>{});\n", ""),
    ("instances.cuh", "  by_dim(std::false_type{});\n", ""),
    ("launch_sm90.cu", "problem.causal ? choose<true, true>(problem, rows, device, stream) : ", ""),
    ("launch_sm90.cu", "problem.causal ? choose<false, true>(problem, rows, device, stream) : choose<false,", "choose<true,"),
)  # fmt: skip


class OtherRows(Attention):
    """Blocks of queries and of keys that differ: `rows`, and the other size."""

    def backward_rows(self, dim: int) -> tuple[int, int]:
        return self.rows, 192 - self.rows


def forward(csrc: Path) -> None:
    """By the rule, on two devices: more keys than queries, and fewer; strides that differ."""
    library = build.library(csrc)
    for name, rows in (("sm_80", 64), ("sm_80", 128), ("sm_90", 64), ("sm_90", 128), ("sm_90", 192)):
        for case in (Case((70, 40), (90, 200), heads=4, heads_k=2, layout="contiguous"), Case((130, 65), (20, 40))):
            for grid in (2, 5):
                check_rule(Kernel(library, name, rows, grid=grid), case)


def backward(csrc: Path) -> None:
    """By the rule, all ways to dq on two devices; no queries, no keys, blocks of two sizes."""
    for way in ways(causal=False):
        for op in (Attention(64, way, 2, csrc=csrc), Attention(128, way, 5, csrc=csrc)):
            hold(op, [65, 1, 0, 130], keys=[70, 3, 5, 150], heads=4, heads_k=2)
        for lengths, keys in (([0, 0], [4, 5]), ([4, 5], [0, 0])):
            hold(op, lengths, keys=keys)
        for rows in (64, 128):
            hold(OtherRows(rows, way, csrc=csrc), [150, 40], keys=[140, 200])


def order(csrc: Path) -> None:
    """In turn: the same bits in any schedule, on a device whose blocks go around the steps and on one where they may not. What
    the launch says of the device decides, so that the two have different bits.
    """
    tensors, rest = sample([270, 64, 20, 1], heads=4, heads_k=2)
    found = []
    for grid in (20, 3):
        op = Attention(64, "in turn", grid, csrc=csrc)
        found.append(gradients(op, tensors, rest))
        for seed in range(1, 4):
            for name, x in gradients(replace(op, seed=seed), tensors, rest).items():
                assert same_bits(x, found[-1][name]), f"{name}, seed {seed}, {op}"
    assert not same_bits(found[0]["q"], found[1]["q"])


def lists(csrc: Path) -> None:
    """The list of tiles, of fewer entries than a block of threads and of more."""
    for lengths in ([70, 3], [1] * 300):
        total, bounds = sum(lengths), packed_bounds(lengths)
        found = torch.full(((total // 64 + len(lengths)) * 2, 8), -1, dtype=torch.int32)
        pointers = (bounds.data_ptr(), bounds.data_ptr(), found.data_ptr())
        arguments = TileList(*pointers, len(lengths), total, total, 2, 64, False, False)
        call(load(build.library(csrc)).build_tiles, ctypes.byref(arguments), *place(2), seed=0)
        assert sorted(x for x in found.tolist() if x[1]) == sorted(tiles(lengths, lengths, 2, 64, False).tolist())


def refused(message: str, csrc: Path, function: str, args: ctypes.Structure, *arguments) -> None:
    """With this message, and nothing is left behind."""
    with pytest.raises(HostError) as caught:
        call(getattr(load(build.library(csrc)), function), ctypes.byref(args), *arguments, seed=0)
    assert str(caught.value) == message


def refusals(csrc: Path) -> None:
    """A device that is not there, a stream of another device, rows that no kernel has: told with the kernel's name, and before
    anything is written.
    """
    q, k, v, o, grad, dq, dk, dv = (torch.full((9, 1, 80), torch.nan, dtype=torch.bfloat16) for _ in range(8))
    lse, shift, delta = torch.zeros(1, 9), torch.full((1, 9), torch.nan), torch.full((1, 9), torch.nan)
    work, by_keys = tiles([9], [9], 1, 64, False), key_tiles([9], [9], 1, 64, False)
    problem = Attention().problem(q, k, v, o, lse, work, 0.1, False)
    views = {"grad": grad, "dq": dq, "dk": dk, "dv": dv}
    args = VarlenAttentionBackward(
        problem=problem, key_tiles=by_keys.data_ptr(), key_tile_count=len(by_keys),
        **{name: x.data_ptr() for name, x in {**views, "shift": shift, "delta": delta}.items()},
        **{f"{n}_stride_{a}": x.stride(i) for n, x in views.items() for i, a in enumerate("th")},
    )  # fmt: skip
    bounds, made = packed_bounds([9]), torch.full((1, 8), UNTAKEN, dtype=torch.int32)
    listed = TileList(bounds.data_ptr(), bounds.data_ptr(), made.data_ptr(), 1, 9, 9, 1, 64, False, False)
    nowhere, elsewhere = place(65), (place(2)[0], place(3)[1])
    for function, given, choice, kernel, first in (
        ("forward", problem, (b"sm_80", 64), "forward_sm_80", "forward_sm80"),
        ("forward", problem, (b"sm_90", 64), "forward_sm_90", "forward_sm90"),
        ("backward", args, (64, 64), "backward", "backward_row_sums"),
        ("build_tiles", listed, (), "tiles", "tiles"),
    ):
        refused(f"varlen_attention_{kernel}: cudaSetDevice: cudaErrorInvalidDevice (cudaErrorInvalidDevice)",
                csrc, function, given, *choice, *nowhere)  # fmt: skip
        refused(f"varlen_attention_{first}: cudaErrorInvalidResourceHandle (cudaErrorInvalidResourceHandle)",
                csrc, function, given, *choice, *elsewhere)  # fmt: skip
    refused("key_rows: expected 64, or 128 up to D = 80, got 32", csrc, "backward", args, 64, 32, *place(2))
    refused("rows: expected 64, or 128 up to D = 80, got 32", csrc, "backward", args, 32, 64, *place(2))
    problem.q_stride_t = 2**39
    refused("varlen_attention_forward_sm90: cuTensorMapEncodeTiled refused q (CUresult 1)",
            csrc, "forward", problem, b"sm_90", 64, *place(2))  # fmt: skip
    assert all(x.isnan().all() for x in (o, dq, dk, dv, shift, delta)) and (made == UNTAKEN).all()


BWD, SM90 = "launch_bwd.cu", "launch_sm90.cuh"
_text = (build.CSRC / BWD).read_text()
_keys = _text.index("  select_backward_keys(args, key_rows, [&]")
_round = _text.index("  if (add_dq) {", _keys)
KEYS, ROUND = _text[_keys:_round], _text[_round : _text.index("  } else {", _round)]

# name -> (file, old, new, check that catches it)
MUTANTS: dict[str, tuple[str, str, str, Callable]] = {
    "blocks that wait are not started together": (BWD, "Grid::together,", "Grid::resident,", order),
    "resident is not set": (BWD, "told.resident = resident_blocks", "(void)resident_blocks", order),
    "more resident blocks than there are": (BWD, "told.resident = resident", "told.resident = 4 * resident", order),
    "the kernel gets what the launch was given": (BWD, "launch<Kernel>(NAME, told,", "launch<Kernel>(NAME, args,", order),
    "no row sums": (BWD, "std::max<int64_t>((count + ROWS - 1) / ROWS, 1)", "0 * ROWS", backward),
    "dq is rounded before it is added": (BWD, KEYS + ROUND, ROUND.replace("  if (", "  const auto round = [&] { if (")
                                         + "  }\n  };\n  round();\n" + KEYS + "  if (add_dq) {\n", backward),
    "the other way to dq": (BWD, ROUND, ROUND.replace("(add_dq)", "(!add_dq)"), backward),
    "blocks of keys as many as of queries": (BWD, "found, NAME, args.key_tile_count", "found, NAME, p.tile_count", backward),
    "blocks of queries as many as of keys": (BWD, '_queries", p.tile_count', '_queries", args.key_tile_count', backward),
    "nothing to do without queries": (BWD, "p.T == 0 && args", "p.T == 0 || args", backward),
    "blocks of keys have the queries' rows": (BWD, "_keys(args, key_rows, [&]", "_keys(args, rows, [&]", backward),
    "blocks of queries have the keys' rows": (BWD, "_queries(args, rows, [&]", "_queries(args, key_rows, [&]", backward),
    "keys are refused after the row sums": (BWD, "  select_backward_keys(args, key_rows, [](auto) {});\n", "", refusals),
    "queries are refused after the row sums": (
        BWD, "  if (!add_dq) select_backward_queries(args, rows, [](auto) {});\n", "", refusals),
    "shared memory is not asked for": ("start.cuh", "check(cudaFuncSetAttribute(kernel,", "(void)std::make_pair((0,", backward),
    "a launch without shared memory": ("start.cuh", "parameters, Kernel::SMEM,", "parameters, 0,", forward),
    "half of the threads": ("start.cuh", "count, Kernel::THREADS,", "count, Kernel::THREADS / 2,", forward),
    "as many blocks as tiles": ("start.cuh", "Grid::each ? INT32_MAX : resident", "Grid::each ? INT32_MAX : pieces", order),
    "one answer for all devices": ("start.cuh", "static std::atomic<int> known[MAX_DEVICES];",
                                   "static std::atomic<int> one;\n  std::atomic<int>* known = &one - device;", order),
    "a refused launch is ignored": ("start.cuh", "check(start(", "(void)std::make_pair(start(", refusals),
    "the default stream": ("start.cuh", "static_cast<cudaStream_t>(stream)", "nullptr", forward),
    "the device is not made current": ("status.h", "check(cudaSetDevice(device),", "check(cudaSuccess,", forward),
    "another device stays current": ("status.h", "{ cudaSetDevice(before_); }", "{}", forward),
    "an error is left to the next who asks": ("status.h", "  cudaGetLastError();  //", "  //", refusals),
    "one kernel for the other": ("launch.cu", 'if (kernel == "sm_90") return', 'if (kernel == "sm_80") return', forward),
    "a list in too few blocks": ("launch.cu", "(count + BuildTiles::THREADS - 1) / B", "count / B", lists),
    "k ends with q": (SM90, '{"k", p.k, p.Tk,', '{"k", p.k, p.T,', forward),
    "v ends with q": (SM90, '{"v", p.v, p.Tk,', '{"v", p.v, p.T,', forward),
    "q has the heads of k": (SM90, '{"q", p.q, p.T, p.H,', '{"q", p.q, p.T, p.Hk,', forward),
    "k with the strides of q": (SM90, "p.k_stride_t, p.k_stride_h}", "p.q_stride_t, p.q_stride_h}", forward),
    "v with the strides of q": (SM90, "p.v_stride_t, p.v_stride_h}", "p.q_stride_t, p.q_stride_h}", forward),
    "strides in elements": (SM90, "cuuint64_t(x.stride_t) * 2", "cuuint64_t(x.stride_t)", forward),
    "a scale without log2(e)": (SM90, "p.scale * 1.4426950408889634f", "p.scale", forward),
    "narrow boxes with another swizzle": (SM90, ": CU_TENSOR_MAP_SWIZZLE_32B", ": CU_TENSOR_MAP_SWIZZLE_64B", forward),
    "narrow boxes of half the rows": (SM90, "bfloat16, 16, Layout::ROWS);", "bfloat16, 16, Layout::ROWS / 2);", forward),
    "boxes of V as wide as those of K": (SM90, "Kernel::V_ROW / 2, Kernel::VLayout", "16, Kernel::VLayout", forward),
    "a refused tensor map is ignored": (SM90, "if (status != CUDA_SUCCESS)", "if (false)", refusals),
}  # fmt: skip
QUICK = (
    "blocks that wait are not started together", "dq is rounded before it is added", "as many blocks as tiles", "k ends with q",
)


def narrowed(folder: Path, *changes: tuple[str, str, str]) -> Path:
    csrc = build.altered(folder, *NARROWED[0])
    for each in (*NARROWED[1:], *changes):
        build.change(csrc, *each)
    build.library(csrc)  # what does not compile is no planted bug
    return csrc


def check_caught(name: str, folder: Path) -> None:
    *change, check = MUTANTS[name]
    assert outcome(check, narrowed(folder, tuple(change))) != "passed"


@pytest.mark.parametrize("name", QUICK)
def test_caught(name, tmp_path):
    check_caught(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICK])
def test_all_caught(name, tmp_path):
    check_caught(name, tmp_path)


def test_the_launches_themselves_pass(tmp_path):
    csrc = narrowed(tmp_path)
    for check in (forward, backward, order, lists, refusals):
        assert outcome(check, csrc) == "passed"
