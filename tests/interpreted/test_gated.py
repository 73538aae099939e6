"""The kernel of SwiGLU of two tensors, by the test bodies that every backend runs."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_fast.ops.gated import gated
from tests import test_ops_gated
from tests.compare import Call, judge
from tests.test_ops_rope import randn


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 80), (5, 1030), (0, 16)])
def test_rule(dtype, shape):
    gate, up = (3 * randn(*shape, seed=seed, device="cpu", dtype=dtype) for seed in range(2))
    judge(
        lambda gate, up: gated(gate, up, backend="triton"), test_ops_gated.definition, Call({"gate": gate, "up": up}),
        name=f"triton {shape}",
    )  # fmt: skip
