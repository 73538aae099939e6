"""The definition of every op against the oracle; its gradients against finite differences; its tables against transformers."""

from __future__ import annotations

import math

import pytest
import torch

from qwen2vl_fast import reference
from qwen2vl_fast.config import TextConfig
from tests import oracle
from tests.compare import DTYPES, HALVES, check_definition, check_pair_units, same_bits
from tests.samples import SAMPLES
from tests.test_positions import OLD_TRANSFORMERS


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_mrope(sections=(16, 24, 24), high=32768, scaling=1.0, theta=1e6, reference=reference) -> None:
    """Three tokens, one head: the oracle turns every pair by its own axis' float32 angle."""
    dim = 2 * sum(sections)
    q, k = randn(3, 2, dim), randn(3, 1, dim, seed=1)
    positions = torch.randint(high, (3, 3), generator=torch.Generator().manual_seed(high))
    table = reference.inverse_frequencies(dim, theta)
    arguments = {"theta": theta, "sections": sections, "attention_scaling": scaling}
    for x, out in zip((q, k), reference.mrope(q, k, positions, **arguments), strict=True):
        check_definition(out, oracle.mrope(x, positions, table.tolist(), sections, scaling))
    for dtype in HALVES:
        x = q.to(dtype)
        out, _ = reference.mrope(x, x, positions, **arguments)
        check_pair_units(out, oracle.mrope(x, positions, table.tolist(), sections, scaling))


@pytest.mark.parametrize("sections", [(16, 24, 24), (1, 0, 3), (0, 0, 4), (2, 1, 1), (24, 20, 20)])
@pytest.mark.parametrize("high", [2, 1000, 131072])
def test_mrope(sections, high):
    check_mrope(sections, high)


def test_mrope_scaling_and_theta():
    check_mrope(scaling=1.138, theta=1e4)


def check_vision_rope(high=1000, dim=80, reference=reference) -> None:
    q, k = randn(3, 2, dim), randn(3, 1, dim, seed=1)
    positions = torch.randint(high, (2, 3), generator=torch.Generator().manual_seed(high))
    table = reference.inverse_frequencies(dim // 2, 1e4)
    for x, out in zip((q, k), reference.vision_rope(q, k, positions), strict=True):
        check_definition(out, oracle.vision_rope(x, positions, table.tolist()))


@pytest.mark.parametrize("dim", [4, 80])
@pytest.mark.parametrize("high", [2, 1000, 131072])
def test_vision_rope(high, dim):
    check_vision_rope(high, dim)


def check_norms(reference=reference) -> None:
    x, residual, weight, bias = randn(5, 24) * 3 + 1, randn(5, 24, seed=1), randn(24, seed=2), randn(24, seed=3)
    for eps in (1e-6, 1e-2):
        layer = [oracle.layer_norm(row, weight.tolist(), bias.tolist(), eps) for row in (x + residual).tolist()]
        rms = [oracle.rms_norm(row, weight.tolist(), eps) for row in (x + residual).tolist()]
        for out, truth in (
            (reference.layer_norm(x, weight, bias, eps=eps, residual=residual), layer),
            (reference.rms_norm(x, weight, eps=eps, residual=residual), rms),
        ):
            check_definition(out[0], torch.tensor(truth, dtype=torch.float64))
            assert same_bits(out[1], x + residual)
        check_definition(reference.layer_norm(x + residual, weight, bias, eps=eps), torch.tensor(layer, dtype=torch.float64))
        check_definition(reference.rms_norm(x + residual, weight, eps=eps), torch.tensor(rms, dtype=torch.float64))


def test_norms():
    check_norms()


def check_merge(reference=reference) -> None:
    grids = [[1, 2, 4], [2, 4, 2], [1, 6, 4]]
    rows = sum(t * h * w for t, h, w in grids)
    x, weight, bias = randn(rows, 6), randn(6, seed=1), randn(6, seed=2)
    normed = [oracle.layer_norm(row, weight.tolist(), bias.tolist(), 1e-6) for row in x.tolist()]
    for order, grid in ((range(rows), None), (oracle.merge_order(grids), torch.tensor(grids))):
        truth = torch.tensor([normed[i] for i in order], dtype=torch.float64).view(-1, 24)
        check_definition(reference.merge_patches(x, weight, bias, grid_thw=grid), truth)


def test_merge():
    check_merge()


ATTENTION = {
    "packed": ([0, 3, 7, 8], None, False),
    "empty segments": ([0, 0, 4, 4, 6, 6], None, False),
    "causal": ([0, 5, 6, 9], None, True),
    "more keys": ([0, 2, 5], [0, 6, 9], True),
    "fewer keys": ([0, 4, 7], [0, 2, 2], True),
    "other keys": ([0, 4, 4, 7], [0, 1, 3, 8], False),
}


def check_attention(case: str, reference=reference, heads: int = 4, heads_k: int = 2, scale: float | None = None) -> None:
    bounds, bounds_k, causal = ATTENTION[case]
    other = bounds if bounds_k is None else bounds_k
    q, k, v = randn(bounds[-1], heads, 6), randn(other[-1], heads_k, 6, seed=1), randn(other[-1], heads_k, 6, seed=2)
    tensors = [None if b is None else torch.tensor(b, dtype=torch.int32) for b in (bounds, bounds_k)]
    options = {"cu_seqlens_k": tensors[1], "scale": scale, "causal": causal, "return_lse": True}
    o, lse = reference.varlen_attention(q, k, v, tensors[0], **options)
    truth, truth_lse = oracle.attention(q, k, v, bounds, other, 6**-0.5 if scale is None else scale, causal)
    check_definition(o, truth)
    assert lse.dtype == torch.float32
    check_definition(lse.double(), truth_lse)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    check_attention(case)
    check_attention(case, heads=3, heads_k=1, scale=2.0)
    check_attention(case, heads=2, heads_k=2)


def check_activations(reference=reference) -> None:
    z = torch.cat((randn(4, 10) * 4, torch.tensor([[0, 1, -1, 20, -20, 60, -60, 1e-8, -1e-8, 3]], dtype=torch.float64)))
    bias = randn(10, seed=1)
    for name in ("quick_gelu", "gelu"):
        function, scalar = getattr(reference, name), getattr(oracle, name)
        for x, b in ((z, None), (z - bias, bias)):
            y = x if b is None else x + b
            truth = torch.tensor([[scalar(value) for value in row] for row in y.tolist()], dtype=torch.float64)
            check_definition(function(x, b), truth, name)
    gate, up = z, randn(5, 10, seed=2)
    truth = torch.tensor([[oracle.silu(value) for value in row] for row in gate.tolist()], dtype=torch.float64) * up
    check_definition(reference.swiglu(torch.cat((gate, up), -1)), truth)


def test_activations():
    check_activations()


def check_patchify(reference=reference) -> None:
    frames = torch.randint(0, 256, (4, 56, 84, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    check_definition(reference.patchify(frames, dtype=torch.float64), oracle.patch_rows(frames))


def test_patchify():
    check_patchify()


def check_loss(reference=reference) -> None:
    hidden, weight = randn(6, 5), randn(7, 5, seed=1)
    for labels, ignore in (([0, 3, -100, 6, -100, 2], -100), ([1, 1, 4, 5, 1, 0], 1), ([6] * 6, -100)):
        out = reference.linear_cross_entropy(hidden, weight, torch.tensor(labels), ignore_index=ignore)
        truth = torch.tensor(oracle.cross_entropy(hidden, weight, labels, ignore), dtype=torch.float64)
        check_definition(out, truth)
    assert reference.linear_cross_entropy(hidden, weight, torch.full((6,), -100)).isnan()


def test_loss():
    check_loss()


GRADCHECK = {
    "mrope": {"sections": (1, 1, 1)},
    "vision_rope": {},
    "merge_patches": {},
    "rms_norm": {"eps": 1e-6},
    "layer_norm": {"eps": 1e-6},
    "quick_gelu": {},
    "gelu": {},
    "swiglu": {},
    "varlen_attention": {},
    "linear_cross_entropy": {},
}


def gradcheck_call(op: str, residual: bool = True):
    """A small float64 call of op: (names and tensors that get gradients, the other arguments)."""
    rest = dict(GRADCHECK[op])
    if op in ("mrope", "vision_rope"):
        dim = 6 if op == "mrope" else 8
        tensors = {"q": randn(4, 2, dim), "k": randn(4, 1, dim, seed=1)}
        rest["position_ids"] = torch.arange(12 if op == "mrope" else 8).view(-1, 4)
    elif op in ("merge_patches", "layer_norm"):
        tensors = {"x": randn(8, 5), "weight": randn(5, seed=1), "bias": randn(5, seed=2)}
        if op == "merge_patches":
            rest["grid_thw"] = torch.tensor([[1, 2, 4]])
        elif residual:
            tensors["residual"] = randn(8, 5, seed=3)
    elif op == "rms_norm":
        tensors = {"x": randn(4, 5), "weight": randn(5, seed=1)} | ({"residual": randn(4, 5, seed=3)} if residual else {})
    elif op == "swiglu":
        tensors = {"gate_up": randn(3, 8)}
    elif op == "varlen_attention":
        tensors = {"q": randn(9, 4, 4), "k": randn(10, 2, 4, seed=1), "v": randn(10, 2, 4, seed=2)}
        bounds = ([0, 3, 3, 7, 8, 9], [0, 5, 5, 7, 7, 10])
        rest |= {n: torch.tensor(b, dtype=torch.int32) for n, b in zip(("cu_seqlens", "cu_seqlens_k"), bounds, strict=True)}
        rest["causal"] = residual
    elif op == "linear_cross_entropy":
        tensors = {"hidden": randn(5, 3), "weight": randn(4, 3, seed=1)}
        rest["labels"] = torch.tensor([0, 3, -100, 1, 2])
    else:
        tensors = {"x": randn(3, 6), "bias": randn(6, seed=1)}
    return tensors, rest


def check_gradients(module, op: str, **extra) -> None:
    for residual in (True, False):
        tensors, rest = gradcheck_call(op, residual)

        def function(*values, tensors=tensors, rest=rest):
            return getattr(module, op)(**dict(zip(tensors, values, strict=True)), **rest, **extra)

        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("op", GRADCHECK)
def test_gradients(op):
    check_gradients(reference, op)


def test_every_op_has_a_definition_in_every_dtype():
    for kind, make in SAMPLES.items():
        for dtype in DTYPES:
            call, _ = make(0).call(dtype)
            out = getattr(reference, make(0).op)(**call.tensors, **call.rest)
            assert (out[0] if isinstance(out, tuple) else out).dtype in (dtype, torch.float32), kind


def test_frequencies_are_those_of_the_stated_expression():
    for dim, theta in ((128, 1e6), (40, 1e4), (64, 5e5)):
        table = reference.inverse_frequencies(dim, theta)
        assert same_bits(table, 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        truth = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
        assert ((table.double() - truth).abs() / truth).max() < 1e-6


YARN = {
    "factor 4": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "factor 2.5": {"factor": 2.5, "original_max_position_embeddings": 8192, "beta_fast": 24, "beta_slow": 2},
    "attention_factor": {"factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.25},
    "mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
}
if not OLD_TRANSFORMERS:  # 4.x does not know the key
    YARN["not truncated"] = {"factor": 8.0, "original_max_position_embeddings": 32768, "truncate": False}


def check_yarn(scaling: dict, config=TextConfig) -> None:
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"vocab_size": 10, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1}
    # 4.x takes the factor to be the ratio of these two lengths, whatever `factor` says; here it is both.
    longest = int(scaling["factor"] * scaling["original_max_position_embeddings"])
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": longest}
    rope = {"rope_type": "yarn", **scaling}
    theirs = Qwen2Config(**sizes, **heads, rope_theta=1e6, rope_scaling={**rope, "rope_theta": 1e6})
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    table, attention_scaling = config(**sizes, **heads, rope_theta=1e6, rope=rope).rope_table()
    assert table.dtype == torch.float32
    assert torch.equal(table, expected), f"{(table - expected).abs().max()}"
    assert math.isclose(attention_scaling, factor, rel_tol=1e-15)


@pytest.mark.parametrize("name", YARN)
def test_yarn_equals_transformers(name):
    check_yarn(YARN[name])


def test_plain_table_equals_transformers():
    sizes = {"vocab_size": 10, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    table, scaling = TextConfig(**sizes, num_key_value_heads=1).rope_table()
    assert same_bits(table, reference.inverse_frequencies(128, 1e6))
    assert scaling == 1.0
