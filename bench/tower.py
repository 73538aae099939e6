"""The vision tower against transformers with sdpa: same weights, same process, interleaved; and what each part of ours takes.

qwen2vl-fast bench tower [--cases a f ...] [--peers NAME ...] [--depth 32] [--dtype bfloat16] [--json] [--save]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from bench.timing import capture, ceilings, chosen, keep, measure, parser, publish, say, speedup, taking_part, times, warm_up
from qwen2vl_fast import ops
from qwen2vl_fast.config import VisionConfig
from qwen2vl_fast.vision import VisionTower
from qwen2vl_fast.weights import share_parameters

SMALL = ((1, 16, 16), (1, 24, 32), (1, 22, 40), (1, 48, 64))  # 256, 768, 880 and 3072 patches
CASES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "1": SMALL[:1], "2": SMALL[1:2], "3": SMALL[2:3], "4": SMALL[3:], "5": SMALL,
    "a": ((1, 32, 32),),
    "b": 4 * ((1, 32, 32),),
    "c": 64 * ((1, 16, 16),),
    "d": 4 * ((1, 64, 64),),
    "e": ((1, 128, 128),),
    "f": ((1, 72, 72), *3 * ((1, 36, 36),), *8 * ((1, 20, 32),), *16 * ((1, 16, 16),)),
    "g": ((32, 28, 36),),
}  # fmt: skip
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative error past which nothing is timed
WIDTH, HEADS, MLP = 1280, 16, 5120
THEIRS, OURS, GRAPH, COMPILED = (
    "transformers sdpa",
    "qwen2vl_fast",
    "qwen2vl_fast in a CUDA graph",
    "transformers sdpa compiled",  # takes minutes, so only on request
)
PEERS = (THEIRS,)


def towers(dtype: torch.dtype, device: str, depth: int) -> tuple[torch.nn.Module, VisionTower]:
    """transformers' tower and ours on the same weights."""
    torch.manual_seed(0)
    theirs = Qwen2VisionTransformerPretrainedModel._from_config(
        Qwen2VLVisionConfig(depth=depth, hidden_size=1536), attn_implementation="sdpa"
    )
    theirs = theirs.to(device, dtype).eval()
    with torch.device("meta"):
        ours = VisionTower(VisionConfig(depth=depth, embed_dim=WIDTH, num_heads=HEADS, hidden_size=1536))
    share_parameters(ours, theirs.named_parameters(), tied=False)
    return theirs, ours.eval()


def in_a_graph(tower: VisionTower, pixels: torch.Tensor, grid: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The tower's device work alone, replayed: what it takes when the host is not in the way.

    A call overwrites what the one before returned.
    """
    pack, out = tower.pack(grid, pixels.device), torch.empty(0)

    def run() -> None:
        nonlocal out
        x, branch = tower.patch_embed(pixels), None
        for block in tower.blocks:
            x, branch = block(x, branch, pack)
        out = tower.merger(x + branch)

    warm_up(run)
    replay = capture(run)

    def replayed() -> torch.Tensor:
        replay()
        return out

    return replayed


def judge(name: str, out: torch.Tensor, expected: torch.Tensor) -> float:
    """The contender's relative error. Raises RuntimeError unless it is within the dtype's bound."""
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    if not error < ALLOWED[expected.dtype]:
        raise RuntimeError(f"{name}: relative error {error:.1e} of the features")
    return error


def contenders(
    theirs: torch.nn.Module, ours: VisionTower, case: str, dtype: torch.dtype, device: str, compiled: Any = None
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, float]]:
    """Calls of every tower on the images of a case, and their relative errors: each is judged by transformers' features."""
    grid = torch.tensor(CASES[case])
    pixels = torch.randn(int(grid.prod(1).sum()), 1176, device=device, dtype=dtype)
    device_grid = grid.to(device)
    runs = {THEIRS: lambda: theirs(pixels, device_grid).pooler_output, OURS: lambda: ours(pixels, grid)}
    if device != "cpu":
        runs[GRAPH] = in_a_graph(ours, pixels, grid)
    if compiled is not None:
        runs[COMPILED] = lambda: compiled(pixels, device_grid).pooler_output
    expected = runs[THEIRS]()
    return runs, {name: judge(f"case {case}, {name}", run(), expected) for name, run in runs.items()}


def parts(tower: VisionTower, grid: torch.Tensor, dtype: torch.dtype, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """{part: seconds in the whole tower, and the floating-point operations and bytes that it can't do without}."""
    tokens, depth = int(grid.prod(1).sum()), len(tower.blocks)
    pack, block = tower.pack(grid, torch.device(device)), tower.blocks[0]
    lengths = pack.schedule.lengths
    size = torch.finfo(dtype).bits // 8
    pixels = torch.randn(tokens, 1176, device=device, dtype=dtype)
    x, branch = (torch.randn(tokens, WIDTH, device=device, dtype=dtype) for _ in range(2))
    wide = torch.randn(tokens, MLP, device=device, dtype=dtype)
    q, k, v = torch.randn(tokens, 3, HEADS, WIDTH // HEADS, device=device, dtype=dtype).unbind(1)
    schedule, attn, mlp = pack.schedule, block.attn, block.mlp
    runs = {
        "patch embedding": (1, lambda: tower.patch_embed(pixels), 2 * tokens * 1176 * WIDTH, 0),
        "qkv and projection": (
            depth, lambda: (attn.qkv(x), attn.proj(x)), 2 * tokens * WIDTH * 4 * WIDTH, 0
        ),
        "MLP products": (depth, lambda: (mlp.fc1(x), mlp.fc2(wide)), 4 * tokens * WIDTH * MLP, 0),
        "attention": (
            depth, lambda: ops.varlen_attention(q, k, v, schedule.cu_seqlens, schedule=schedule),
            4 * WIDTH * sum(n * n for n in lengths), 0,
        ),
        "rotation": (
            depth, lambda: ops.vision_rope_(q, k, pack.position_ids, inv_freq=pack.inv_freq), 0, 4 * tokens * WIDTH * size
        ),
        "norms and residuals": (
            depth, lambda: (block.norm1(x, branch), block.norm2(x, branch)), 0, 8 * tokens * WIDTH * size
        ),
        "QuickGELU": (depth, lambda: ops.quick_gelu(wide), 0, 2 * tokens * MLP * size),
        "merger": (1, lambda: tower.merger(x), 2 * tokens // 4 * 5120 * (5120 + 1536), 0),
    }  # fmt: skip
    seconds = measure({name: run for name, (_, run, _, _) in runs.items()}, repeats=repeats, device=device)
    return {
        name: {"seconds": times * seconds[name]["median"], "flop": times * flop, "bytes": times * moved}
        for name, (times, _, flop, moved) in runs.items()
    }


def race(options: argparse.Namespace, dtype: torch.dtype, device: str, ceiling: dict[str, Any]) -> list[dict]:
    theirs, ours = towers(dtype, device, options.depth)
    compiled = torch.compile(theirs, dynamic=True) if COMPILED in chosen(options, PEERS) else None
    rows = []
    for case in options.cases:
        runs, errors = contenders(theirs, ours, case, dtype, device, compiled)
        runs = taking_part(options, runs, PEERS)
        seconds = measure(runs, repeats=options.repeats, device=device, graph=False)
        best = min(seconds[name]["median"] for name in (OURS, GRAPH) if name in seconds)
        row = {
            "case": case,
            "grids": CASES[case],
            "dtype": str(dtype).removeprefix("torch."),
            "depth": options.depth,
            "errors": errors,
            "seconds": seconds,
            "speedup": speedup(seconds, THEIRS, OURS),
        }
        if device != "cpu":
            row["parts"] = parts(ours, torch.tensor(CASES[case]), dtype, device, options.repeats)
            floor = sum(
                max(part["flop"] / ceiling["matmul_flops"], part["bytes"] / ceiling["copy_bytes_per_s"])
                for part in row["parts"].values()
            )
            row |= {"floor_seconds": floor, "share_of_floor": floor / best}
        rows.append(row)
        tell(options, row)
        keep(name_of(options, device), options, rows, ceilings=ceiling)
    return rows


def name_of(options: argparse.Namespace, device: str) -> str:
    return f"tower_{device}_{options.dtype}"


def describe(grids: tuple[tuple[int, int, int], ...]) -> str:
    """'1024 + 3 x 256': patches of each image or frame pair."""
    counts: dict[int, int] = {}
    for t, h, w in grids:
        counts[h * w] = counts.get(h * w, 0) + t
    return " + ".join(f"{count} x {patches}" if count > 1 else str(patches) for patches, count in counts.items())


def tell(options: argparse.Namespace, row: dict[str, Any]) -> None:
    say(options, f"({row['case']}) {describe(row['grids'])} patches, {times(row['speedup'])}")
    for name, value in row["seconds"].items():
        say(options, f"  {name:<30} {value['median'] * 1e3:9.3f} ms, relative error {row['errors'][name]:.1e}")
    for name, part in row.get("parts", {}).items():
        say(options, f"    {name:<28} {part['seconds'] * 1e3:9.3f} ms")
    if "floor_seconds" in row:
        say(options, f"  floor {row['floor_seconds'] * 1e3:.3f} ms, reached {100 * row['share_of_floor']:.0f} %")


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    arguments = parser("tower", __doc__, repeats=10 if cuda else 5, peers=PEERS, on_request=(COMPILED,))
    arguments.add_argument("--cases", nargs="*", choices=tuple(CASES), help="default: a to g, on the CPU 1 to 5")
    arguments.add_argument("--depth", type=int, default=32 if cuda else 4, help="blocks (default: 32, on the CPU 4)")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    options = arguments.parse_args(argv)
    options.cases = options.cases or list("abcdefg" if cuda else "12345")
    device = "cuda" if cuda else "cpu"
    ceiling = ceilings()
    with torch.inference_mode():
        rows = race(options, getattr(torch, options.dtype), device, ceiling)
    publish(name_of(options, device), options, rows, ceilings=ceiling)


if __name__ == "__main__":
    main()
