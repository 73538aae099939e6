"""bias + QuickGELU and bias + GELU of 5120 (tower, merger), SwiGLU of 8960 and 18944 (2B and 7B decoder).

qwen2vl-fast bench activations [--peers NAME ...] [--repeats 30] [--json] [--save]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from bench.passes import COMPILED, Case, compiled, compiled_with_gradients, main, peer, random, tokens, with_gradients
from qwen2vl_fast import ops, reference
from qwen2vl_fast.ops.gated import gated

PEERS = ("torch", COMPILED, "Liger")
FEATURES, WIDTHS = 5120, {"2B": 8960, "7B": 18944}


def eager_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return ACT2FN["quick_gelu"](x + bias)


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def eager_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def eager_gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def true_gated(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(torch.cat((gate, up), -1))


def cases() -> Iterator[Case]:
    for op, eager in (("quick_gelu", eager_quick_gelu), ("gelu", eager_gelu)):
        for count in tokens():
            leaves = (random(count, FEATURES), random(FEATURES, seed=1))
            functions = getattr(ops, op), getattr(reference, op), eager
            yield from _cases(f"bias + {op} {FEATURES}", functions, leaves, 1, leaves[0].numel(), (2, 3))
    for model, width in WIDTHS.items():
        for count in tokens():
            leaves = (random(count, 2 * width),)
            functions = ops.swiglu, reference.swiglu, eager_swiglu
            yield from _cases(f"swiglu {width} ({model})", functions, leaves, 1, count * width, (3, 5))
        for count in tokens():
            leaves = (random(count, width), random(count, width, seed=1))
            functions = gated, true_gated, eager_gated
            yield from _cases(f"swiglu of two {width} ({model})", functions, leaves, 2, count * width, (3, 5))


def _cases(
    name: str,
    functions: tuple[Callable[..., Tensor], ...],
    leaves: tuple[Tensor, ...],
    packed: int,
    outputs: int,
    moved: tuple[int, int],
) -> Iterator[Case]:
    """functions: ours, the definition, eager PyTorch. The first `packed` leaves are by rows. moved: elements that move forward
    and backward, per output."""
    ours, true, eager = functions
    count = leaves[0].shape[0]
    grad = random(count, outputs // count, seed=2)

    def wide(rows: slice) -> list[Tensor]:
        return [*(x[rows].double() for x in leaves[:packed]), *(p.double() for p in leaves[packed:])]

    def both(rows: slice) -> Any:
        return with_gradients(true, wide(rows), (grad[rows].double(),))()

    size = outputs * leaves[0].element_size()
    contenders = {"qwen2vl_fast": lambda: ours(*leaves), "torch": lambda: eager(*leaves), **compiled(eager, *leaves)}
    training = {
        "qwen2vl_fast": with_gradients(ours, leaves, (grad,)),
        "torch": with_gradients(eager, leaves, (grad,)),
        **compiled_with_gradients(eager, leaves, (grad,)),
    }
    missing: dict[str, str] = {}
    if packed == 2 and (function := peer(missing, "Liger", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction", "liger-kernel")):
        contenders["Liger"] = lambda: function.apply(*leaves)
        own = [x.clone() for x in leaves]  # over which it writes the gradients
        training["Liger"] = with_gradients(function.apply, own, (grad,))
    yield Case(name, count, moved[0] * size, contenders, lambda rows: true(*wide(rows)), group=name, missing=missing)
    sums = len(leaves) - packed
    yield Case(
        f"{name}, forward and backward", count, sum(moved) * size, training, both, sums=sums, group=name, missing=missing
    )


if __name__ == "__main__":
    main(("activations",), __doc__)
