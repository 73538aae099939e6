"""Reads the machine code of the extension's attention kernels: registers, local memory, the instructions of their main loops.

`python -m tests.compiled_cuda` writes docs/cuda_registers.json and what docs/attention.md shows of it;
tests/test_compiled_cuda.py holds both. `python -m tests.compiled_cuda FILE` prints the main loops in the output of
`cuobjdump -sass`, of a peer's library too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from bench.attention import CASES
from bench.static_model import DEVICES
from qwen2vl_fast.positions import backward_rows, backward_steps
from tests import turns
from tests.host import build
from tests.test_package import cuobjdump

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "cuda_registers.json"
DOCUMENT = ROOT / "docs" / "attention.md"
END = "<!-- end -->"
EXTENSION = ROOT / "qwen2vl_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# Of a multiprocessor: registers, bytes of shared memory, threads; bytes of it that a resident block costs besides its own.
LIMITS = {"sm_80": (65536, 164 << 10, 2048, 1024), "sm_90a": (65536, 228 << 10, 2048, 1024)}
INSTRUCTIONS = {
    "mma": r"HMMA\.16816", "ex2": r"MUFU\.EX2", "ldmatrix": r"LDSM\.16\.MT?88\.4", "copy 16": r"LDGSTS\.E\.\S*128",
    "ffma": r"FFMA", "fmul": r"FMUL", "fmnmx": r"FMNMX", "shuffle": r"SHFL", "barrier": r"BAR\.SYNC", "red": r"RED\.|REDG",
}  # fmt: skip
# Clocks of a multiprocessor for which one instruction of each of a block's four warps keeps a unit. Each warp has a quarter of
# the multiprocessor to itself: issue, and tensor cores (m16n8k16 is 2048 multiplications, at 256 a clock on A100, 512 on H100).
# All share the shared-memory port (128 bytes a clock; 512 for an ldmatrix or a 16-byte copy of a warp) and 16 exponentials.
CLOCKS = {
    "sm_80": {"tensor": {"mma": 8}, "shared": {"ldmatrix": 16, "copy 16": 16}, "ex2": {"ex2": 8}, "issue": {"loop": 1}},
    "sm_90a": {"tensor": {"mma": 4}, "shared": {"ldmatrix": 16, "copy 16": 16}, "ex2": {"ex2": 8}, "issue": {"loop": 1}},
}
# One turn of the main loop of FlashAttention-2's backward for head dims 65 to 96, for each of its eight warps: 64 queries by
# 128 keys over 96 columns. Read by the same functions from PyTorch 2.12.0 (sm_80, bf16, lengths and head dim not even).
PEER = {"mma": 240, "ldmatrix": 108, "copy 16": 6, "ex2": 32, "loop": 1034}
# What takes part in the backward at head dim 80, by its way to dq: each takes 4096 pairs of a query and a key a turn.
BACKWARD = {
    "dq added": ("BackwardKeys<bf16, 80, 2, 32, add dq>",),
    "in turn": ("BackwardKeys<bf16, 80, 2, 32, in turn>",),
    "two passes": ("BackwardKeys<bf16, 80, 2, 32, two passes>", "BackwardQueries<bf16, 80, 2, 32>"),
}
SIZES = {64: "1, 64", 128: "2, 32"}  # rows of a block -> the same kernels by their names
DEVICE_CODE = {"A100": "sm_80", "H100": "sm_90a"}
# Of a kernel's name, in C++.
WORDS = {"bf16": "true", "fp16": "false", "add dq": "true, false", "two passes": "false, false", "in turn": "true, true"}
FAMILIES = r"(ForwardSm80|BackwardKeys|BackwardQueries|RowSums|RoundDq|BuildTiles)"


def kernel_name(mangled: str) -> str | None:
    """'ForwardSm80<bf16, 80, 2>' of an entry point's symbol, None for other kernels."""
    found = re.search(rf"entryINS_\d+{FAMILIES}(I(?:L[bi]\d+E)+)?E", mangled)
    if found is None:
        return None
    values = re.findall(r"L([bi])(\d+)E", found[2] or "")
    if not values:
        return found[1]
    words = ["bf16" if values[0][1] == "1" else "fp16"]
    words += [value for kind, value in values[1:] if kind == "i"]
    if ways := [value == "1" for kind, value in values[1:] if kind == "b"]:  # ADD_DQ, IN_TURN
        words.append("in turn" if ways[1] else "add dq" if ways[0] else "two passes")
    return f"{found[1]}<{', '.join(words)}>"


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions of the smallest loop that holds half of all matrix products; none for a kernel without any."""
    products = sum("HMMA" in text for _, text in code)
    loops = []
    for address, text in code:
        jump = re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t for a, t in code if int(jump[1], 16) <= a <= address]
            if products and 2 * sum("HMMA" in t for t in body) >= products:
                loops.append(body)
    return min(loops, key=len, default=[])


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, text) of a disassembly."""
    return [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]


def unordered(code: list[str]) -> list[str]:
    """Stores for other blocks (`publish`) without a fence just before them, and loads of what others stored (`wait_for`) behind
    which L1 is not emptied before the next barrier.
    """
    found = []
    for at, text in enumerate(code):
        if "STG.E.STRONG.GPU" in text and not any("MEMBAR.ALL.GPU" in t for t in code[max(at - 4, 0) : at]):
            found.append(text)
        if "LDG.E.STRONG.GPU" in text:
            rest = code[at : next((i for i in range(at, len(code)) if "BAR.SYNC" in code[i]), len(code))]
            if not any("CCTL.IVALL" in t for t in rest):
                found.append(text)
    return found


def turn(loop: list[str]) -> dict[str, int]:
    """How many instructions a turn of a main loop has, in all and of each kind."""
    kinds = {key: sum(bool(re.search(rf"\b(?:{p})", t)) for t in loop) for key, p in INSTRUCTIONS.items() if loop}
    return {"loop": len(loop), **kinds}


def clocks(row: dict[str, int], arch: str) -> dict[str, int]:
    """Predicted clocks of a turn of the main loop (a block's rows by a step's rows), by unit; it takes the largest at least."""
    return {unit: sum(row[name] * each for name, each in parts.items()) for unit, parts in CLOCKS[arch].items()}


def shared_bytes() -> dict[str, tuple[int, int]]:
    """kernel -> (threads, dynamic shared memory), as the sources say."""
    instances = sorted({name for names in _functions(("-res-usage",)).values() for name in names})
    lines = []
    for name in instances:
        family, _, rest = name.partition("<")
        words = [WORDS.get(word, word) for word in rest[:-1].split(", ")]
        kernel = f"{family}<{', '.join(words)}>" if rest else family
        lines.append(f'  std::printf("%d %d\\n", {kernel}::THREADS, {kernel}::SMEM);')
    headers = ("<cstdio>", '"fwd_sm80.cuh"', '"bwd_sm80.cuh"', '"tiles.cuh"')
    source = "\n".join([*(f"#include {h}" for h in headers), "using namespace qwen2vl_fast;", "int main() {", *lines, "}"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sizes")
        command = [build.compiler(), "-std=c++17", "-O1", "-w", f"-I{build.CSRC}", "-x", "c++", "-", "-o", path]
        subprocess.run(command, input=source, text=True, check=True)
        printed = subprocess.run([path], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: tuple(map(int, line.split())) for name, line in zip(instances, printed, strict=True)}


def _functions(flags: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """arch -> kernel -> what cuobjdump prints of it."""
    text = subprocess.run([cuobjdump(), *flags, EXTENSION], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, str]] = {}
    arch = name = None
    for line in text.splitlines():
        if header := re.search(r"arch = (sm_\w+)", line):
            arch, name = header[1], None
        elif header := re.match(r"\s*Function\s*:?\s*(\S+?):?$", line):
            name = kernel_name(header[1])
        elif name is not None:
            found.setdefault(arch, {}).setdefault(name, "")
            found[arch][name] += line + "\n"
    return found


def disassembly() -> dict[str, dict[str, list[tuple[int, str]]]]:
    """arch -> kernel -> instructions."""
    return {arch: {n: instructions(t) for n, t in names.items()} for arch, names in _functions(("-sass",)).items()}


def table() -> dict[str, Any]:
    """Everything that docs/cuda_registers.json holds."""
    from qwen2vl_fast import _C

    usage, code, sizes = _functions(("-res-usage",)), disassembly(), shared_bytes()
    rows: dict[str, Any] = {}
    for arch, names in sorted(code.items()):
        registers, shared, threads, reserve = LIMITS[arch]
        for name, lines in sorted(names.items()):
            number = {key: int(re.search(rf"{key}:(\d+)", usage[arch][name])[1]) for key in ("REG", "STACK", "LOCAL")}
            loop = main_loop(lines)
            count, dynamic = sizes[name]
            by_registers = registers // (-(-number["REG"] // 8) * 8 * count)
            resident = min(by_registers, threads // count, shared // (dynamic + reserve))
            everything = "\n".join(t for _, t in lines)
            row = rows.setdefault(name, {})[arch] = {
                "registers": number["REG"], "stack": number["STACK"] + number["LOCAL"],
                "local": len(re.findall(r"\b(?:LDL|STL)\b", everything)), "shared": dynamic, "blocks": resident,
                "stores 16": len(re.findall(r"\bSTG\.E\.128", everything)), **turn(loop),
            }  # fmt: skip
            if loop:
                row["clocks a step"] = clocks(row, arch)
    return {"cuda": _C.build_info()["cuda_version"], "kernels": rows}


def readable(rows: dict[str, Any]) -> str:
    """The bf16 kernels with a main loop, for sm_80, as a table."""
    head = "kernel registers shared blocks mma EX2 ldmatrix copies instructions tensor port exponentials".split()
    lines = [f"| {' | '.join(head)} |", f"| --- {'| --: ' * (len(head) - 1)}|"]
    for name, archs in rows["kernels"].items():
        row = archs.get("sm_80", {})
        if "bf16" not in name or "clocks a step" not in row:
            continue
        counts = [row[key] for key in ("registers", "shared", "blocks", "mma", "ex2", "ldmatrix", "copy 16", "loop")]
        counts += [row["clocks a step"][unit] for unit in ("tensor", "shared", "ex2")]
        lines.append(f"| `{name.replace('bf16, ', '')}` | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def backward_clocks(rows: dict[str, Any], arch: str) -> dict[str, dict[str, int]]:
    """Clocks for 4096 pairs at head dim 80, by unit, of each way to dq and of FlashAttention-2; all: each kernel's largest."""
    found = {}
    for way, names in BACKWARD.items():
        parts = [clocks(rows["kernels"][name][arch], arch) for name in names]
        found[way] = {unit: sum(part[unit] for part in parts) for unit in CLOCKS[arch]}
        found[way]["all"] = sum(max(part.values()) for part in parts)
    peer = clocks(PEER, arch)  # twice as many warps in a turn of twice as many pairs
    return found | {"FlashAttention-2": peer | {"all": max(peer.values())}}


def predicted(rows: dict[str, Any]) -> str:
    """The backward beside FlashAttention-2's, as a table."""
    head = "| | way | tensor | port | exponentials | instructions | all | FlashAttention-2 / this |"
    lines = [head, f"| --- | --- {'| --: ' * 6}|"]
    for device, arch in DEVICE_CODE.items():
        found = backward_clocks(rows, arch)
        for way, row in found.items():
            values = [str(row[unit]) for unit in ("tensor", "shared", "ex2", "issue", "all")]
            values.append(f"{found['FlashAttention-2']['all'] / row['all']:.2f}")
            lines.append(f"| {device} | {way} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def shared_clocks(rows: dict[str, Any], arch: str, way: str, size: int, dim: int = 80) -> float:
    """Clocks for 4096 pairs in blocks of `size` rows, when the units of a block take turns and two blocks share them."""
    names = [name.replace("80, 2, 32", f"{dim}, {SIZES[size]}") for name in BACKWARD[way]]
    return sum(sum(clocks(rows["kernels"][name][arch], arch).values()) for name in names) / 2


def blocks(rows: dict[str, Any]) -> str:
    """Microseconds of the backward's large kernel by the rows of their blocks, and the rows that are taken, as a table."""
    ways = ("dq added", "in turn")  # two passes are for causal masks, and here nothing is causal
    columns = [f"{device}: {way}, {size}" for device in DEVICE_CODE for way in ways for size in SIZES]
    columns[4:4], columns[9:] = ["taken"], ["taken"]
    lines = [f"| | {' | '.join(columns)} |", f"| --- {'| --: ' * len(columns)}|"]
    for case, lengths in (CASES | {"600 x 64": 600 * (64,)}).items():
        values = []
        for device, arch in DEVICE_CODE.items():
            model = DEVICES[device]
            steps = {size: backward_steps(lengths, 16, size, model.multiprocessors, False) for size in SIZES}
            times = [steps[size] * shared_clocks(rows, arch, way, size) / model.clock for way in ways for size in SIZES]
            values += [f"{1e6 * time:.0f}" for time in times]
            values.append(str(backward_rows(lengths, 16, 80, model.multiprocessors, False)))
        lines.append(f"| {f'({case})' if case in CASES else case} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def waits() -> str:
    """How many times as long the steps of the backward in turn take as if nobody waited, as a table."""
    cases = {name: lengths for name, lengths in CASES.items() if name != "h"}  # too many steps for every run of the tests
    lines = [f"| seen after | device | {' | '.join(f'({name})' for name in cases)} |", f"| --- | --- {'| --: ' * len(cases)}|"]
    for late in (1.0, 1.5):
        for device in DEVICE_CODE:
            processors, values = DEVICES[device].multiprocessors, []
            for lengths in cases.values():
                size = backward_rows(lengths, 16, 80, processors, False)
                arguments = (lengths, 16, size, {64: 64, 128: 32}[size], 2 * processors)
                values.append(f"{turns.steps(*arguments, late) / turns.steps(*arguments, None):.2f}")
            lines.append(f"| {late} steps | {device} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def document(text: str, rows: dict[str, Any]) -> str:
    """The text of docs/attention.md with the tables between their marks."""
    tables = {"machine code": readable(rows), "blocks": blocks(rows), "backward": predicted(rows), "turns": waits()}
    for name, lines in tables.items():
        start = f"<!-- {name} -->\n"
        before, _, rest = text.partition(start)
        text = before + start + lines + END + rest.partition(END)[2]
    return text


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for part in re.split(r"Function\s*:", Path(path).read_text())[1:]:
            print(part.split()[0], turn(main_loop(instructions(part))))
    if sys.argv[1:]:
        raise SystemExit
    found = table()
    TABLE.write_text(json.dumps(found, indent=1) + "\n")
    DOCUMENT.write_text(document(DOCUMENT.read_text(), found))
