"""Tile sizes of the Triton kernels, one after another on a CUDA device: where the constants in kernels/ come from.

    python -m bench.sweep [FAMILY ...] [--repeats 5] [--save]

A family is one kernel at one shape. Every setting has to agree with the first. It is timed at 1024 tokens, where latency
counts, and at 32768, where bandwidth does; the table is sorted by the latter. All settings are compiled first, in as many
processes as there are processors.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench.passes import device, positions_of, random
from bench.timing import ceilings, measure, parser, publish, say
from qwen2vl_fast import reference
from qwen2vl_fast.kernels import activation, gated, norm, patchify, rope, sums

TOKENS = (1024, 32768)
SHOWN = 8
EPS = 1e-6


@dataclass
class Family:
    """module.NAME for each name of `settings` takes each of its values; call(tokens) -> (run, bytes that must move)."""

    module: ModuleType
    settings: dict[str, Sequence[Any]]
    call: Callable[[int], tuple[Callable[[], Any], int]]


def rotation(heads: int, heads_k: int, dim: int, axes: int) -> Callable[[int], tuple[Callable[[], Any], int]]:
    def call(count: int) -> tuple[Callable[[], Any], int]:
        qkv = random(count, heads + 2 * heads_k, dim)
        q, k = qkv[:, :heads], qkv[:, heads : heads + heads_k]
        out_q, out_k = torch.empty_like(q), torch.empty_like(k)
        positions, half = positions_of(count)[:axes], dim // 2
        table = reference.inverse_frequencies(dim if axes == 3 else half, 1e6).to(device())
        sections = (16, 24, 24) if axes == 3 else (half // 2, half // 2)

        def run() -> tuple[Any, ...]:
            rope.launch(q, k, out_q, out_k, positions, table, sections, 1.0, 1.0)
            return out_q, out_k

        return run, 4 * (q.numel() + k.numel())

    return call


def normed(width: int, layer: bool, add: bool, backward: bool) -> Callable[[int], tuple[Callable[[], Any], int]]:
    def call(count: int) -> tuple[Callable[[], Any], int]:
        x, other = random(count, width), random(count, width, seed=1)
        weight, bias = random(width, seed=2), random(width, seed=3) if layer else None
        if backward:
            extra = other.clone() if add else None
            return lambda: norm.launch_backward(other, x, weight, bias, EPS, grad_total=extra), 2 * x.numel() * (3 + add)
        residual = other if add else None
        return lambda: norm.launch(x, weight, bias, EPS, residual=residual), 2 * x.numel() * (4 if add else 2)

    return call


def activated(width: int, kind: str, backward: bool = False) -> Callable[[int], tuple[Callable[[], Any], int]]:
    def call(count: int) -> tuple[Callable[[], Any], int]:
        if kind == "swiglu":
            x, grad = random(count, 2 * width), random(count, width, seed=1)
            if backward:
                return lambda: (activation.launch_swiglu_backward(grad, x),), 10 * grad.numel()
            return lambda: (activation.launch_swiglu(x),), 6 * grad.numel()
        if kind == "gated":
            gate, up = random(count, width), random(count, width, seed=1)
            return lambda: (gated.launch(gate, up),), 6 * gate.numel()
        x, grad, bias = random(count, width), random(count, width, seed=1), random(width, seed=2)
        quick = kind == "quick_gelu"
        if backward:
            return lambda: activation.launch_backward(grad, x, bias, quick), 6 * x.numel()
        return lambda: (activation.launch(x, bias, quick),), 4 * x.numel()

    return call


def patches(count: int) -> tuple[Callable[[], Any], int]:
    frames = torch.randint(256, (count // 512, 448, 448, 3), dtype=torch.uint8, device=device())
    return lambda: (patchify.launch(frames, torch.bfloat16, (0.01, 0.02, 0.03), (-1.0, -2.0, -3.0)),), 3 * count * 1176


def partial_sums(count: int) -> tuple[Callable[[], Any], int]:
    """As many partial sums as a backward pass of `count` rows of 1280 leaves."""
    rows = min(count // 8, norm.PROGRAMS)
    partial = torch.randn(rows, 2, 1280, device=device())
    outs = [torch.empty(1280, dtype=torch.bfloat16, device=device()) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        sums.launch(partial, outs)
        return outs

    return run, 4 * partial.numel()


ROTATION = {"BLOCK_H": (1, 2, 4), "NUM_WARPS": (1, 2, 4), "SHARE": (1, 2, 4, 8)}
FORWARD = {"TILE": (1024, 2048, 4096), "PER_WARP": (256, 512, 1024)}
BACKWARD = {"BACKWARD_TILE": (2048, 4096), "BACKWARD_PER_WARP": (512, 1024), "BACKWARD_STAGES": (1, 2),
            "PROGRAMS": (264, 528), "ROWS": (1, 4)}  # fmt: skip
PARTED = {"PARTED": ({}, *({1280: (rows, 256, warps), 1536: other}
                            for (rows, warps), other in (((2, 2), (1, 512, 2)), ((1, 1), (2, 256, 2)), ((2, 4), (1, 512, 4)),
                                                         ((4, 4), (2, 512, 4))))),
          "BACKWARD_STAGES": (1, 2), "PROGRAMS": (264, 512, 1024)}  # fmt: skip
POINTWISE = {"BLOCK_T": (1, 2, 4), "BLOCK_F": (512, 1024, 2048), "NUM_WARPS": (4, 8)}
GELU_BACKWARD = {"GELU_BACKWARD_T": (1, 2, 4), "BLOCK_F": (512, 1024), "NUM_WARPS": (4, 8), "CHUNKS": (64, 128, 256)}
FAMILIES = {
    "vision_rope": Family(rope, ROTATION, rotation(16, 16, 80, 2)),
    "mrope_2B": Family(rope, ROTATION, rotation(12, 2, 128, 3)),
    "mrope_7B": Family(rope, ROTATION, rotation(28, 4, 128, 3)),
    "layer_norm_1280": Family(norm, FORWARD, normed(1280, True, False, False)),
    "add_layer_norm_1280": Family(norm, FORWARD, normed(1280, True, True, False)),
    "add_rms_norm_3584": Family(norm, FORWARD, normed(3584, False, True, False)),
    "layer_norm_1280_backward": Family(norm, PARTED, normed(1280, True, True, True)),
    "rms_norm_1536_backward": Family(norm, PARTED, normed(1536, False, True, True)),
    "rms_norm_3584_backward": Family(norm, BACKWARD, normed(3584, False, True, True)),
    "quick_gelu_5120": Family(activation, POINTWISE, activated(5120, "quick_gelu")),
    "gelu_5120": Family(activation, POINTWISE, activated(5120, "gelu")),
    "swiglu_18944": Family(activation, POINTWISE, activated(18944, "swiglu")),
    "gelu_5120_backward": Family(activation, GELU_BACKWARD, activated(5120, "gelu", True)),
    "gated_18944": Family(gated, POINTWISE, activated(18944, "gated")),
    "swiglu_18944_backward": Family(activation, POINTWISE, activated(18944, "swiglu", True)),
    "patchify": Family(patchify, {"BLOCK_T": (4, 8, 16, 32), "BLOCK_P": (32, 64), "NUM_WARPS": (1, 2, 4)}, patches),
    "sums": Family(sums, {"BLOCK_R": (32, 64, 128), "BLOCK_C": (16, 32, 64), "NUM_WARPS": (4, 8)}, partial_sums),
}


def settings(family: Family) -> Iterator[dict[str, int]]:
    """Every combination; inside the loop it is in force, and behind it what was there before."""
    before = {name: getattr(family.module, name) for name in family.settings}
    try:
        for values in itertools.product(*family.settings.values()):
            row = dict(zip(family.settings, values, strict=True))
            _set(family, row)
            yield row
    finally:
        _set(family, before)


def _set(family: Family, row: dict[str, int]) -> None:
    for name, value in row.items():
        setattr(family.module, name, value)


def compile_one(task: tuple[str, dict[str, int]]) -> None:
    """In a process of its own: leaves the binary in Triton's cache."""
    name, row = task
    _set(FAMILIES[name], row)
    run, _ = FAMILIES[name].call(256)
    with contextlib.suppress(OutOfResources):
        run()
    torch.cuda.synchronize()


def compile_all(names: Sequence[str]) -> None:
    tasks = [(name, row) for name in names for row in settings(FAMILIES[name])]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, tasks, chunksize=2))


def sweep(family: Family, repeats: int, copy: float) -> list[dict[str, Any]]:
    """Every setting that fits a multiprocessor, best first."""
    calls = {count: family.call(count) for count in TOKENS}
    expected = {count: [x.clone() for x in run() if x is not None] for count, (run, _) in calls.items()}
    rows = []
    for setting in settings(family):
        row: dict[str, Any] = dict(setting)
        try:
            for count, (run, size) in calls.items():
                outs = [x for x in run() if x is not None]
                for out, first in zip(outs, expected[count], strict=True):
                    if float((out.float() - first.float()).norm() / first.float().norm()) > 1e-2:
                        raise RuntimeError(f"{row}: another result at {count} tokens")
                seconds = measure({"run": run}, repeats=repeats, device="cuda")["run"]["median"]
                row[f"us_{count}"], row[f"share_{count}"] = seconds * 1e6, size / seconds / copy
        except OutOfResources:
            continue
        rows.append(row)
    return sorted(rows, key=lambda row: row[f"us_{TOKENS[-1]}"])


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("sweep", __doc__, repeats=5)
    arguments.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    options = arguments.parse_args(argv)
    if unknown := set(options.families) - set(FAMILIES):
        arguments.error(f"unknown family: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        arguments.error("needs a CUDA device")
    names = options.families or list(FAMILIES)
    compile_all(names)
    ceiling = ceilings()
    found = []
    for name in names:
        rows = sweep(FAMILIES[name], options.repeats, ceiling["copy_bytes_per_s"])
        found.append({"family": name, "settings": rows})
        least = min(rows, key=lambda row: row[f"us_{TOKENS[0]}"])
        say(options, f"{name}: {len(rows)} settings")
        current = {key: getattr(FAMILIES[name].module, key) for key in FAMILIES[name].settings}
        now = next((row for row in rows if all(row[k] == v for k, v in current.items())), None)
        for mark, row in [*(("", row) for row in rows[:SHOWN]), ("least latency ", least), ("now ", now)]:
            if row:
                values = " ".join(f"{k}={row[k]}" for k in current)
                times = ", ".join(f"{row[f'us_{n}']:.1f} us {100 * row[f'share_{n}']:.0f} %" for n in TOKENS)
                say(options, f"  {mark}{values}: {times}")
    publish("sweep", options, found, ceilings=ceiling)


if __name__ == "__main__":
    main()
