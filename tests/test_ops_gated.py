"""SwiGLU of two tensors: the rule against the definition, and the op that takes them side by side."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_fast import ops, reference
from qwen2vl_fast.ops.gated import _gated, gated
from tests.compare import Call, judge, same_bits
from tests.test_ops_every import dtypes, usable
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = ((1, 1), (7, 33), (3, 5, 80), (300, 129), (0, 16))


def definition(gate, up):
    return reference.swiglu(torch.cat((gate, up), -1))


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_rule(dtype, device, shape):
    gate, up = (3 * randn(*shape, seed=seed, device=device, dtype=dtype) for seed in range(2))
    for backend in usable("swiglu", device):
        run = lambda gate, up, backend=backend: gated(gate, up, backend=backend)  # noqa: E731
        judge(run, definition, Call({"gate": gate, "up": up}), name=f"{backend} {shape}")


@dtypes
def test_bits_of_the_joined_op(dtype, device):
    """Also from views with gaps, and an image's rows alone."""
    wide = 3 * randn(40, 3 * 64, seed=1, device=device, dtype=dtype)
    gate, up = wide[:, :64], wide[:, 128:]
    for backend in usable("swiglu", device):
        out = gated(gate, up, backend=backend)
        assert same_bits(out, ops.swiglu(torch.cat((gate, up), -1), backend=backend))
        assert same_bits(out[7:9], gated(gate[7:9], up[7:9], backend=backend))


def test_registration():
    gate, up = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(_gated.registered, (gate, up, "torch"))
    assert torch.autograd.gradcheck(gated, (gate, up))


def test_bad_arguments():
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    for bad, error, message in (
        ((gate, up[:, :4]), ValueError, "up: expected gate's shape"),
        ((gate, up.double()), TypeError, "up: expected the dtype of gate"),
        ((gate.long(), up), TypeError, "gate: expected float16"),
        ((gate, None), TypeError, "up: expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            gated(*bad)
