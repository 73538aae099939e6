"""Planted bugs: an altered copy of csrc, a library or program of it, and checks in a process of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.compare import evaluate
from tests.host.backward import UNTAKEN, Attention, VarlenAttentionBackward, key_tiles
from tests.host.cases import Case
from tests.host.extension import TileList
from tests.host.runner import VarlenAttention, packed_bounds, tiles

GRID = 3  # blocks that run at once


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: Callable


def outcome(check: Callable, *arguments: object) -> str:
    """'passed', or what check(*arguments) raised or died of. In a child: a planted bug may end its process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's threads do not exist here
            check(*arguments)
            text = "passed"
        except BaseException as problem:  # those of pytest too
            text = "".join(traceback.format_exception_only(problem))
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or f"ended by signal {os.WTERMSIG(status)}"


def sanitized(
    program: Path, folder: Path, args: ctypes.Structure, buffers: dict[str, torch.Tensor], call: Sequence[object], seed: int = 0
) -> dict[str, torch.Tensor]:
    """The buffers after this call (function, choices) of the sanitized program; AssertionError with its report where it ends
    with one. buffers: by the names of the pointers of `args`."""
    (folder / "args").write_bytes(bytes(args))
    (folder / "pointers").write_text("".join(f"{offset_of(type(args), name)} {name}\n" for name in buffers))
    for name, x in buffers.items():
        (folder / name).write_bytes(x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(word) for word in (program, folder, GRID - 1, seed, *call)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{call}:\n{result.stderr[-6000:]}"
    bits = {name: bytearray((folder / name).read_bytes()) for name in buffers}
    return {
        n: torch.frombuffer(bits[n], dtype=x.dtype).view(x.shape) if x.numel() else x.clone() for n, x in buffers.items()
    }


def offset_of(struct: type[ctypes.Structure], name: str) -> int:
    """Of a field, or of one of the struct's `problem`."""
    if hasattr(struct, name):
        return getattr(struct, name).offset
    return struct.problem.offset + getattr(VarlenAttention, name).offset


def sanitized_forward(
    program: Path, folder: Path, kernel: str, rows: int, case: Case, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse."""
    q, k, v = (x.contiguous() for x in case.call().tensors.values())
    o, lse = torch.full_like(q, torch.nan), torch.full((case.heads, q.shape[0]), torch.nan)
    work = tiles(case.lengths, case.key_lengths, case.heads, rows, case.causal)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    args = Attention().problem(q, k, v, o, lse, work, scale, case.causal)
    buffers = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "tiles": work}
    found = sanitized(program, folder, args, buffers, ("forward", kernel, rows), seed)
    return found["o"], found["lse"]


def sanitized_backward(program: Path, folder: Path, op: Attention, case: Case) -> tuple[dict, dict]:
    """The gradients of op's kernels, of the sanitized program and of the plain build, from the same forward."""
    call = case.call()
    (o, lse), tensors = op(**call.tensors, **call.rest), {n: x.contiguous() for n, x in call.tensors.items()}
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    expected = evaluate(op, call, (grad, None))[1]
    rows, key_rows = op.backward_rows(case.dim)
    lengths, keys = case.lengths, case.key_lengths
    buffers = {**tensors, "o": o, "lse": lse, "tiles": tiles(lengths, keys, case.heads, rows, case.causal), "grad": grad}
    buffers["key_tiles"] = key_tiles(lengths, keys, case.heads_k, key_rows, case.causal)
    buffers |= {f"d{n}": torch.full_like(x, torch.nan) for n, x in tensors.items()}
    buffers |= {n: torch.full_like(lse, torch.nan) for n in ("shift", "delta")}
    if op.way != "two passes":
        buffers["dq_sum"] = torch.full(o.shape, torch.nan)
    if op.way == "in turn":
        buffers["turns"] = torch.full((lse.numel() + 1,), UNTAKEN, dtype=torch.int32)
    problem = op.problem(*tensors.values(), o, lse, buffers["tiles"], case.dim**-0.5, case.causal)
    strided = {f"{n}_stride_{a}": buffers[n].stride(i) for n in ("grad", "dq", "dk", "dv") for i, a in enumerate("th")}
    args = VarlenAttentionBackward(problem=problem, key_tile_count=len(buffers["key_tiles"]), **strided)
    found = sanitized(program, folder, args, buffers, ("backward", rows, key_rows), op.seed)
    return {n: found[f"d{n}"] for n in "qkv"}, expected


def sanitized_tiles(program: Path, folder: Path, case: Case, rows: int, by_keys: bool) -> list[list[int]]:
    """The tiles with work, of the list that the device builds."""
    bounds, bounds_k = (packed_bounds(x) for x in (case.lengths, case.key_lengths))
    heads, own = (case.heads_k, sum(case.key_lengths)) if by_keys else (case.heads, sum(case.lengths))
    found = torch.full(((own // rows + len(case.lengths)) * heads, 8), -1, dtype=torch.int32)
    args = TileList(N=len(case.lengths), T=sum(case.lengths), Tk=sum(case.key_lengths), heads=heads, rows=rows,
                    causal=case.causal, by_keys=by_keys)  # fmt: skip
    buffers = {"bounds": bounds, "bounds_k": bounds_k, "tiles": found}
    done = sanitized(program, folder, args, buffers, ("build_tiles",))["tiles"]
    return [tile for tile in done.tolist() if tile[3 if by_keys else 1] > 0]
