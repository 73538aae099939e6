"""The sm_80 backward on the CPU, as an op with gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.compare import guard
from tests.host import build
from tests.host.runner import VarlenAttention, call, load, place, tiles

WAYS = ("two passes", "added", "in turn")  # to dq
UNTAKEN = 77  # in a workspace of turns before it is cleared


def ways(causal: bool) -> tuple[str, ...]:
    """Under a causal mask there are no turns."""
    return WAYS[:2] if causal else WAYS


class VarlenAttentionBackward(ctypes.Structure):
    """csrc/varlen_attention.h"""

    _fields_ = [
        ("problem", VarlenAttention), ("key_tiles", ctypes.c_void_p), ("key_tile_count", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("grad", "dq", "dk", "dv", "shift", "delta", "dq_sum", "turns")),
        ("resident", ctypes.c_int),
        *((f"{name}_stride_{axis}", ctypes.c_int64) for name in ("grad", "dq", "dk", "dv") for axis in "th"),
    ]  # fmt: skip


def key_tiles(lengths: Sequence[int], keys: Sequence[int], heads: int, rows: int, causal: bool) -> Tensor:
    """The list of work by keys, re-derived from csrc/varlen_attention.h's description."""
    found, q_row, k_row = [], 0, 0
    for length, key_count in zip(lengths, keys, strict=True):
        own = []
        for first in range(0, key_count, rows):
            count = min(rows, key_count - first)
            seeing = [i for i in range(length) if not causal or i + key_count - length >= first]
            start = seeing[0] if seeing else length
            diagonal = start + key_count - length - first
            place = first // rows, -(-key_count // rows)
            own += [[q_row + start, length - start, k_row + first, count, diagonal, *place]]
        found += [[*tile[:4], head, *tile[4:]] for head in range(heads) for tile in own]
        q_row, k_row = q_row + length, k_row + key_count
    return torch.tensor(found, dtype=torch.int32).reshape(-1, 8)


@dataclass(frozen=True)
class Attention:
    """A differentiable op of the launches. rows: of the forward's blocks; way: to dq, one of WAYS.

    The backward's blocks have 64 rows, and 128 where `rows` is 128 and there is such a kernel. grid: blocks that run at once.
    """

    rows: int = 64
    way: str = "two passes"
    grid: int = 8
    seed: int = 0
    races: bool = True
    shuffled: bool = False  # tiles in another order
    csrc: object = build.CSRC

    def __call__(self, q, k, v, cu_seqlens, *, cu_seqlens_k=None, scale=None, causal=False, return_lse=True):
        lengths = cu_seqlens.diff().tolist()
        keys = lengths if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o, lse = _Function.apply(q, k, v, self, lengths, keys, scale, causal)
        return (o, lse) if return_lse else o

    def problem(self, q, k, v, o, lse, work, scale, causal) -> VarlenAttention:
        views = {"q": q, "k": k, "v": v, "o": o}
        return VarlenAttention(
            **{name: x.data_ptr() for name, x in views.items()},
            lse=lse.data_ptr(), tiles=work.data_ptr(), tile_count=len(work),
            T=q.shape[0], Tk=k.shape[0], H=q.shape[1], Hk=k.shape[1], D=q.shape[2],
            **{f"{n}_stride_{axis}": x.stride(i) for n, x in views.items() for i, axis in enumerate("th")},
            scale=scale, causal=causal, bfloat16=q.dtype == torch.bfloat16,
        )  # fmt: skip

    def backward_rows(self, dim: int) -> tuple[int, int]:
        """Of blocks of queries and of keys."""
        return (128, 128) if self.rows == 128 and dim <= 80 else (64, 64)

    def launch(self, function: str, *arguments) -> None:
        call(getattr(load(build.library(self.csrc)), function), *arguments, *place(self.grid), seed=self.seed, races=self.races)

    def ordered(self, work: Tensor) -> Tensor:
        if not self.shuffled:
            return work
        return work[torch.randperm(len(work), generator=torch.Generator().manual_seed(self.seed))].contiguous()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, op, lengths, keys, scale, causal):
        o = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
        work = op.ordered(tiles(lengths, keys, q.shape[1], op.rows, causal))
        problem = op.problem(q, k, v, o, lse, work, scale, causal)
        op.launch("forward", ctypes.byref(problem), b"sm_80", op.rows)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = op, lengths, keys, scale, causal
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, o, lse = ctx.saved_tensors
        op, lengths, keys, scale, causal = ctx.rest
        grad = guard(grad, strided=True).view  # other strides than those of o
        nan = functools.partial(torch.full, fill_value=torch.nan)
        outputs = [guard(nan(x.shape, dtype=x.dtype), strided=True) for x in (q, k, v)]
        workspace = [guard(nan(lse.shape), strided=False) for _ in range(2)]
        if op.way != "two passes":
            workspace.append(guard(nan(q.shape), strided=False))
        if op.way == "in turn" and q.numel():  # without a query there is no dq, nor an address of it
            assert not (causal or op.shuffled)
            workspace.append(guard(torch.full((lse.numel() + 1,), UNTAKEN, dtype=torch.int32), strided=False))
        rows, key_rows = op.backward_rows(q.shape[2])
        work = op.ordered(tiles(lengths, keys, q.shape[1], rows, causal))
        by_keys = op.ordered(key_tiles(lengths, keys, k.shape[1], key_rows, causal))
        views = {"grad": grad} | {f"d{n}": x.view for n, x in zip("qkv", outputs, strict=True)}
        args = VarlenAttentionBackward(
            problem=op.problem(q, k, v, o, lse, work, scale, causal), key_tiles=by_keys.data_ptr(), key_tile_count=len(by_keys),
            **{name: x.data_ptr() for name, x in views.items()},
            **{n: x.view.data_ptr() for n, x in zip(("shift", "delta", "dq_sum", "turns"), workspace, strict=False)},
            **{f"{n}_stride_{axis}": x.stride(i) for n, x in views.items() for i, axis in enumerate("th")},
        )  # fmt: skip
        op.launch("backward", ctypes.byref(args), rows, key_rows)
        results = [x.view.clone() for x in outputs]
        for guarded in (*outputs, *workspace):
            guarded.view.fill_(torch.nan if guarded.view.is_floating_point() else UNTAKEN)
            guarded.check("output")
        return *results, None, None, None, None, None
