"""The tower's 2-D rotation of q and k inside packed qkv: transformers' function, compiled too, flash-attn's op, against ours.

    qwen2vl-fast bench rope [--peers NAME ...] [--repeats 30] [--json] [--save]

The others are given their cos and sin tables, as a model makes them once a forward; ours computes angles from positions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from bench.passes import (
    COMPILED,
    Case,
    compiled,
    compiled_with_gradients,
    device,
    dtype,
    main,
    peer,
    random,
    tokens,
    with_gradients,
)
from qwen2vl_fast import ops, positions, reference

PEERS = ("transformers", COMPILED, "flash-attn")
HEADS, DIM, THETA = 16, 80, 1e4


def cases() -> Iterator[Case]:
    for count in tokens():
        yield from _cases(count)


def _cases(count: int) -> Iterator[Case]:
    qkv, grad = random(count, 3, HEADS, DIM), random(count, 2, HEADS, DIM, seed=1)
    (q, k, _), (grad_q, grad_k) = qkv.unbind(1), grad.unbind(1)
    side = 32
    ids = positions.vision_position_ids(torch.tensor([[count // side**2, side, side]])).to(device())
    table = reference.inverse_frequencies(DIM // 2, THETA).to(device())
    angles = reference.vision_rope_angles(ids, table)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    ours = functools.partial(ops.vision_rope, position_ids=ids, inv_freq=table)
    by_table = functools.partial(apply_rotary_pos_emb_vision, cos=cos, sin=sin)
    own = qkv.clone()

    def in_place() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ops.vision_rope_(own[:, 0], own[:, 1], ids, inv_freq=table)
        return own[:, 0], own[:, 1]

    def forward(rows: slice) -> tuple[Tensor, ...]:
        return reference.vision_rope(q[rows].double(), k[rows].double(), ids[:, rows], inv_freq=table)

    def both(rows: slice) -> tuple[Tensor, ...]:
        back = reference.vision_rope(grad_q[rows].double(), grad_k[rows].double(), -ids[:, rows], inv_freq=table)
        return *forward(rows), *back

    contenders = {
        "qwen2vl_fast": lambda: ours(q, k),
        "qwen2vl_fast in place": in_place,
        "transformers": lambda: by_table(q, k),
        **compiled(by_table, q, k),
    }
    training = {
        "qwen2vl_fast": with_gradients(ours, (q, k), (grad_q, grad_k)),
        "transformers": with_gradients(by_table, (q, k), (grad_q, grad_k)),
        **compiled_with_gradients(by_table, (q, k), (grad_q, grad_k)),
    }
    missing: dict[str, str] = {}
    if apply_rotary := peer(missing, "flash-attn", "flash_attn.ops.triton.rotary", "apply_rotary", "flash-attn"):
        half_cos, half_sin, other = angles.cos().to(dtype()), angles.sin().to(dtype()), qkv.clone()

        def flash() -> tuple[Tensor, Tensor]:
            apply_rotary(other[:, :2].flatten(1, 2)[None], half_cos, half_sin, inplace=True)  # q and k at once: its best
            return other[:, 0], other[:, 1]

        def flash_each() -> tuple[Tensor, ...]:
            return tuple(apply_rotary(x[None], half_cos, half_sin)[0] for x in (q, k))

        contenders |= {"flash-attn in place": flash, "flash-attn": flash_each}
    size = 2 * 2 * q.numel() * q.element_size()
    yield Case("vision RoPE", count, size, contenders, forward, missing=missing)
    yield Case("vision RoPE, forward and backward", count, 2 * size, training, both)


if __name__ == "__main__":
    main(("rope",), __doc__)
