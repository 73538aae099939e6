"""Ops that move memory and compute little: what every subject of theirs shares. Correctness first, then times, then one table.

    python -m bench.passes [SUBJECT ...] [--peers NAME ...] [--repeats 30] [--save]

Each subject (rope, mrope, merge, norms, activations, patchify) is also a module of its own. A time stands beside the bytes that
must move (every input read once, every output written once) as a share of the same run's copy bandwidth: warm, where what
fits the L2 cache may exceed it, and cold.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.peers import OURS, Missing, load
from bench.timing import ceilings, chosen, failed, keep, measure, parser, publish, say

SUBJECTS = ("rope", "mrope", "merge", "norms", "activations", "patchify")
COMPILED = "torch.compile"
TOKENS = (1024, 4096, 32768)
COLD_TOKENS = 4096  # up to here L2 holds the tensors from one call to the next, so that cold times are taken too
HOST_CALLS = 200  # fewer than the launches that a stream queues
CHECKED = 2048  # rows that the float64 definition takes at a time
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative error that no contender may exceed, bf16 tables included


@dataclass
class Case:
    """One op at one shape.

    contenders: each returns its outputs, rows first; the last `sums` of them are sums over the rows. definition: the same
    outputs in float64 of some rows. bytes: that must move.
    """

    name: str
    tokens: int
    bytes: int
    contenders: dict[str, Callable[[], Sequence[Tensor]]]
    definition: Callable[[slice], Sequence[Tensor]]
    sums: int = 0
    group: str = field(default="")  # contenders of a group are compiled once
    missing: dict[str, str] = field(default_factory=dict)  # peers that take no part, and why


def peer(missing: dict[str, str], name: str, module: str, attribute: str, package: str) -> Any:
    """The peer's function, or None and the reason in `missing`."""
    try:
        return load(module, attribute, package, cuda=device() == "cuda")
    except Missing as reason:
        missing[name] = str(reason)
        return None


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def tokens() -> tuple[int, ...]:
    return TOKENS if torch.cuda.is_available() else TOKENS[:1]


def random(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device(), dtype=torch.float32).to(dtype())


def positions_of(count: int) -> Tensor:
    """[3, T]: text, then an image of half the tokens."""
    half, side = count // 2, int((count // 2) ** 0.5)
    text = torch.arange(half)
    image = torch.stack(
        (torch.zeros(count - half, dtype=torch.int64), *(torch.arange(count - half) // d % side for d in (side, 1)))
    )
    return torch.cat((text.expand(3, -1), half + image), 1).to(device())


def with_gradients(function: Callable[..., Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Callable[[], Any]:
    """A call of function(*leaves) and of its backward pass: outputs, then the gradients of the leaves."""
    inputs = [x.detach().requires_grad_() for x in leaves]

    def run() -> tuple[Tensor, ...]:
        outputs = _tuple(function(*inputs))
        return *outputs, *torch.autograd.grad(outputs, inputs, upstream)

    return run


def compiled(function: Callable[..., Any], *arguments: Tensor) -> dict[str, Callable[[], Any]]:
    """{COMPILED: a call}, compiled once for every number of rows; {} on the CPU, where nothing of it is asked."""
    if device() == "cpu":
        return {}
    made = torch.compile(function)
    return {COMPILED: lambda: made(*map(_any_rows, arguments))}


def compiled_with_gradients(
    function: Callable[..., Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
) -> dict[str, Callable[[], Any]]:
    if device() == "cpu":
        return {}
    made = torch.compile(function)
    return {COMPILED: with_gradients(lambda *inputs: made(*map(_any_rows, inputs)), leaves, upstream)}


def _any_rows(x: Tensor) -> Tensor:
    if x.dim() > 1:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def relative_error(case: Case, outputs: Sequence[Tensor]) -> float:
    """The largest over the outputs of |out - ref| / |ref| in the Euclidean norm."""
    outputs = [x.detach() for x in outputs]
    plain = len(outputs) - case.sums
    wrong, size = [0.0] * plain, [0.0] * plain
    totals: list[Any] = [0.0] * case.sums
    for start in range(0, case.tokens, CHECKED):
        rows = slice(start, min(start + CHECKED, case.tokens))
        found = [x.detach() for x in _tuple(case.definition(rows))]
        if len(found) != len(outputs):
            raise ValueError(f"{case.name}: {len(outputs)} outputs, the definition has {len(found)}")
        for i, ref in enumerate(found[:plain]):
            first = outputs[i].shape[0] * rows.start // case.tokens
            out = outputs[i][first : first + ref.shape[0]].double()
            wrong[i] += float((out - ref).square().sum())
            size[i] += float(ref.square().sum())
        totals = [total + part for total, part in zip(totals, found[plain:], strict=True)]
    errors = [(w / s) ** 0.5 for w, s in zip(wrong, size, strict=True)]
    errors += [float((out.double() - ref).norm() / ref.norm()) for out, ref in zip(outputs[plain:], totals, strict=True)]
    return max(errors)


def host_seconds(run: Callable[[], Any], on: str) -> float:
    """Seconds of Python and launching a call: what a caller waits for that does not wait for the device."""
    run()
    if on != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        run()
    elapsed = (time.perf_counter() - start) / HOST_CALLS
    if on != "cpu":
        torch.cuda.synchronize()
    return elapsed


def judge(case: Case, name: str, outputs: Any) -> float:
    """The contender's relative error. Raises RuntimeError if it computes something else."""
    error = relative_error(case, _tuple(outputs))
    if not error <= ALLOWED[dtype()]:
        raise RuntimeError(f"{case.name}, {case.tokens} tokens, {name}: relative error {error:.1e}")
    return error


def taking_part(case: Case, wanted: Sequence[str]) -> tuple[dict[str, Callable[[], Sequence[Tensor]]], dict[str, str]]:
    """The contenders that are ours or wanted, and why a wanted peer is none. A peer may have a second contender, in place."""
    peer_of = {name: name.removesuffix(" in place") for name in case.contenders}
    runs = {name: run for name, run in case.contenders.items() if name.startswith(OURS) or peer_of[name] in wanted}
    missing = {}
    for name in wanted:
        if name not in peer_of.values():
            asked = "not compiled on a CPU" if name == COMPILED and device() == "cpu" else "not in this case"
            missing[name] = case.missing.get(name, asked)
    return runs, missing


def measure_case(case: Case, wanted: Sequence[str], repeats: int, copy: float) -> dict[str, Any]:
    on, errors = device(), {}
    runs, missing = taking_part(case, wanted)
    for name, run in runs.items():  # the first call of each: those that work in place find what they started with
        try:
            errors[name] = judge(case, name, run())
        except Exception as failure:
            if name.startswith(OURS):
                raise
            missing[name] = failed(failure)
    runs = {name: run for name, run in runs.items() if name in errors}
    seconds = measure(runs, repeats=repeats, device=on)
    cold = {}
    if on != "cpu" and case.tokens <= COLD_TOKENS:
        cold = measure(runs, repeats=repeats, device=on, cold=True)
    rows = {}
    for name, run in runs.items():
        row = {"seconds": seconds[name], "share_of_copy": case.bytes / seconds[name]["median"] / copy, "error": errors[name]}
        if cold:
            row |= {"cold_seconds": cold[name], "cold_share_of_copy": case.bytes / cold[name]["median"] / copy}
        if on != "cpu" and case.tokens == TOKENS[0]:
            row["host_seconds"] = host_seconds(run, on)
        rows[name] = row
    rows |= {name: {"missing": reason} for name, reason in missing.items()}
    return {"op": case.name, "tokens": case.tokens, "bytes": case.bytes, "contenders": rows}


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A row of the result for a person: microseconds, the share of copy bandwidth, cold, and the host's time of a call."""
    yield f"{row['op']}, {row['tokens']} tokens"
    for name, found in row["contenders"].items():
        if "missing" in found:
            yield f"  {name:<22}{found['missing']}"
            continue
        text = f"  {name:<22}{found['seconds']['median'] * 1e6:9.1f} us {100 * found['share_of_copy']:5.0f} %"
        if "cold_seconds" in found:
            text += f"   cold {found['cold_seconds']['median'] * 1e6:8.1f} us {100 * found['cold_share_of_copy']:4.0f} %"
        if "host_seconds" in found:
            text += f"   host {found['host_seconds'] * 1e6:6.0f} us"
        if found["seconds"]["method"] == "events":
            text += "   (no graph)"
        yield text


def peers_of(subject: str) -> tuple[str, ...]:
    return importlib.import_module(f"bench.{subject}").PEERS


def run_subject(subject: str, options: argparse.Namespace, ceiling: dict[str, Any]) -> None:
    rows, group = [], None
    wanted = [name for name in chosen(options, peers_of(subject)) if name in peers_of(subject)]
    for case in importlib.import_module(f"bench.{subject}").cases():
        if case.group != group:
            group = case.group
            torch._dynamo.reset()
        rows.append(measure_case(case, wanted, options.repeats, ceiling["copy_bytes_per_s"]))
        for line in lines(rows[-1]):
            say(options, line)
        keep(f"{subject}_{device()}", options, rows, ceilings=ceiling)
    publish(f"{subject}_{device()}", options, rows, ceilings=ceiling)


def main(subjects: Sequence[str], description: str, argv: Sequence[str] | None = None) -> None:
    """The command line of one subject, or of several in one process."""
    peers = dict.fromkeys(name for subject in subjects for name in peers_of(subject))
    arguments = parser(subjects[0] if len(subjects) == 1 else "passes", description, peers=tuple(peers))
    if len(subjects) > 1:
        arguments.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(subjects)} (default: all)")
    options = arguments.parse_args(argv)
    wanted = getattr(options, "subjects", None) or subjects
    if unknown := set(wanted) - set(subjects):
        arguments.error(f"expected {', '.join(subjects)}, got {', '.join(sorted(unknown))}")
    ceiling = ceilings()
    say(options, f"copy {ceiling['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    for subject in wanted:
        run_subject(subject, options, ceiling)


if __name__ == "__main__":
    main(SUBJECTS, __doc__)
