"""Rotation of queries and keys by two or three axes of positions, forward and backward.

Shape letters: B sequences, S their length, T = B * S tokens, A axes, H/Hk query/key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .offsets import LIMIT, blocks_of, offset, power_of_two, refuse, wide
from .starting import start

VECTOR = 8  # pairs side by side in a thread: one load of 16 bytes in fp16
BLOCK_H, NUM_WARPS = 2, 2  # heads of a group: four such loads a thread, while the four of the group before are turned
FILL, SHARE = 2048, 4  # programs before one takes a second group of heads, for which it has the angles; groups it takes then


@triton.jit
def sincos(angle):
    """(sin, cos) of a float32 angle with |angle| < 2e5, as near as float32 gets (a test has the figures).

    The library's version keeps a table in local memory for large angles. Here angle = r + low + n pi/2 with |r| <= pi/4: pi/2
    is the sum of four constants, the first three short enough (5, 7, 7 bits) for exact products with n < 2^17, so that
    the differences are exact too, with or without fused multiply-add; low is what the last one rounds off. The polynomials
    are least-maximum fits on that interval, summed from the small terms up.
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    exact = angle - n * 1.5625
    exact = exact - n * 0.0081787109375
    exact = exact - n * 0.00011730194091796875
    rest = n * 3.139164786504813e-07
    r = exact - rest
    low = (exact - r) - rest
    z = r * r
    half = 0.5 * z
    near = 1.0 - half
    s = r + (low * near + r * z * (-0.16666649281978607 + z * (0.008331923745572567 + z * -0.0001948874705703929)))
    c = z * z * (0.04166664555668831 + z * (-0.0013887305976822972 + z * 2.4431205019936897e-05))
    c = near + (((1.0 - near) - half) + (c - r * low))
    quadrant = n.to(tl.int32)
    odd = (quadrant & 1) == 1
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where((quadrant & 2) == 2, -sin, sin), tl.where(((quadrant + 1) & 2) == 2, -cos, cos)


@triton.jit
def _turn(
    x_ptr, out_ptr, row, row_out, stride_h, stride_out_h, first, end, inside, pair, axis_0, axis_1, axis_2, table, table_sin,
    scaling, HEADS: tl.constexpr, HALF: tl.constexpr, END_0: tl.constexpr, END_1: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Turns the groups first..end of BLOCK_H heads each, of tokens that start at row [ROWS], by the pairs [ROWS, VECTOR].

    While one group is turned the next is being loaded. No group is read after it was written, and both halves of a pair are in
    registers before either is stored. table: frequencies, or cos and sin apart for float64.
    """
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    head = first * BLOCK_H + tl.arange(0, BLOCK_H)
    x = x_ptr + (offset(head, stride_h)[:, None, None] + (row[:, None] + pair)[None, :, :])
    out = out_ptr + (offset(head, stride_out_h)[:, None, None] + (row_out[:, None] + pair)[None, :, :])
    mask = inside[None, :, None] & (head < HEADS)[:, None, None]
    low, high = tl.load(x, mask=mask, other=0.0), tl.load(x + HALF, mask=mask, other=0.0)
    if compute == tl.float32:
        position = tl.where(pair < END_1, axis_1[:, None], axis_2[:, None])
        position = tl.where(pair < END_0, axis_0[:, None], position)
        sin, cos = sincos(position * table)
    else:
        sin, cos = table_sin, table
    cos = (cos * scaling).to(compute)[None, :, :]
    sin = (sin * (scaling * SIGN)).to(compute)[None, :, :]
    step, step_out = offset(tl.full((), BLOCK_H, tl.int32), stride_h), offset(tl.full((), BLOCK_H, tl.int32), stride_out_h)
    for group in range(first, end):
        x += step
        a, b = wide(low), wide(high)
        more = inside[None, :, None] & ((head + BLOCK_H < HEADS) & (group + 1 < end))[:, None, None]
        low, high = tl.load(x, mask=more, other=0.0), tl.load(x + HALF, mask=more, other=0.0)
        here = inside[None, :, None] & (head < HEADS)[:, None, None]
        tl.store(out, a * cos - b * sin, mask=here)
        tl.store(out + HALF, b * cos + a * sin, mask=here)
        out += step_out
        head += BLOCK_H


@triton.jit(do_not_specialize=["T", "S", "share", "stride_p_a", "stride_p_b", "stride_p_s"])
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, position_ptr, table_ptr,
    T, S, share, stride_p_a, stride_p_b, stride_p_s, scaling,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_qo_b, stride_qo_s, stride_qo_h, stride_ko_b, stride_ko_s, stride_ko_h,
    H: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, AXES: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, PERIOD: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program turns `share` groups of heads, of q or of k, of ROWS // chunks tokens.

    A row is a chunk of VECTOR pairs of a token, so that hardly a lane idles where D/2 is no power of two (D = 80: five chunks).
    Each thread keeps the cos and sin of its row for all heads.
    """
    chunks: tl.constexpr = HALF // VECTOR
    tokens: tl.constexpr = ROWS // chunks
    groups_q: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    groups_k: tl.constexpr = (HK + BLOCK_H - 1) // BLOCK_H
    programs_q = tl.cdiv(groups_q, share)  # of these tokens
    programs = programs_q + tl.cdiv(groups_k, share)
    row = tl.arange(0, ROWS)
    t = tl.program_id(0) // programs * tokens + row // chunks
    inside = (t < T) & (row < tokens * chunks)
    pair = (row % chunks * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    n, s = t // S, t % S
    # All loads before the first use of one, here and in _turn: they wait together.
    if q_ptr.dtype.element_ty == tl.float64:
        entry = table_ptr + (offset(t, HALF)[:, None] + pair)
        table = tl.load(entry, mask=inside[:, None], other=0.0)
        table_sin = tl.load(entry + offset(T, HALF), mask=inside[:, None], other=0.0)
        axis_0, axis_1, axis_2 = t, t, t
    else:
        p_ptr = position_ptr + (offset(n, stride_p_b) + offset(s, stride_p_s))
        axis_0 = tl.load(p_ptr, mask=inside, other=0).to(tl.float32)
        axis_1 = tl.load(p_ptr + stride_p_a, mask=inside, other=0).to(tl.float32)
        axis_2 = axis_1
        if AXES == 3:
            axis_2 = tl.load(p_ptr + 2 * offset(tl.full((), 1, tl.int32), stride_p_a), mask=inside, other=0).to(tl.float32)
        table = tl.load(table_ptr + (pair if PERIOD == HALF else pair % PERIOD))
        table_sin = table
    part = tl.program_id(0) % programs
    if part < programs_q:
        first = part * share
        _turn(
            q_ptr, q_out_ptr, offset(n, stride_q_b) + offset(s, stride_q_s), offset(n, stride_qo_b) + offset(s, stride_qo_s),
            stride_q_h, stride_qo_h, first, tl.minimum(first + share, groups_q), inside, pair,
            axis_0, axis_1, axis_2, table, table_sin, scaling, H, HALF, END_0, END_1, SIGN, BLOCK_H,
        )  # fmt: skip
    else:
        first = (part - programs_q) * share
        _turn(
            k_ptr, k_out_ptr, offset(n, stride_k_b) + offset(s, stride_k_s), offset(n, stride_ko_b) + offset(s, stride_ko_s),
            stride_k_h, stride_ko_h, first, tl.minimum(first + share, groups_k), inside, pair,
            axis_0, axis_1, axis_2, table, table_sin, scaling, HK, HALF, END_0, END_1, SIGN, BLOCK_H,
        )  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    position_ids: torch.Tensor,
    table: torch.Tensor,
    sections: Sequence[int],
    scaling: float,
    sign: float,
) -> None:
    """q_out, k_out = q, k [T, H, D] or [B, S, H, D] rotated by sign * angles; they may be q and k themselves.

    position_ids [A, T] or [A, B, S]; sections: the pairs of each of the A axes, D/2 in all. table: float32 frequencies [D/2],
    or [D/4] for the two axes of the vision tower, which then share it. For float64 cos and sin [2, ..., D/2] in float32
    instead: there a last bit of theirs is an error, so they come from where the definition takes them.
    """
    batched = q.dim() == 4
    *_, length, heads, dim = q.shape
    tokens = q.shape[0] * length if batched else length
    if tokens >= LIMIT or heads >= LIMIT:
        refuse(max(tokens, heads))
    if tokens == 0 or heads + k.shape[-2] == 0:
        return
    strides = tuple([n for x in (q, k, q_out, k_out) for n in (x.stride()[:3] if batched else (0, *x.stride()[:2]))])
    axis, *rest = position_ids.stride()
    half = dim // 2
    vector = min(half & -half, VECTOR)
    rows = max(32 * NUM_WARPS, power_of_two(half // vector))
    blocks = blocks_of(tokens, rows // (half // vector))
    groups = [blocks_of(heads, BLOCK_H), blocks_of(k.shape[-2], BLOCK_H)]
    share = max(1, min(SHARE, max(groups), blocks * sum(groups) // FILL))
    start(
        _rope_kernel, blocks * sum([blocks_of(n, share) for n in groups]),
        (q, k, q_out, k_out, position_ids, table.contiguous()),
        (tokens, length, share, axis, *(rest if batched else (0, *rest)), float(scaling)),  # an int would be specialised
        strides,
        {
            "H": heads, "HK": k.shape[-2], "HALF": half, "AXES": len(sections), "END_0": sections[0],
            "END_1": sections[0] + sections[1], "PERIOD": table.shape[0], "SIGN": sign,
            "BLOCK_H": BLOCK_H, "ROWS": rows, "VECTOR": vector,
        },
        NUM_WARPS,
    )  # fmt: skip
