"""Norms and activations: exact cases, extremes, odd layouts, narrow rows, and the residual that feeds a norm."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from qwen2vl_fast import ops, reference
from qwen2vl_fast.ops import activation, checks
from tests.compare import HALVES, Call, judge, same_bits
from tests.test_ops_every import dtypes, usable
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")
POINTWISE = ("quick_gelu", "gelu", "swiglu")


def integer_valued(*size: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-8, 9, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@dtypes
def test_exact_norms(dtype, device):
    """Rows of +-1 with as many of each have mean 0 and mean square 1: what stays in integers comes out exact.

    The library's float32 LayerNorm on the CPU is left out: its running variance of such rows is one unit below 1.
    """
    signs = torch.tensor([1, -1] * 8 + [-1, 1] * 8).to(device, dtype).repeat(3, 1)
    weight, bias = (integer_valued(32, device=device, dtype=dtype).roll(i) for i in range(2))
    for backend in usable("rms_norm", device):
        assert same_bits(ops.rms_norm(signs, weight, eps=0.0, backend=backend), signs * weight)
        half = signs * 0.5
        y, total = ops.rms_norm(half, weight, eps=0.0, residual=half, backend=backend)
        assert same_bits(y, signs * weight) and same_bits(total, signs)
    if dtype == torch.float32 and device == "cpu":
        return
    for backend in usable("layer_norm", device):
        assert torch.equal(ops.layer_norm(signs, weight, bias, eps=0.0, backend=backend), signs * weight + bias)
    for backend in usable("merge_patches", device):
        merged = ops.merge_patches(torch.cat((signs, signs[:1])), weight, bias, eps=0.0, backend=backend)
        assert torch.equal(merged, (signs[0] * weight + bias).repeat(1, 4))


@dtypes
def test_exact_sum(dtype, device):
    """The sum that goes on to the next block has the bits of x + residual."""
    x, residual, weight = (randn(*size, seed=i, device=device, dtype=dtype) for i, size in enumerate(((9, 64), (9, 64), (64,))))
    for op, extra in (("rms_norm", {}), ("layer_norm", {"bias": weight})):
        for backend in usable(op, device):
            y, total = getattr(ops, op)(x, weight=weight, **extra, eps=1e-6, residual=residual, backend=backend)
            assert same_bits(total, x + residual)
            assert same_bits(y, getattr(ops, op)(x + residual, weight=weight, **extra, eps=1e-6, backend=backend))


def check_exact_activations(dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """0 stays 0, large values pass, large negative ones vanish; nothing overflows on the way."""
    big = 2.0**14
    x = torch.tensor([0, big, 64, -big], device=device, dtype=dtype)
    expected = torch.tensor([0, big, 64, 0], device=device, dtype=dtype)
    shifted = torch.ones_like(x)
    for name in ("quick_gelu", "gelu"):
        for backend in usable(name, device):
            function = functools.partial(getattr(ops, name), backend=backend)
            assert torch.equal(function(x), expected), name
            assert torch.equal(function(x[None] - shifted, shifted)[0, 1:], function(x - shifted + shifted)[1:]), name
    gate_up = torch.cat((x, torch.full_like(x, -2)))
    for backend in usable("swiglu", device):
        out = ops.swiglu(gate_up * 0.5, backend=backend)
        assert torch.equal(out[:2], torch.tensor([0, -big / 2], device=device, dtype=dtype))
        x = gate_up.clone().requires_grad_()
        ops.swiglu(x, backend=backend).sum().backward()
        assert x.grad.isfinite().all()


@dtypes
def test_exact_activations(dtype, device):
    check_exact_activations(dtype, device)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", HALVES)
def test_narrow_rows(width, dtype, device):
    """Widths that no vector fits. In fp16 and bf16, where a cancellation to nearly nothing has a floor above it."""
    x, bias = randn(70, width, device=device, dtype=dtype), randn(width, seed=1, device=device, dtype=dtype)
    calls = {
        "quick_gelu": {"x": x, "bias": bias},
        "gelu": {"x": x, "bias": bias},
        "swiglu": {"gate_up": randn(70, 2 * width, device=device, dtype=dtype)},
        "rms_norm": {"x": x, "weight": bias},
    }
    for op, tensors in calls.items():
        rest = {"eps": 1e-2} if op == "rms_norm" else {}
        for backend in usable(op, device):
            function = functools.partial(getattr(ops, op), backend=backend)
            judge(function, getattr(reference, op), Call(tensors, rest), name=f"{op} {backend}")


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values: contiguous, leading dims swapped in memory, with gaps, last dim not contiguous, broadcast rows."""
    gaps = x.new_full((x.shape[0], x.shape[1], 2 * x.shape[2]), math.nan)[:, :, ::2]
    gaps.copy_(x)
    return [x, x.transpose(0, 1).contiguous().transpose(0, 1), gaps, x.permute(2, 0, 1).contiguous().permute(1, 2, 0)]


@dtypes
@pytest.mark.parametrize("op", [*POINTWISE, "rms_norm", "layer_norm"])
def test_any_strides(op, dtype, device):
    """Outputs and gradients have the same bits whatever the strides of the input and of the upstream gradient."""
    x, weight = randn(4, 6, 32, device=device, dtype=dtype), randn(32, seed=1, device=device, dtype=dtype)
    options = {
        "rms_norm": {"weight": weight, "eps": 1e-6},
        "layer_norm": {"weight": weight, "bias": weight, "eps": 1e-6},
        "swiglu": {},
    }.get(op, {"bias": weight})
    for backend in usable(op, device):
        expected = None
        for values in layouts(x):
            out = getattr(ops, op)(values, **options, backend=backend)
            assert out.is_contiguous()
            leaf = values.detach().requires_grad_()
            for upstream in layouts(randn(*out.shape, seed=2, device=device, dtype=dtype)):
                (grad,) = torch.autograd.grad(getattr(ops, op)(leaf, **options, backend=backend), leaf, upstream)
                expected = expected or (out, grad)
                assert same_bits(out, expected[0]) and same_bits(grad, expected[1]), (values.stride(), upstream.stride())


def check_permuted_upstream(op: str, device: str = "cpu", ops=ops) -> None:
    """bias and weight get their gradient whatever the layout (a view of a permuted product raised here once)."""
    x = randn(4, 6, 32, device=device).transpose(0, 1).requires_grad_()
    parameters = [randn(32, seed=i, device=device).requires_grad_() for i in range(2)]
    names = {"rms_norm": ("weight",), "layer_norm": ("weight", "bias"), "swiglu": ()}.get(op, ("bias",))
    options = dict(zip(names, parameters, strict=False)) | ({"eps": 1e-6} if "norm" in op else {})
    out = getattr(ops, op)(x, **options)
    upstream = randn(4, 6, out.shape[-1], seed=3, device=device).transpose(0, 1)
    leaves = [x, *parameters[: len(names)]]
    for got, plain in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(getattr(ops, op)(x, **options), leaves, upstream.contiguous()),
        strict=True,
    ):
        assert same_bits(got, plain)


@pytest.mark.parametrize("op", [*POINTWISE, "rms_norm", "layer_norm"])
def test_parameter_gradients_of_permuted_upstreams(op, device):
    check_permuted_upstream(op, device)


@dtypes
@pytest.mark.parametrize("size", [(0, 16), (3, 0, 16), (16,), (1, 16), (1, 1, 1, 16)])
def test_sizes(size, dtype, device):
    """No rows, one row, one dim, many dims."""
    weight = torch.ones(16, device=device, dtype=dtype, requires_grad=True)
    for op, options in (
        ("rms_norm", {"weight": weight, "eps": 1e-6}),
        ("layer_norm", {"weight": weight, "bias": weight, "eps": 1e-6}),
        ("quick_gelu", {"bias": weight}),
        ("gelu", {"bias": weight}),
        ("swiglu", {}),
    ):
        for backend in usable(op, device):
            for residual in (False, True) if "norm" in op else (False,):
                x = randn(*size, device=device, dtype=dtype).requires_grad_()
                extra = {"residual": x} if residual else {}
                out = getattr(ops, op)(x, **options, **extra, backend=backend)
                out = sum(out) if residual else out
                assert out.shape == (*size[:-1], 8 if op == "swiglu" else 16)
                weight.grad = None
                out.float().sum().backward()
                assert x.grad.shape == x.shape and x.grad.isfinite().all()
                assert op == "swiglu" or (weight.grad.isfinite().all() and weight.grad.shape == (16,))


def test_gradient_of_the_sum_alone(device):
    """A loss on x + residual alone still reaches both, and one on the norm alone too."""
    weight = torch.ones(16, device=device)
    for op, extra in (("rms_norm", {}), ("layer_norm", {"bias": weight})):
        for backend in usable(op, device):
            x, residual = (randn(3, 16, seed=i, device=device).requires_grad_() for i in range(2))
            y, total = getattr(ops, op)(x, weight=weight, **extra, eps=1e-6, residual=residual, backend=backend)
            for grad in torch.autograd.grad(total.sum(), (x, residual), retain_graph=True):
                assert same_bits(grad, torch.ones_like(grad))
            one, other = torch.autograd.grad(y.square().sum(), (x, residual))
            assert same_bits(one, other)


@dtypes
def test_frozen_parameters(dtype, device):
    """Only the parameter, or only the input, asks for a gradient."""
    for asked in range(2):
        x, weight = randn(4, 16, device=device, dtype=dtype), randn(16, seed=1, device=device, dtype=dtype)
        (x, weight)[asked].requires_grad_()
        for out in (
            ops.rms_norm(x, weight, eps=1e-6),
            ops.layer_norm(x, weight, weight, eps=1e-6),
            ops.quick_gelu(x, weight),
            ops.gelu(x, weight),
        ):
            (grad,) = torch.autograd.grad(out.float().sum(), (x, weight)[asked])
            assert grad.isfinite().all() and grad.any()


@dtypes
def test_rows_far_from_zero(dtype, device):
    """Values of 5 +- 0.1: what is left of them below the mean is rounded alike by all, and no rms can be drawn from it."""
    x, weight, bias = (randn(*size, seed=i, device=device, dtype=dtype) for i, size in enumerate(((40, 64), (64,), (64,))))
    call = Call({"x": 5 + x / 10, "weight": weight, "bias": bias}, {"eps": 1e-6})
    for backend in usable("layer_norm", device):
        judge(functools.partial(ops.layer_norm, backend=backend), reference.layer_norm, call, rms=False, name=backend)


def test_outliers_stay_in_their_row(device):
    """Massive activations: one channel at 1e4 leaves no NaN, and the rows beside it keep their bits."""
    x, weight = randn(5, 64, device=device, dtype=torch.bfloat16), torch.ones(64, device=device, dtype=torch.bfloat16)
    loud = x.clone()
    loud[2, 7] = 1e4
    for op, extra in (("rms_norm", {}), ("layer_norm", {"bias": weight})):
        quiet, out = (getattr(ops, op)(values, weight=weight, **extra, eps=1e-6) for values in (x, loud))
        keep = [0, 1, 3, 4]
        assert out.isfinite().all() and same_bits(out[keep], quiet[keep])


def test_bits_do_not_depend_on_threads():
    """Real widths, shares of a thread that end anywhere: the same bits with one thread, three, and for a part alone."""
    before = torch.get_num_threads()
    x, gate_up, weight = randn(301, 640), randn(301, 2 * 640, seed=1), randn(640, seed=2)
    calls = (
        functools.partial(ops.quick_gelu, x),
        functools.partial(ops.gelu, x, weight),
        functools.partial(ops.swiglu, gate_up),
        functools.partial(ops.rms_norm, x, weight, eps=1e-6),
        functools.partial(ops.layer_norm, x, weight, weight, eps=1e-6),
    )
    try:
        for call in calls:
            expected = call()
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert same_bits(call(), expected)
                part = functools.partial(call.func, call.args[0][7:100], *call.args[1:], **call.keywords)
                assert same_bits(part(), expected[7:100])
    finally:
        torch.set_num_threads(before)


VECTORS = {
    "sigmoid": lambda x: checks.in_vectors(torch.sigmoid_, x),
    "silu": lambda x: checks.in_vectors(activation._silu_, x),
    "silu's gradient": lambda x: checks.in_vectors(activation._silu_backward_, x, x.clone()),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_vectors_have_the_same_bits_anywhere(name, dtype):
    """What `in_vectors` rests on: 64 elements at any place, alone and inside any tensor, with any number of threads."""
    run, before = VECTORS[name], torch.get_num_threads()
    x = (3 * randn(64, dtype=dtype)).repeat(3000)
    single = run(x[:64].clone())
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for count in (1, 63, 64, 65, 1000, 32767, 32768, 32769, 65536 + 64, 65537, 98304 + 1, 163840 + 33, 192000):
                found = run(x[:count].clone())
                assert same_bits(found, single.repeat(3000)[:count]), (threads, count)
            for start in range(1, 64, 7):
                part = x[start : start + 40000]
                assert same_bits(run(part.clone()), single.repeat(3000)[start : start + 40000]), (threads, start)
    finally:
        torch.set_num_threads(before)


def check_parameter_blocks(ops=ops, module=checks) -> None:
    """A parameter's gradient has the rows of all blocks."""
    x, weight = randn(40, 64), randn(64, seed=1).requires_grad_()
    calls = {
        "quick_gelu": lambda: ops.quick_gelu(x, weight),
        "gelu": lambda: ops.gelu(x, weight),
        "rms_norm": lambda: ops.rms_norm(x, weight, eps=1e-6),
        "layer_norm": lambda: ops.layer_norm(x, weight, weight, eps=1e-6),
    }
    before = module._BLOCK_BYTES
    for name, call in calls.items():
        (whole,) = torch.autograd.grad(call().square().sum(), weight)
        try:
            module._BLOCK_BYTES = 1
            (parts,) = torch.autograd.grad(call().square().sum(), weight)
        finally:
            module._BLOCK_BYTES = before
        torch.testing.assert_close(parts, whole, msg=name)


def test_parameter_gradients_in_blocks():
    check_parameter_blocks()
