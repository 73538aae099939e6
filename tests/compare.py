"""The one tolerance rule, and what goes beyond closeness: bits, guard bands, poisoned memory.

An output is right when, in every segment of the pack,

    max|out - ref| <= k max|peer - ref| + floor,    floor = 2 max|((ref + 0.3) - 0.3) - ref| in the output's dtype,

where ref is the definition (qwen2vl_fast/reference.py) in float64 and peer is PyTorch in the dtype under test: the
definition in that dtype, or where `judge` is given others, the worst of them. k is 2 for outputs and 3 for gradients.
Over the whole tensor the root mean square of out - ref is at most 1.25 times peer's.

Where the formula says too little:
- The floor is that of the whole tensor, and at least one unit in the last place of 0.3 (for a ref of zeros it would be 0).
- A segment of few elements can have a lucky peer. So the peer's error there counts as at least its error in the whole
  tensor, scaled by max|ref| of the segment over max|ref| of the tensor (for gradients not scaled: they can cancel to
  nothing, as behind a softmax of one key, and the error that cancelled stays); in a tensor of fewer than 64 elements as at
  least one unit in the last place of max|ref|. Below 2048 elements the root mean square is left out.
- Nothing judges float64 but float64. There the peer's error is estimated by that of the float32 peer (at float32 inputs)
  scaled by the ratio of the two epsilons, k is two more for the reference's own error and the estimate's, and the root mean
  square is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0
RMS = 1.25
RMS_COUNT, FEW = 2048, 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
LSE = 1e-4
# Relative errors against transformers in float64, as it is released and with its float32 casts lifted (QUALITY.md).
PARITY = {"released": 1e-6, "lifted": 1e-10}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bounds_of(lengths: Sequence[int]) -> list[int]:
    """[0, l0, l0 + l1, ...]"""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


def check(
    out: Tensor,
    ref: Tensor,
    peer_errors: Sequence[Tensor],
    *,
    k: float = FORWARD,
    bounds: Sequence[int] | None = None,
    axis: int = 0,
    rms: bool = True,
    name: str = "output",
) -> None:
    """Raises AssertionError unless out obeys the rule.

    Args:
        ref: float64. peer_errors: |peer - ref| of each peer, as `error` gives it.
        bounds: boundaries of the segments along axis; None = one segment.
    """
    assert out.shape == ref.shape, f"{name}: shape {list(out.shape)}, expected {list(ref.shape)}"
    if ref.numel() == 0:
        return
    finite = ref.isfinite()
    wild = out.double()[~finite]
    assert torch.equal(wild.nan_to_num(0.5), ref[~finite].nan_to_num(0.5)), f"{name}: {wild} where {ref[~finite]} is right"
    assert out[finite].isfinite().all(), f"{name}: not finite where the reference is"
    size = ref.abs().masked_fill(~finite, 0)
    errors, top = error(out, ref), size.max().item()
    rounded = ref.to(out.dtype)
    floor = 2 * max(error((rounded + 0.3) - 0.3, ref).max().item(), torch.finfo(out.dtype).eps / 8)
    worst_peer = max(e.max().item() for e in peer_errors)
    assert math.isfinite(worst_peer), f"{name}: the peer overflows; the inputs are unfit for the rule"
    if ref.numel() < FEW:
        worst_peer = max(worst_peer, torch.finfo(out.dtype).eps * top)
    gradient, k = k == GRADIENT, k + 2 * (out.dtype == torch.float64)
    for start, end in pairwise(bounds or (0, ref.shape[axis] if ref.dim() else 1)):
        if start == end:
            continue
        part, part_size, *peers = (x.narrow(axis, start, end - start) if x.dim() else x for x in (errors, size, *peer_errors))
        share = worst_peer * (1 if gradient else part_size.max().item() / (top or 1))
        peer = max(*(e.max().item() for e in peers), share)
        worst, allowed = part.max().item(), k * peer + floor
        where = [int(i) for i in torch.unravel_index(part.argmax(), part.shape)]
        assert worst <= allowed, (
            f"{name}[{start}:{end}]: error {worst:.3g} at {where}, allowed {allowed:.3g} = {k} x {peer:.3g} + {floor:.3g}"
        )
    if rms and out.dtype != torch.float64 and out.numel() >= RMS_COUNT:
        mean, *allowed = (x.square().mean().sqrt().item() for x in (errors, *peer_errors))
        # Where the answer is 0 but for rounding (the gradients of a row that sees one key), errors are noise on both sides.
        if size.square().mean().sqrt() > max(*allowed, torch.finfo(torch.float32).eps):
            assert mean <= RMS * max(allowed), f"{name}: rms error {mean:.4g}, allowed {RMS} x {max(allowed):.4g}"


def check_lse(out: Tensor, ref: Tensor, name: str = "lse") -> None:
    """The log-sum-exp of an attention kernel, float32: within LSE and four units in the last place of float64."""
    assert torch.equal(out == -torch.inf, ref == -torch.inf), f"{name}: -inf in other rows than in the definition"
    beyond = (error(out, ref) - 4 * unit(ref, torch.float32)).masked_fill(~ref.isfinite(), 0)
    worst = beyond.max().item() if out.numel() else 0.0
    assert worst <= LSE, f"{name}: log-sum-exp {worst:.3g} from the definition, allowed {LSE}"


def check_definition(value: Tensor, truth: Tensor, name: str = "definition") -> None:
    """A float64 value, rounded to float32, is the truth (float64, from tests/oracle.py) by the floor alone."""
    assert value.dtype == truth.dtype == torch.float64, f"{name}: {value.dtype}, {truth.dtype}"
    check(value.float(), truth, [torch.zeros_like(truth)], rms=False, name=name)


def check_parity(out: Tensor, peer: Tensor, casts: str, name: str = "output") -> None:
    """QUALITY.md, "Peers as judges": the largest difference over the largest value, in float64."""
    assert out.dtype == peer.dtype == torch.float64 and out.shape == peer.shape, f"{name}: {out.dtype} {list(out.shape)}"
    assert peer.isfinite().all() and peer.any(), f"{name}: the peer's values are unfit to compare with"
    error = ((out - peer).abs().max() / peer.abs().max()).item()
    assert error <= PARITY[casts], f"{name}: relative error {error:.3g}, allowed {PARITY[casts]} ({casts})"


def error(x: Tensor, ref: Tensor) -> Tensor:
    """|x - ref| in float64, 0 where ref is not finite."""
    return (x.double() - ref).abs().masked_fill(~ref.isfinite(), 0)


@dataclass
class Call:
    """The arguments of an op: tensors are floating, take gradients and are cast; the rest is passed as it is.

    segments: name -> (axis, boundaries) for outputs ("0", "1", ...) and tensors (their gradients) that are packed.
    """

    tensors: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)
    segments: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Call:
        rest = {n: dtype if isinstance(v, torch.dtype) else v for n, v in self.rest.items()}
        return Call({n: x.to(dtype) for n, x in self.tensors.items()}, rest, self.segments)


def evaluate(function: Callable, call: Call, upstream: Sequence[Tensor | None] | None = None):
    """(outputs, {tensor name: gradient}) of one call; with upstream None forward alone, without autograd."""
    if upstream is None:
        with torch.no_grad():
            result = function(**call.tensors, **call.rest)
        return result if isinstance(result, tuple) else (result,), {}
    leaves = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    result = function(**leaves, **call.rest)
    outputs = result if isinstance(result, tuple) else (result,)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if g is not None and o.requires_grad]
    if pairs:  # a tensor that is not reached has the gradient 0, and so have all where nothing is computed
        wanted = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], **wanted)
    else:
        grads = [torch.zeros_like(x) for x in leaves.values()]
    return tuple(o.detach() for o in outputs), dict(zip(leaves, grads, strict=True))


def upstream_of(outputs: Sequence[Tensor], seed: int, without: Sequence[int] = ()) -> list[Tensor | None]:
    """Random gradients for outputs, in their dtype; None for those that have none (the log-sum-exp)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]
    return [None if i in without else g for i, g in enumerate(drawn)]


def judge(
    function: Callable,
    definition: Callable,
    call: Call,
    *,
    peers: Sequence[Callable] = (),
    gradients: bool = True,
    rms: bool = True,
    without: Sequence[int] = (),
    seed: int = 0,
    name: str = "",
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Holds the outputs of function(call), and its gradients, to the rule; returns both.

    peers: same-dtype PyTorch; none = the definition. without: indices of outputs without gradient.
    """
    outputs, _ = evaluate(function, call)
    grads: dict[str, Tensor] = {}
    upstream = upstream_of(outputs, seed, without) if gradients and call.tensors else None
    if upstream is not None:
        plain, (outputs, grads) = outputs, evaluate(function, call, upstream)
        assert all(map(same_bits, plain, outputs)), f"{name}: another result when a gradient is asked for"
    dtype = next(iter(call.tensors.values()), outputs[0]).dtype
    refs = _by_name(*evaluate(definition, call.to(torch.float64), upstream))
    peer_call, peer_refs, scale = call, refs, 1.0
    if dtype == torch.float64:
        peer_call, scale = call.to(torch.float32), torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        peer_refs = _by_name(*evaluate(definition, peer_call.to(torch.float64), upstream))
        peers = (*peers, definition)  # in float64 the reference has an error of its own
    found = [_by_name(*evaluate(peer, peer_call, upstream)) for peer in peers or (definition,)]
    for key, out in _by_name(outputs, grads).items():
        # Not simply the dtype under test: the log-sum-exp is float32 even then.
        expected = (refs if dtype == torch.float64 else found[0])[key].dtype
        assert out.dtype == expected, f"{name} {key}: {out.dtype}, expected {expected}"
        factor = scale if out.dtype == torch.float64 else 1.0
        peer_errors = [error(peer[key], peer_refs[key].double()) * factor for peer in found]
        axis, bounds = call.segments.get(key, (0, None))
        k = GRADIENT if key in grads else FORWARD
        what = f"{name} gradient of {key}" if key in grads else f"{name} output {key}"
        check(out, refs[key].double(), peer_errors, k=k, bounds=bounds, axis=axis, rms=rms, name=what)
    return outputs, grads


def _by_name(outputs: Sequence[Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {str(i): x for i, x in enumerate(outputs)} | grads


def unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of dtype at |x|, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1).clamp(min=info.tiny * info.eps)


def check_units(out: Tensor, ref: Tensor, size: Tensor, name: str = "output") -> None:
    """out is within one unit in the last place of size of the correctly rounded ref (float64)."""
    assert out.dtype in HALVES, "the rule of units is for fp16 and bf16"
    apart = (out.double() - ref.to(out.dtype).double()).abs() / unit(size, out.dtype)
    assert apart.numel() == 0 or apart.max() <= 1, f"{name}: {apart.max().item():.3g} units from the correctly rounded result"


def check_pair_units(out: Tensor, ref: Tensor, name: str = "output") -> None:
    """The rule of rotations: pairs (j, j + D/2) of the last dim, in units of hypot(a, b)."""
    a, b = ref.chunk(2, -1)
    size = torch.hypot(a, b)
    check_units(out, ref, torch.cat((size, size), -1), name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and every bit: NaN equals itself, 0 and -0 differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = _INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and its kin come filled with NaN (integers: the largest), and nothing nondeterministic runs."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


@dataclass
class Guarded:
    """A tensor inside a larger buffer of NaN (integers: a huge number), contiguous or with gaps in every dim but the last."""

    buffer: Tensor
    view: Tensor
    before: Tensor

    def check(self, name: str) -> None:
        """Neither the tensor nor anything around it was written."""
        assert same_bits(self.buffer, self.before), f"{name}: an input or its surroundings were written"


def guard(x: Tensor, strided: bool) -> Guarded:
    """x between guard bands of 8 elements; strided: with gaps after each row and head, so that no stride is the usual one."""
    value = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2
    if strided:
        buffer = x.new_full([n + 2 for n in x.shape[:-1]] + [x.shape[-1] + 16], value)
        view = buffer
        for dim, n in enumerate(x.shape):
            view = view.narrow(dim, 8 if dim == x.dim() - 1 else 1, n)
    else:
        buffer = x.new_full((x.numel() + 16,), value)
        view = buffer[8 : 8 + x.numel()].view(x.shape)
    view.copy_(x)
    return Guarded(buffer, view, buffer.clone())
