"""Cross entropy of a linear head without its logits in memory."""

from __future__ import annotations

import functools

import torch

from ..positions import check_integer
from . import checks
from .backends import choose, define

_BLOCK_BYTES = 1 << 27  # of float32 logits alive at once


def linear_cross_entropy(hidden, weight, labels, *, ignore_index: int = -100, backend: str | None = None):
    """Mean cross entropy of hidden @ weight^T against labels, computed a block of words at a time.

    loss = mean over rows t with labels[t] != ignore_index of logsumexp(z_t) - z_t[labels[t]], z_t = weight hidden_t.

    Args:
        hidden: [T, E], floating.
        weight: [V, E], the dtype and device of hidden.
        labels: [T] int64 on the same device, in [0, V) or ignore_index. Already shifted by the caller.
        ignore_index: the label of rows that don't count.
        backend: None for the fastest that can run the tensors.
    Returns: a scalar, float32 (float64 for float64); nan when no row counts, as the mean of nothing.
    Raises: TypeError, ValueError for a dtype, device, shape or (on the host) a label out of range; RuntimeError for an
        unusable backend.
    Precision: products in the dtype of hidden; the rest in float32 (float64 for float64).
    Source: MODEL.md section 6. Definition: `reference.linear_cross_entropy`.
    """
    checks.floating("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected [T, E], got shape {list(hidden.shape)}")
    checks.same("weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected [V, {hidden.shape[1]}] with V at least 1, got shape {list(weight.shape)}")
    if checks.check_tensor("labels", labels).dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    checks.shape("labels", labels, (hidden.shape[0],), "[T]")
    checks.same_device("labels", labels, "hidden", hidden)
    check_integer("ignore_index", ignore_index)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))
        if bad.any():
            index = int(bad.nonzero()[0])
            raise ValueError(f"labels[{index}]: expected {ignore_index} or 0..{weight.shape[0] - 1}, got {int(labels[index])}")
    name = choose("linear_cross_entropy", backend, hidden.device)
    return _loss(hidden, weight, labels.contiguous(), ignore_index, name)[0]


@functools.cache
def _kernels():
    """Imported when they are first needed: triton may be missing."""
    from ..kernels import loss

    return loss


# By words and not by rows: each block of weight is read once, and its gradient written once, whatever the number of rows.


def _blocks(hidden, weight):
    step = max(1, _BLOCK_BYTES // (4 * max(1, hidden.shape[0])))
    step -= step % 64 if step > 64 else 0  # rows of a block begin at 16 bytes
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _places(labels, first, logits):
    """Where each row's label stands in a block of logits [T, 1], and whether it is there [T, 1]."""
    place = labels[:, None] - first
    inside = (place >= 0) & (place < logits.shape[1])
    return place.where(inside, 0), inside


def _add_block(logits, labels, first, top, total, picked):
    """Adds a block of logits, which it overwrites, to the rows' largest logit, sum exp(z - largest) and logit of the label."""
    logits = logits.to(top.dtype)
    place, inside = _places(labels, first, logits)
    picked.copy_(torch.where(inside[:, 0], logits.gather(1, place)[:, 0], picked))
    high = torch.maximum(top, logits.amax(-1))
    total.mul_((top - high).exp_()).add_(logits.sub_(high[:, None]).exp_().sum(-1))
    top.copy_(high)


def _slopes(logits, labels, first, top, log_total, factor):
    """(softmax(z) - onehot(label)) factor of a block of logits, which it overwrites."""
    slope = logits.to(top.dtype).sub_(top[:, None]).sub_(log_total[:, None]).exp_()
    place, inside = _places(labels, first, slope)
    slope.scatter_add_(1, place, -inside.to(slope.dtype))
    return slope.mul_(factor[:, None]).to(logits.dtype)


def _loss_impl(hidden, weight, labels, ignore_index, backend="torch"):
    """The loss, and for the backward pass the largest logit of each row and the logarithm of sum exp(z - largest), [T] each.

    Apart, since their sum would be rounded: a log-sum-exp of 30 to 2e-6 in float32.
    """
    counted = labels != ignore_index
    compute = torch.promote_types(hidden.dtype, torch.float32)
    # Not from -inf: float16 overflows to that, and a block of nothing else would leave exp(-inf + inf).
    top = torch.full(labels.shape, torch.finfo(compute).min, dtype=compute, device=hidden.device)
    total, picked = torch.zeros_like(top), torch.full_like(top, torch.nan)  # so it stays where a label on a device is no word
    add = _kernels().launch if backend == "triton" else _add_block
    with torch._C._DisableAutocast():
        for block in _blocks(hidden, weight):
            add(hidden @ weight[block].t(), labels, block.start, top, total, picked)
    log_total = total.log()
    costs = log_total - (picked - top)
    return costs.masked_fill(~counted, 0).sum() / counted.sum(), top, log_total


def _loss_backward_impl(
    grad, hidden, weight, labels, top, log_total, ignore_index, wants_hidden, wants_weight, backend="torch"
):  # fmt: skip
    """d loss / d z_t = (softmax(z_t) - onehot(label_t)) / count, with the logits of a block computed again.

    A gradient that nobody wants is empty: that of a frozen head would be the largest tensor here.
    """
    counted = labels != ignore_index
    factor = (grad / counted.sum()).masked_fill(~counted, 0)
    grad_hidden = torch.zeros(hidden.shape if wants_hidden else 0, dtype=top.dtype, device=hidden.device)
    grad_weight = weight.new_empty(weight.shape if wants_weight else 0)
    slopes = _kernels().launch_slopes if backend == "triton" else _slopes
    with torch._C._DisableAutocast():
        for block in _blocks(hidden, weight):
            slope = slopes(hidden @ weight[block].t(), labels, block.start, top, log_total, factor)
            if wants_hidden:
                grad_hidden += slope @ weight[block]
            if wants_weight:
                torch.mm(slope.t(), hidden, out=grad_weight[block])
    return grad_hidden.to(hidden.dtype), grad_weight


def _fake(hidden, weight, labels, *_):
    compute = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(shape, dtype=compute) for shape in ((), labels.shape, labels.shape))


def _setup(ctx, inputs, output):
    hidden, weight, labels, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, labels, *output[1:])


def _backward(ctx, grad, *_):
    wanted = ctx.needs_input_grad[:2]
    grads = _loss_grad(grad, *ctx.saved_tensors, ctx.ignore_index, *wanted, ctx.backend)
    return *(g if wants else None for g, wants in zip(grads, wanted, strict=True)), None, None, None


_loss = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, str backend='torch')"
    " -> (Tensor, Tensor, Tensor)",
    _loss_impl,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_loss_grad = define(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor top, Tensor log_total,"
    " int ignore_index, bool wants_hidden, bool wants_weight, str backend='torch') -> (Tensor, Tensor)",
    _loss_backward_impl,
    lambda grad, hidden, weight, labels, top, log_total, ignore_index, *wanted: tuple(
        x.new_empty(x.shape if wants else 0) for x, wants in zip((hidden, weight), wanted[:2], strict=True)
    ),
)
