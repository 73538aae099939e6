"""Variable-length attention over packed segments."""

from __future__ import annotations

import importlib.util
import inspect
import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from ..positions import AttentionSchedule, check_cu_seqlens
from . import attention_cuda, checks
from .backends import choose, define


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    deterministic: bool | None = None,
    schedule: AttentionSchedule | None = None,
    return_lse: bool = False,
    backend: str | None = None,
):
    """Attention inside each segment of a pack, never across.

    o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys j of i's segment; causal keeps j <= i + Lk - Lq (bottom-right).

    Args:
        q: [T, H, D], floating, any strides with a contiguous last dim.
        k, v: [Tk, Hk, D], the dtype and device of q; H a multiple of Hk (grouped queries).
        cu_seqlens: [N + 1] int32 boundaries of the queries' segments, from 0 to T. Empty segments are allowed.
        cu_seqlens_k: [N + 1] int32 boundaries of the keys; None = cu_seqlens.
        max_seqlen, max_seqlen_k: longest segment, when the caller knows it; else read from cu_seqlens where a backend needs it.
        scale: None = D^-0.5.
        causal: bottom-right aligned causal mask.
        deterministic: bit-equal gradients in every run of the same pack; None = torch.are_deterministic_algorithms_enabled().
            torch's own variable-length attention (backend torch on a CUDA device) knows that switch alone, and True without
            it is RuntimeError.
        schedule: positions.attention_schedule(...) of the queries' segments, built once for all layers. The cuda backend uses
            its list of work where heads, mask, keys and device are those it was made for, and else builds one on the device.
        return_lse: also return the log-sum-exp.
        backend: None for the fastest that can run the tensors.
    Returns: o [T, H, D] in q's dtype; with return_lse also lse [H, T] float32, natural log, not differentiable.
        A row without keys gives o = 0 and lse = -inf.
    Raises: TypeError, ValueError for a dtype, device, shape or boundaries that don't fit (values only of host tensors);
        RuntimeError for an unusable backend.
    Precision: scores and softmax in float32 (float64 for float64); on the cuda backend |scale q_i . k_j| must stay below 1e8.
    Source: MODEL.md section 2. Definition: `reference.varlen_attention`.
    """
    _check(q, k, v, cu_seqlens, cu_seqlens_k, schedule)
    if schedule is not None:
        _check_schedule(schedule, cu_seqlens, q.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else float(checks.number("scale", scale))
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    bounds_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    name = choose("varlen_attention", backend, q.device, attention_cuda.refuses(q))
    if name == "cuda":
        own = schedule if cu_seqlens_k is None else None
        o, lse = attention_cuda.attention(q, k, v, cu_seqlens, bounds_k, own, scale, causal, bool(deterministic))
        return (o, lse.detach()) if return_lse else o
    if name == "torch" and not has_varlen(q):
        o, lse = _attention(q, k, v, cu_seqlens, bounds_k, scale, causal)
        return (o, lse.detach().float()) if return_lse else o
    if schedule is not None:
        max_seqlen = schedule.max_seqlen
    max_seqlen = _longest(cu_seqlens) if max_seqlen is None else max_seqlen
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen if cu_seqlens_k is None else _longest(cu_seqlens_k)
    run = _flash_attn if name == "flash" else _torch_varlen
    o, lse = run(q, k, v, cu_seqlens, bounds_k, max_seqlen, max_seqlen_k, scale, causal, deterministic)
    if not return_lse:
        return o
    lse = lse.detach().float()
    return o, lse.masked_fill(lse == math.inf, -math.inf)  # FlashAttention-2 says +inf of a row without keys


def _check(q, k, v, cu_seqlens, cu_seqlens_k, schedule) -> None:
    checks.floating("q", q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.same(name, x, "q", q)
        if x.dim() != 3:
            raise ValueError(f"{name}: expected [T, H, D], got shape {list(x.shape)}")
        if x.stride(-1) != 1 and x.numel():
            raise ValueError(f"{name}: expected a contiguous last dim, got strides {x.stride()}; use .contiguous()")
    checks.shape("v", v, tuple(k.shape), "k's shape")
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q: expected at least one head and a head dim of at least 1, got shape {list(q.shape)}")
    if k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected head dim {q.shape[2]} and a number of heads that divides {q.shape[1]}, got shape {list(k.shape)}"
        )
    if cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected {q.shape[0]} tokens like q, got {k.shape[0]}; pass cu_seqlens_k for other key lengths")
    if type(schedule) is not AttentionSchedule or schedule.cu_seqlens is not cu_seqlens:  # else they were checked then
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0])
    checks.same_device("cu_seqlens", cu_seqlens, "q", q)
    if cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0])
        checks.same_device("cu_seqlens_k", cu_seqlens_k, "q", q)
        checks.shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), "[N + 1]")


def _check_schedule(schedule: AttentionSchedule, cu_seqlens: torch.Tensor, total: int) -> None:
    if not isinstance(schedule, AttentionSchedule):
        raise TypeError(f"schedule: expected what positions.attention_schedule returns, got {type(schedule).__name__}")
    if schedule.total != total:
        raise ValueError(f"schedule: made for {schedule.total} tokens, but q has {total}")
    if torch.compiler.is_compiling() or schedule.cu_seqlens is cu_seqlens:
        return
    if cu_seqlens.device.type == schedule.cu_seqlens.device.type == "cpu" and not torch.equal(cu_seqlens, schedule.cu_seqlens):
        raise ValueError("schedule: made for other boundaries than cu_seqlens; pass its own schedule.cu_seqlens")


def _longest(cu_seqlens: torch.Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def has_varlen(q: torch.Tensor) -> bool:
    """Whether torch's own variable-length flash attention takes this tensor."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return _TORCH_VARLEN


_TORCH_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _torch_varlen(q, k, v, bounds, bounds_k, longest, longest_k, scale, causal, deterministic):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if deterministic and wanted and not torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "deterministic: torch's varlen_attn has bit-equal gradients under torch.use_deterministic_algorithms(True) alone"
        )
    # The keywords moved between torch 2.10 and 2.13: is_causal became window_size, and grouped queries were added.
    keywords = inspect.signature(varlen_attn).parameters
    mask = {"window_size": (-1, 0 if causal else -1)} if "window_size" in keywords else {"is_causal": causal}
    group = q.shape[1] // k.shape[1]
    if group > 1 and "enable_gqa" in keywords:
        mask["enable_gqa"] = True
    elif group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, return_aux=AuxRequest(lse=True), scale=scale, **mask)


def _flash_attn(q, k, v, bounds, bounds_k, longest, longest_k, scale, causal, deterministic):
    from flash_attn import flash_attn_varlen_func

    o, lse, _ = flash_attn_varlen_func(
        q, k, v, bounds, bounds_k, longest, longest_k, softmax_scale=scale, causal=causal,
        deterministic=deterministic, return_attn_probs=True,
    )  # fmt: skip
    return o, lse


# The torch backend elsewhere: neighbouring segments of one length are a batch, and each batch is one call of the library's
# fused attention.


def _batches(bounds: list[int], bounds_k: list[int]):
    """(first query row, first key row, number, Lq, Lk) of each run of neighbouring segments with equal lengths."""
    run = None
    for (start, end), (start_k, end_k) in zip(pairwise(bounds), pairwise(bounds_k), strict=True):
        lengths = (end - start, end_k - start_k)
        if run is not None and run[3:] == lengths:
            run = (*run[:2], run[2] + 1, *lengths)
            continue
        if run is not None:
            yield run
        run = (start, start_k, 1, *lengths)
    if run is not None:
        yield run


def _heads_first(x: torch.Tensor, start: int, count: int, length: int, group: int = 1) -> torch.Tensor:
    """Rows of x [T, H, D] as [count, H * group, length, D]; a view unless heads are repeated."""
    y = x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
    return y if group == 1 else y.repeat_interleave(group, 1)


def _plan(q, k, bounds, bounds_k, causal):
    """The batches with at least one visible key, without the rows that see none.

    Yields (query rows, key rows, count, Lq, Lk, mask): causal rows before the first key are dropped (bottom-right), after
    which a square is the library's own causal mask (mask=True) and a wider one needs an explicit mask.
    """
    # A batch must give a segment the bits that it has alone. With one head the library's kernel is a single task alone, inside
    # which BLAS uses all threads, and several tasks in a batch; in float64 the bits change with the thread that gets the task.
    alone = q.device.type == "cpu" and (q.shape[1] == 1 or q.dtype == torch.float64)
    for start, start_k, count, length, length_k in _batches(bounds.tolist(), bounds_k.tolist()):
        blind = max(length - length_k, 0) if causal else 0
        if length == 0 or length_k == 0:
            continue
        if count > 1 and (blind or alone):
            pieces = [(start + i * length + blind, start_k + i * length_k, 1) for i in range(count)]
        else:
            pieces = [(start + blind, start_k, count)]
        rows = length - blind
        mask: bool | torch.Tensor = causal and rows == length_k
        if causal and 1 < rows < length_k:
            hidden = torch.ones(rows, length_k, dtype=torch.bool, device=q.device).triu(1 + length_k - rows)
            mask = q.new_zeros(rows, length_k).masked_fill_(hidden, -math.inf)
        for piece in pieces:
            yield (*piece, rows, length_k, mask)


def forward(q, k, v, bounds, bounds_k, scale, causal):
    """(o [T, H, D], lse [H, T] float32, or float64 for float64)."""
    group = q.shape[1] // k.shape[1]

    def attend(start, start_k, count, length, length_k, mask):
        keys, values = (_heads_first(x, start_k, count, length_k, group) for x in (k, v))
        o, row_lse = _FORWARD[q.device.type == "cpu"](_heads_first(q, start, count, length), keys, values, mask, scale)
        return o, row_lse.transpose(0, 1).flatten(1)

    plan = list(_plan(q, k, bounds, bounds_k, causal))
    covered = sum(count * length for _, _, count, length, _, _ in plan) == q.shape[0]
    if covered and len(plan) == 1:  # all rows at once: what the library wrote is the result
        o, row_lse = attend(*plan[0])
        with torch._C._AutoDispatchBelowADInplaceOrView():  # no view for autograd
            return o.transpose(1, 2).contiguous().view(q.shape), row_lse.contiguous()
    out, lse = _outputs(q, covered)
    for piece in plan:
        start, _, count, length, _, _ = piece
        o, lse[:, start : start + count * length] = attend(*piece)
        _heads_first(out, start, count, length).copy_(o)
    return out, lse


def _outputs(q: torch.Tensor, covered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse as they are for a row that sees no key; not filled where every row will be written."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
    return (out, lse) if covered else (out.zero_(), lse.fill_(-math.inf))


def _attention_backward_impl(grad, q, k, v, out, lse, bounds, bounds_k, scale, causal):
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    backward_into(grads, grad, q, k, v, out, lse, bounds, bounds_k, scale, causal)
    return grads


def backward_into(grads, grad, q, k, v, out, lse, bounds, bounds_k, scale, causal) -> None:
    """Writes dq, dk, dv into `grads`, of any strides."""
    group = q.shape[1] // k.shape[1]
    for x in grads:
        x.zero_()
    for start, start_k, count, length, length_k, mask in _plan(q, k, bounds, bounds_k, causal):
        queries, o, upstream = (_heads_first(x, start, count, length) for x in (q, out, grad))
        keys, values = (_heads_first(x, start_k, count, length_k, group) for x in (k, v))
        row_lse = lse[:, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
        parts = _BACKWARD[q.device.type == "cpu"](upstream, queries, keys, values, o, row_lse, mask, scale)
        _heads_first(grads[0], start, count, length).copy_(parts[0])
        for total, part in zip(grads[1:], parts[1:], strict=True):
            _heads_first(total, start_k, count, length_k).copy_(part.unflatten(1, (-1, group)).sum(2))


def _split_mask(mask):
    return (None, mask) if isinstance(mask, bool) else (mask, False)


def _cpu_forward(q, k, v, mask, scale):
    attn_mask, causal = _split_mask(mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=attn_mask, scale=scale)


def _cpu_backward(grad, q, k, v, out, lse, mask, scale):
    attn_mask, causal = _split_mask(mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=attn_mask, scale=scale
    )


def _scores(q, k, mask, scale):
    attn_mask, causal = _split_mask(mask)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if causal:
        attn_mask = scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    return scores if attn_mask is None else scores + attn_mask


def _explicit_forward(q, k, v, mask, scale):
    scores = _scores(q, k, mask, scale)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _explicit_backward(grad, q, k, v, out, lse, mask, scale):
    weights = (_scores(q, k, mask, scale) - lse[..., None]).exp()
    row = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1, keepdim=True)
    slope = (weights * ((grad @ v.transpose(-1, -2)).to(weights.dtype) - row) * scale).to(q.dtype)
    return slope @ k, slope.transpose(-1, -2) @ q, weights.to(grad.dtype).transpose(-1, -2) @ grad


_FORWARD = {True: _cpu_forward, False: _explicit_forward}  # on a device: float32 and float64, or a torch without varlen_attn
_BACKWARD = {True: _cpu_backward, False: _explicit_backward}


def _attention_fake(q, k, v, *_):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _setup(ctx, inputs, output):
    q, k, v, bounds, bounds_k, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, bounds_k)


def _backward(ctx, grad, grad_lse):
    grads = _attention_grad(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *grads, None, None, None, None


_attention = define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor bounds_k, float scale, bool causal)"
    " -> (Tensor, Tensor)",
    forward,
    _attention_fake,
    setup_context=_setup,
    backward=_backward,
)
_attention_grad = define(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bounds,"
    " Tensor bounds_k, float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    _attention_backward_impl,
    lambda grad, q, k, v, *_: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)),
    setup_context=lambda ctx, inputs, output: None,
    backward=attention_cuda.no_second,
)


def cache_attention(q, k, v, lengths):
    """One decoded token of each sequence over its cache: softmax(D^-0.5 q k^T) v over the first lengths[b] entries.

    Args:
        q: [B, H, D]. k, v: [B, S, Hk, D] with S at least max(lengths). lengths: the B numbers of entries, on the host.
    Returns: [B, H, D].
    Precision: as `varlen_attention`.
    """
    mask = None
    if min(lengths) < k.shape[1]:
        mask = (torch.arange(k.shape[1]) < torch.tensor(lengths)[:, None]).to(q.device)[:, None, None]
    o = F.scaled_dot_product_attention(
        q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[1] != k.shape[2]
    )
    return o.squeeze(2)
