"""ops/attention_cuda.py on the CPU: in the place of qwen2vl_fast._C a module whose launches run their kernels by csrc/host.

What runs is the Python of the cuda backend as it is (autograd, lists of work, pointers and strides, checkpoints), and the
launches of csrc as they are: their checks, their choice of kernels, their grids.
"""

from __future__ import annotations

import ctypes
import re
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch

import qwen2vl_fast
from qwen2vl_fast import positions
from qwen2vl_fast.ops import attention_cuda
from tests.host import build
from tests.host.backward import VarlenAttentionBackward
from tests.host.runner import VarlenAttention, call, load, place

backends = sys.modules["qwen2vl_fast.ops.backends"]  # qwen2vl_fast.ops offers a function of that name
TENSORS = ("q", "k", "v", "o")
GRADS = ("grad", "dq", "dk", "dv")
PROCESSORS = 108  # of an A100
# name, and the rows that the third parameter of its type counts
KERNELS = {
    "ForwardSm80": ("forward sm_80", 64), "ForwardSm90": ("forward sm_90", 1), "RowSums": ("row_sums", 0),
    "BackwardKeys": ("keys", 64), "BackwardQueries": ("queries", 64), "RoundDq": ("round", 0), "BuildTiles": ("tiles", 0),
}  # fmt: skip


class TileList(ctypes.Structure):
    """csrc/varlen_attention.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bounds", "bounds_k", "tiles")),
        *((name, ctypes.c_int) for name in ("N", "T", "Tk", "heads", "rows")),
        ("causal", ctypes.c_bool), ("by_keys", ctypes.c_bool),
    ]  # fmt: skip


def _strides(names, pairs) -> dict[str, int]:
    return {f"{name}_stride_{axis}": pair[i] for name, pair in zip(names, pairs, strict=True) for i, axis in enumerate("th")}


def _largest(address: int | None, count: int, column: int) -> int:
    """Of the numbers in one column of a list of tiles."""
    tiles = ctypes.cast(address, ctypes.POINTER(ctypes.c_int * 8))
    return max((tiles[i][column] for i in range(count)), default=0)


@dataclass
class Extension:
    """The functions of csrc/bindings.cpp.

    launched: the kernels that ran, in order. blocks: of the backward's lists, by keys and by queries, the rows that the kernel
    was started for and the largest block of the list. grid: blocks that run at once.
    """

    launched: list[str] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    grid: int = 8
    seed: int = 0
    races: bool = False

    def VarlenAttention(
        self, q, k, v, o, lse, tiles, tile_count, T, Tk, H, Hk, D, q_strides, k_strides, v_strides, o_strides, scale, causal,
        bfloat16,
    ):  # fmt: skip
        strides = _strides(TENSORS, (q_strides, k_strides, v_strides, o_strides))
        return VarlenAttention(
            q=q, k=k, v=v, o=o, lse=lse, tiles=tiles, tile_count=tile_count, T=T, Tk=Tk, H=H, Hk=Hk, D=D, **strides,
            scale=scale, causal=causal, bfloat16=bfloat16,
        )  # fmt: skip

    def varlen_attention_forward(self, problem, kernel, rows, device, stream):
        self._launch("forward", problem, kernel.encode(), rows, device, stream)

    def varlen_attention_backward(
        self, problem, key_tiles, key_tile_count, grad, dq, dk, dv, shift, delta, dq_sum, turns, grad_strides, dq_strides,
        dk_strides, dv_strides, rows, key_rows, device, stream,
    ):  # fmt: skip
        args = VarlenAttentionBackward(
            problem=problem, key_tiles=key_tiles, key_tile_count=key_tile_count, grad=grad, dq=dq, dk=dk, dv=dv, shift=shift,
            delta=delta, dq_sum=dq_sum or None, turns=turns or None,
            **_strides(GRADS, (grad_strides, dq_strides, dk_strides, dv_strides)),
        )  # fmt: skip
        self.blocks.append((key_rows, _largest(key_tiles, key_tile_count, 3)))
        self.blocks.append((rows, _largest(problem.tiles, problem.tile_count, 1)))
        self._launch("backward", args, rows, key_rows, device, stream)

    def varlen_attention_tiles(self, bounds, bounds_k, tiles, N, T, Tk, heads, rows, causal, by_keys, device, stream):
        arguments = TileList(bounds, bounds_k, tiles, N, T, Tk, heads, rows, causal, by_keys)
        self._launch("build_tiles", arguments, device, stream, of=f" {rows}{' by keys' if by_keys else ''}")

    def _launch(self, function: str, problem: ctypes.Structure, *arguments, of: str = "") -> None:
        start = getattr(load(build.library()), function)
        ran = call(start, ctypes.byref(problem), *arguments, seed=self.seed, races=self.races)
        self.launched += [_name(line) + of for line in ran.splitlines()]


def _name(line: str) -> str:
    """Of a kernel that ran: what it is and its rows; blocks that run together are those that add in turn."""
    kernel, parameters, together = re.fullmatch(r"qwen2vl_fast::(\w+)(?:<(.*)>)? in \d+ blocks( together)?", line).groups()
    name, rows = KERNELS[kernel]
    size = f" {int(parameters.split(', ')[2]) * rows}" if rows else ""
    return name + size + (" in turn" if together else "")


def install(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0), processors: int = PROCESSORS, **options
) -> Extension:
    """From here on the cuda backend takes CPU tensors, as a device of this capability with so many multiprocessors would."""
    extension = Extension(**options)
    properties = types.SimpleNamespace(multi_processor_count=processors)
    module = types.ModuleType("qwen2vl_fast._C")
    for name in ("VarlenAttention", "varlen_attention_forward", "varlen_attention_backward", "varlen_attention_tiles"):
        setattr(module, name, getattr(extension, name))
    monkeypatch.setitem(sys.modules, "qwen2vl_fast._C", module)
    monkeypatch.setattr(qwen2vl_fast, "_C", module, raising=False)
    monkeypatch.setattr(attention_cuda, "_place", lambda x: place(extension.grid))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(backends, "_chosen", {})  # choices are remembered
    plain = backends.unusable
    monkeypatch.setattr(
        backends, "unusable",
        lambda op, backend, device=None: None if (op, backend) == ("varlen_attention", "cuda") else plain(op, backend, device),
    )  # fmt: skip
    return extension


def schedule(
    cu_seqlens: torch.Tensor, *, heads: int, heads_k: int | None = None, head_dim: int = 80, causal: bool = False,
    processors: int = PROCESSORS,
):  # fmt: skip
    """positions.attention_schedule with the lists that it makes for a device of capability 8.0."""
    shape = {"heads": heads, "heads_k": heads_k, "head_dim": head_dim, "causal": causal}
    plain = positions.attention_schedule(cu_seqlens, **shape, device="cpu")
    return positions.with_lists(plain, (8, 0), processors, backward=True)
