"""The second stage of a gradient that is a sum over rows: partial sums of a backward kernel, added in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .offsets import blocks_of, offset
from .starting import start

BLOCK_R, BLOCK_C, NUM_WARPS = 64, 32, 4  # few columns a program, so that there are many programs at a width of a thousand


@triton.jit(do_not_specialize=["R"])
def _sum_kernel(
    partial_ptr, first_ptr, second_ptr, R,
    C: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), partial_ptr.dtype.element_ty)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        entry = partial_ptr + (offset(r, PARTS * C)[:, None] + (part * C + c)[None, :])
        total += tl.load(entry, mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)
    out = tl.sum(total, 0)
    if part == 0:
        tl.store(first_ptr + c, out, mask=c < C)
    else:
        tl.store(second_ptr + c, out, mask=c < C)


def launch(partial: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
    """outs, one or two of [C], = the sums over R of partial [R, len(outs), C]."""
    rows, parts, width = partial.shape
    start(
        _sum_kernel, parts * blocks_of(width, BLOCK_C), (partial, outs[0], outs[-1]), (rows,), (),
        {"C": width, "PARTS": parts, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}, NUM_WARPS,
    )  # fmt: skip
