"""Around the Triton kernels: who has to see a call of theirs, what they refuse, torch.compile, second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from qwen2vl_fast import ops
from qwen2vl_fast.kernels import activation, loss, norm, patchify, resize, rope
from qwen2vl_fast.kernels import gated as gated_kernels
from qwen2vl_fast.kernels.offsets import LIMIT
from qwen2vl_fast.ops.backends import using
from qwen2vl_fast.ops.gated import gated
from tests.compare import same_bits
from tests.compiled import recorded
from tests.test_bad_input_ops import failures
from tests.test_ops_registration import check_negated, check_trace
from tests.test_ops_rope import check_places, check_saved_tensors

OPS = {
    "mrope": lambda x: ops.mrope(x.view(-1, 2, 8), x.view(-1, 2, 8), x.new_ones((3, x.shape[0]), dtype=torch.int64),
                                 sections=(1, 1, 2), backend="triton")[0],
    "vision_rope": lambda x: ops.vision_rope(x.view(-1, 2, 8), x.view(-1, 2, 8), x.new_ones((2, x.shape[0]), dtype=torch.int64),
                                             backend="triton")[1],
    "rms_norm": lambda x: ops.rms_norm(x, x[0], eps=1e-6, residual=x, backend="triton")[0],
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[1], eps=1e-6, backend="triton"),
    "merge_patches": lambda x: ops.merge_patches(x, x[0], x[1], backend="triton"),
    "merge from raster order": lambda x: ops.merge_patches(x, x[0], x[1], grid_thw=torch.tensor([[1, 2, 4]]), backend="triton"),
    "quick_gelu": lambda x: ops.quick_gelu(x, x[0], backend="triton"),
    "gelu": lambda x: ops.gelu(x, backend="triton"),
    "swiglu": lambda x: ops.swiglu(x, backend="triton"),
    "gated": lambda x: gated(x, 2 * x, backend="triton"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_compiles_without_breaks(name, device):
    """torch.compile(fullgraph=True), forward and backward, gives the eager bits; one graph for several lengths."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPS[name], backend=counter, fullgraph=True, dynamic=True)
    first = None
    for length in (8,) if "raster" in name else (8, 12, 20):  # its grid fixes the length
        x = torch.randn(length, 16, generator=torch.Generator().manual_seed(0)).to(device)
        results = []
        for function in (OPS[name], compiled):
            leaf = x.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=length != 8):
                out = function(leaf)
                (grad,) = torch.autograd.grad(out.square().sum(), leaf)
            results.append((out.detach(), grad))
        assert all(map(same_bits, *results))
        first = first or counter.frame_count
    assert 1 <= counter.frame_count == first


@pytest.mark.parametrize("name", OPS)
def test_results_can_be_written_into(name, device):
    OPS[name](torch.ones(8, 16, device=device, requires_grad=True)).mul_(2)


@pytest.mark.parametrize("op", ["mrope_", "vision_rope_"])
def test_in_place_is_seen_by_autograd_and_owns_its_memory(op, device):
    check_saved_tensors(op, "triton", device)
    check_places(op, "triton", device)


@pytest.mark.parametrize("name", OPS)
def test_views_with_the_negative_bit(name):
    check_negated(OPS[name])


@pytest.mark.parametrize("name", [name for name in OPS if name != "merge from raster order"])  # whose grid fixes the length
def test_trace(name):
    check_trace(OPS[name])


@pytest.mark.parametrize("name", [name for name in OPS if "rope" not in name])
def test_second_derivatives_are_refused(name, device):
    """Not zero, which is what torch makes of an op without a derivative. The rotations have theirs."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(OPS[name](x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative on this backend; .* have one"):
        grad.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    """Every operator that the call and its gradient reach passes torch.library.opcheck."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "qwen2vl_fast":
                seen.append((function, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
            return function(*args, **(kwargs or {}))

    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    with Watch():
        OPS[name](x).square().sum().backward()
    assert len(seen) >= 2, "neither op nor backward was seen"
    for function, arguments in seen:
        differentiable = not function.name().endswith("backward")
        arguments = [a.requires_grad_() if differentiable and isinstance(a, torch.Tensor) and a.is_floating_point() else a
                     for a in arguments]  # fmt: skip
        if function.name().endswith("rope"):
            arguments[3] = arguments[3].detach()  # the frequencies take no gradient
        torch.library.opcheck(function, tuple(arguments))


def test_bad_input_starts_no_kernel():
    """Every row of the table, with this backend where there is a kernel: the same typed errors, before any launch."""
    with using("triton"), recorded() as launches:
        found = failures()
    assert found == [] and launches == []
    with using("triton"), recorded() as launches:  # which it would see
        ops.swiglu(torch.ones(2, 4))
    assert len(launches) == 1


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 4096), (torch.float32, 4096), (torch.float64, 2048)])
def test_rows_that_spill_are_refused(dtype, most, device):
    """Before any launch; nobody's choice of a backend takes them there."""
    for width, fits in ((most, True), (most + 1, False), (most + 8, False), (2 * most, True), (2 * most + 16, False)):
        x = torch.ones(4, width, device=device, dtype=dtype)
        for call in (
            lambda x: ops.rms_norm(x, x[0], eps=1e-6, backend="triton"),
            lambda x: ops.layer_norm(x, x[0], x[0], eps=1e-6, residual=x, backend="triton"),
            lambda x: ops.merge_patches(x, x[0], x[0], backend="triton"),
            lambda x: ops.merge_patches(x, x[0], x[0], grid_thw=torch.tensor([[1, 2, 2]]), backend="triton"),
        ):
            with recorded() as launches:
                if fits:
                    call(x)
                else:
                    with pytest.raises(RuntimeError, match=f"it takes {most} columns of {dtype}, or .* and these are {width}"):
                        call(x)
            assert len(launches) == fits


@pytest.mark.parametrize("count", [LIMIT, 2**31, 2**33])
def test_more_rows_than_32_bits_count_are_refused(count, device):
    """Before anything is allocated or started; a kernel counts rows in int32, and its last block reaches beyond them."""
    x = torch.ones(1, 2, device=device).expand(count, 2)
    heads, row = x.unsqueeze(1), torch.ones(2, device=device)
    ids, frequency = torch.zeros(3, 1, dtype=torch.int64, device=device).expand(3, count), row[:1]
    taps = [torch.zeros(count // 2, *taps, dtype=torch.int32, device="meta") for taps in ((), (4,))]
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device)
    for call in (
        lambda: rope.launch(heads, heads, heads, heads, ids, frequency, (1, 0, 0), 1.0, 1.0),
        lambda: rope.launch(*[heads[None]] * 4, ids[:, None], frequency, (1, 0, 0), 1.0, 1.0),
        lambda: norm.launch(x, row, None, 1e-6, residual=x),
        lambda: norm.launch_backward(x, x, row, row, 1e-6),
        lambda: activation.launch(x, row, True),
        lambda: activation.launch(torch.empty(2, count, device="meta"), None, False),
        lambda: activation.launch_backward(x, x, row, True),
        lambda: activation.launch_swiglu(x),
        lambda: activation.launch_swiglu_backward(x[:, :1], x),
        lambda: gated_kernels.launch(x, x),
        lambda: loss.launch(x, ids[0], 0, *[x[:, 0]] * 3),
        lambda: loss.launch_slopes(x, ids[0], 0, *[x[:, 0]] * 3),
        lambda: gated_kernels.launch_backward(x, x, x),
        lambda: patchify.launch(pixels.expand(2 * count, 28, 28, 3), torch.float16, (1.0,) * 3, (0.0,) * 3),
        lambda: resize.launch(pixels.expand(1, 1, 2, 3), 1, *taps),
    ):
        with pytest.raises(ValueError, match=r"fewer than 2\^30 rows"):
            call()
