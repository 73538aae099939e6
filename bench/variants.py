"""Which form of the Hopper forward is the fastest: builds csrc/variants_sm90.cuh, times all on a device, writes the choice.

    python -m bench.variants [--cases b e ...] [--save]      on a device of compute capability 9.0
    python -m bench.variants --choose                        csrc/chosen_sm90.cuh from bench/results/variants_cuda.json

Each form is judged against float64 first. Per case, a form's time is that of the better of its tile sizes, 192 and 128 rows.
Case s, segments of 64 patches, is for the form with 64 rows, which positions.block_rows takes by an estimate.
Chosen is the one with the best geometric mean that has both: the extension takes the size by the pack (positions.block_rows).
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.attention import CASES, CHECK, describe
from bench.micro import find_nvcc
from bench.peers import Problem
from bench.timing import RESULTS, ROOT, ceilings, keep, measure, parser, publish, say
from qwen2vl_fast.positions import attention_tiles, dealt_tiles, hopper_blocks
from tests.host.runner import VarlenAttention

SOURCE = Path(__file__).parent / "variants_sm90.cu"
CHOSEN = ROOT / "csrc" / "chosen_sm90.cuh"
RESULT = RESULTS / "variants_cuda.json"
SHORT = {"s": 1024 * (64,)}  # for which blocks of 64 rows are; it decides nothing among the forms of 192 and 128
ON_CASES = ("a", "b", "c", "e", "f", "h", *SHORT)
BOUND = 6e-3  # relative error against float64, in bfloat16
REFERENCES = ("FIRST", "CONDITIONAL", "ALWAYS")


class Facts(ctypes.Structure):
    """bench/variants_sm90.cu"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("rows", "keys", "stages", "turns", "polynomial", "reference", "narrow")),
    ]


def build(nvcc: str, library: Path) -> str:
    """Compiles the variants; what the assembler says about registers, spills and serialised wgmma."""
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-Xptxas", "-v",
               "-gencode=arch=compute_90a,code=sm_90a", str(SOURCE), "-o", str(library)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr}")
    return done.stdout + done.stderr


def variants(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """name, rows, keys, stages, ... of each, in the order of run_variant's numbers."""
    count = library.variants(None, 0)
    facts = (Facts * count)()
    library.variants(facts, count)
    return [{name: getattr(x, name) for name, *_ in Facts._fields_} | {"name": x.name.decode()} for x in facts]


def attend(library: ctypes.CDLL, index: int, rows: int, problem: Problem) -> Callable[[], torch.Tensor]:
    """A call of one variant on the problem, without an allocation in it."""
    q, k, v = problem.views
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    workers = torch.cuda.get_device_properties(q.device).multi_processor_count * hopper_blocks(rows)
    tiles = dealt_tiles(attention_tiles(problem.schedule.cu_seqlens.cpu(), q.shape[1], rows, False), workers).to(q.device)
    views = {"q": q, "k": k, "v": v, "o": o}
    arguments = VarlenAttention(
        **{name: x.data_ptr() for name, x in views.items()}, lse=lse.data_ptr(), tiles=tiles.data_ptr(), tile_count=len(tiles),
        T=q.shape[0], Tk=k.shape[0], H=q.shape[1], Hk=k.shape[1], D=q.shape[2],
        **{f"{n}_stride_{axis}": x.stride(i) for n, x in views.items() for i, axis in enumerate("th")},
        scale=q.shape[2] ** -0.5, causal=False, bfloat16=True,
    )  # fmt: skip
    message = ctypes.create_string_buffer(1000)

    def call(held: Any = (tiles, lse)) -> torch.Tensor:  # `arguments` has their addresses alone
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if library.run_variant(index, ctypes.byref(arguments), q.device.index, stream, message, len(message)):
            raise RuntimeError(message.value.decode())
        return o

    return call


def best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{form: geometric mean over the cases of the chosen form's time over its own, of the better size each}; nothing where the
    chosen form took no part."""
    ratios: dict[str, list[float]] = {}
    rows = [row for row in rows if row["case"] in CASES]
    for row in rows:
        fastest: dict[str, float] = {}
        for entry in row["variants"]:
            if "seconds" in entry:
                seconds = entry["seconds"]["median"]
                fastest[entry["name"]] = min(seconds, fastest.get(entry["name"], math.inf))
        if "chosen" not in fastest:
            return {}
        for name, seconds in fastest.items():
            ratios.setdefault(name, []).append(fastest["chosen"] / seconds)
    return {name: math.exp(sum(map(math.log, r)) / len(r)) for name, r in ratios.items() if len(r) == len(rows)}


def header(result: dict[str, Any] | None) -> str:
    """The text of csrc/chosen_sm90.cuh: by the result, or without one by the trials of the log."""
    facts = {"keys": 96, "stages": 4, "turns": 1, "polynomial": 0, "reference": 0, "narrow": 0}
    why = "By the trials of 2026-11-23 (docs/hopper.md): bench/results has no variants_cuda.json yet."
    if result is not None:
        entries = result["rows"][0]["variants"]
        sizes = {name: {e["rows"] for e in entries if e["name"] == name} for name in best(result["rows"])}
        means = {name: mean for name, mean in best(result["rows"]).items() if sizes[name] == {128, 192}}
        name = max(means, key=means.get)
        facts = next(e for e in entries if e["name"] == name)
        environment = result["environment"]
        why = f'"{name}", {means[name]:.3f} times the speed of the one before: {environment["device"]}, {environment["date"]}.'
    return f"""// Which variant of the Hopper forward runs at D = 80. Written by `python -m bench.variants --choose`.
#pragma once

#include "softmax_sm90.cuh"

namespace qwen2vl_fast {{

// {why}
struct ChosenSm90 {{
  static constexpr int KEYS = {facts["keys"]};
  static constexpr int STAGES = {facts["stages"]};
  static constexpr bool TURNS = {"true" if facts["turns"] else "false"};
  static constexpr int POLYNOMIAL = {facts["polynomial"]};
  static constexpr Reference REFERENCE = Reference::{REFERENCES[facts["reference"]]};
  static constexpr bool NARROW = {"true" if facts["narrow"] else "false"};
}};

}}  // namespace qwen2vl_fast
"""


def measured() -> dict[str, Any] | None:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else None


def measure_case(library: ctypes.CDLL, name: str, wrong: dict[int, str], options: Any) -> dict[str, Any]:
    lengths = (CASES | SHORT)[name]
    problem = Problem.random(lengths, device="cuda", dtype=torch.bfloat16)
    entries = variants(library)
    runs = {str(i): attend(library, i, entry["rows"], problem) for i, entry in enumerate(entries) if i not in wrong}
    for index, seconds in measure(runs, repeats=options.repeats, device="cuda").items():
        entries[int(index)] |= {"seconds": seconds, "flops": problem.useful_flop / seconds["median"]}
    for index, reason in wrong.items():
        entries[index]["missing"] = reason
    return {"case": name, "lengths": describe(lengths), "useful_flop": problem.useful_flop, "variants": entries}


def judge(library: ctypes.CDLL) -> dict[int, str]:
    """{number: why it takes no part}, found on a small problem whose lengths are no multiples of any tile."""
    problem, wrong = Problem.random(CHECK, device="cuda", dtype=torch.bfloat16, seed=2), {}
    for index, entry in enumerate(variants(library)):
        try:
            error = peers.error(problem, attend(library, index, entry["rows"], problem)())
            if not error < BOUND:
                wrong[index] = f"relative error {error:.1e}"
        except RuntimeError as failure:
            wrong[index] = str(failure)
    return wrong


def main(argv: list[str] | None = None) -> int:
    arguments = parser("variants", __doc__, repeats=7)
    arguments.add_argument("--cases", nargs="*", choices=tuple(CASES | SHORT), default=list(ON_CASES))
    arguments.add_argument("--choose", action="store_true", help="only write csrc/chosen_sm90.cuh from the result at hand")
    options = arguments.parse_args(argv)
    if options.choose:
        CHOSEN.write_text(header(measured()), encoding="utf-8")
        say(options, f"wrote {CHOSEN.relative_to(ROOT)}; build the extension again")
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        say(options, "no nvcc: the variants were neither built nor timed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variants.so"
        build(nvcc, path)
        library = ctypes.CDLL(str(path))
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            say(options, f"built {len(variants(library))} kernels; no device of compute capability 9.0 here, so none was timed")
            return 0
        wrong = judge(library)
        rows = []
        for case in options.cases:
            rows.append(measure_case(library, case, wrong, options))
            keep("variants_cuda", options, rows)
    publish("variants_cuda", options, rows, ceilings=ceilings())
    for row in rows:
        say(options, f"({row['case']}) {row['lengths']}")
        for entry in row["variants"]:
            speed = f"{entry['flops'] / 1e12:7.1f} TFLOP/s" if "flops" in entry else entry["missing"]
            say(options, f"  {entry['rows']} rows, {entry['name']:<42} {speed}")
    for name, mean in sorted(best(rows).items(), key=lambda x: -x[1]):
        say(options, f"{mean:.3f}  {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
