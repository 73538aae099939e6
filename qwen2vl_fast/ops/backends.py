"""Who can run what: the table of op x backend, the automatic choice, and the one place where an op meets torch.library."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from .checks import TENSORS

BACKENDS = ("cuda", "flash", "triton", "torch")  # fastest first
OPS = (
    "mrope", "mrope_", "vision_rope", "vision_rope_", "merge_patches", "varlen_attention", "patchify",
    "linear_cross_entropy", "rms_norm", "layer_norm", "quick_gelu", "gelu", "swiglu",
)  # fmt: skip
_TRITON = tuple(op for op in OPS if op != "varlen_attention")
_WRITTEN = {"torch": OPS, "flash": ("varlen_attention",), "triton": _TRITON, "cuda": ("varlen_attention",)}
_PREFERRED = {op: "cuda" if op == "varlen_attention" else "triton" for op in OPS}

_model_backend: ContextVar[str | None] = ContextVar("qwen2vl_fast_backend", default=None)
_library = torch.library.Library("qwen2vl_fast", "DEF")
_warned = False
_chosen: dict[tuple, str] = {}  # what `choose` found: packages, drivers and devices stay what they are while a process runs


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Registers qwen2vl_fast::<schema> with torch (every device, fake tensors, autograd) and returns the function to call.

    Where the schema has backend='torch' the implementation needs that default too: torch drops arguments that equal theirs.

    An op has no forward-mode derivative; a tensor with a tangent is RuntimeError, since it would come out without one.

    Where nothing traces, transforms or profiles, a call goes to the implementation, or to an autograd function around it:
    torch's dispatch of an op written in Python costs several times what starting a kernel does (`python -m bench.host`).
    """
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qwen2vl_fast::{name}", fake, lib=_library)
    if backward is None and name.endswith("_backward"):
        setup_context, backward = (lambda ctx, inputs, output: None), _no_second_derivative(name)
    if backward is not None:
        torch.library.register_autograd(f"qwen2vl_fast::{name}", backward, setup_context=setup_context, lib=_library)
    registered = getattr(torch.ops.qwen2vl_fast, name).default
    function = registered if backward is None else _function(name, implementation, setup_context, backward)

    tensors = tuple(i for i, argument in enumerate(registered._schema.arguments) if "Tensor" in str(argument.type))

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return registered(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, [args[i] for i in tensors])
        if _modes() or _function_modes() or _transforms() or _tracing() or profiler._is_profiler_enabled:
            return registered(*args)
        differentiable = False
        for i in tensors:
            x = args[i]
            if x is None:
                continue
            if type(x) not in TENSORS or x.is_neg():  # the dispatcher negates what is a view with that bit
                return registered(*args)
            differentiable = differentiable or x.requires_grad
        return function(*args) if differentiable and torch.is_grad_enabled() else implementation(*args)

    call.registered = registered
    return call


def _refuse_tangents(name: str, tensors: list[torch.Tensor | None]) -> None:
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"{name} has no forward-mode derivative; the functions of qwen2vl_fast.reference have theirs")


# Who has to see a call of an op besides a profiler: modes (fake tensors, checkpoints, of functions), transforms, a trace.
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._is_torch_function_mode_enabled
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


def _no_second_derivative(name: str) -> Callable[..., Any]:
    """The backward of an op that is itself a gradient. Without one, torch takes a second derivative to be zero."""

    def backward(ctx, *grads):
        op = name.removesuffix("_backward")
        raise RuntimeError(f"{op} has no second derivative on this backend; the functions of qwen2vl_fast.reference have one")

    return backward


def differentiated(definition: Callable[..., Any], grads: int = 1) -> dict[str, Callable[..., Any]]:
    """For `define`: the derivative of a backward pass, by autograd through the definition of its forward one.

    The op takes `grads` upstream gradients (None: not asked for), then the arguments of definition, which returns a tuple; the
    op returns the gradients of the tensors among these.
    """

    def setup_context(ctx, inputs, output):
        ctx.is_tensor = [x is None or isinstance(x, torch.Tensor) for x in inputs]
        ctx.save_for_backward(*(x for x, is_tensor in zip(inputs, ctx.is_tensor, strict=True) if is_tensor))
        ctx.rest = [x for x, is_tensor in zip(inputs, ctx.is_tensor, strict=True) if not is_tensor]

    def backward(ctx, *upstream):
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: a tensor that was given twice stands for two arguments.
            saved = [x if x is None else x.view_as(x) if x.requires_grad else x.detach() for x in ctx.saved_tensors]
            wanted = [x for x in saved if x is not None and x.requires_grad]
            pairs = [(x.requires_grad_(), u) for x, u in zip(saved[grads:], upstream, strict=True) if x is not None]
            inputs, upstream = zip(*pairs, strict=True)
            outputs = definition(*saved[grads:], *ctx.rest)
            ends, given = zip(*((o, g) for o, g in zip(outputs, saved[:grads], strict=True) if g is not None), strict=True)
            first = torch.autograd.grad(ends, inputs, given, create_graph=True)
            found = iter(torch.autograd.grad(first, wanted, upstream, create_graph=again, allow_unused=True))
        needed = iter(x is not None and x.requires_grad for x in ctx.saved_tensors)
        return tuple(next(found) if is_tensor and next(needed) else None for is_tensor in ctx.is_tensor)

    return {"setup_context": setup_context, "backward": backward}


def _function(name: str, implementation: Callable, setup_context: Callable, backward: Callable) -> Callable[..., Any]:
    """An op with its gradient as an autograd function, for calls that go past the dispatcher."""

    def forward(ctx, *args):
        output = implementation(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    cls = type(f"qwen2vl_fast_{name}", (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, cls).apply  # Function's own looks at every argument for transforms: there are none


@functools.cache
def _installed(package: str) -> bool:
    """Looked up once: each look goes through all of sys.path. A folder that another package brings along (FlashAttention-4 puts
    its own into flash_attn) has no origin."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


@functools.cache
def extension_error() -> str | None:
    """None when the compiled extension imports, else the reason."""
    if importlib.util.find_spec("qwen2vl_fast._C") is None:
        return "the CUDA extension is not built (nvcc was not found when the package was installed)"
    try:
        import qwen2vl_fast._C  # noqa: F401
    except ImportError as error:
        return f"the CUDA extension does not load: {error}"
    return None


@functools.cache
def driver_error() -> str | None:
    """None when the extension's CUDA runtime gets along with the driver (torch's own may be older), else the reason."""
    from qwen2vl_fast import _C

    try:
        _C.device_count()
    except RuntimeError as error:
        return f"the extension was built with CUDA {_C.build_info()['cuda_version']}: {error}"
    return None


def _interpreting() -> bool:
    """Whether triton runs kernels on the CPU, one program at a time in Python (TRITON_INTERPRET=1): for tests."""
    import triton

    return triton.knobs.runtime.interpret


def unusable(op: str, backend: str, device: str | torch.device | None = None) -> str | None:
    """Why `backend` can't run `op` on `device` (None: on whatever this machine has), or None if it can."""
    kind = None if device is None else torch.device(device).type
    if op not in _WRITTEN[backend]:
        return f"there is no {backend} kernel for {op} yet"
    if backend == "torch":
        return None
    if backend == "flash" and not _installed("flash_attn"):
        return "the flash-attn package is not installed (pip install qwen2vl-fast[flash])"
    if backend == "triton" and not _installed("triton"):
        return "triton is not installed"
    if backend == "triton" and kind in (None, "cpu") and _interpreting():
        return None
    if backend == "cuda" and (error := extension_error()):
        return error
    if not torch.cuda.is_available():
        return "no CUDA device"
    if kind not in (None, "cuda"):
        return f"the tensors are on {kind}, not on a CUDA device"
    if backend == "cuda" and (error := driver_error()):
        return error
    if backend == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the extension needs compute capability 8.0, and this device has {capability[0]}.{capability[1]}"
    return None


def choose(op: str, backend: str | None, device: torch.device, refused: str | None = None) -> str:
    """The backend that will run `op`: the one asked for, or the fastest that can.

    refused: why the backend that was made for op can't take these very tensors, if it can't.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that can't run here. The first time
    that a CUDA tensor gets less than the backend made for it, a warning says which and why. What is found is remembered.
    """
    if backend is None:
        wanted = _model_backend.get()
        if wanted is not None and op in _WRITTEN[wanted]:
            backend = wanted
    elif type(backend) is not str:
        _known(backend)
    key = op, backend, device, refused
    name = _chosen.get(key)
    if name is None:
        name = _choose(*key)
        if backend != "triton" or device.type == "cuda":  # whether triton runs on a CPU is a switch that can be turned
            _chosen[key] = name
    return name


def _choose(op: str, backend: str | None, device: torch.device, refused: str | None) -> str:
    global _warned
    if backend is not None:
        _known(backend)
        if reason := unusable(op, backend, device) or (refused if backend == _PREFERRED[op] else None):
            raise RuntimeError(f"backend {backend!r} can't run {op}: {reason}")
        return backend
    for name in BACKENDS:
        if name == _PREFERRED[op] and refused:
            continue
        if unusable(op, name, device) is None and (name != "triton" or device.type == "cuda"):
            break
    if device.type == "cuda" and name != _PREFERRED[op] and not _warned:
        _warned = True
        reason = unusable(op, _PREFERRED[op], device) or refused
        warnings.warn(
            f"{op} runs on the {name} backend: {reason}. qwen2vl_fast.backends() lists every op; this is said once.",
            stacklevel=4,
        )
    return name


# What torch.compiler.assume_constant_result sets: the choice is made while tracing, since a ContextVar and find_spec are beyond
# dynamo. Calling that function here would import dynamo, and so double the time that importing this package takes.
choose._dynamo_marked_constant = True


def _known(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")


def check_backend(backend: str | None) -> None:
    """Raises ValueError for an unknown name and RuntimeError for a backend that can run no op on this machine."""
    if backend is None:
        return
    _known(backend)
    reasons = [unusable(op, backend) for op in OPS]
    if None not in reasons:
        reason = next((r for op, r in zip(OPS, reasons, strict=True) if op in _WRITTEN[backend]), reasons[0])
        raise RuntimeError(f"backend {backend!r} can't run any op here: {reason}")


@contextmanager
def using(backend: str | None) -> Iterator[None]:
    """Inside, `backend` runs every op that it has; ops that it doesn't have choose as usual."""
    token = _model_backend.set(backend)
    try:
        yield
    finally:
        _model_backend.reset(token)


class BackendTable(dict):
    """{op: {backend: None if usable, else the reason}}; prints as a table."""

    def __str__(self) -> str:
        lines = []
        for op, row in self.items():
            lines.append(op)
            lines.extend(f"  {name:<7} {'usable' if reason is None else reason}" for name, reason in row.items())
        return "\n".join(lines)


def backends() -> BackendTable:
    """Which backend can run which op on this machine, and for each that can't, why."""
    return BackendTable({op: {name: unusable(op, name) for name in BACKENDS} for op in OPS})
