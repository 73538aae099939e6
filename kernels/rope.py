"""Rotation of queries and keys by two or three axes of positions, forward and backward.

Shape letters: B sequences, S their length, T = B * S tokens, A axes, H/Hk query/key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .offsets import blocks_of, offset, power_of_two, wide
from .starting import start

BLOCK_T, NUM_WARPS = 4, 2
PER_THREAD = 16  # pairs that a thread turns at a time: four loads of 16 bytes in fp16; twice as many spill
FILL, SHARE = 2048, 2  # programs before one takes a second group of heads, for which it has the angles; groups it takes then


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
def _rotate_heads(
    x_ptr, out_ptr, row, row_out, first, stride_h, stride_out_h, cos, sin, mask,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Rotates BLOCK_H heads of the tokens that start at row [BLOCK_T]. Both halves are read before either is written."""
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    head = first + tl.arange(0, BLOCK_H)[:, None, None]
    x = x_ptr + (row[None, :, None] + offset(head, stride_h) + pair)
    out = out_ptr + (row_out[None, :, None] + offset(head, stride_out_h) + pair)
    a = wide(tl.load(x, mask=mask, other=0.0))
    b = wide(tl.load(x + HALF, mask=mask, other=0.0))
    tl.store(out, a * cos - b * sin, mask=mask)
    tl.store(out + HALF, b * cos + a * sin, mask=mask)


@triton.jit(do_not_specialize=["T", "S", "share", "stride_p_a", "stride_p_b", "stride_p_s"])
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, position_ptr, table_ptr,
    T, S, share, stride_p_a, stride_p_b, stride_p_s, scaling,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_qo_b, stride_qo_s, stride_qo_h, stride_ko_b, stride_ko_s, stride_ko_h,
    H: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, AXES: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, PERIOD: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """A program turns `share` groups of heads, q's before k's, of BLOCK_T tokens."""
    groups_q: tl.constexpr = H // BLOCK_H
    groups: tl.constexpr = groups_q + HK // BLOCK_HK
    programs = tl.cdiv(groups, share)  # of these tokens
    t = tl.program_id(0) // programs * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.arange(0, BLOCK_HALF)
    compute: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    b, s = t // S, t % S
    inside = t < T
    mask = inside[:, None] & (pair < HALF)[None, :]
    if compute == tl.float64:
        entry = table_ptr + (offset(t, HALF)[:, None] + pair[None, :])
        cos = tl.load(entry, mask=mask, other=0.0)
        sin = tl.load(entry + offset(T, HALF), mask=mask, other=0.0)
    else:
        p_ptr = position_ptr + (offset(b, stride_p_b) + offset(s, stride_p_s))
        position = tl.where((pair < END_0)[None, :], tl.load(p_ptr, mask=inside, other=0)[:, None], 0)
        second = tl.load(p_ptr + stride_p_a, mask=inside, other=0)
        position = tl.where(((pair >= END_0) & (pair < END_1))[None, :], second[:, None], position)
        if AXES == 3:
            third = tl.load(p_ptr + 2 * offset(tl.full((), 1, tl.int32), stride_p_a), mask=inside, other=0)
            position = tl.where((pair >= END_1)[None, :], third[:, None], position)
        freq = tl.load(table_ptr + pair % PERIOD, mask=pair < HALF, other=0.0)
        sin, cos = sincos(position.to(tl.float32) * freq[None, :])
    cos = (cos * scaling).to(compute)
    sin = (sin * (scaling * SIGN)).to(compute)
    mask = mask[None, :, :]
    cos, sin = cos[None, :, :], sin[None, :, :]
    row_q, row_k = offset(b, stride_q_b) + offset(s, stride_q_s), offset(b, stride_k_b) + offset(s, stride_k_s)
    row_qo, row_ko = offset(b, stride_qo_b) + offset(s, stride_qo_s), offset(b, stride_ko_b) + offset(s, stride_ko_s)
    first = tl.program_id(0) % programs * share
    for group in range(first, tl.minimum(first + share, groups)):
        if group < groups_q:
            _rotate_heads(
                q_ptr, q_out_ptr, row_q, row_qo, group * BLOCK_H, stride_q_h, stride_qo_h, cos, sin, mask,
                HALF, BLOCK_H, BLOCK_HALF,
            )  # fmt: skip
        else:
            _rotate_heads(
                k_ptr, k_out_ptr, row_k, row_ko, (group - groups_q) * BLOCK_HK, stride_k_h, stride_ko_h, cos, sin, mask,
                HALF, BLOCK_HK, BLOCK_HALF,
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
    if tokens == 0 or heads + k.shape[-2] == 0:
        return
    strides = tuple([n for x in (q, k, q_out, k_out) for n in (x.stride()[:3] if batched else (0, *x.stride()[:2]))])
    axis, *rest = position_ids.stride()
    block_t, block_h, block_hk = _tile(heads, k.shape[-2], power_of_two(dim // 2))
    blocks, groups = blocks_of(tokens, block_t), heads // block_h + k.shape[-2] // block_hk
    share = max(1, min(SHARE, groups, blocks * groups // FILL))
    start(
        _rope_kernel, blocks * blocks_of(groups, share),
        (q, k, q_out, k_out, position_ids, table.contiguous()),
        (tokens, length, share, axis, *(rest if batched else (0, *rest)), scaling),
        strides,
        {
            "H": heads, "HK": k.shape[-2], "HALF": dim // 2, "AXES": len(sections), "END_0": sections[0],
            "END_1": sections[0] + sections[1], "PERIOD": table.shape[0], "SIGN": sign,
            "BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_HK": block_hk, "BLOCK_HALF": power_of_two(dim // 2),
        },
        NUM_WARPS,
    )  # fmt: skip


def _tile(heads: int, heads_k: int, half: int) -> tuple[int, int, int]:
    """(tokens, heads of q, heads of k) of a tile: powers of two that divide the heads, tokens that give each thread 8 pairs."""
    threads, powers = 32 * NUM_WARPS, [n & -n for n in (heads, heads_k)]
    fewest = min([n for n in powers if n], default=1)
    tokens = max(BLOCK_T, 8 * threads // (half * min(fewest, 4)))
    most = max(1, PER_THREAD * threads // (half * tokens))
    return tokens, *(max(1, min(n, most)) for n in powers)
