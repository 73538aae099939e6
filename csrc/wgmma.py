"""Writes csrc/wgmma.cuh: one wrapper an instruction shape, since inline assembly has to spell every register out.

    python csrc/wgmma.py
"""

from __future__ import annotations

from pathlib import Path

SHARED = (64, 96, 112, 128, 176)  # N of S = Q K^T: rows of a key block; the kernels have 96 and 128, tests the others too
REGISTERS = (64, 80, 128)  # N of O += P V: columns of V

HEAD = """\
// Written by csrc/wgmma.py. Warpgroup products D [64, N] (+)= A [64, 16] B [16, N] with float32 accumulators; ptx_sm90.cuh says
// how they are fenced, committed and awaited.
//
// Thread t of the warpgroup, warp w = t / 32 and lane l = t % 32, holds D's row 16 w + l / 4 + 8 (i / 2 % 2), column
// 8 (i / 4) + 2 (l % 4) + i % 2 in d[i]. An operand in shared memory is named by a descriptor: `a`, `b` are its low word
// (address >> 4, leading offset >> 4 in the upper half), `high` is its high word (stride offset >> 4, swizzle).
#pragma once

#include "ptx_sm90.cuh"

namespace qwen2vl_fast {

// A and B [N, 16] both K-major in shared memory. accumulate = 0 overwrites d.
template <bool BF16, int N>
struct WgmmaShared;

// A in registers, each warp's 16 rows as in mma_16x8x16; B [16, N] with N contiguous. d += A B.
template <bool BF16, int N>
struct WgmmaRegisters;
"""

SHAPE = """
template <>
struct {struct}<{flag}, {n}> {{
  static DEV void run(float (&d)[{count}], {arguments}) {{
#ifdef __CUDACC__
    asm volatile(
        "{{\\n.reg .pred p;\\n.reg .b64 a, b;\\n"
        "{prepare}\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} "
        "{{"
{names}
        "}}, "
        "{operands}\\n}}\\n"
        : {accumulators}
        : {inputs});
#else
    host::{twin}(d, {n}, {passed}, {flag});
#endif
  }}
}};
"""


def wrapped(items: list[str], indent: int, quoted: bool) -> str:
    """The items over lines of at most 128 columns."""
    lines, line = [], ""
    for i, item in enumerate(items):
        piece = item + (", " if i + 1 < len(items) else "")
        if indent + len(line) + len(piece) > 122:
            lines, line = [*lines, line.rstrip() if not quoted else line], ""
        line += piece
    lines.append(line)
    margin = " " * indent
    return ("\n").join(f'{margin}"{line}"' if quoted else (margin if i else "") + line for i, line in enumerate(lines))


def shape(n: int, flag: str, name: str, in_registers: bool) -> str:
    count = n // 2
    at = [f"%{count + i}" for i in range(6)]
    if in_registers:
        text = {
            "struct": "WgmmaRegisters",
            "arguments": "const uint32_t (&a)[4], uint32_t b, uint32_t high",
            "prepare": f"setp.eq.b32 p, 0, 0;\\nmov.b64 b, {{{at[4]}, {at[5]}}};",
            "operands": f"{{{', '.join(at[:4])}}}, b, p, 1, 1, 1;",
            "inputs": '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(high)',
            "twin": "wgmma_registers",
            "passed": "a, b, high",
        }
    else:
        text = {
            "struct": "WgmmaShared",
            "arguments": "uint32_t a, uint32_t b, uint32_t high, int accumulate",
            "prepare": f"setp.ne.b32 p, {at[3]}, 0;\\nmov.b64 a, {{{at[0]}, {at[2]}}};\\nmov.b64 b, {{{at[1]}, {at[2]}}};",
            "operands": "a, b, p, 1, 1, 0, 0;",
            "inputs": '"r"(a), "r"(b), "r"(high), "r"(accumulate)',
            "twin": "wgmma_shared",
            "passed": "a, b, high, accumulate",
        }
    names = wrapped([f"%{i}" for i in range(count)], 8, quoted=True)
    accumulators = wrapped([f'"+f"(d[{i}])' for i in range(count)], 10, quoted=False)
    return SHAPE.format(n=n, count=count, flag=flag, name=name, names=names, accumulators=accumulators, **text)


def main() -> None:
    parts = [HEAD]
    for flag, name in (("true", "bf16"), ("false", "f16")):
        parts += [shape(n, flag, name, False) for n in SHARED]
        parts += [shape(n, flag, name, True) for n in REGISTERS]
    parts.append("\n}  // namespace qwen2vl_fast\n")
    Path(__file__).with_name("wgmma.cuh").write_text("".join(parts))


if __name__ == "__main__":
    main()
