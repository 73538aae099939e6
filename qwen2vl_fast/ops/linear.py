"""Matrix products of the model: torch's, except where the CPU build has a faster one."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F

from .backends import define


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias: x [..., E], weight [F, E], bias [F] -> [..., F].

    float32 on the CPU goes through oneDNN where that is faster than torch's default, MKL (docs/LOG.md has the measurements):
    always, where MKL leaves AVX-512 unused, which is on processors that are not Intel's; elsewhere from 3 to 767 rows.
    Everything else is torch.nn.functional.linear.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _ONEDNN and weight.dtype == x.dtype:
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _intel() -> bool:
    """Whether the processor is Intel's, by Linux's account of it or by Python's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "GenuineIntel" in file.read(512)
    except OSError:
        return "GenuineIntel" in platform.processor()


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Whether MKL uses all of the processor.
_MKL = torch.backends.mkl.is_available() and ("AVX512" not in torch.backends.cpu.get_cpu_capability() or _intel())
_FEW, _MANY = 2, 768  # rows to which and from which MKL is the faster one then


def _linear_impl(x, weight, bias):
    with torch._C._AutoDispatchBelowADInplaceOrView():  # no view: autograd lets nobody write into one that a function returned
        width = x.shape[-1]
        if not x.numel() or _MKL and not _FEW * width < x.numel() < _MANY * width:
            return F.linear(x, weight, bias)
        bias = bias if bias is None else bias.contiguous()  # it is read without its stride
        out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, width), weight, bias, "none", [], "")
        return out.view(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grads, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = grad_weight = None
    # oneDNN needs operands copied to transpose them; MKL does not, and is faster here with any number of rows.
    if wanted[0]:
        grad_x = grad @ weight if _MKL else _linear(grad, weight.t().contiguous(), None)
    if wanted[1]:
        grad_weight = grads.t() @ rows if _MKL else _linear(grads.t().contiguous(), rows.t().contiguous(), None)
    return grad_x, grad_weight, grads.sum(0) if ctx.has_bias and wanted[2] else None


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear_impl,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    setup_context=_setup,
    backward=_backward,
)
