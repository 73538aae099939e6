"""M-RoPE of the 2B and the 7B model: transformers' rotation by tables, compiled too, and Liger's op, against ours.

    qwen2vl-fast bench mrope [--peers NAME ...] [--repeats 30] [--json] [--save]

transformers and Liger are given their cos and sin tables, which a model makes once a forward; ours computes angles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

from bench.passes import (
    COMPILED,
    Case,
    compiled,
    compiled_with_gradients,
    device,
    dtype,
    main,
    peer,
    positions_of,
    random,
    tokens,
    with_gradients,
)
from qwen2vl_fast import ops, reference

PEERS = ("transformers", COMPILED, "Liger")
MODELS = {"2B": (12, 2), "7B": (28, 4)}
DIM, THETA, SECTIONS = 128, 1e6, (16, 24, 24)


def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [3, 1, T, D] as Liger and transformers before 5.17 take them."""
    angles = positions[..., None].float() * reference.inverse_frequencies(DIM, THETA).to(positions.device)
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos().to(dtype()), angles.sin().to(dtype())


def recomposed(table: Tensor) -> Tensor:
    """[1, T, D] as transformers from 5.17 on make them."""
    halves = table[..., : DIM // 2].split(SECTIONS, -1)
    half = torch.cat([part[axis] for axis, part in enumerate(halves)], -1)
    return torch.cat((half, half), -1)


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' function on its layout [B, H, T, D], which is a view here as it is in the model."""
    rotate = getattr(theirs, "apply_rotary_pos_emb", None) or functools.partial(
        theirs.apply_multimodal_rotary_pos_emb, mrope_section=list(SECTIONS)
    )
    q, k = rotate(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def liger(function: Any, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = function.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin, SECTIONS)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def cases() -> Iterator[Case]:
    for model, (heads, heads_k) in MODELS.items():
        for count in tokens():
            yield from _cases(model, heads, heads_k, count)


def _cases(model: str, heads: int, heads_k: int, count: int) -> Iterator[Case]:
    q, k, grad_q, grad_k = (random(count, h, DIM, seed=i) for i, h in enumerate((heads, heads_k, heads, heads_k)))
    own_q, own_k = q.clone(), k.clone()
    positions = positions_of(count)
    table = reference.inverse_frequencies(DIM, THETA).to(device())
    cos, sin = tables(positions)
    if hasattr(theirs, "apply_rotary_pos_emb"):
        one_cos, one_sin = recomposed(cos), recomposed(sin)
    else:
        one_cos, one_sin = cos, sin
    ours = functools.partial(ops.mrope, position_ids=positions, inv_freq=table)
    by_table = functools.partial(eager, cos=one_cos, sin=one_sin)

    def in_place() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ops.mrope_(own_q, own_k, positions, inv_freq=table)
        return own_q, own_k

    def forward(rows: slice) -> tuple[Tensor, ...]:
        return reference.mrope(q[rows].double(), k[rows].double(), positions[:, rows], inv_freq=table)

    def both(rows: slice) -> tuple[Tensor, ...]:
        back = reference.mrope(grad_q[rows].double(), grad_k[rows].double(), -positions[:, rows], inv_freq=table)
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
    if function := peer(missing, "Liger", "liger_kernel.ops.qwen2vl_mrope", "LigerQwen2VLMRopeFunction", "liger-kernel"):
        liger_q, liger_k = q.clone(), k.clone()  # rotated in place, and so are the gradients
        contenders["Liger"] = lambda: liger(function, cos, sin, liger_q, liger_k)
        clones = [x.clone() for x in (q, k, grad_q, grad_k)]
        training["Liger"] = with_gradients(functools.partial(liger, function, cos, sin), clones[:2], clones[2:])
    size = 2 * (q.numel() + k.numel()) * q.element_size()
    yield Case(f"M-RoPE {model}", count, size, contenders, forward, group=model, missing=missing)
    yield Case(f"M-RoPE {model}, forward and backward", count, 2 * size, training, both, group=model, missing=missing)


if __name__ == "__main__":
    main(("mrope",), __doc__)
