"""Planted bugs: an altered copy of csrc, a library or program of it, and checks in a process of their own."""

from __future__ import annotations

import os
import struct
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tests.host.cases import Case
from tests.host.runner import tiles


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
        except Exception as problem:
            text = "".join(traceback.format_exception_only(problem))
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or f"ended by signal {os.WTERMSIG(status)}"


def sanitized(
    program: Path, folder: Path, kernel: int, rows: int, case: Case, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of the sanitized program; AssertionError with its report where it ends with one."""
    call = case.call()
    tensors = {n: x.contiguous() for n, x in call.tensors.items()}
    o, lse = torch.full_like(tensors["q"], torch.nan), torch.full((case.heads, tensors["q"].shape[0]), torch.nan)
    tensors |= {"o": o, "lse": lse, "tiles": tiles(case.lengths, case.key_lengths, case.heads, rows, case.causal)}
    for name, x in tensors.items():
        (folder / name).write_bytes(x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    scale = case.dim**-0.5 if case.scale is None else case.scale
    numbers = [kernel, rows, 3, seed, tensors["q"].shape[0], tensors["k"].shape[0], case.heads, case.heads_k, case.dim,
               case.causal, o.dtype == torch.bfloat16, *struct.unpack("i", struct.pack("f", scale))]  # fmt: skip
    numbers += [tensors[n].stride(i) for n in "qkvo" for i in (0, 1)]
    (folder / "call").write_bytes(struct.pack("24q", *numbers, *[0] * (24 - len(numbers))))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program, folder], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{case}:\n{result.stderr[-6000:]}"
    return tuple(
        torch.frombuffer(bytearray((folder / n).read_bytes()), dtype=x.dtype).view(x.shape) for n, x in (("o", o), ("lse", lse))
    )
