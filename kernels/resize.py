"""One axis of a resize of uint8 frames: a weighted sum of neighbouring samples in integers.

Shape letters: O what stands before the axis, L its length, J the new length, I what stands behind, K taps of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .offsets import LIMIT, blocks_of, offset, refuse
from .starting import start

BLOCK, NUM_WARPS = 1024, 4
BITS = 22  # of a weight's fraction: eight bits for the sample and two for sums above one are left of 32


@triton.jit(do_not_specialize=["O", "L", "J", "I", "K"])
def _resize_kernel(x_ptr, start_ptr, weight_ptr, y_ptr, O, L, J, I, K, BITS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    blocks = tl.cdiv(J * I, BLOCK)
    o = tl.program_id(0) // blocks
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    j, i = e // I, e % I
    inside = e < J * I
    first = tl.load(start_ptr + j, mask=inside, other=0)
    total = tl.full((BLOCK,), 1 << (BITS - 1), tl.int32)
    for k in range(K):
        sample = offset(o, L) + first + k
        known = inside & (first + k < L)
        value = tl.load(x_ptr + (offset(sample, I) + i), mask=known, other=0).to(tl.int32)
        total += value * tl.load(weight_ptr + (j * K + k), mask=inside, other=0)
    level = tl.minimum(tl.maximum(total >> BITS, 0), 255)
    tl.store(y_ptr + (offset(o, J * I) + e), level.to(tl.uint8), mask=inside)


def launch(x: torch.Tensor, axis: int, start_of: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x uint8, contiguous -> the same with J samples along axis: sample j is the sum over k of x[start_of[j] + k] weight[j, k].

    start_of [J] int32, weight [J, K] int32 with BITS bits behind the point, zeros past the last tap.
    """
    shape = list(x.shape)
    length, shape[axis] = shape[axis], start_of.shape[0]
    outer, inner = (torch.Size(sizes).numel() for sizes in (shape[:axis], shape[axis + 1 :]))
    blocks = outer * blocks_of(start_of.shape[0] * inner, BLOCK)
    largest = max(start_of.shape[0] * max(inner, weight.shape[1]), length, blocks)
    if largest >= LIMIT:
        refuse(largest)
    y = x.new_empty(shape)
    if y.numel():
        start(
            _resize_kernel, blocks, (x, start_of, weight, y),
            (outer, length, start_of.shape[0], inner, weight.shape[1]), (), {"BITS": BITS, "BLOCK": BLOCK}, NUM_WARPS,
        )  # fmt: skip
    return y
