"""Matrix products of the model: torch's, except where the CPU build has a faster one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backends import define


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias: x [..., E], weight [F, E], bias [F] -> [..., F].

    float32 on the CPU goes through oneDNN: torch's default there is MKL, which leaves AVX-512 unused on processors that are
    not Intel's, and is slower with few rows everywhere (docs/LOG.md has the measurements). Everything else is
    torch.nn.functional.linear.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _ONEDNN and weight.dtype == x.dtype:
        if x.numel() > (0 if _AVX512 else x.shape[-1]):  # one row: MKL, where it uses all of the processor
            return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()


def _linear_impl(x, weight, bias):
    with torch._C._AutoDispatchBelowADInplaceOrView():  # no view: autograd lets nobody write into one that a function returned
        out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
        return out.view(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grads, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = _linear(grad, weight.t().contiguous(), None) if wanted[0] else None
    grad_weight = None
    if wanted[1]:
        # oneDNN needs both operands copied to transpose them. Where MKL uses all of the processor, it is faster without.
        grad_weight = _linear(grads.t().contiguous(), rows.t().contiguous(), None) if _AVX512 else grads.t() @ rows
    return grad_x, grad_weight, grads.sum(0) if ctx.has_bias and wanted[2] else None


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear_impl,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    setup_context=_setup,
    backward=_backward,
)
