"""Random calls of every op, built from segments so that a test can run one alone, in a pack, or beside a poisoned one.

Every builder takes a seed and returns a Sample; `SAMPLES[op](seed)` is the one-line reproduction of a failure.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qwen2vl_fast import reference
from tests.compare import Call, Guarded, bounds_of, guard


@dataclass
class Sample:
    """One call of `op`. Floating tensors are float64; `arguments` casts, packs and lays them out.

    segments: what is packed, name -> tensor, one dict a segment. shared: parameters. options: other keywords.
    axes: the packed dim of inputs ("q") and outputs ("0") where it is not 0. ratio: rows of output 0 per row of the first
    packed tensor. without: outputs without gradient. isolated: an image has the same bits alone and in any pack.
    """

    op: str
    segments: list[dict[str, Tensor]]
    shared: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    ratio: Fraction = Fraction(1)
    without: tuple[int, ...] = ()
    isolated: bool = True
    boundaries: bool = False  # attention: cu_seqlens are made from the lengths
    rms: bool = True  # see `enough_rows`

    def bounds(self, name: str) -> list[int]:
        """Boundaries of the packed tensor `name`, or of the outputs when name is '0'."""
        if name.isdigit():
            first = next(iter(self.segments[0]))
            return bounds_of([int(s[first].shape[0] * self.ratio) for s in self.segments])
        return bounds_of([s[name].shape[self.axes.get(name, 0)] for s in self.segments])

    def part(self, indices: Sequence[int]) -> Sample:
        """The same call with some of the segments only, in that order."""
        return Sample(**{**self.__dict__, "segments": [self.segments[i] for i in indices]})

    def call(self, dtype: torch.dtype, device: str = "cpu", layout: str = "plain") -> tuple[Call, list[Guarded]]:
        """The arguments, and the guard bands around them (layouts: plain, guarded, strided)."""
        guards: list[Guarded] = []

        def place(x: Tensor) -> Tensor:
            x = x.to(device, dtype) if x.is_floating_point() and x.dtype == torch.float64 else x.to(device)
            if layout == "plain":
                return x
            guards.append(guard(x, strided=layout == "strided" and x.dim() > 1))
            return guards[-1].view

        names = list(self.segments[0])
        packed = {n: place(torch.cat([s[n] for s in self.segments], self.axes.get(n, 0))) for n in names}
        shared = {n: place(x) for n, x in self.shared.items()}
        rest = {n: v.to(device) if isinstance(v, Tensor) else dtype if isinstance(v, torch.dtype) else v
                for n, v in self.options.items()}  # fmt: skip
        if self.boundaries:
            q, k = (torch.tensor(self.bounds(n), dtype=torch.int32) for n in ("q", "k"))
            rest["cu_seqlens"] = place(q)
            if not torch.equal(q, k):
                rest["cu_seqlens_k"] = place(k)
        tensors = {n: x for n, x in packed.items() if x.is_floating_point()}
        rest.update({n: x for n, x in packed.items() if not x.is_floating_point()})
        segments = {n: (self.axes.get(n, 0), self.bounds(n)) for n in tensors}
        segments.update({i: (self.axes.get(i, 0), self.bounds(i)) for i in ("0", "1")})
        return Call({**tensors, **shared}, rest, segments), guards

    def poison(self, index: int) -> Sample:
        """The same call with NaN in every floating value of one segment."""
        segments = [dict(s) for s in self.segments]
        segments[index] = {n: x.clone().fill_(float("nan")) if x.is_floating_point() else x for n, x in segments[index].items()}
        return Sample(**{**self.__dict__, "segments": segments})


def _sources(op: str, seed: int) -> tuple[random.Random, Callable[..., Tensor]]:
    """Shapes come from the first, values (normal, float64) from the second."""
    shapes = random.Random(f"{op} {seed}")
    generator = torch.Generator().manual_seed(shapes.getrandbits(32))
    return shapes, functools.partial(torch.randn, generator=generator, dtype=torch.float64)


def _positions(shapes: random.Random, size: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(shapes.getrandbits(32))
    high = shapes.choice((1, 100, 32768, 131072))
    return torch.randint(0, high, size, generator=generator)


def _lengths(shapes: random.Random, low: int = 0, high: int = 24) -> list[int]:
    return [shapes.randint(low, high) for _ in range(shapes.randint(1, 6))]


def _sections(shapes: random.Random, half: int) -> tuple[int, int, int]:
    if half == 64 and shapes.random() < 0.7:
        return 16, 24, 24
    cuts = sorted(shapes.randint(0, half) for _ in range(2))
    return cuts[0], cuts[1] - cuts[0], half - cuts[1]


def mrope(seed: int, op: str = "mrope") -> Sample:
    shapes, randn = _sources(op, seed)
    dim, heads, heads_k = shapes.choice((2, 6, 64, 128, 128)), shapes.randint(1, 5), shapes.randint(1, 3)
    integer = shapes.choice((torch.int32, torch.int64))
    segments = [
        {"q": randn(n, heads, dim), "k": randn(n, heads_k, dim), "position_ids": _positions(shapes, (3, n)).to(integer)}
        for n in _lengths(shapes)
    ]
    options: dict[str, Any] = {"sections": _sections(shapes, dim // 2), "theta": shapes.choice((1e4, 1e6))}
    if shapes.random() < 0.3:
        options |= {"inv_freq": torch.rand(dim // 2), "attention_scaling": 1.2}
    return Sample(op, segments, options=options, axes={"position_ids": 1})


def mrope_batch(seed: int) -> Sample:
    """The [B, S, H, D] form; a sequence of the batch is a segment."""
    shapes, randn = _sources("mrope_batch", seed)
    length, heads, dim = shapes.randint(0, 12), shapes.randint(1, 4), shapes.choice((8, 128))
    segments = [
        {"q": randn(1, length, heads, dim), "k": randn(1, length, 1, dim), "position_ids": _positions(shapes, (3, 1, length))}
        for _ in range(shapes.randint(1, 4))
    ]
    return Sample("mrope", segments, options={"sections": _sections(shapes, dim // 2)}, axes={"position_ids": 1})


def vision_rope(seed: int, op: str = "vision_rope") -> Sample:
    shapes, randn = _sources(op, seed)
    dim, heads, heads_k = shapes.choice((4, 12, 80, 80)), shapes.randint(1, 4), shapes.randint(1, 4)
    segments = [
        {"q": randn(n, heads, dim), "k": randn(n, heads_k, dim), "position_ids": _positions(shapes, (2, n))}
        for n in _lengths(shapes)
    ]
    options = {"inv_freq": torch.rand(dim // 4)} if shapes.random() < 0.3 else {}
    return Sample(op, segments, options=options, axes={"position_ids": 1})


def _norm(op: str, seed: int) -> Sample:
    shapes, randn = _sources(op, seed)
    width = shapes.choice((16, 19, 80, 160, 1280))
    middle = shapes.choice(((), (), (3,), (2, 2)))
    spread = shapes.choice((0.1, 1, 30))
    offset, residual = spread * shapes.choice((0, 0, 5)), shapes.random() < 0.5
    names = ("x", "residual") if residual else ("x",)
    segments = [{n: randn(length, *middle, width) * spread + offset for n in names} for length in _lengths(shapes)]
    shared = {"weight": randn(width)} | ({"bias": randn(width)} if op == "layer_norm" else {})
    rows = sum(s["x"].shape[0] for s in segments) * math.prod(middle)
    # A row's scale and mean are rounded once: few rows make no mean; far from zero that rounding is nearly all of the error.
    return Sample(op, segments, shared, {"eps": shapes.choice((1e-6, 1e-5))}, rms=offset == 0 and rows >= 32)


def _activation(op: str, seed: int) -> Sample:
    shapes, randn = _sources(op, seed)
    width = shapes.choice((16, 19, 80, 640))
    middle = shapes.choice(((), (), (3,), (2, 2)))
    wide = 2 * width if op == "swiglu" else width
    segments = [{"gate_up" if op == "swiglu" else "x": randn(n, *middle, wide) * 3} for n in _lengths(shapes)]
    return Sample(op, segments, {"bias": randn(width)} if op != "swiglu" and shapes.random() < 0.6 else {})


def merge_patches(seed: int) -> Sample:
    shapes, randn = _sources("merge_patches", seed)
    width, raster = shapes.choice((16, 20, 80, 160)), shapes.random() < 0.5
    segments = []
    for _ in range(shapes.randint(1, 5)):
        grid = [shapes.randint(1, 3), 2 * shapes.randint(1, 3), 2 * shapes.randint(1, 4)]
        x = randn(grid[0] * grid[1] * grid[2], width)
        segments.append({"x": x, "grid_thw": torch.tensor([grid])} if raster else {"x": x})
    shared = {"weight": randn(width), "bias": randn(width)}
    return Sample("merge_patches", segments, shared, {"eps": 1e-6}, ratio=Fraction(1, 4))


def enough_rows(tensors: dict[str, Tensor]) -> bool:
    """Whether attention's root mean squares mean something: the elements of a row share the roundings of its softmax, and 33
    rows were once 1.26 times as bad as PyTorch's where every larger case of 588 was at most as bad.
    """
    return min(x[..., 0].numel() for x in tensors.values()) >= 64


def varlen_attention(seed: int) -> Sample:
    shapes, randn = _sources("varlen_attention", seed)
    dim, heads_k, group = shapes.choice((4, 16, 64, 80, 80, 128)), shapes.randint(1, 2), shapes.choice((1, 1, 2, 3))
    causal, other_keys = shapes.random() < 0.5, shapes.random() < 0.4
    lengths = _lengths(shapes, high=shapes.choice((3, 24, 70)))
    if shapes.random() < 0.3:
        lengths = lengths[:1] * len(lengths)
    segments = []
    for n in lengths:
        keys = shapes.randint(0, 40) if other_keys else n
        segments.append({"q": randn(n, group * heads_k, dim), "k": randn(keys, heads_k, dim), "v": randn(keys, heads_k, dim)})
    options: dict[str, Any] = {"causal": causal, "return_lse": True}
    if shapes.random() < 0.3:
        options["scale"] = 0.3
    rms = enough_rows({n: torch.cat([s[n] for s in segments]) for n in segments[0]})
    return Sample("varlen_attention", segments, options=options, axes={"1": 1}, without=(1,), boundaries=True, rms=rms)


def patchify(seed: int) -> Sample:
    shapes, _ = _sources("patchify", seed)
    generator = torch.Generator().manual_seed(seed)
    height, width = 28 * shapes.randint(1, 3), 28 * shapes.randint(1, 3)
    segments = [
        {"frames": torch.randint(0, 256, (2 * shapes.randint(1, 2), height, width, 3), generator=generator, dtype=torch.uint8)}
        for _ in range(shapes.randint(1, 3))
    ]
    return Sample("patchify", segments, options={"dtype": torch.float32}, ratio=Fraction(height * width, 2 * 14 * 14))


def linear_cross_entropy(seed: int) -> Sample:
    shapes, randn = _sources("linear_cross_entropy", seed)
    width, vocabulary = shapes.choice((1, 8, 64)), shapes.choice((1, 7, 272))
    rows = shapes.randint(64, 96) if vocabulary == 272 else shapes.randint(1, 40)  # the errors of a few rows make no mean
    ignore = shapes.choice((-100, -100, 0))
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < shapes.choice((0, 0.5))] = ignore
    labels[0] = vocabulary - 1  # one row counts at least, unless the last word is the one to ignore
    ignore = -100 if vocabulary == 1 else ignore
    labels[labels < 0] = ignore
    segments = [{"hidden": randn(rows, width), "labels": labels}]
    shared = {"weight": randn(vocabulary, width)}
    return Sample("linear_cross_entropy", segments, shared, {"ignore_index": ignore}, isolated=False)


SAMPLES: dict[str, Callable[[int], Sample]] = {
    "mrope": mrope,
    "mrope_batch": mrope_batch,
    "vision_rope": vision_rope,
    "merge_patches": merge_patches,
    "varlen_attention": varlen_attention,
    "patchify": patchify,
    "linear_cross_entropy": linear_cross_entropy,
    **{op: functools.partial(_norm, op) for op in ("rms_norm", "layer_norm")},
    **{op: functools.partial(_activation, op) for op in ("quick_gelu", "gelu", "swiglu")},
}


def eager_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, scale=None, causal=False, return_lse=False):
    """Attention as eager PyTorch code has it: matrix products in the tensors' dtype, softmax in float32."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    bounds, bounds_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    outputs, lses = [q[:0]], [q.new_zeros((q.shape[1], 0), dtype=torch.float32)]
    for (start, end), (start_k, end_k) in zip(pairwise(bounds), pairwise(bounds_k), strict=True):
        queries = q[start:end].transpose(0, 1)
        keys, values = (x[start_k:end_k].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = (queries @ keys.transpose(1, 2) * scale).to(torch.promote_types(q.dtype, torch.float32))
        if causal:
            hidden = torch.ones(scores.shape[1:], device=q.device).triu(1 + end_k - start_k - (end - start)).bool()
            scores = scores.masked_fill(hidden, -math.inf)
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        outputs.append((weights.to(q.dtype) @ values).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    output = torch.cat(outputs)
    return (output, torch.cat(lses, 1).float()) if return_lse else output


def sdpa_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, scale=None, causal=False, return_lse=False):
    """torch's scaled_dot_product_attention, a segment at a time (the log-sum-exp is eager's)."""
    arguments = {"cu_seqlens_k": cu_seqlens_k, "scale": scale, "causal": causal}
    _, lse = eager_attention(q.detach(), k.detach(), v.detach(), cu_seqlens, **arguments, return_lse=True)
    bounds, bounds_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    outputs = []
    for (start, end), (start_k, end_k) in zip(pairwise(bounds), pairwise(bounds_k), strict=True):
        blind = end - start if start_k == end_k else max(end - start - (end_k - start_k), 0) if causal else 0
        outputs.append(q[start : start + blind] * 0)
        rows = end - start - blind
        if rows == 0:
            continue
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[start + blind : end], k[start_k:end_k], v[start_k:end_k]))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        visible = torch.ones(rows, end_k - start_k, dtype=torch.bool, device=q.device).tril(end_k - start_k - rows)
        mask = visible if causal else None
        o = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        outputs.append(o[0].transpose(0, 1))
    output = torch.cat([q[:0], *outputs]) + 0 * (k.sum() + v.sum())  # so that k and v of blind rows have a gradient
    return (output, lse) if return_lse else output


def library_norm(x, weight, bias=None, *, eps, residual=None):
    """torch's layer_norm, or without a bias its rms_norm, in the tensors' dtype."""
    total = x if residual is None else x + residual
    norm = torch.nn.functional.rms_norm if bias is None else functools.partial(torch.nn.functional.layer_norm, bias=bias)
    y = norm(total, weight.shape, weight=weight, eps=eps)
    return y if residual is None else (y, total)


# Same-dtype PyTorch, where the definition is not it: in fp16 and bf16 it widens before the products, as no library does, and
# its gradients reuse the softmax, which every attention that saves memory computes again. Norms have two peers: the errors of
# a row hang together by its mean and deviation, and with few rows one peer can be lucky as a whole.
PEERS = {
    "varlen_attention": (eager_attention, sdpa_attention),
    "rms_norm": (reference.rms_norm, library_norm),
    "layer_norm": (reference.layer_norm, library_norm),
}


def _rotation_truth(angles: Callable[..., Tensor], axis_dim: Callable[[int], int]) -> Callable[..., tuple[Tensor, Tensor]]:
    def truth(q, k, position_ids, *, theta=None, inv_freq=None, attention_scaling=1.0, **rest):
        if inv_freq is None:
            dim = axis_dim(q.shape[-1])
            inv_freq = reference.inverse_frequencies(dim, theta or (1e6 if "sections" in rest else 1e4))
        turned = angles(position_ids, inv_freq, **rest).to(torch.promote_types(q.dtype, torch.float32))
        return reference.rotate(q, turned, attention_scaling), reference.rotate(k, turned, attention_scaling)

    return truth


# What judges float32 and less, where the definition alone would be unfair: for float64 tensors too it takes cos and sin in
# float32 (MODEL.md), so that their rounding is in ref and in peer alike and counts against everyone else. These take float64.
_mrope_truth = _rotation_truth(reference.mrope_angles, lambda dim: dim)
TRUTHS = {
    "mrope": _mrope_truth,
    "mrope_batch": _mrope_truth,
    "vision_rope": _rotation_truth(reference.vision_rope_angles, lambda dim: dim // 2),
}
