"""uint8 frames to normalised patch rows, in merge order.

Shape letters: T patch rows, h, w their numbers down and across a frame. A row is (channel 3, frame 2, y 14, x 14).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .offsets import LIMIT, blocks_of, offset, refuse
from .starting import start

BLOCK_T, BLOCK_P, NUM_WARPS = 16, 32, 4  # 196 = 6.1 blocks of 32 pairs: 13 % of the lanes idle, against 23 % with 64


@triton.jit
def _put(out, left, right, mask, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Stores the two columns of each pair at out [BLOCK_T, 2 * BLOCK_P]."""
    compute: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    pair = tl.join(left.to(compute) * SCALE + SHIFT, right.to(compute) * SCALE + SHIFT)
    tl.store(out, tl.reshape(pair, out.shape), mask=mask)


@triton.jit(do_not_specialize=["T", "height", "width"])
def _patchify_kernel(
    word_ptr, out_ptr, T, height, width,
    SCALE_R: tl.constexpr, SCALE_G: tl.constexpr, SCALE_B: tl.constexpr,
    SHIFT_R: tl.constexpr, SHIFT_G: tl.constexpr, SHIFT_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Two pixels side by side are three words of two bytes, RG BR GB: each is loaded once, for all channels.

    The lanes of a load stand side by side in a patch: each line of the first-level cache that a load touches takes a turn.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    half = width // 28  # squares of 2x2 patches across a frame
    square = t // 4
    down = square // half % (height // 28) * 2 + t // 2 % 2
    across = square % half * 2 + t % 2
    frames = t // (height // 14 * (width // 14)) * 2
    pitch = half * 42  # words of a row of pixels
    # A word's place is the sum of what its patch and what its place in the patch give: one addition for each, not a product.
    corner = offset(offset(frames, height) + down * 14, pitch) + across * 21
    rows = (t < T)[:, None]
    for first in tl.static_range(0, 196, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        frame, y, x = p // 98, p // 7 % 14, p % 7
        word = word_ptr + (corner[:, None] + (offset(offset(frame, height) + y, pitch) + x * 3)[None, :])
        mask = rows & (p < 196)[None, :]
        rg, br, gb = (
            tl.load(word, mask=mask, other=0), tl.load(word + 1, mask=mask, other=0), tl.load(word + 2, mask=mask, other=0)
        )  # fmt: skip
        e = 2 * first + tl.arange(0, 2 * BLOCK_P)
        out = out_ptr + (offset(t, 1176)[:, None] + e[None, :])
        mask = rows & (e < 392)[None, :]
        _put(out, rg & 255, br >> 8, mask, SCALE_R, SHIFT_R)
        _put(out + 392, rg >> 8, gb & 255, mask, SCALE_G, SHIFT_G)
        _put(out + 784, br & 255, gb >> 8, mask, SCALE_B, SHIFT_B)


def launch(
    frames: torch.Tensor, dtype: torch.dtype, scale: tuple[float, float, float], shift: tuple[float, float, float]
) -> torch.Tensor:
    """frames [N, 14h, 14w, 3] uint8 -> [N/2 * h * w, 1176]: value * scale + shift by channel."""
    rows = frames.numel() // 1176
    if rows >= LIMIT:
        refuse(rows)
    _, height, width, _ = frames.shape
    frames = frames.contiguous()
    if frames.data_ptr() % 2 or frames.storage_offset() % 2:
        frames = frames.clone()
    out = torch.empty((rows, 1176), dtype=dtype, device=frames.device)
    if rows:
        names = [f"{what}_{channel}" for what in ("SCALE", "SHIFT") for channel in "RGB"]
        constants = dict(zip(names, (*scale, *shift), strict=True))
        start(
            _patchify_kernel, blocks_of(rows, BLOCK_T), (frames.view(-1).view(torch.uint16), out), (rows, height, width), (),
            {**constants, "BLOCK_T": BLOCK_T, "BLOCK_P": BLOCK_P}, NUM_WARPS,
        )  # fmt: skip
    return out
