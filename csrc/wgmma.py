"""Writes csrc/wgmma.cuh: one wrapper an instruction shape, since inline assembly has to spell every register out.

    python csrc/wgmma.py
"""

from __future__ import annotations

from pathlib import Path

SHARED = (80, 112, 128, 144, 176)  # N of S = Q K^T: rows of a key block
REGISTERS = (64, 80, 128)  # N of O += P V: head dims
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}

HEAD = """\
// Written by csrc/wgmma.py. D[64, N] (+)= A[64, 16] B[16, N], float32 accumulators; see ptx_sm90.cuh for their layout.
//
// A descriptor is passed as its low word (address and leading offset); the high word (stride offset, swizzle) is constant.
#pragma once

#include "ptx_sm90.cuh"

namespace qwen2vl_fast::ptx {

// A [64, 16] and B [N, 16], both K-major in shared memory. accumulate = 0 overwrites d.
template <int N, typename Element>
struct WgmmaShared;

// A [64, 16] in registers (the layout of m16n8k16 in each warp), B [16, N] in shared memory, N contiguous. d += A B.
template <int N, typename Element>
struct WgmmaRegisters;
"""


def accumulators(n: int, indent: str) -> tuple[str, str]:
    count = n // 2
    names = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return names, operands


def shared(n: int, element: str, name: str) -> str:
    names, operands = accumulators(n, "")
    count = n // 2
    return f"""
template <>
struct WgmmaShared<{n}, {element}> {{
  template <uint32_t HIGH>
  DEV static void run(float (&d)[{count}], uint32_t a, uint32_t b, int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\n.reg .b64 a, b;\\nsetp.ne.b32 p, %{count + 2}, 0;\\nmov.b64 a, {{%{count}, %{count + 3}}};\\nmov.b64 b, {{%{count + 1}, %{count + 3}}};\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} "
        "{{{names}}}, "
        "a, b, p, 1, 1, 0, 0;\\n}}\\n"
        : {operands}
        : "r"(a), "r"(b), "r"(accumulate), "n"(HIGH));
  }}
}};
"""


def registers(n: int, element: str, name: str) -> str:
    names, operands = accumulators(n, "")
    count = n // 2
    return f"""
template <>
struct WgmmaRegisters<{n}, {element}> {{
  template <uint32_t HIGH>
  DEV static void run(float (&d)[{count}], const uint32_t (&a)[4], uint32_t b) {{
    asm volatile(
        "{{\\n.reg .pred p;\\n.reg .b64 b;\\nsetp.eq.b32 p, 0, 0;\\nmov.b64 b, {{%{count + 4}, %{count + 5}}};\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} "
        "{{{names}}}, "
        "{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, b, p, 1, 1, 1;\\n}}\\n"
        : {operands}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(HIGH));
  }}
}};
"""


def main() -> None:
    parts = [HEAD]
    for element, name in TYPES.items():
        parts += [shared(n, element, name) for n in SHARED]
        parts += [registers(n, element, name) for n in REGISTERS]
    parts.append("\n}  // namespace qwen2vl_fast::ptx\n")
    Path(__file__).with_name("wgmma.cuh").write_text("".join(parts))


if __name__ == "__main__":
    main()
