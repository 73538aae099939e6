"""LayerNorm of 1280 and the 2x2 merge behind it, from merge order and from raster order.

    qwen2vl-fast bench merge [--peers NAME ...] [--repeats 30] [--json] [--save]

From merge order eager PyTorch's LayerNorm is one pass already, and its view costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.passes import COMPILED, Case, compiled, compiled_with_gradients, device, main, random, tokens, with_gradients
from qwen2vl_fast import ops, reference

PEERS = ("torch", COMPILED)
WIDTH, EPS, SIDE = 1280, 1e-6, 32


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS).view(-1, 4 * WIDTH)


def eager_raster(order: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager(x[order], weight, bias)


def cases() -> Iterator[Case]:
    for count in tokens():
        yield from _cases(count)


def _cases(count: int) -> Iterator[Case]:
    leaves = (random(count, WIDTH), random(WIDTH, seed=1), random(WIDTH, seed=2))
    grad = random(count // 4, 4 * WIDTH, seed=3)
    grid = torch.tensor([[count // SIDE**2, SIDE, SIDE]])
    host_order = reference.raster_to_merge_order(grid)
    order = host_order.to(device())
    ours = functools.partial(ops.merge_patches, eps=EPS)
    peer = functools.partial(eager_raster, order)

    def definition(x: Tensor, rows: slice) -> Tensor:
        return reference.merge_patches(x[rows].double(), *(p.double() for p in leaves[1:]), eps=EPS)

    def both(rows: slice) -> tuple[Tensor, ...]:
        wide = [leaves[0][rows].double(), *(p.double() for p in leaves[1:])]
        return with_gradients(
            functools.partial(reference.merge_patches, eps=EPS),
            wide,
            (grad.view(-1, WIDTH)[rows].double().view(-1, 4 * WIDTH),),
        )()

    size = 2 * leaves[0].numel() * leaves[0].element_size()
    contenders = {"qwen2vl_fast": lambda: ours(*leaves), "torch": lambda: eager(*leaves), **compiled(eager, *leaves)}
    yield Case("LayerNorm + merge", count, size, contenders, lambda rows: definition(leaves[0], rows))
    raster = {
        "qwen2vl_fast": lambda: ours(*leaves, grid_thw=grid),
        "torch": lambda: peer(*leaves),
        **compiled(peer, *leaves),
    }
    yield Case("LayerNorm + merge from raster order", count, size, raster, lambda rows: definition(leaves[0][order], rows))
    training = {
        "qwen2vl_fast": with_gradients(ours, leaves, (grad,)),
        "torch": with_gradients(eager, leaves, (grad,)),
        **compiled_with_gradients(eager, leaves, (grad,)),
    }
    yield Case("LayerNorm + merge, forward and backward", count, size * 5 // 2, training, both, sums=2)


if __name__ == "__main__":
    main(("merge",), __doc__)
