"""Registration with torch: opcheck, gradcheck, torch.compile without recompiling, and who is chosen to run what."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad

from qwen2vl_fast import ops
from qwen2vl_fast.ops import attention, gated  # noqa: F401 -- gated is registered when patch asks for it
from qwen2vl_fast.ops.backends import BACKENDS, OPS, check_backend, choose, using
from qwen2vl_fast.reference import inverse_frequencies
from tests.compare import same_bits
from tests.test_ops_rope import randn
from tests.test_reference import GRADCHECK, check_gradients

module = importlib.import_module("qwen2vl_fast.ops.backends")  # the attribute of ops is the function of that name
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def raw_calls(device: str = "cpu") -> dict[str, list[tuple]]:
    """Arguments for every registered op, as torch.ops.qwen2vl_fast.<name> takes them."""

    def leaf(*size: int) -> torch.Tensor:
        return randn(*size, device=device).requires_grad_()

    def whole(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    q, k, v = randn(9, 4, 16, device=device), randn(9, 2, 16, device=device), randn(9, 2, 16, seed=1, device=device)
    bounds = whole(0, 4, 4, 9)
    ids = torch.arange(27, device=device).view(3, 9)
    rotary = (ids, inverse_frequencies(16, 1e4).to(device), [2, 3, 3], 1.5)
    vision = (ids[:2], inverse_frequencies(8, 1e4).to(device))
    labels = whole(0, 4, -100, 2, dtype=torch.int64)
    out, lse = torch.ops.qwen2vl_fast.varlen_attention(q, k, v, bounds, bounds, 0.25, False)
    hidden, words = randn(4, 6, device=device), randn(5, 6, device=device)
    loss, *statistics = torch.ops.qwen2vl_fast.linear_cross_entropy(hidden, words, labels, -100)
    frames = torch.zeros(2, 28, 56, 3, dtype=torch.uint8, device=device)
    rows, row = randn(3, 8, device=device), randn(8, device=device)
    return {
        "mrope": [(leaf(9, 4, 16), leaf(9, 2, 16), *rotary, 1.0), (leaf(9, 6, 16)[:, :4], leaf(9, 1, 16), *rotary, -1.0)],
        "vision_rope": [(leaf(9, 2, 16), leaf(9, 2, 16), *vision, 1.0)],
        "mrope_": [(q.clone(), k.clone(), *rotary)],
        "vision_rope_": [(q.clone(), k.clone(), *vision)],
        "rms_norm": [(leaf(3, 8), leaf(8), 1e-6), (leaf(2, 3, 8), leaf(8), 1e-6), (leaf(8, 3).T, leaf(8), 1e-6)],
        "add_rms_norm": [(leaf(3, 8), leaf(3, 8), leaf(8), 1e-6)],
        "layer_norm": [(leaf(3, 8), leaf(8), leaf(8), 1e-6), (leaf(8, 3).T, leaf(8), leaf(8), 1e-6)],
        "add_layer_norm": [(leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), 1e-6)],
        "quick_gelu": [(leaf(3, 8), leaf(8)), (leaf(3, 8), None)],
        "gelu": [(leaf(3, 8), leaf(8)), (leaf(8, 3).T, None)],
        "swiglu": [(leaf(3, 8),), (leaf(2, 3, 8),)],
        "gated": [(leaf(3, 8), leaf(3, 8)), (leaf(2, 3, 8), leaf(2, 3, 8))],
        "gated_backward": [tuple(randn(3, 8, seed=seed, device=device) for seed in range(3))],
        "pointwise_backward": [(rows, rows + 1, bias, quick) for bias in (row, None) for quick in (True, False)],
        "swiglu_rows_backward": [(rows[:, :4], rows)],
        "rms_norm_backward": [(rows, total, rows + 1, row, 1e-3) for total in (rows, None)],
        "layer_norm_backward": [(rows, total, rows + 1, row, row, 1e-3) for total in (rows, None)],
        "merge_rows": [(leaf(8, 4), leaf(4), leaf(4), whole(1, 2, 4).view(1, 3), 1e-6)],
        **dict.fromkeys(("norm_backward", "activation_backward", "swiglu_backward"), []),  # kernels alone: tests/interpreted
        "varlen_attention": [
            (*(x.clone().requires_grad_() for x in (q, k, v)), ends, ends, 0.25, causal)
            for causal in (True, False)
            for ends in (bounds, bounds[::3], torch.arange(10, dtype=torch.int32, device=device)[::3].contiguous())
        ],
        "varlen_attention_backward": [(torch.ones_like(out), q, k, v, out, lse, bounds, bounds, 0.25, False)],
        "vision_attention": [(leaf(9, 3, 2, 16), *vision, bounds, None, 0, None, None, 0, 0.25, True, "torch", "torch")],
        "vision_attention_backward": [],  # by the gradients of the one above
        "varlen_attention_cuda": extension_calls(device),
        "varlen_attention_cuda_backward": [],  # by the gradients of the one above; alone it needs what that one returns
        "patchify": [(frames, torch.float32), (frames, torch.float16)],
        "resize": [(frames, 56, 28), (frames, 28, 56)],
        "linear_cross_entropy": [(leaf(4, 6), leaf(5, 6), labels, -100)],
        "linear_cross_entropy_backward": [
            (torch.ones_like(loss), hidden, head, labels, *statistics, -100, *wanted)
            for wanted in ((True, True), (True, False), (False, True))
            for head in (words, words.t().contiguous().t())
        ],
        "linear": [(leaf(3, 8), leaf(5, 8), leaf(5)), (leaf(2, 3, 8), leaf(5, 8), None)] if device == "cpu" else [],
    }


def extension_calls(device: str) -> list[tuple]:
    if device == "cpu":
        return []
    q, k, v = (randn(9, heads, 80, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    return [(q, k, v, bounds, bounds, None, 0, None, None, 0, 0.25, causal, True) for causal in (True, False)]


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in names if name.startswith("qwen2vl_fast::")}


def test_every_registered_op_is_checked():
    """A new op needs a line in raw_calls."""
    assert registered() == set(raw_calls())


@pytest.mark.parametrize("name", sorted(registered()))
def test_opcheck(name, device):
    for arguments in raw_calls(device)[name]:
        torch.library.opcheck(getattr(torch.ops.qwen2vl_fast, name).default, arguments)


def direct_calls() -> dict[str, Callable]:
    """What ops call: past torch's dispatcher where nobody has to see it."""
    modules = [value for name, value in sys.modules.items() if name.startswith("qwen2vl_fast.ops.")]
    found = [value for module in modules for value in vars(module).values() if hasattr(value, "registered")]
    return {call.registered.name().split("::")[1].split(".")[0]: call for call in found}


def test_every_registered_op_has_a_call_past_the_dispatcher():
    assert direct_calls().keys() == registered()


def copies(arguments: tuple, schema) -> list:
    """All arguments, those left out at their defaults; tensors are leaves of their own."""
    given = [*arguments, *(argument.default_value for argument in schema.arguments[len(arguments) :])]
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in given]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(registered()))
def test_a_call_past_the_dispatcher_is_the_registered_op(name, grad, device):
    """The same bits, also of what is written in place, and the same gradients."""
    direct = direct_calls()[name]
    for arguments in raw_calls(device)[name]:
        found = []
        for call in (direct, direct.registered):
            given = copies(arguments, direct.registered._schema)
            tensors = [x for x in given if isinstance(x, torch.Tensor)]
            with torch.set_grad_enabled(grad):
                outputs = call(*given)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs or ())
            ends, leaves = [x for x in outputs if x.requires_grad], [x for x in tensors if x.requires_grad]
            assert grad or not ends
            gradients = torch.autograd.grad([x.sum() for x in ends], leaves, allow_unused=True) if ends and leaves else ()
            found.append([*outputs, *tensors, *gradients])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
            assert ours is None or ours.requires_grad == theirs.requires_grad, name


@pytest.mark.parametrize("name", sorted(registered()))
def test_results_can_be_written_into(name, device):
    """Autograd refuses that for a view which a function returned."""
    direct = direct_calls()[name]
    for arguments in raw_calls(device)[name]:
        for call in (direct, direct.registered):
            outputs = call(*copies(arguments, direct.registered._schema))
            for x in [outputs] if isinstance(outputs, torch.Tensor) else list(outputs or ()):
                if x.requires_grad:
                    x.mul_(2)


def test_who_has_to_see_an_op_sees_it():
    """Modes, subclasses of tensors, transforms and profilers; a plain call goes past the dispatcher."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    x, weight = randn(4, 8), randn(8)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    def run(x=x):
        return ops.rms_norm(x, weight, eps=1e-6)

    with Watching():
        run()
    assert "qwen2vl_fast.rms_norm.default" in seen
    seen.clear()
    run(x.as_subclass(Marked))
    assert "qwen2vl_fast.rms_norm.default" in seen
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert type(ops.rms_norm(fake, mode.from_tensor(weight), eps=1e-6)) is type(fake)
    with torch.profiler.profile() as profile:
        run()
    assert any(event.name == "qwen2vl_fast::rms_norm" for event in profile.events())
    assert torch.equal(torch.func.vmap(run)(x[None])[0], run())


def test_a_mode_of_functions_sees_an_op():
    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Watching():
        ops.rms_norm(randn(4, 8), randn(8), eps=1e-6)
    assert any("qwen2vl_fast.rms_norm" in name for name in seen)


def check_negated(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A tensor whose memory holds the opposite of its values, as the imaginary part of a conjugate: the bits of a plain one."""
    x = randn(8, 16)
    negated = torch._neg_view(-x)
    assert negated.is_neg() and same_bits(function(negated), function(x))
    results = []
    for value in (x, negated):
        leaf = value.detach().requires_grad_()
        results.append(torch.autograd.grad(function(leaf).square().sum(), leaf)[0])
    assert leaf.is_neg() and same_bits(*results)


def check_trace(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """torch.jit.trace records the op and not what one call did: another length has its own result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes that are checked stay as they were
        traced = torch.jit.trace(function, (randn(8, 16),))
    assert "qwen2vl_fast::" in str(traced.graph)
    other = randn(8, 16, seed=1)
    assert same_bits(traced(other), function(other))


@pytest.mark.parametrize("check", [check_negated, check_trace])
def test_what_steps_through_the_dispatcher(check):
    check(lambda x: ops.swiglu(ops.rms_norm(x, torch.ones(16), eps=1e-6)))
    check(lambda x: ops.vision_rope(x.view(-1, 2, 8), x.view(-1, 2, 8), torch.ones(2, 8, dtype=torch.int64))[0])
    check(lambda x: ops.varlen_attention(*[x.view(-1, 2, 8)] * 3, torch.tensor([0, 3, 8], dtype=torch.int32)))


def test_a_plain_call_goes_past_the_dispatcher(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError(f"{self} went through the dispatcher")

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)
    x, weight = randn(4, 8).requires_grad_(), randn(8)
    ops.rms_norm(x, weight, eps=1e-6).sum().backward()
    with torch.no_grad():
        ops.swiglu(x)


@pytest.mark.parametrize("op", GRADCHECK)
def test_gradcheck(op):
    """Finite differences in float64 through the torch backend."""
    check_gradients(ops, op, backend="torch")


@pytest.mark.parametrize("op", ("quick_gelu", "gelu", "swiglu", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"))
def test_second_derivatives(op):
    """Of the torch backend, in float64, also where one tensor stands for two arguments and where a parameter is frozen."""
    function, *tensors = calls(3)[op]
    tensors = [x.detach()[..., :6].double().requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(function, tensors)
    if "layer_norm" in op:
        assert torch.autograd.gradgradcheck(lambda *x: function(*x, x[-1]), tensors[:-1])
    if op != "swiglu":
        assert torch.autograd.gradgradcheck(lambda x: function(x, *(y.detach() for y in tensors[1:])), tensors[:1])


def calls(length: int, device: str = "cpu") -> dict[str, tuple]:
    """op -> (function of tensors, tensors); only the number of tokens, segments' lengths or frames follows `length`."""

    def x(*size: int) -> torch.Tensor:
        return randn(*size, device=device).requires_grad_()

    ids = torch.arange(3 * length, device=device).view(3, length)
    bounds = torch.tensor([0, 4, length // 2, length], dtype=torch.int32, device=device)
    pixels = torch.zeros(length, 28, 56, 3, dtype=torch.uint8, device=device)
    grid = torch.tensor([[1, 2, length // 2]], device=device)
    weight, bias = x(64), x(64)
    frozen = randn(length, 2, 80, device=device)

    def in_place(q, k, p):
        q, k = q.clone(), k.clone()
        ops.vision_rope_(q, k, p)
        return q, k

    return {
        "mrope": (lambda q, k, p: ops.mrope(q, k, p), x(length, 4, 128), x(length, 2, 128), ids),
        "vision_rope": (lambda q, k, p: ops.vision_rope(q, k, p), x(length, 2, 80), x(length, 2, 80), ids[:2]),
        "vision_rope_": (in_place, frozen, frozen + 1, ids[:2]),
        "rms_norm": (lambda a, w: ops.rms_norm(a, w, eps=1e-6), x(length, 64), weight),
        "add_rms_norm": (lambda a, b, w: ops.rms_norm(a, w, eps=1e-6, residual=b), x(length, 64), x(length, 64), weight),
        "layer_norm": (lambda a, w, b: ops.layer_norm(a, w, b, eps=1e-6), x(length, 64), weight, bias),
        "add_layer_norm": (lambda a, w, b: ops.layer_norm(a, w, b, eps=1e-6, residual=a * 2), x(length, 64), weight, bias),
        "merge_patches": (lambda a, w, b: ops.merge_patches(a, w, b), x(length, 64), weight, bias),
        "merge_patches from raster order": (
            lambda a, w, b, g: ops.merge_patches(a, w, b, grid_thw=g),
            x(length, 64),
            weight,
            bias,
            grid,
        ),
        "quick_gelu": (lambda a, b: ops.quick_gelu(a, b), x(length, 64), bias),
        "gelu": (lambda a, b: ops.gelu(a, b), x(length, 64), bias),
        "swiglu": (lambda a: ops.swiglu(a), x(length, 64)),
        "varlen_attention": (
            lambda q, k, v, c: ops.varlen_attention(q, k, v, c, max_seqlen=1024, causal=True),
            *(x(length, heads, 80) for heads in (4, 2, 2)),
            bounds,
        ),
        "patchify": (lambda f: ops.patchify(f), pixels),
        "linear_cross_entropy": (
            lambda h, w, t: ops.linear_cross_entropy(h, w, t),
            *(x(rows, 16) for rows in (length, 30)),
            torch.arange(length, device=device) % 30,
        ),
    }


def _with_gradients(function, tensors) -> list[torch.Tensor]:
    out = function(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    leaves = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad([o.sum() for o in outs], leaves) if leaves else ()
    return [o.detach() for o in outs] + list(grads)


@pytest.mark.parametrize("op", calls(8))
def test_compile(op, device):
    """fullgraph, forward and backward; three lengths, one graph; the bits of eager mode."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(calls(8)[op][0], fullgraph=True, dynamic=True, backend=counter)
    first = None
    for length in (12, 20, 36):
        function, *tensors = calls(length, device)[op]
        with torch._dynamo.config.patch(error_on_recompile=length != 12):
            got = _with_gradients(compiled, tensors)
        first = first or counter.frame_count  # two where dynamo starts again for a float argument
        for a, b in zip(got, _with_gradients(function, tensors), strict=True):
            assert same_bits(a, b)
    assert 1 <= counter.frame_count == first


@pytest.mark.full
def test_inductor(device):
    """The default compiler, once: a block's worth of ops in one graph."""
    torch._dynamo.reset()

    def block(x, w, ids, bounds):
        y, total = ops.rms_norm(x, w, eps=1e-6, residual=x)
        q, k = ops.vision_rope(y.unflatten(1, (2, 80)), y.unflatten(1, (2, 80)), ids)
        return ops.swiglu(ops.varlen_attention(q, k, k, bounds, max_seqlen=64).flatten(1)).sum() + total.sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for length in (16, 24):
        x, w = (randn(*s, device=device).requires_grad_() for s in ((length, 160), (160,)))
        ids = torch.arange(2 * length, device=device).view(2, -1)
        bounds = torch.tensor([0, 8, length], dtype=torch.int32, device=device)
        got, plain = (torch.autograd.grad(f(x, w, ids, bounds), (x, w)) for f in (compiled, block))
        for a, b in zip(got, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_table():
    table = ops.backends()
    assert list(table) == list(OPS)
    for op, row in table.items():
        assert list(row) == list(BACKENDS)
        assert row["torch"] is None
        assert all(reason is None or (isinstance(reason, str) and len(reason) > 8) for reason in row.values()), op
    text = str(table)
    for op, row in table.items():
        assert op in text.splitlines()
        for name, reason in row.items():
            assert f"  {name:<7} {reason or 'usable'}" in text


def test_the_table_names_every_op():
    """Whatever ops/ exports can be asked for."""
    assert set(OPS) == set(ops.__all__) - {"backends"}


def check_explicit_backend(op: str, backend: str, module=module) -> None:
    """Runs, or raises with the reason that the table gives; never another one in silence."""
    reason = module.unusable(op, backend, "cpu")
    if reason is None:
        assert module.choose(op, backend, CPU) == backend
        return
    with pytest.raises(RuntimeError) as raised:
        module.choose(op, backend, CPU)
    assert str(raised.value) == f"backend {backend!r} can't run {op}: {reason}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_backend(op, backend):
    check_explicit_backend(op, backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of cuda, flash, triton, torch or None, got 'cudnn'"):
        ops.swiglu(torch.ones(2, 4), backend="cudnn")
    with pytest.raises(ValueError, match="backend: expected one of"):
        check_backend("cudnn")


@pytest.fixture
def simulated_device(monkeypatch):
    """A machine that says it has a CUDA device, and a process that chose and warned of nothing yet."""
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_warned", False)


def test_the_capability_is_that_of_the_tensors_device(simulated_device, monkeypatch):
    """Two devices, of which the current one is newer: a call on the other gets no kernel that it can't run."""
    old = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5) if device == old else (9, 0))
    monkeypatch.setattr(module, "extension_error", lambda: None)
    monkeypatch.setattr(module, "driver_error", lambda: None)
    assert choose("varlen_attention", "cuda", torch.device("cuda", 0)) == "cuda"
    with pytest.raises(RuntimeError, match="needs compute capability 8.0, and this device has 7.5"):
        choose("varlen_attention", "cuda", old)


@pytest.mark.parametrize("op", OPS)
def test_the_cpu_never_reaches_a_gpu_kernel(simulated_device, op):
    """Fault 18: CPU tensors on a machine with a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, None, CPU) == "torch"
    for backend in ("cuda", "flash"):
        with pytest.raises(RuntimeError, match=f"backend '{backend}' can't run {op}: "):
            choose(op, backend, CPU)


def test_packages_are_looked_up_once(monkeypatch):
    """A look goes through all of sys.path: the choice made by every call of an op must not pay for it."""
    looks = []
    look = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: looks.append(name) or look(name, *a))
    on_device = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    for _ in range(2):
        looks.clear()
        for op in OPS:
            choose(op, None, CPU)
        module.extension_error()
        attention.has_varlen(on_device)
    assert not looks


def test_a_downgrade_warns_once(simulated_device, monkeypatch):
    """A CUDA tensor that gets less than the backend made for it: one warning in a process, with the reason."""
    monkeypatch.setattr(module, "unusable", lambda op, name, device=None: None if name == "torch" else f"{name} is missing")
    with pytest.warns(UserWarning, match="varlen_attention runs on the torch backend: cuda is missing") as caught:
        assert choose("varlen_attention", None, CUDA) == "torch"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("mrope", None, CUDA) == "torch"


def test_the_fastest_is_chosen(simulated_device, monkeypatch):
    """With everything usable the preferred backend runs and nobody is warned."""
    monkeypatch.setattr(module, "unusable", lambda op, name, device=None: None if name in ("torch", "cuda", "triton") else "no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("varlen_attention", None, CUDA) == "cuda"
    monkeypatch.setattr(module, "unusable", lambda op, name, device=None: None if name in ("torch", "triton") else "no")
    monkeypatch.setattr(module, "_chosen", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("mrope", None, CUDA) == "triton"


def test_tensors_that_the_preferred_backend_refuses(simulated_device, monkeypatch):
    """Too wide a row, say: the next backend runs, with a warning that has the reason."""
    monkeypatch.setattr(module, "unusable", lambda op, name, device=None: None if name in ("torch", "triton") else "no")
    with pytest.warns(UserWarning, match="rms_norm runs on the torch backend: too wide"):
        assert choose("rms_norm", None, CUDA, "too wide") == "torch"
    assert choose("rms_norm", "torch", CUDA, "too wide") == "torch"
    with pytest.raises(RuntimeError, match="backend 'triton' can't run rms_norm: too wide"):
        choose("rms_norm", "triton", CUDA, "too wide")


def test_a_model_wide_backend(monkeypatch):
    """`using` reaches the ops that have this backend, leaves the others their choice, and ends with its block."""
    monkeypatch.setattr(module, "_WRITTEN", {**module._WRITTEN, "flash": ("varlen_attention",)})
    with using("flash"):
        with pytest.raises(RuntimeError, match="backend 'flash' can't run varlen_attention: "):
            choose("varlen_attention", None, CPU)
        assert choose("swiglu", None, CPU) == "torch"
        assert choose("varlen_attention", "torch", CPU) == "torch"
        with using(None):
            assert choose("varlen_attention", None, CPU) == "torch"
    assert choose("varlen_attention", None, CPU) == "torch"


def test_a_backend_that_runs_nothing_is_refused(monkeypatch):
    check_backend(None)
    check_backend("torch")
    monkeypatch.setattr(module, "unusable", lambda op, name, device=None: "it is broken")
    with pytest.raises(RuntimeError, match="backend 'flash' can't run any op here: it is broken"):
        check_backend("flash")


@pytest.mark.parametrize("op", [op for op in calls(8) if op != "patchify"])  # which takes integers
def test_a_tangent_is_refused(op, device):
    """No op has a forward-mode derivative, and none loses a tangent in silence."""
    function, *tensors = calls(8, device)[op]
    plain = [x.detach() for x in tensors]
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda x: function(x, *plain[1:]), (plain[0],), (torch.ones_like(plain[0]),))
    with forward_ad.dual_level():
        function(*plain)  # without tangents nothing is wrong
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            function(forward_ad.make_dual(plain[0], torch.ones_like(plain[0])), *plain[1:])


def test_no_double_dispatch(device):
    """At most one boundary of torch.library a call: the profiler sees one op of ours for one call of each."""
    for op, (function, *tensors) in calls(8, device).items():
        with torch.profiler.profile() as profile, torch.no_grad():
            function(*tensors)
        names = [event.name for event in profile.events() if event.name.startswith("qwen2vl_fast::")]
        assert len(names) == 1, f"{op}: {names}"
