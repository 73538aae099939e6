"""Reads the machine code of the Hopper forward: what the compiler may silently undo, its products back to back and its overlap.

`python -m tests.compiled_sm90` writes docs/hopper_code.json, the table that tests/test_compiled_sm90.py holds.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.compiled_cuda import EXTENSION, ROOT
from tests.host import build
from tests.test_package import cuobjdump

TABLE = ROOT / "docs" / "hopper_code.json"
COUNTED = ("MUFU.EX2", "FFMA", "FADD", "FMUL", "FMNMX", "F2FP", "SHFL", "R2UR")


def kernel_name(mangled: str) -> str | None:
    """'ForwardSm90<bf16, 80, 192, 96, 4, causal>' of an entry point's symbol, None for other kernels."""
    found = re.search(r"ForwardSm90ILb([01])ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELb([01])E", mangled)
    if found is None:
        return None
    bf16, *numbers, causal = found.groups()
    return f"ForwardSm90<{', '.join((('fp16', 'bf16')[int(bf16)], *numbers, ('full', 'causal')[int(causal)]))}>"


def listings(flag: str) -> dict[str, str]:
    """kernel -> what cuobjdump prints of it."""
    text = subprocess.run([cuobjdump(), "-arch", "sm_90a", flag, EXTENSION], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        if header := re.match(r"\s*Function\s*:?\s*(\S+?):?$", line):
            name = kernel_name(header[1])
        elif name is not None:
            found[name] = found.get(name, "") + line + "\n"
    return found


def instructions(listing: str) -> list[tuple[int, str]]:
    """(address, instruction) in order."""
    return [(int(a, 16), t.strip()) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]


def steps(code: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Each place where the products of two blocks are under way together: from their fence to the wait for both.

    products: shape -> how many. gap: the most instructions between two of them. under: exponentials between the wait for S and
    the wait for O, so those that run under the second product.
    """
    text = [t for _, t in code]
    found = []
    for first in [i for i, t in enumerate(text) if t == "WARPGROUP.ARRIVE"]:
        waits = [i for i in range(first, len(text)) if "WARPGROUP.DEPBAR" in text[i]][:2]
        if len(waits) < 2 or not text[waits[0]].endswith("gsb0, 0x1"):
            continue
        at = [i for i in range(first, waits[0]) if "HGMMA" in text[i]]
        shapes = Counter(re.search(r"HGMMA\.64x(\d+)x16", text[i])[1] for i in at)
        found.append({
            "products": dict(shapes),
            "gap": max(b - a - 1 for a, b in zip(at, at[1:], strict=False)),
            "under": sum("MUFU.EX2" in t for t in text[waits[0] : waits[1]]),
            "waits": [t.split(", ")[-1] for t in (text[i] for i in waits)],
            "from": code[first][0],
        })  # fmt: skip
    return found


def block_of_keys(code: list[tuple[int, str]]) -> list[str]:
    """What a block of keys costs: the smallest loop around the first of the steps, less the branch that computes S again."""
    start = steps(code)[0]["from"]
    loops, skipped = [], []
    for address, text in code:
        if jump := re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)", text):
            target = int(jump[1], 16)
            if target <= start < address:
                loops.append((address - target, target, address))
            elif start < address < target and any("HMMA" in t for a, t in code if address < a < target):
                skipped.append((target - address, address, target))
    _, first, last = min(loops)
    _, left, right = min(skipped)
    return [t for a, t in code if first <= a <= last and not left < a < right]


def sizes(names: list[str]) -> dict[str, tuple[int, int]]:
    """kernel -> (dynamic shared memory, blocks of a multiprocessor), as the sources say."""
    lines = []
    for name in names:
        words = name[len("ForwardSm90<") : -1].split(", ")
        words = [{"bf16": "true", "fp16": "false", "causal": "true", "full": "false"}.get(word, word) for word in words]
        kernel = f"ForwardSm90<{', '.join(words)}>"
        lines.append(f'  std::printf("%d %d\\n", {kernel}::SMEM, {kernel}::BLOCKS);')
    head = ("#include <cstdio>", '#include "fwd_sm90.cuh"', "using namespace qwen2vl_fast;", "int main() {")
    source = "\n".join([*head, *lines, "}"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sizes")
        command = [build.compiler(), "-std=c++17", "-O1", "-w", f"-I{build.CSRC}", "-x", "c++", "-", "-o", path]
        subprocess.run(command, input=source, text=True, check=True)
        printed = subprocess.run([path], capture_output=True, text=True, check=True).stdout.splitlines()
        return {name: tuple(map(int, line.split())) for name, line in zip(names, printed, strict=True)}


def table() -> dict[str, Any]:
    """Everything that docs/hopper_code.json holds."""
    from qwen2vl_fast import _C

    usage, listing = listings("-res-usage"), listings("-sass")
    known = sizes(sorted(listing))
    rows = {}
    for name in sorted(listing):
        code = instructions(listing[name])
        everything = "\n".join(t for _, t in code)
        number = {key: int(re.search(rf"{key}:(\d+)", usage[name])[1]) for key in ("REG", "STACK", "LOCAL")}
        block = block_of_keys(code)
        rows[name] = {
            "registers at launch": number["REG"],
            "highest register": max(map(int, re.findall(r"\bR(\d+)\b", everything))),
            "stack": number["STACK"] + number["LOCAL"],
            "local": len(re.findall(r"\b(?:LDL|STL)\b", everything)),
            "shared": known[name][0],
            "blocks": known[name][1],
            "steps": [{k: v for k, v in step.items() if k != "from"} for step in steps(code)],
            "block of keys": {"instructions": len(block), **{key: sum(key in t for t in block) for key in COUNTED}},
        }
    return {"cuda": _C.build_info()["cuda_version"], "kernels": rows}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n", encoding="utf-8")
