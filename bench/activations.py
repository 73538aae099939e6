"""bias + QuickGELU and bias + GELU of 5120 (tower, merger), SwiGLU of 8960 and 18944 (2B and 7B decoder).

python -m bench.activations [--repeats 30] [--save]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from bench.passes import Case, compiled, compiled_with_gradients, main, random, tokens, with_gradients
from qwen2vl_fast import ops, reference

FEATURES, WIDTHS = 5120, {"2B": 8960, "7B": 18944}


def eager_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return ACT2FN["quick_gelu"](x + bias)


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def eager_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def cases() -> Iterator[Case]:
    for op, eager in (("quick_gelu", eager_quick_gelu), ("gelu", eager_gelu)):
        for count in tokens():
            leaves = (random(count, FEATURES), random(FEATURES, seed=1))
            yield from _cases(f"bias + {op} {FEATURES}", op, eager, leaves, leaves[0].numel(), (2, 3))
    for model, width in WIDTHS.items():
        for count in tokens():
            leaves = (random(count, 2 * width),)
            yield from _cases(f"swiglu {width} ({model})", "swiglu", eager_swiglu, leaves, count * width, (3, 5))


def _cases(
    name: str, op: str, eager: Callable[..., Tensor], leaves: tuple[Tensor, ...], outputs: int, moved: tuple[int, int]
) -> Iterator[Case]:
    """moved: elements that move forward and backward, per output."""
    count, ours, true = leaves[0].shape[0], getattr(ops, op), getattr(reference, op)
    grad = random(count, outputs // count, seed=2)

    def wide(rows: slice) -> list[Tensor]:
        return [leaves[0][rows].double(), *(p.double() for p in leaves[1:])]

    def both(rows: slice) -> Any:
        return with_gradients(true, wide(rows), (grad[rows].double(),))()

    size = outputs * leaves[0].element_size()
    contenders = {"qwen2vl_fast": lambda: ours(*leaves), "torch": lambda: eager(*leaves), **compiled(eager, *leaves)}
    training = {
        "qwen2vl_fast": with_gradients(ours, leaves, (grad,)),
        "torch": with_gradients(eager, leaves, (grad,)),
        **compiled_with_gradients(eager, leaves, (grad,)),
    }
    yield Case(name, count, moved[0] * size, contenders, lambda rows: true(*wide(rows)), group=name)
    both_size = sum(moved) * size
    yield Case(f"{name}, forward and backward", count, both_size, training, both, sums=len(leaves) - 1, group=name)


if __name__ == "__main__":
    main(("activations",), __doc__)
