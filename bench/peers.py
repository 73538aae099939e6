"""The others' variable-length attention, called at its best on our problem: a pack of segments, q, k, v views of one qkv.

FlashAttention-2   in torch: varlen_attn, SDPA; or the package flash-attn
FlashAttention-3   pip install fa3-fwd==0.0.3          (forward alone, bf16, Hopper)
FlashAttention-4   pip install --pre flash-attn-4      (CuTe DSL: compiles at the first call)
cuDNN              in torch, through SDPA
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import failed
from qwen2vl_fast.ops import varlen_attention
from qwen2vl_fast.ops.backends import unusable
from qwen2vl_fast.positions import attention_schedule

HEADS, HEAD_DIM = 16, 80
MAX_PLANS = 32  # cuDNN plans and compiles for every new length


class Missing(Exception):
    """Why a contender can't take part; becomes its row."""


@dataclass(frozen=True)
class Problem:
    """A pack: qkv [T, 3, H, D] and the lengths of its segments."""

    qkv: Tensor
    lengths: tuple[int, ...]
    grad: bool = False

    @cached_property
    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [T, H, D], strided; leaves of their own if gradients are wanted."""
        return tuple(x.detach().requires_grad_(self.grad) for x in self.qkv.unbind(1))

    @cached_property
    def schedule(self) -> Any:
        bounds = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int()
        return attention_schedule(bounds, heads=self.qkv.shape[2], device=self.qkv.device)

    @property
    def varlen(self) -> tuple[Any, ...]:
        """The arguments that flash attention's varlen functions share."""
        bounds, longest = self.schedule.cu_seqlens, self.schedule.max_seqlen
        return (*self.views, bounds, bounds, longest, longest)

    @property
    def useful_flop(self) -> int:
        """Two products of L x L x D for every segment and head."""
        return 4 * self.qkv.shape[2] * self.qkv.shape[3] * sum(n * n for n in self.lengths)

    @classmethod
    def random(cls, lengths: tuple[int, ...], *, device: str, dtype: torch.dtype, seed: int = 0, grad: bool = False) -> Problem:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (sum(lengths), 3, HEADS, HEAD_DIM)
        return cls(torch.randn(shape, generator=generator, device=device, dtype=dtype), lengths, grad)


Attend = Callable[[], Tensor]  # -> o [T, H, D]


def ours(problem: Problem, deterministic: bool = False) -> Attend:
    backend = "cuda" if problem.qkv.is_cuda else None
    if backend and (reason := unusable("varlen_attention", backend)):
        raise Missing(reason)
    q, k, v = problem.views
    schedule = problem.schedule
    options = {"max_seqlen": schedule.max_seqlen, "schedule": schedule, "backend": backend, "deterministic": deterministic}
    return lambda: varlen_attention(q, k, v, schedule.cu_seqlens, **options)


def torch_varlen(problem: Problem) -> Attend:
    varlen_attn = _function("torch.nn.attention.varlen", "varlen_attn", "torch 2.10 or newer", problem)
    return lambda: varlen_attn(*problem.varlen)


def sdpa(backend: SDPBackend) -> Callable[[Problem], Attend]:
    """SDPA with one call for each run of equal segments: at most as many launches as transformers' loop over images."""

    def build(problem: Problem) -> Attend:
        if backend != SDPBackend.MATH and not problem.qkv.is_cuda:
            backends_here = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        else:
            backends_here = [backend]
        if backend == SDPBackend.CUDNN_ATTENTION:
            if not problem.qkv.is_cuda:
                raise Missing("needs a CUDA device")
            if len(set(problem.lengths)) > MAX_PLANS:
                raise Missing(f"left out: cuDNN compiles for each of {len(set(problem.lengths))} lengths")
        views, cuts, start = problem.views, [], 0
        for length, equal in groupby(problem.lengths):
            count = len(list(equal))
            cuts.append((start, count, length))
            start += count * length

        def attend() -> Tensor:
            parts = []
            with sdpa_kernel(backends_here):
                for start, count, length in cuts:
                    q, k, v = (x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2) for x in views)
                    parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return attend

    return build


def flash_2(problem: Problem) -> Attend:
    function = _function("flash_attn.flash_attn_interface", "flash_attn_varlen_func", "flash-attn", problem)
    return lambda: function(*problem.varlen)


def flash_3(problem: Problem) -> Attend:
    function = _function("fa3_fwd_interface", "flash_attn_varlen_func", "fa3-fwd==0.0.3", problem)
    if problem.grad:
        raise Missing("fa3-fwd has no backward")
    return lambda: _first(function(*problem.varlen))


def flash_4(problem: Problem) -> Attend:
    function = _function("flash_attn.cute", "flash_attn_varlen_func", "--pre flash-attn-4", problem)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    if missing := set(names) - set(inspect.signature(function).parameters):
        raise Missing(f"this flash-attn-4 does not know {sorted(missing)}")
    return lambda: _first(function(**dict(zip(names, problem.varlen, strict=True))))


def _function(module: str, name: str, package: str, problem: Problem) -> Callable[..., Any]:
    return load(module, name, package, cuda=problem.qkv.is_cuda)


def load(module: str, name: str, package: str, *, cuda: bool) -> Callable[..., Any]:
    """A peer's function; Missing when it can't be had, with what to install. A package's folder alone is no package."""
    if not cuda:
        raise Missing("needs a CUDA device")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        top = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")
        reason = "not installed" if top else f"does not load: {' '.join(str(error).split())[:160]}"
        raise Missing(f"{reason}; pip install {package}") from error


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


OURS = "qwen2vl_fast"
REPEATABLE = f"{OURS}, deterministic"  # another contender in the backward pass
PEERS: dict[str, Callable[[Problem], Attend]] = {
    "torch varlen_attn": torch_varlen,
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash-attn 2": flash_2,
    "FlashAttention-3": flash_3,
    "FlashAttention-4": flash_4,
}


def error(problem: Problem, out: Tensor, rows: int = 256) -> float:
    """||out - reference|| / ||reference|| over randomly chosen rows, in float64 on the device."""
    q, k, v = (x.detach() for x in problem.views)
    if tuple(out.shape) != tuple(q.shape):
        return float("inf")
    ends = torch.tensor(problem.lengths).cumsum(0)
    chosen = torch.randperm(len(q), generator=torch.Generator().manual_seed(1))[:rows]
    wrong = total = 0.0
    for segment in torch.searchsorted(ends, chosen, right=True).unique().tolist():
        end = int(ends[segment])
        start = end - problem.lengths[segment]
        mine = chosen[(chosen >= start) & (chosen < end)].to(q.device)
        scores = torch.einsum("rhd,khd->hrk", q[mine].double(), k[start:end].double()) * q.shape[-1] ** -0.5
        expected = torch.einsum("hrk,khd->rhd", scores.softmax(-1), v[start:end].double())
        wrong += float((out[mine].detach().double() - expected).square().sum())
        total += float(expected.square().sum())
    return (wrong / total) ** 0.5


def gradient_error(problem: Problem, attend: Attend) -> float:
    """The largest of ||dx - reference|| / ||reference|| over q, k and v, in float64 on the device."""
    out = attend()
    grad = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(3), device=out.device, dtype=out.dtype)
    found = torch.autograd.grad(out, problem.views, grad)
    leaves = [x.detach().double().requires_grad_() for x in problem.views]
    parts = []
    for q, k, v in zip(*(x.split(problem.lengths) for x in leaves), strict=True):
        weights = (torch.einsum("rhd,khd->hrk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        parts.append(torch.einsum("hrk,khd->rhd", weights, v))
    expected = torch.autograd.grad(torch.cat(parts), leaves, grad.double())
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))


def prepare(name: str, problem: Problem, bound: float, gradient_bound: float | None = None) -> tuple[Attend, float]:
    """The contender's call and its error on this problem; Missing if it can't run or computes something else.

    gradient_bound: its gradients are held to this as well, on all rows, so the problem should be a small one.
    """
    if name in (OURS, REPEATABLE):
        attend = ours(problem, name == REPEATABLE)
    else:
        attend = PEERS[name](problem)
    try:
        found = error(problem, attend())
        gradient = 0.0 if gradient_bound is None else gradient_error(problem, attend)
    except Exception as failure:
        raise Missing(failed(failure)) from failure
    if not found < bound:
        raise Missing(f"computes something else: relative error {found:.1e}")
    if gradient_bound is not None and not gradient < gradient_bound:
        raise Missing(f"its gradients are something else: relative error {gradient:.1e}")
    return attend, max(found, gradient)
