"""Compiles the Triton kernels for devices that are not here, as their launchers call them, and reads the machine code.

`python -m tests.compiled` writes docs/registers.json, the table that tests/test_compiled.py holds.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).resolve().parent.parent / "docs" / "registers.json"
CAPABILITIES = (80, 90)
MODULES = ("rope", "norm", "activation", "gated", "loss", "patchify", "resize", "sums")
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.uint16: "u16",
}  # fmt: skip


@dataclass
class Launch:
    """What a launcher asked for: the kernel, its arguments and options."""

    kernel: Any
    arguments: tuple
    options: dict[str, Any]


class _Recorder:
    """In the place of a kernel: keeps its launches and runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append(Launch(self.kernel, arguments, options))


def kernels() -> dict[str, Any]:
    """Every kernel that a launcher starts: name -> jitted function."""
    found = {}
    for module in MODULES:
        names = vars(importlib.import_module(f"qwen2vl_fast.kernels.{module}"))
        found.update({name: kernel for name, kernel in names.items() if re.fullmatch(r"_\w+_kernel", name)})
    return found


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches of the package's kernels are kept instead of run."""
    launches: list[Launch] = []
    known = kernels()
    places = [importlib.import_module(f"qwen2vl_fast.kernels.{m}") for m in MODULES]
    before = [(place, n) for place in places for n in vars(place) if n in known]
    try:
        for place, name in before:
            setattr(place, name, _Recorder(known[name], launches))
        yield launches
    finally:
        for place, name in before:
            setattr(place, name, known[name])


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The launch as Triton specialises it: pointers and integers divisible by 16 are known to be, ones are constants."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    options = dict(launch.options)
    arguments = iter(launch.arguments)
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = options.pop(name) if name in options else next(arguments)
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if number % 16 == 0 and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Registers, bytes of stack, and the global accesses of the machine code by width in bytes.

    A spill is a store to the stack, so no stack means no spills; STL and LDL are counted besides.
    """
    asts, options = source(launch)
    binary = triton.compile(asts, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    found = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    accesses: dict[str, int] = {}
    for operation, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDL|STL)\b((?:\.\w+)*)", code):
        width = re.search(r"\.(128|64|[US]16|[US]8)\b", modifiers)
        size = 4 if width is None else int(re.sub(r"\D", "", width[1])) // 8
        accesses[f"{operation} {size}"] = accesses.get(f"{operation} {size}", 0) + 1
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "accesses": dict(sorted(accesses.items()))}


def _cuobjdump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


def cases() -> dict[str, Launch]:
    """The released models' shapes in bf16, small or odd ones, other dtypes where these take most registers: name -> launch."""
    from qwen2vl_fast.kernels import activation, gated, loss, merge, norm, patchify, resize, rope

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    found: dict[str, Launch] = {}

    def keep(name: str, launcher: Callable, *arguments: Any, **options: Any) -> None:
        with recorded() as launches:
            launcher(*arguments, **options)
        found[name], *second = launches
        for launch in second:  # of a gradient that is a sum
            found[f"{name}, sums"] = launch

    def rotate(name: str, heads: int, heads_k: int, dim: int, axes: int, sign: float = 1.0, dtype=torch.bfloat16) -> None:
        qkv = torch.empty((48, heads + 2 * heads_k, dim), dtype=dtype)
        q, k = qkv[:, :heads], qkv[:, heads : heads + heads_k]
        positions, half = torch.zeros((axes, 48), dtype=torch.int64), dim // 2
        sections = (half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8) if axes == 3 else (half // 2, half // 2)
        table = torch.empty((2, 48, half) if dtype == torch.float64 else half if axes == 3 else half // 2)
        keep(name, rope.launch, q, k, q, k, positions, table, sections, 1.0, sign)

    rotate("vision rope", 16, 16, 80, 2)
    rotate("vision rope backward", 16, 16, 80, 2, -1.0)
    rotate("mrope 2B", 12, 2, 128, 3)
    rotate("mrope 7B", 28, 4, 128, 3)
    rotate("mrope 72B", 64, 8, 128, 3)
    rotate("mrope 7B backward", 28, 4, 128, 3, -1.0)
    rotate("mrope head 64", 8, 2, 64, 3)
    rotate("mrope head 96", 8, 2, 96, 3)
    rotate("mrope 7B fp16", 28, 4, 128, 3, dtype=torch.float16)
    rotate("mrope 7B fp32", 28, 4, 128, 3, dtype=torch.float32)
    rotate("vision rope fp16", 16, 16, 80, 2, dtype=torch.float16)
    rotate("vision rope fp32", 16, 16, 80, 2, dtype=torch.float32)
    rotate("mrope head 96 fp16", 8, 2, 96, 3, dtype=torch.float16)
    rotate("mrope 7B fp64", 28, 4, 128, 3, dtype=torch.float64)
    rotate("vision rope fp64", 16, 16, 80, 2, dtype=torch.float64)

    widths = (("layer norm", 1280), ("rms norm", 1536), ("rms norm", 3584), ("rms norm", 8192), ("layer norm", 160))
    doubles = (("layer norm", 1280), ("rms norm", 3584), ("layer norm", 4096))  # the last is the widest
    for kind, width, dtype, end in (
        *((*width, torch.bfloat16, "") for width in widths), *((*width, torch.float64, " fp64") for width in doubles)
    ):  # fmt: skip
        x, weight = made(48, width, dtype=dtype), made(width, dtype=dtype)
        bias = weight if kind == "layer norm" else None
        keep(f"add {kind} {width}{end}", norm.launch, x, weight, bias, 1e-6, residual=x)
        keep(f"{kind} {width} backward{end}", norm.launch_backward, x, x, weight, bias, 1e-6, grad_total=x)
    for dtype, end in ((torch.bfloat16, ""), (torch.float64, " fp64")):
        x, weight, rows = made(48, 1280, dtype=dtype), made(1280, dtype=dtype), torch.zeros(48, dtype=torch.int64)
        keep(f"merge{end}", merge.launch, x, weight, weight, None, 1e-6)
        keep(f"merge from raster order{end}", merge.launch, x, weight, weight, rows, 1e-6)
        keep(f"merge from raster order backward{end}", norm.launch_backward, x, x, weight, weight, 1e-6, rows=rows)

    for width, name in ((1280, "layer norm 1280"), (65, "layer norm of odd width 65")):
        x, weight = made(48, width, dtype=torch.float32), made(width, dtype=torch.float32)
        keep(f"{name} backward fp32", norm.launch_backward, x, x, weight, weight, 1e-6, grad_total=x)

    for dtype, end in ((torch.bfloat16, ""), (torch.float64, " fp64")):
        for name, is_quick in (("quick gelu", True), ("gelu", False)):
            x, bias = made(48, 5120, dtype=dtype), made(5120, dtype=dtype)
            keep(f"bias {name}{end}", activation.launch, x, bias, is_quick)
            keep(f"bias {name} backward{end}", activation.launch_backward, x, x, bias, is_quick)
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        x, bias = made(48, 5120, dtype=dtype), made(5120, dtype=dtype)
        keep(f"bias gelu backward {name}", activation.launch_backward, x, x, bias, False)
    for width in (8960, 18944, 29568):
        x = made(48, 2 * width)
        keep(f"swiglu {width}", activation.launch_swiglu, x)
        keep(f"gated {width}", gated.launch, made(48, width), made(48, width))
    for dtype, end in ((torch.bfloat16, ""), (torch.float64, " fp64")):
        x = made(48, 18944, dtype=dtype)
        keep(f"swiglu 18944 backward{end}", activation.launch_swiglu_backward, x, made(48, 2 * 18944, dtype=dtype))
        keep(f"gated 18944 backward{end}", gated.launch_backward, x, x, x)
    x = made(48, 18944, dtype=torch.float64)
    keep("swiglu 18944 fp64", activation.launch_swiglu, made(48, 2 * 18944, dtype=torch.float64))
    keep("gated 18944 fp64", gated.launch, x, x)
    keep("gated 18944 backward fp32", gated.launch_backward, *(made(48, 18944, dtype=torch.float32) for _ in range(3)))
    x, bias = made(48, 1001, dtype=torch.float16), made(1001, dtype=torch.float16)
    keep("bias quick gelu of odd width 1001 backward fp16", activation.launch_backward, x, x, bias, True)
    x = made(48, 1000, dtype=torch.float16)
    keep("gated of odd width 1000 backward fp16", gated.launch_backward, x, x, x)

    for dtype, end in ((torch.bfloat16, ""), (torch.float64, " fp64")):
        rows = [torch.empty(48, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(3)]
        for name, launcher in (("loss", loss.launch), ("loss backward", loss.launch_slopes)):
            keep(f"{name}{end}", launcher, made(48, 8192, dtype=dtype), torch.zeros(48, dtype=torch.int64), 8192, *rows)

    frames = torch.empty((2, 56, 84, 3), dtype=torch.uint8)
    for name, dtype in (("patchify", torch.bfloat16), ("patchify fp32", torch.float32), ("patchify fp64", torch.float64)):
        keep(name, patchify.launch, frames, dtype, (0.1, 0.2, 0.3), (-1.0, -2.0, -3.0))
    taps = torch.empty(84, 5, dtype=torch.int32)
    keep("resize", resize.launch, frames, 2, taps[:, 0].contiguous(), taps)
    return found


def table() -> dict[str, Any]:
    """Everything that docs/registers.json holds."""
    rows = {name: {f"sm_{c}": compiled(launch, c) for c in CAPABILITIES} for name, launch in cases().items()}
    return {"triton": triton.__version__, "kernels": rows}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
