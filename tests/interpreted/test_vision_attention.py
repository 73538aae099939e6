"""The tower's attention with its rotations by Triton: forward into new tensors, back in place inside the gradient of qkv."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_fast import ops
from qwen2vl_fast.ops.vision_attention import _vision_attention
from tests.compare import same_bits
from tests.test_ops_rope import randn
from tests.test_ops_vision_attention import DIM, HEADS, TOKENS, pack, with_gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_the_bits_of_the_two_ops(dtype):
    def one_op(qkv, position_ids, inv_freq, schedule):
        lists = (schedule.cu_seqlens, None, 0, None, None, 0)
        return _vision_attention(qkv, position_ids, inv_freq, *lists, DIM**-0.5, True, "triton", "torch")[0]

    def two_ops(qkv, position_ids, inv_freq, schedule):
        q, k, v = qkv.unbind(1)
        q, k = ops.vision_rope(q, k, position_ids, inv_freq=inv_freq, backend="triton")
        return ops.varlen_attention(q, k, v, schedule.cu_seqlens, backend="torch")

    qkv, rest = randn(TOKENS, 3, HEADS, DIM, device="cpu", dtype=dtype), pack("cpu")
    assert all(map(same_bits, with_gradient(one_op, qkv, rest), with_gradient(two_ops, qkv, rest)))
