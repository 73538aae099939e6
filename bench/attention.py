"""Variable-length attention at the tower's shape (16 heads of 80) against its peers, as shares of a matrix product's rate.

    qwen2vl-fast bench attention [--cases a b ...] [--peers NAME ...] [--backward] [--json] [--save]

Operations that count, for everybody: 4 * 80 * 16 * sum(L^2), 2.5 times as many in the backward pass.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch

from bench import peers
from bench.peers import OURS, PEERS, REPEATABLE, Missing, Problem
from bench.timing import ceilings, chosen, keep, measure, parser, publish, say

CASES: dict[str, tuple[int, ...]] = {
    "a": (1024,),
    "b": 4 * (1024,),
    "c": 64 * (256,),
    "d": 4 * (4096,),
    "e": (16384,),
    "f": (5184, *3 * (1296,), *8 * (640,), *16 * (256,)),
    "g": 32 * (1008,),
    "h": tuple(4 * round(64 * 128 ** random.Random(n).random() / 4) for n in range(500)),  # log-uniform in 64..8192
}
ON_CPU = ("a", "b", "c")
CHECK = (1, 64, 260, 4, 1024, 191, 193)  # lengths of the problem on which every contender is judged first
COLD_TOKENS = 4096
# Relative errors of outputs and of gradients; a wrong mask, scale or stride gives 1e-2 and more, in gradients 1e-1.
BOUNDS = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
GRADIENT_BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def describe(lengths: tuple[int, ...]) -> str:
    """'4 x 1024'; for a pack of many kinds its number, smallest and largest."""
    kinds = [(length, len(list(equal))) for length, equal in groupby(lengths)]
    if len(kinds) > 4:
        return f"{len(lengths)} of {min(lengths)} to {max(lengths)}"
    return " + ".join(f"{count} x {length}" for length, count in kinds)


def backward(problem: Problem, attend: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    """The backward pass alone: the forward's graph is kept."""
    out = attend()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, problem.views, grad, retain_graph=True)


def measure_case(
    name: str, wanted: list[str], options: argparse.Namespace, rate: float, broken: dict[str, str]
) -> dict[str, Any]:
    """One row: what every contender takes, or why it takes no part."""
    lengths = CASES[name]
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    problem = Problem.random(lengths, device=device, dtype=dtype, grad=options.backward)
    flop = problem.useful_flop * (2.5 if options.backward else 1)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for contender in wanted:
        try:
            if contender in broken:
                raise Missing(broken[contender])
            attend, error = peers.prepare(contender, problem, BOUNDS[dtype])
            runs[contender] = backward(problem, attend) if options.backward else attend
            found[contender] = {"error": error}
        except Missing as reason:
            found[contender] = {"missing": str(reason)}
    repeats = options.repeats if flop < 5e12 else max(5, options.repeats // 4)
    # A backward pass runs on its forward's stream, which is not the one that a graph is captured on.
    graph = not options.backward
    for contender, seconds in measure(runs, repeats=repeats, device=device, graph=graph).items():
        speed = flop / seconds["median"]
        found[contender] |= {"seconds": seconds, "flops": speed, "share_of_matmul": speed / rate}
    if device == "cuda" and sum(lengths) <= COLD_TOKENS:
        for contender, seconds in measure(runs, repeats=repeats, device=device, graph=graph, cold=True).items():
            found[contender]["cold_seconds"] = seconds
    speeds = {contender: facts["flops"] for contender, facts in found.items() if "flops" in facts}
    best = max((contender for contender in speeds if contender in PEERS), key=speeds.get, default=None)
    return {
        "case": name,
        "lengths": describe(lengths),
        "tokens": sum(lengths),
        "pass": "backward" if options.backward else "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "useful_flop": flop,
        "contenders": found,
        "best_peer": best,
        "ratio_to_best_peer": speeds[OURS] / speeds[best] if OURS in speeds and best else None,
    }


def check(wanted: list[str], options: argparse.Namespace) -> dict[str, str]:
    """{contender: why it takes no part}, found on a small problem whose lengths are no multiples of any tile."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    broken = {}
    for contender in wanted:
        lengths = tuple(n for n in CHECK if n > 1 or contender != "cuDNN")  # in torch it refuses a single key
        problem = Problem.random(lengths, device=options.device, dtype=dtype, seed=2, grad=options.backward)
        try:
            gradients = GRADIENT_BOUNDS[dtype] if options.backward else None
            _, error = peers.prepare(contender, problem, BOUNDS[dtype], gradients)
            say(options, f"{contender:<28} computes our problem, relative error {error:.1e}")
        except Missing as reason:
            broken[contender] = str(reason)
            say(options, f"{contender:<28} {reason}")
    return broken


def geometric_mean(rows: list[dict[str, Any]], peer: str) -> float | None:
    """Our speed over a peer's, over the cases that both ran."""
    pairs = [(row["contenders"].get(OURS, {}), row["contenders"].get(peer, {})) for row in rows]
    ratios = [ours["flops"] / theirs["flops"] for ours, theirs in pairs if "flops" in ours and "flops" in theirs]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def main(argv: list[str] | None = None) -> None:
    arguments = parser("attention", __doc__, peers=tuple(PEERS))
    arguments.add_argument("--cases", nargs="*", choices=tuple(CASES), help="default: all, on the CPU a, b and c")
    arguments.add_argument("--backward", action="store_true", help="time the backward pass")
    options = arguments.parse_args(argv)
    cuda = torch.cuda.is_available()
    cases = options.cases or (tuple(CASES) if cuda else ON_CPU)
    wanted = [OURS, *([REPEATABLE] if options.backward else []), *chosen(options, PEERS)]
    name = f"attention_{'backward_' if options.backward else ''}{'cuda' if cuda else 'cpu'}"
    options.device = "cuda" if cuda else "cpu"
    if not cuda:
        say(options, "no CUDA device: this measures float32 on the CPU, and no GPU peer")
    ceiling = ceilings()
    say(options, f"matrix product {ceiling['matmul']} {ceiling['matmul_flops'] / 1e12:.2f} TFLOP/s")
    with torch.set_grad_enabled(options.backward):
        broken = check(wanted, options)
        rows = []
        for case in cases:
            rows.append(measure_case(case, wanted, options, ceiling["matmul_flops"], broken))
            for line in lines(rows[-1]):
                say(options, line)
            keep(name, options, rows, ceilings=ceiling)
    means = {peer: mean for peer in PEERS if (mean := geometric_mean(rows, peer))}
    for peer, mean in means.items():
        say(options, f"geometric mean over {peer}: {mean:.2f}x")
    del options.device
    publish(name, options, rows, ceilings=ceiling, geometric_means=means)


def lines(row: dict[str, Any]) -> list[str]:
    text = [f"({row['case']}) {row['lengths']}, {row['pass']}, {row['tokens']} tokens"]
    for contender, facts in row["contenders"].items():
        if "missing" in facts:
            text.append(f"  {contender:<28} {facts['missing']}")
            continue
        line = f"  {contender:<28} {facts['seconds']['median'] * 1e6:10.1f} us {facts['flops'] / 1e12:7.2f} TFLOP/s"
        line += f" {100 * facts['share_of_matmul']:4.0f} %"
        if "cold_seconds" in facts:
            line += f"   cold {facts['cold_seconds']['median'] * 1e6:8.1f} us"
        text.append(line + ("   (no graph)" if facts["seconds"]["method"] == "events" else ""))
    if row["ratio_to_best_peer"]:
        text.append(f"  {row['ratio_to_best_peer']:.2f}x {row['best_peer']}")
    return text


if __name__ == "__main__":
    main()
