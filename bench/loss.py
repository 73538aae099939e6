"""The loss of a training step, forward and backward, from hidden states and the head's weight: time, and memory of its own.

qwen2vl-fast bench loss [--peers NAME ...] [--tokens N ...] [--repeats 10] [--json] [--save]

The released vocabulary at the widths of the 2B and the 7B model, in bfloat16; on a CPU the 2B one in float32 and few tokens.
Useful work is three products, of the logits and of the two gradients; a loss that computes its logits again does a fourth.
Every contender's loss and gradients are judged by those of float32 logits before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.passes import ALLOWED, COMPILED, device, dtype, random
from bench.peers import OURS, Missing, load
from bench.timing import ceilings, chosen, failed, keep, measure, parser, peak, publish, say
from qwen2vl_fast import ops

PEERS = ("torch", COMPILED, "Liger")
WORDS, WIDTHS = 151936, {"2B": 1536, "7B": 3584}


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def contenders(wanted: list[str]) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """{contender: its loss of (hidden, weight, labels)}, and why a peer has none."""
    found: dict[str, Callable[..., Tensor]] = {OURS: ops.linear_cross_entropy}
    missing: dict[str, str] = {}
    if "torch" in wanted:
        found["torch"] = eager
    if COMPILED in wanted:
        if device() == "cuda":
            found[COMPILED] = torch.compile(eager)
        else:
            missing[COMPILED] = "not compiled on a CPU"
    if "Liger" in wanted:
        try:
            name = "LigerFusedLinearCrossEntropyLoss"
            liger = load("liger_kernel.transformers", name, "liger-kernel", cuda=device() == "cuda")()
            found["Liger"] = lambda hidden, weight, labels: liger(weight, hidden, labels)
        except Missing as reason:
            missing["Liger"] = str(reason)
    return found, missing


def step(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the loss and the gradients of hidden and weight."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]

    def run() -> tuple[Tensor, ...]:
        loss = function(*leaves, labels)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return run


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """|x - exact| / |exact| of the loss and of both gradients."""
    return [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


def race(model: str, tokens: int, wanted: list[str], repeats: int, words: int = WORDS) -> dict[str, Any]:
    width = WIDTHS[model]
    hidden, weight = random(tokens, width), random(words, width, seed=1) * 0.02
    labels = torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2)).to(device())
    labels[::7] = -100
    functions, missing = contenders(wanted)
    exact = step(eager, hidden.float(), weight.float(), labels)()
    facts: dict[str, dict[str, Any]] = {name: {"missing": reason} for name, reason in missing.items()}
    runs = {}
    for name, function in functions.items():
        run = step(function, hidden, weight, labels)
        try:
            found = errors(run(), exact)
            if not max(found) < ALLOWED[dtype()]:
                raise ValueError(f"relative errors {found}")
        except Exception as error:
            if name == OURS:
                raise
            facts[name] = {"missing": failed(error)}
            continue
        runs[name], facts[name] = run, {"errors": found}
        if device() == "cuda":
            facts[name]["peak_bytes"] = peak(run)
    del exact
    for name, seconds in measure(runs, repeats=repeats, device=device(), graph=False).items():
        facts[name] |= {"seconds": seconds, "flops": 6 * tokens * words * width / seconds["median"]}
    return {"case": f"{model}, {tokens} tokens", "tokens": tokens, "width": width, "words": words, "contenders": facts}


def lines(row: dict[str, Any]) -> list[str]:
    text = [f"{row['case']}, {row['words']} words"]
    ours = row["contenders"][OURS]["seconds"]["median"]
    for name, facts in row["contenders"].items():
        if "missing" in facts:
            text.append(f"  {name:<14} {facts['missing']}")
            continue
        memory = f"   peak {facts['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in facts else ""
        median = facts["seconds"]["median"]
        speed = f"{facts['flops'] / 1e12:7.2f} TFLOP/s   {median / ours:5.2f} of ours"
        text.append(f"  {name:<14} {median * 1e3:9.2f} ms   {speed}{memory}")
    return text


def main(argv: list[str] | None = None) -> None:
    cuda = device() == "cuda"
    arguments = parser("loss", __doc__, repeats=10 if cuda else 3, peers=PEERS)
    arguments.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384] if cuda else [256], metavar="N")
    options = arguments.parse_args(argv)
    name, rows, ceiling = f"loss_{device()}", [], ceilings()
    for model in WIDTHS if cuda else ("2B",):
        for tokens in options.tokens:
            rows.append(race(model, tokens, chosen(options, PEERS), options.repeats))
            for line in lines(rows[-1]):
                say(options, line)
            keep(name, options, rows, ceilings=ceiling)
    publish(name, options, rows, ceilings=ceiling)


if __name__ == "__main__":
    main()
