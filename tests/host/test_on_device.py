"""The attention forward on a device by the checks of the host's: edges, votes, extremes, what is not finite, the log-sum-exp.

On the CPU the same calls go through ops.varlen_attention to the kernels of csrc/host, as on a device of compute capability 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qwen2vl_fast import ops, reference
from qwen2vl_fast.positions import block_rows
from tests.compare import same_bits
from tests.host import extension
from tests.host.cases import BF16, FP16, Case, check_alone, check_isolation, check_rule
from tests.host.test_forward_sm80 import NAMED
from tests.host.test_forward_sm90 import EDGES, EXTREMES, VOTES

dims = pytest.mark.parametrize("dim", [64, 80, 128])


@dataclass(frozen=True)
class OnDevice:
    """ops.varlen_attention as tests.host.cases calls a kernel: tensors of the CPU in, o and lse on the CPU out."""

    device: str
    name: str = "ops.varlen_attention"
    seed: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None, **options):
        bounds = [x if x is None else x.to(self.device) for x in (cu_seqlens, cu_seqlens_k)]
        found = ops.varlen_attention(
            *(x.to(self.device) for x in (q, k, v)), bounds[0], cu_seqlens_k=bounds[1], **options, backend="cuda"
        )
        return tuple(x.cpu() for x in found)


@pytest.fixture
def op(device, monkeypatch) -> OnDevice:
    if device == "cpu":
        extension.install(monkeypatch, (9, 0))
    return OnDevice(device)


@dims
@pytest.mark.parametrize("name", NAMED)
def test_named(op, name, dim):
    check_rule(op, replace(NAMED[name], dim=dim))


@dims
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_scores(op, name, dim):
    check_rule(op, replace(EXTREMES[name], dim=dim))


@dims
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_tiles(op, dim, causal):
    for edge in EDGES:
        lengths = (edge - 1, edge, edge + 1, 0, 2 * edge + 1, 1)
        check_rule(op, Case(lengths, heads=2, dim=dim, dtype=FP16 if edge == 96 else BF16, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_many_short_segments(op, causal):
    """So many that a Hopper takes blocks of 64 rows."""
    case = Case(tuple(7 * i % 65 for i in range(160)), causal=causal)
    assert block_rows((max(case.lengths),) * 160, case.heads, case.dim, (9, 0), causal) == 64
    check_rule(op, case)
    check_isolation(op, case, 3)


@dims
def test_votes_and_tails(op, dim):
    """NaN of a neighbour behind a tile's own rows and keys; every segment alone has the bits that it has in the pack."""
    for case in (replace(VOTES, dim=dim), Case((65, 30, 0, 200, 1), dim=dim, causal=dim == 64)):
        for poisoned, length in enumerate(case.lengths):
            if length:
                check_isolation(op, case, poisoned)
        check_alone(op, case)


@dims
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_is_seen(op, name, value, dim):
    """One element: a row that the definition spoils is spoilt, every other row keeps its bits."""
    case = Case((70, 300), heads=2, heads_k=1, dim=dim)
    clean, values = case.call(), case.values()
    values[name][200, 0, 5] = value
    ill = case.call(values)
    expected, found = (op(**call.tensors, **call.rest)[0] for call in (clean, ill))
    truth = reference.varlen_attention(**{n: x.double() for n, x in ill.tensors.items()}, **{**ill.rest, "return_lse": False})
    spoilt = ~truth.isfinite().all(-1)
    touched = torch.zeros_like(spoilt)
    touched[70:] = True
    if name == "q":
        touched[:] = False
        touched[200, 0] = True
    assert spoilt.any() and not found[spoilt].isfinite().all(-1).any()
    assert same_bits(found[~touched], expected[~touched])
