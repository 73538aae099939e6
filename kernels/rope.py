"""Rotation of queries and keys by two or three axes of positions, forward and backward.

Shape letters: B sequences, S their length, T = B * S tokens, A axes, H/Hk query/key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .offsets import offset, wide

BLOCK_T = 8  # tokens a program: 8 lanes of 16 bytes hold half a head of 128 in fp16, so two warps hold 8 tokens
NUM_WARPS = 2
MAX_BLOCK_H = 4  # heads loaded before the first is stored: 8 loads of 16 bytes a thread are under way at a time


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
    x_ptr, out_ptr, row, row_out, stride_h, stride_out_h, cos, sin, mask,
    N_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of the tokens that start at row [BLOCK_T]. Both halves are read before either is written."""
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    for first in range(0, N_HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None, None]
        x = x_ptr + (row[None, :, None] + offset(head, stride_h) + pair)
        out = out_ptr + (row_out[None, :, None] + offset(head, stride_out_h) + pair)
        a = wide(tl.load(x, mask=mask, other=0.0))
        b = wide(tl.load(x + HALF, mask=mask, other=0.0))
        tl.store(out, a * cos - b * sin, mask=mask)
        tl.store(out + HALF, b * cos + a * sin, mask=mask)


@triton.jit(do_not_specialize=["T", "S", "stride_p_a", "stride_p_b", "stride_p_s"])
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, position_ptr, inv_freq_ptr,
    T, S,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_qo_b, stride_qo_s, stride_qo_h, stride_ko_b, stride_ko_s, stride_ko_h,
    stride_p_a, stride_p_b, stride_p_s, scaling,
    H: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, AXES: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, PERIOD: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.arange(0, BLOCK_HALF)
    b, s = t // S, t % S
    p_ptr = position_ptr + (offset(b, stride_p_b) + offset(s, stride_p_s))
    inside = t < T
    position = tl.where((pair < END_0)[None, :], tl.load(p_ptr, mask=inside, other=0)[:, None], 0)
    second = tl.load(p_ptr + stride_p_a, mask=inside, other=0)
    position = tl.where(((pair >= END_0) & (pair < END_1))[None, :], second[:, None], position)
    if AXES == 3:
        third = tl.load(p_ptr + 2 * offset(tl.full((), 1, tl.int32), stride_p_a), mask=inside, other=0)
        position = tl.where((pair >= END_1)[None, :], third[:, None], position)
    freq = tl.load(inv_freq_ptr + pair % PERIOD, mask=pair < HALF, other=0.0)
    sin, cos = sincos(position.to(tl.float32) * freq[None, :])
    cos = cos * scaling
    sin = sin * (scaling * SIGN)
    if q_ptr.dtype.element_ty == tl.float64:
        cos, sin = cos.to(tl.float64), sin.to(tl.float64)
    mask = (inside[:, None] & (pair < HALF)[None, :])[None, :, :]
    cos, sin = cos[None, :, :], sin[None, :, :]
    _rotate_heads(
        q_ptr, q_out_ptr, offset(b, stride_q_b) + offset(s, stride_q_s), offset(b, stride_qo_b) + offset(s, stride_qo_s),
        stride_q_h, stride_qo_h, cos, sin, mask, H, HALF, BLOCK_H, BLOCK_HALF,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, offset(b, stride_k_b) + offset(s, stride_k_s), offset(b, stride_ko_b) + offset(s, stride_ko_s),
        stride_k_h, stride_ko_h, cos, sin, mask, HK, HALF, BLOCK_HK, BLOCK_HALF,
    )  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    sections: Sequence[int],
    scaling: float,
    sign: float,
) -> None:
    """q_out, k_out = q, k [T, H, D] or [B, S, H, D] rotated by sign * angles; they may be q and k themselves.

    position_ids [A, T] or [A, B, S]; sections: the pairs of each of the A axes, D/2 in all. inv_freq [D/2], or [D/4] for
    the two axes of the vision tower, which then share it.
    """
    if q.dim() == 3:
        q, k, q_out, k_out = (x.unsqueeze(0) for x in (q, k, q_out, k_out))
        position_ids = position_ids.unsqueeze(1)
    batch, length, heads, dim = q.shape
    tokens = batch * length
    if tokens == 0:
        return
    with torch.cuda.device_of(q):
        _rope_kernel[(triton.cdiv(tokens, BLOCK_T),)](
            q, k, q_out, k_out, position_ids, inv_freq.contiguous(), tokens, length,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *position_ids.stride(), scaling,
            H=heads, HK=k.shape[2], HALF=dim // 2, AXES=len(sections), END_0=sections[0], END_1=sections[0] + sections[1],
            PERIOD=inv_freq.shape[0], SIGN=sign, BLOCK_T=BLOCK_T, BLOCK_H=_block_of(heads), BLOCK_HK=_block_of(k.shape[2]),
            BLOCK_HALF=triton.next_power_of_2(dim // 2), num_warps=NUM_WARPS,
        )  # fmt: skip


def _block_of(heads: int) -> int:
    """The largest power of two that divides heads, at most MAX_BLOCK_H."""
    return min(heads & -heads, MAX_BLOCK_H) if heads else 1
