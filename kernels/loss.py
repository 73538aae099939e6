"""The two passes of the fused loss over a block of logits: the statistics of its rows, and their slopes.

Shape letters: T rows, N words of the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .offsets import LIMIT, offset, refuse, wide
from .starting import start

BLOCK_N, NUM_WARPS = 4096, 8  # 16 columns a thread: 2 loads of 16 bytes in bf16 at a time


@triton.jit(do_not_specialize=["first"])
def _statistics_kernel(
    logits_ptr, labels_ptr, top_ptr, total_ptr, picked_ptr, first, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A row: its largest logit so far, the sum of exp(z - largest), and the logit of its label where the block has it."""
    row = tl.program_id(0)
    logits_ptr += offset(row, N)
    top, total = tl.load(top_ptr + row), tl.load(total_ptr + row)
    for start_n in range(0, N, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        z = wide(tl.load(logits_ptr + n, mask=n < N, other=float("-inf")))
        high = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - high) + tl.sum(tl.exp(z - high), 0)
        top = high
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    label = tl.load(labels_ptr + row) - first
    inside = (label >= 0) & (label < N)
    tl.store(picked_ptr + row, wide(tl.load(logits_ptr + label, mask=inside, other=0.0)), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _slope_kernel(
    logits_ptr, labels_ptr, top_ptr, log_total_ptr, factor_ptr, first, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A row in place: z becomes (exp(z - largest - log total) - [n is the label]) factor."""
    row = tl.program_id(0)
    logits_ptr += offset(row, N)
    top, log_total, factor = tl.load(top_ptr + row), tl.load(log_total_ptr + row), tl.load(factor_ptr + row)
    label = tl.load(labels_ptr + row) - first
    for start_n in range(0, N, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        z = wide(tl.load(logits_ptr + n, mask=n < N, other=0.0))
        p = tl.exp(z - top - log_total)
        tl.store(logits_ptr + n, tl.where(n == label, p - 1.0, p) * factor, mask=n < N)


def launch(
    logits: torch.Tensor, labels: torch.Tensor, first: int, top: torch.Tensor, total: torch.Tensor, picked: torch.Tensor
) -> None:
    """Adds a block to the statistics of its rows.

    logits: [T, N], contiguous, of words first to first + N. labels: [T] int64. top, total, picked: [T], in the type that is
    computed in; from the lowest number, 0 and anything on. picked keeps what it holds where the label is in no block.
    """
    _start(_statistics_kernel, logits, labels, first, top, total, picked)


def launch_slopes(
    logits: torch.Tensor, labels: torch.Tensor, first: int, top: torch.Tensor, log_total: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """d loss / d logits of a block, in the place of logits. factor: [T], the upstream gradient of each row's loss."""
    _start(_slope_kernel, logits, labels, first, top, log_total, factor)
    return logits


def _start(kernel, logits, labels, first, *of_rows):
    rows, words = logits.shape
    if rows >= LIMIT or words >= LIMIT:
        refuse(max(rows, words))
    if rows:
        start(kernel, rows, (logits, labels, *of_rows), (first,), (words,), {"BLOCK_N": BLOCK_N}, NUM_WARPS)
