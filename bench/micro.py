"""Design data for the Hopper attention kernel: builds bench/micro_sm90.cu, runs it, prints a table, writes JSON.

    python -m bench.micro [--items wgmma tma] [--output bench/results/micro_cuda.json]

Needs nvcc to build and a device of compute capability 9.0 to run; says which of the two is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.timing import RESULTS, environment

SOURCE = Path(__file__).parent / "micro_sm90.cu"
OUTPUT = RESULTS / "micro_cuda.json"
ITEMS = ("wgmma", "exp2", "beside", "operation", "skeleton", "tma", "loads", "bytes", "wait", "shared")


def find_nvcc() -> str | None:
    """nvcc from the path, or from where the CUDA toolkit puts it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build(nvcc: str, program: Path) -> str:
    """Compiles the program; what the assembler says about registers, spills and serialised wgmma."""
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    command = [nvcc, "-O3", "-std=c++17", architecture, "-Xptxas", "-v", str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr}")
    return done.stdout + done.stderr


def measure(program: Path, item: str, seconds: float = 30.0) -> tuple[list[dict[str, Any]], str]:
    """(the device and the rows that came, what went wrong). A wrong result is a row with right = false."""
    try:
        done = subprocess.run([str(program), item], capture_output=True, timeout=seconds, check=False)
        printed, failure = done.stdout, "" if done.returncode in (0, 2) else f"ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        printed, failure = late.stdout or b"", f"took more than {seconds:.0f} s"
    rows = [json.loads(row) for row in printed.decode().splitlines(keepends=True) if row.endswith("\n")]
    failure = next((row["error"] for row in rows if "error" in row), failure)
    return [row for row in rows if "error" not in row], failure


def measure_all(program: Path, items: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, failures). Each item has a process of its own: a kernel that fails takes no other item with it."""
    rows, failures = [], []
    for item in items:
        found, failure = measure(program, item)
        rows += [row for row in found if "item" in row]
        failures += [f"{item}: {failure}"] if failure else []
    return rows, failures


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    megahertz = row["cycles"] / row["milliseconds"] / 1e3 if row["milliseconds"] else 0.0
    known = {"item", "name", "value", "unit", "ideal", "cycles", "milliseconds", "right"}
    more = "".join(f", {key.replace('_', ' ')} {value}" for key, value in row.items() if key not in known)
    ideal = f"ideal {row['ideal']:8.2f}" if row["ideal"] else " " * 14
    verdict = "" if row["right"] else "  WRONG RESULT"
    left = f"{row['item']:<8} {row['name']:<68} {row['value']:9.3f}  {ideal}  {megahertz:5.0f} MHz"
    return f"{left}  {row['unit']}{more}{verdict}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__.splitlines()[0])
    parser.add_argument("--items", nargs="*", choices=ITEMS, default=ITEMS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc: micro_sm90.cu was neither built nor run")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "micro_sm90"
        build(nvcc, program)
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            print("built micro_sm90.cu; no device of compute capability 9.0 here, so nothing was measured")
            return 0
        rows, failures = measure_all(program, options.items)
    for row in rows:
        print(line(row))
    command = f"python -m bench.micro --items {' '.join(options.items)}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": environment(), "command": command, "failures": failures, "rows": rows}
    options.output.write_text(json.dumps(data, indent=2) + "\n")
    print(options.output)
    wrong = [row["name"] for row in rows if not row["right"]]
    if wrong:
        print(f"{len(wrong)} of {len(rows)} with a wrong result: {wrong[0]}", file=sys.stderr)
    for failure in failures:
        print(f"micro_sm90.cu: {failure}", file=sys.stderr)
    return 1 if wrong or failures else 0


if __name__ == "__main__":
    sys.exit(main())
