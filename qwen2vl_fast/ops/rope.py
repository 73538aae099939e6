"""Rotary embeddings: three axes for the decoder, two for the vision tower."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..reference import inverse_frequencies, mrope_angles, vision_rope_angles
from . import checks
from .backends import choose, define

_tables: dict[tuple[int, float, torch.device], torch.Tensor] = {}


def mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    theta: float = 1e6,
    sections: Sequence[int] = (16, 24, 24),
    inv_freq: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three-axis rotary embedding (M-RoPE) of queries and keys.

    Pair (j, j + D/2) of every head turns by position_ids[axis(j)] * inv_freq[j], where axis(j) is the section that holds j:
    (a, b) -> s (a cos - b sin, b cos + a sin), s = attention_scaling.

    Args:
        q: [T, H, D] or [B, S, H, D], floating; any strides with a contiguous last dim.
        k: [T, Hk, D] or [B, S, Hk, D], the dtype and device of q.
        position_ids: [3, T] or [3, B, S], int32 or int64, on q's device: (t, h, w) ids.
        theta: base of the frequencies theta^(-2i/D); ignored when inv_freq is given.
        sections: pairs per axis; three numbers that sum to D/2.
        inv_freq: [D/2] float32, radians per position (a model's own table, YaRN).
        attention_scaling: factor on cos and sin (YaRN).
        backend: None for the fastest that can run the tensors.
    Returns: q and k rotated, new contiguous tensors of the same shape and dtype.
    Raises: TypeError, ValueError for a dtype, device, shape or sections that don't fit; RuntimeError for an unusable backend.
    Precision: angles, cos and sin in float32; the rotation in float32 (float64 for float64 input); one rounding at the end. The
        triton backend's cos and sin are float32's nearest for angles under 2e5 and lose digits beyond: by emulation 1e-6 at 1e6
        where multiply and add are fused, as on a GPU. Triton's interpreter rounds between them: 3e-4 at 1e6, none left at 1e7.
    Source: MODEL.md section 4; arXiv:2409.12191 section 2.1. Definition: `reference.mrope`.
    """
    table = _check_mrope(q, k, position_ids, theta, sections, inv_freq, attention_scaling)
    name = choose("mrope", backend, q.device)
    return _mrope(q, k, position_ids, table, list(sections), attention_scaling, 1.0, name)


def mrope_as_given(q, k, position_ids, inv_freq, sections, attention_scaling, backend):
    """`mrope` of tensors that fit, for layers that get them from one another; ids may be below zero."""
    return _mrope(q, k, position_ids, inv_freq, sections, attention_scaling, 1.0, choose("mrope", backend, q.device))


def mrope_(q, k, position_ids, *, theta=1e6, sections=(16, 24, 24), inv_freq=None, attention_scaling=1.0, backend=None):
    """`mrope` in place; returns None.

    Raises RuntimeError when grad is enabled and q or k requires it, ValueError where q or k is broadcast or both are one.
    """
    table = _check_mrope(q, k, position_ids, theta, sections, inv_freq, attention_scaling)
    name = choose("mrope_", backend, q.device)
    _refuse_grad("mrope_", q, k)
    _mrope_inplace(q, k, position_ids, table, list(sections), attention_scaling, name)


def vision_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    theta: float = 1e4,
    inv_freq: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-axis rotary embedding of the vision tower's queries and keys.

    Pair (j, j + D/2) turns by row * inv_freq[j] for j < D/4 and by column * inv_freq[j - D/4] for the rest.

    Args:
        q, k: [T, H, D] and [T, Hk, D], floating, any strides with a contiguous last dim; D a multiple of 4.
        position_ids: [2, T], int32 or int64, on q's device: row and column in patches.
        theta: base of the frequencies theta^(-2i/(D/2)); ignored when inv_freq is given.
        inv_freq: [D/4] float32, radians per patch.
        backend: None for the fastest that can run the tensors.
    Returns: q and k rotated, new contiguous tensors of the same shape and dtype.
    Raises: TypeError, ValueError for a dtype, device or shape that doesn't fit; RuntimeError for an unusable backend.
    Precision: as `mrope`.
    Source: MODEL.md section 2. Definition: `reference.vision_rope`.
    """
    table = _check_vision(q, k, position_ids, theta, inv_freq)
    name = choose("vision_rope", backend, q.device)
    return _vision_rope(q, k, position_ids, table, 1.0, name)


def vision_rope_(q, k, position_ids, *, theta=1e4, inv_freq=None, backend=None):
    """`vision_rope` in place; returns None.

    Raises RuntimeError when grad is enabled and q or k requires it, ValueError where q or k is broadcast or both are one.
    """
    table = _check_vision(q, k, position_ids, theta, inv_freq)
    name = choose("vision_rope_", backend, q.device)
    _refuse_grad("vision_rope_", q, k)
    _vision_rope_inplace(q, k, position_ids, table, name)


def _fit(q: Any, k: Any, position_ids: Any, ranks: tuple[int, ...], divisor: int, axes: int) -> bool:
    """Whether the three pass `_check_heads` and `_check_positions`, values aside: at one look, as `checks.fit`."""
    for x in (q, k, position_ids):
        if type(x) not in checks.TENSORS and not isinstance(x, torch.Tensor):
            return False
    dtype, device, shape, shape_k = q.dtype, q.device, q.shape, k.shape
    if dtype not in checks.FLOATS or k.dtype != dtype or k.device != device or position_ids.device != device:
        return False
    if q.ndim not in ranks or k.ndim != q.ndim or shape_k[:-2] != shape[:-2] or shape_k[-1] != shape[-1]:
        return False
    if shape[-1] == 0 or shape[-1] % divisor or not q.stride(-1) == k.stride(-1) == 1:
        return False
    return position_ids.dtype in checks.INTEGERS and position_ids.shape == (axes, *shape[:-2])


def _check_heads(q: torch.Tensor, k: torch.Tensor, ranks: tuple[int, ...], divisor: int) -> None:
    checks.floating("q", q)
    checks.same("k", k, "q", q)
    if q.dim() not in ranks:
        raise ValueError(f"q: expected rank {' or '.join(map(str, ranks))}, got shape {list(q.shape)}")
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected q's shape {list(q.shape)} except for the number of heads, got {list(k.shape)}")
    if q.shape[-1] == 0 or q.shape[-1] % divisor:
        raise ValueError(f"q: expected a head dim that is a positive multiple of {divisor}, got {q.shape[-1]}")
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 and x.numel():
            raise ValueError(f"{name}: expected a contiguous last dim, got strides {x.stride()}; use .contiguous()")


def _check_positions(position_ids: torch.Tensor, q: torch.Tensor, axes: int) -> None:
    checks.integers("position_ids", position_ids)
    checks.same_device("position_ids", position_ids, "q", q)
    checks.shape("position_ids", position_ids, (axes, *q.shape[:-2]), f"[{axes}, {'T' if q.dim() == 3 else 'B, S'}]")


def _check_values(position_ids: torch.Tensor) -> None:
    if torch.compiler.is_compiling() or position_ids.numel() == 0:
        return
    low, high = map(int, position_ids.aminmax())
    if low < 0 or high >= 1 << 24:  # float32 holds every integer below
        raise ValueError(f"position_ids: expected 0..{(1 << 24) - 1} (angles are float32), got {low if low < 0 else high}")


def _check_table(inv_freq: torch.Tensor | None, size: int, dim: int, theta: float, device: torch.device) -> torch.Tensor:
    if inv_freq is None:
        return _default_table(dim, checks.number("theta", theta), device)
    if checks.check_tensor("inv_freq", inv_freq).dtype != torch.float32:
        raise TypeError(f"inv_freq: expected float32 (a rounded table is wrong from position 256 on), got {inv_freq.dtype}")
    checks.shape("inv_freq", inv_freq, (size,), f"[{size}]")
    return inv_freq if inv_freq.device == device else inv_freq.to(device)


def _default_table(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Made once: on a device a table costs a copy from the host, which waits. While something traces, it is made anew."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return inverse_frequencies(dim, theta).to(device)
    key = dim, float(theta), device
    if key not in _tables:
        with torch.inference_mode(False):  # else autograd could not save it later
            _tables[key] = inverse_frequencies(dim, theta).to(device)
    return _tables[key]


def _check_mrope(q, k, position_ids, theta, sections, inv_freq, attention_scaling) -> torch.Tensor:
    fits = _fit(q, k, position_ids, (3, 4), 2, 3)
    if not fits:
        _check_heads(q, k, (3, 4), 2)
    if type(attention_scaling) is not float:
        checks.number("attention_scaling", attention_scaling)
    dim = q.shape[-1]
    if not isinstance(sections, list | tuple) or not set(map(type, sections)) <= {int}:
        raise TypeError(f"sections: expected three integers, got {sections!r}")
    if len(sections) != 3 or min(sections) < 0 or sum(sections) * 2 != dim:
        raise ValueError(f"sections: expected three numbers that sum to D/2 = {dim // 2}, got {tuple(sections)}")
    if not fits:
        _check_positions(position_ids, q, 3)
    if position_ids.device.type == "cpu":
        _check_values(position_ids)
    return _check_table(inv_freq, dim // 2, dim, theta, q.device)


def _check_vision(q, k, position_ids, theta, inv_freq) -> torch.Tensor:
    if not _fit(q, k, position_ids, (3,), 4, 2):
        _check_heads(q, k, (3,), 4)
        _check_positions(position_ids, q, 2)
    if position_ids.device.type == "cpu":
        _check_values(position_ids)
    return _check_table(inv_freq, q.shape[-1] // 4, q.shape[-1] // 2, theta, q.device)


def _refuse_grad(name: str, q: torch.Tensor, k: torch.Tensor) -> None:
    if (q.requires_grad or k.requires_grad) and torch.is_grad_enabled():
        raise RuntimeError(f"{name} works in place and has no gradient; use {name[:-1]}, or torch.no_grad()")


def _check_places(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raises ValueError where elements that will be written share a place: of a broadcast tensor, or of one given twice."""
    for name, x in (("q", q), ("k", k)):
        if torch._debug_has_internal_overlap(x) == 1:  # what torch's own functions in place ask
            raise ValueError(f"{name}: written in place, so that no dim may have stride 0, got {x.stride()}; use .contiguous()")
    if q.data_ptr() == k.data_ptr() and q.numel() and k.numel():
        raise ValueError("k: written in place like q, so that it needs memory of its own, got that of q")


def _cos_sin(q: torch.Tensor, angles: torch.Tensor, scaling: float, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [..., T, 1, D] and [..., T, 1, D/2] of sign * angles [..., T, D/2], in the dtype that q is turned in."""
    compute = torch.promote_types(q.dtype, torch.float32)
    angles = angles.contiguous()  # those of three axes come with the pairs as their rows
    cos, sin = (f.mul_(scale).unsqueeze(-2) for f, scale in ((angles.cos(), scaling), (angles.sin(), scaling * sign)))
    return torch.cat((cos, cos), -1).to(compute), sin.to(compute)


def _rotate_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """out [..., T, H, D] = x turned by the angles of `_cos_sin`; out may be x."""
    if x.dim() == 4:
        for i in range(x.shape[0]):
            _rotate_into(out[i], x[i], cos[i], sin[i])
        return
    direct = out.dtype == cos.dtype and out.data_ptr() != x.data_ptr()
    for block, whole, turned in checks.row_blocks(x, 2):
        if direct:
            whole, turned = x[block], out[block]
        else:
            whole.copy_(x[block])
        torch.mul(whole, cos[block], out=turned)
        (a, b), (low, high) = whole.chunk(2, -1), turned.chunk(2, -1)
        low.addcmul_(b, sin[block], value=-1)
        high.addcmul_(a, sin[block])
        if not direct:
            out[block].copy_(turned)


def _rotated(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, scaling: float, sign: float) -> tuple[torch.Tensor, ...]:
    factors, outs = _cos_sin(q, angles, scaling, sign), _fake(q, k)
    for out, x in zip(outs, (q, k), strict=True):
        _rotate_into(out, x, *factors)
    return outs


def _rotate(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, scaling: float, sign: float) -> None:
    factors = _cos_sin(q, angles, scaling, sign)
    for x in (q, k):
        _rotate_into(x, x, *factors)


@functools.cache
def _kernels():
    """Imported when they are first needed: triton may be missing. Once, since even a repeated import costs a microsecond."""
    from ..kernels import rope

    return rope


def _launched(q, k, position_ids, inv_freq, sections, scaling, sign):
    if not q.stride(-1) == k.stride(-1) == 1:  # gradients come with any strides
        q, k = q.contiguous(), k.contiguous()
    outs = _fake(q, k)
    _kernels().launch(q, k, *outs, position_ids, _table(q, position_ids, inv_freq, sections), sections, scaling, sign)
    return outs


def _launched_inplace(q, k, position_ids, inv_freq, sections, scaling, sign=1.0):
    _kernels().launch(q, k, q, k, position_ids, _table(q, position_ids, inv_freq, sections), sections, scaling, sign)
    torch._C._increment_version((q, k))  # for autograd, which saved tensors that were written since must not pass


def _table(q, position_ids, inv_freq, sections):
    """What the kernel reads: frequencies, or for float64 cos and sin [2, ..., D/2] of torch, whose last bit counts there."""
    if q.dtype != torch.float64:
        return inv_freq
    three = len(sections) == 3
    angles = mrope_angles(position_ids, inv_freq, sections) if three else vision_rope_angles(position_ids, inv_freq)
    return torch.stack((angles.cos(), angles.sin()))


def _mrope_impl(q, k, position_ids, inv_freq, sections, scaling, sign, backend="torch"):
    if backend == "triton":
        return _launched(q, k, position_ids, inv_freq, sections, scaling, sign)
    angles = mrope_angles(position_ids, inv_freq, sections)
    return _rotated(q, k, angles, scaling, sign)


def _mrope_inplace_impl(q, k, position_ids, inv_freq, sections, scaling, backend="torch"):
    _check_places(q, k)
    if backend == "triton":
        return _launched_inplace(q, k, position_ids, inv_freq, sections, scaling)
    _rotate(q, k, mrope_angles(position_ids, inv_freq, sections), scaling, 1.0)


def rotated(q, k, position_ids, inv_freq, sign, backend="torch"):
    """vision_rope of checked arguments; sign -1 turns back."""
    if backend == "triton":
        return _launched(q, k, position_ids, inv_freq, [inv_freq.shape[0]] * 2, 1.0, sign)
    angles = vision_rope_angles(position_ids, inv_freq)
    return _rotated(q, k, angles, 1.0, sign)


def rotate(q, k, position_ids, inv_freq, sign, backend) -> None:
    """The same in place."""
    if backend == "triton":
        return _launched_inplace(q, k, position_ids, inv_freq, [inv_freq.shape[0]] * 2, 1.0, sign)
    _rotate(q, k, vision_rope_angles(position_ids, inv_freq), 1.0, sign)


def _vision_rope_inplace_impl(q, k, position_ids, inv_freq, backend="torch"):
    _check_places(q, k)
    rotate(q, k, position_ids, inv_freq, 1.0, backend)


def _fake(q, k, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:4])
    ctx.rest = inputs[4:]


def _backward(op):
    """The inverse rotation: the same op with the opposite sign."""

    def backward(ctx, grad_q, grad_k):
        *rest, sign, backend = ctx.rest
        grads = op()(grad_q, grad_k, *ctx.saved_tensors, *rest, -sign, backend)
        return *grads, *(None for _ in range(2 + len(ctx.rest)))

    return backward


_mrope = define(
    "mrope(Tensor q, Tensor k, Tensor position_ids, Tensor inv_freq, int[] sections, float scaling, float sign,"
    " str backend='torch') -> (Tensor, Tensor)",
    _mrope_impl,
    _fake,
    setup_context=_setup,
    backward=_backward(lambda: _mrope),
)
_vision_rope = define(
    "vision_rope(Tensor q, Tensor k, Tensor position_ids, Tensor inv_freq, float sign, str backend='torch')"
    " -> (Tensor, Tensor)",
    rotated,
    _fake,
    setup_context=_setup,
    backward=_backward(lambda: _vision_rope),
)
_mrope_inplace = define(
    "mrope_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, Tensor inv_freq, int[] sections, float scaling,"
    " str backend='torch') -> ()",
    _mrope_inplace_impl,
    lambda *_: None,
)
_vision_rope_inplace = define(
    "vision_rope_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, Tensor inv_freq, str backend='torch') -> ()",
    _vision_rope_inplace_impl,
    lambda *_: None,
)
