"""The kernel of SwiGLU of two tensors, by the test bodies that every backend runs."""

from __future__ import annotations

import random

import pytest
import torch

from qwen2vl_fast.ops.gated import gated
from tests import test_ops_gated
from tests.compare import Call, guard, judge
from tests.test_ops_rope import randn

MANY = 700  # random shapes of each dtype


def check_gated(seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """A random shape between guard bands, gate and up with strides of their own."""
    shapes = random.Random(f"gated {seed}")
    width, middle = shapes.choice((16, 19, 80, 640)), shapes.choice(((), (), (3,), (2, 2)))
    guards = [
        guard(3 * randn(shapes.randint(1, 24), *middle, width, seed=seed, device=device, dtype=dtype), strided=strided)
        for strided in (False, True)
    ]
    rows = min(len(g.view) for g in guards)
    call = Call({name: g.view[:rows] for name, g in zip(("gate", "up"), guards, strict=True)})
    name = f"gated seed {seed} {dtype}"
    judge(lambda gate, up: gated(gate, up, backend="triton"), test_ops_gated.definition, call, seed=seed, name=name)
    for one in guards:
        one.check(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 80), (5, 1030), (0, 16)])
def test_rule(dtype, shape):
    gate, up = (3 * randn(*shape, seed=seed, device="cpu", dtype=dtype) for seed in range(2))
    judge(
        lambda gate, up: gated(gate, up, backend="triton"), test_ops_gated.definition, Call({"gate": gate, "up": up}),
        name=f"triton {shape}",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_random_shapes(dtype):
    for seed in range(6):
        check_gated(seed, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_many(dtype):
    for seed in range(1000, 1000 + MANY):
        check_gated(seed, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"])
def test_on_a_device(dtype, device):
    for seed in range(20):
        check_gated(seed, dtype, device)
