"""Calls the kernels of a library that tests/host/build.py made, by ctypes, on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl_fast.positions import dealt_tiles
from tests.compare import bounds_of, guard


class HostError(Exception):
    """What the runtime found wrong with a run: a race, a deadlock, a divergence, an address."""


class Run(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int), ("races", ctypes.c_int), ("seed", ctypes.c_uint64), ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_int),
    ]  # fmt: skip


class VarlenAttention(ctypes.Structure):
    """csrc/varlen_attention.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "lse", "tiles")),
        *((name, ctypes.c_int) for name in ("tile_count", "T", "Tk", "H", "Hk", "D")),
        *((f"{name}_stride_{axis}", ctypes.c_int64) for name in "qkvo" for axis in "th"),
        ("scale", ctypes.c_float), ("causal", ctypes.c_bool), ("bfloat16", ctypes.c_bool),
    ]  # fmt: skip


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def call(function, *arguments: object, seed: int, races: bool = True, grid: int = 0) -> str:
    """function(*arguments, run); raises HostError with the runtime's message. Of launches: a line for each kernel that ran."""
    message = ctypes.create_string_buffer(8192)
    run = Run(grid, races, seed, ctypes.cast(message, ctypes.c_char_p), len(message))
    failed = function(*arguments, ctypes.byref(run))
    text = message.value.decode()
    if failed:
        raise HostError(_with_lines(text))
    return text


def place(blocks: int) -> tuple[int, ctypes.c_void_p]:
    """The device of csrc/host/cuda.cpp that runs so many blocks at once, and its stream."""
    return blocks - 1, ctypes.c_void_p(blocks)


def _with_lines(message: str) -> str:
    """Addresses of the message as the lines of the kernel that they stand for, innermost first."""
    head, *frames = re.split(r"\n  (\S+)\+(0x[0-9a-f]+)", message)
    lines: list[str] = []
    for path, offset, rest in zip(frames[::3], frames[1::3], frames[2::3], strict=True):
        head += rest
        found = subprocess.run(["addr2line", "-i", "-e", path, offset], capture_output=True, text=True).stdout.split("\n")
        lines += [line for line in (Path(f).name for f in found) if ".cuh:" in line and not line.startswith("ptx")]
    return head + (f"\n  at {' < '.join(dict.fromkeys(lines))}" if lines else "")


def tiles(lengths: Sequence[int], keys: Sequence[int], heads: int, rows: int, causal: bool) -> Tensor:
    """The list of work, [tiles, 8] int32, longest first; re-derived here from csrc/varlen_attention.h's description."""
    found, q_row, k_row = [], 0, 0
    for length, key_count in zip(lengths, keys, strict=True):
        for first in range(0, length, rows):
            count = min(rows, length - first)
            diagonal = first + key_count - length
            seen = min(key_count, max(0, diagonal + count)) if causal else key_count
            found += [[q_row + first, count, k_row, seen, head, diagonal, 0, 0] for head in range(heads)]
        q_row, k_row = q_row + length, k_row + key_count
    found.sort(key=lambda tile: -tile[3])
    return torch.tensor(found, dtype=torch.int32).reshape(-1, 8)


@dataclass(frozen=True)
class Kernel:
    """A forward kernel (sm_80, sm_90) as an op: kernel(q, k, v, cu_seqlens, ...) -> (o, lse). grid: blocks that run at once."""

    path: Path
    name: str
    rows: int
    grid: int = 3
    seed: int = 0
    races: bool = True
    dealt: bool = False  # tiles in the order that positions.dealt_tiles gives for this grid

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, cu_seqlens_k: Tensor | None = None,
        scale: float | None = None, causal: bool = False, return_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lengths = cu_seqlens.diff().tolist()
        keys = lengths if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
        work = tiles(lengths, keys, q.shape[1], self.rows, causal)
        if self.dealt:
            work = dealt_tiles(work, self.grid)
        heads, total = q.shape[1], q.shape[0]
        o = guard(q.new_full(q.shape, torch.nan), strided=True)
        lse = guard(torch.full((heads, total), torch.nan), strided=False)
        views = {"q": q, "k": k, "v": v, "o": o.view}
        problem = VarlenAttention(
            **{name: x.data_ptr() for name, x in views.items()},
            lse=lse.view.data_ptr(), tiles=work.data_ptr(), tile_count=len(work),
            T=total, Tk=k.shape[0], H=heads, Hk=k.shape[1], D=q.shape[2],
            **{f"{n}_stride_{axis}": x.stride(i) for n, x in views.items() for i, axis in enumerate("th")},
            scale=q.shape[-1] ** -0.5 if scale is None else scale, causal=causal, bfloat16=q.dtype == torch.bfloat16,
        )  # fmt: skip
        arguments = ctypes.byref(problem), self.name.encode(), self.rows, *place(self.grid)
        call(load(self.path).forward, *arguments, seed=self.seed, races=self.races)
        results = o.view.clone(), lse.view.clone()
        for guarded in (o, lse):
            guarded.view.fill_(torch.nan)
            guarded.check("output")
        return results


def packed_bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(bounds_of(lengths), dtype=torch.int32)
