"""Packs for the attention kernels on the host: lengths at every edge, and the checks that hold of each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen2vl_fast import reference
from tests.compare import Call, bounds_of, check_lse, guard, judge, same_bits
from tests.host.runner import Kernel
from tests.samples import PEERS, enough_rows

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A pack. keys: of each segment, None = as many as queries. layout: contiguous or views of one fused tensor, or strided."""

    lengths: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    heads: int = 2
    heads_k: int = 1
    dim: int = 80
    dtype: torch.dtype = BF16
    causal: bool = False
    scale: float | None = None
    layout: str = "fused"
    seed: int = 0

    @property
    def key_lengths(self) -> tuple[int, ...]:
        return self.lengths if self.keys is None else self.keys

    def values(self) -> dict[str, Tensor]:
        """q, k, v of each segment on its own, so that a segment has the same values in every pack."""
        generator = torch.Generator().manual_seed(self.seed)
        spread = random.Random(self.seed).choice((0.3, 1.0, 3.0))
        parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for queries, keys in zip(self.lengths, self.key_lengths, strict=True):
            for name, rows, heads in (("q", queries, self.heads), ("k", keys, self.heads_k), ("v", keys, self.heads_k)):
                part = torch.randn(rows, heads, self.dim, generator=generator)
                parts[name].append(part * (spread if name == "q" else 1.0))
        return {name: torch.cat([torch.zeros(0, *x[0].shape[1:]), *x]).to(self.dtype) for name, x in parts.items()}

    def call(self, values: dict[str, Tensor] | None = None) -> Call:
        tensors = placed(values or self.values(), self.layout)
        bounds = torch.tensor(bounds_of(self.lengths), dtype=torch.int32)
        rest = {"cu_seqlens": bounds, "causal": self.causal, "scale": self.scale, "return_lse": True}
        if self.keys is not None:
            rest["cu_seqlens_k"] = torch.tensor(bounds_of(self.keys), dtype=torch.int32)
        segments = {"0": (0, bounds.tolist()), "1": (1, bounds.tolist())}
        return Call(tensors, rest, segments)


def placed(values: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors as views of one fused [T, heads, D] where that can be, or between gaps of NaN, or contiguous."""
    if layout == "fused" and values["q"].shape[0] == values["k"].shape[0]:
        counts = [x.shape[1] for x in values.values()]
        return dict(zip(values, torch.cat(list(values.values()), 1).split(counts, 1), strict=True))
    if layout == "contiguous":
        return values
    return {name: _aligned_guard(x) for name, x in values.items()}


def _aligned_guard(x: Tensor) -> Tensor:
    view = guard(x, strided=True).view
    assert view.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in view.stride()[:-1])
    return view


def check_rule(kernel: Kernel, case: Case) -> tuple[Tensor, Tensor]:
    """QUALITY.md's rule for o, the log-sum-exp within its own bound; rows without keys give 0 and -inf."""
    call = case.call()
    name = f"{case} {kernel.name} seed {kernel.seed}"
    (o, lse), _ = judge(kernel, reference.varlen_attention, call, peers=PEERS["varlen_attention"], gradients=False,
                        rms=enough_rows(call.tensors), name=name)  # fmt: skip
    wide = {n: x.double() for n, x in call.tensors.items()}
    _, truth = reference.varlen_attention(**wide, **call.rest)
    check_lse(lse, truth, name)
    assert not o.transpose(0, 1)[truth == -torch.inf].any(), f"{name}: rows without keys are not 0"
    return o, lse


def check_isolation(kernel: Kernel, case: Case, poisoned: int) -> None:
    """NaN in one segment: the others' bits stay, and the segment's rows that see any key are NaN."""
    clean = kernel(**case.call().tensors, **case.call().rest)
    values = case.values()
    bounds, bounds_k = bounds_of(case.lengths), bounds_of(case.key_lengths)
    for name, edges in (("q", bounds), ("k", bounds_k), ("v", bounds_k)):
        values[name][edges[poisoned] : edges[poisoned + 1]] = torch.nan
    call = case.call(values)
    o, lse = kernel(**call.tensors, **call.rest)
    own = torch.zeros(o.shape[0], dtype=torch.bool)
    own[bounds[poisoned] : bounds[poisoned + 1]] = True
    assert same_bits(o[~own], clean[0][~own]), f"{case}: NaN in segment {poisoned} changes others' o"
    assert same_bits(lse[:, ~own], clean[1][:, ~own]), f"{case}: NaN in segment {poisoned} changes others' lse"
    sees = (clean[1] != -torch.inf).T & own[:, None]
    assert o[sees].isnan().all(), f"{case}: NaN in segment {poisoned} is lost"


def check_alone(kernel: Kernel, case: Case) -> None:
    """Every segment has the same bits alone as in the pack."""
    call = case.call()
    o, lse = kernel(**call.tensors, **call.rest)
    bounds, bounds_k = bounds_of(case.lengths), bounds_of(case.key_lengths)
    for i in range(len(case.lengths)):
        one = replace(case, lengths=(case.lengths[i],), keys=(case.key_lengths[i],), layout="contiguous")
        rows, rows_k = slice(bounds[i], bounds[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        part = one.call({n: x[rows if n == "q" else rows_k].contiguous() for n, x in call.tensors.items()})
        alone, alone_lse = kernel(**part.tensors, **part.rest)
        assert same_bits(alone, o[rows]) and same_bits(alone_lse, lse[:, rows].contiguous()), f"{case}: segment {i} alone"


def check_schedules(kernel: Kernel, case: Case, seeds: Sequence[int]) -> None:
    """The same bits in order and in every shuffled schedule."""
    call = case.call()
    expected = kernel(**call.tensors, **call.rest)
    for seed in seeds:
        found = replace(kernel, seed=seed)(**call.tensors, **call.rest)
        assert all(map(same_bits, found, expected)), f"{case}: other bits with schedule {seed}"


def drawn(seed: int, edges: Sequence[int], dims: Sequence[int], longest: int = 300, total: int = 700) -> Case:
    """A random pack: lengths 0 to `longest`, many at `edges` (rows and keys of the kernel's tiles) and beside them."""
    source = random.Random(seed)

    def length() -> int:
        near = source.choice(edges) * source.randint(1, 2) + source.randint(-1, 1)
        chosen = source.choice((0, 1, 2, near, near, near, source.randint(1, longest), source.randint(1, 40)))
        return min(longest, max(0, chosen))

    kind = source.choice(("mixed", "mixed", "mixed", "tiny", "equal", "one"))
    if kind == "tiny":  # one long segment among many of a few rows
        lengths = [source.randint(0, 4) for _ in range(source.randint(5, 40))]
        lengths[source.randrange(len(lengths))] = source.randint(100, longest)
    elif kind == "equal":
        lengths = [length()] * source.randint(1, 4)
    else:
        lengths = [length() for _ in range(1 if kind == "one" else source.randint(1, 6))]
    while sum(lengths) > total:
        lengths.pop()
    keys = [source.choice((n, length(), n + length() // 2)) for n in lengths] if source.random() < 0.4 else None
    while keys is not None and sum(keys) > total:
        keys[source.randrange(len(keys))] //= 2
    heads_k = source.choice((1, 1, 2))
    return Case(
        tuple(lengths), None if keys is None else tuple(keys), heads=heads_k * source.choice((1, 2, 3)), heads_k=heads_k,
        dim=source.choice(dims), dtype=source.choice((BF16, FP16)), causal=source.random() < 0.5,
        scale=source.choice((None, None, 0.3)), layout=source.choice(("fused", "strided", "contiguous")), seed=seed,
    )  # fmt: skip
