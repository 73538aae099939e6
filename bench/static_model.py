"""What can be known of every kernel without a GPU: bytes, operations, registers, occupancy, instructions, a predicted time.

qwen2vl-fast bench static_model [--tokens 32768] [--json] [--save]

Triton's kernels are compiled for sm_80 and sm_90 as their launchers call them, the CUDA kernels are read from the built
extension. A time is predicted from a floor (bytes or operations over the rate that a device of this kind reaches) and, for
attention, from the list of its tiles dealt to the multiprocessors. Where bench/results holds a measured time of the device,
it stands beside the prediction.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.attention import CASES
from bench.timing import RESULTS, ROOT, parser, publish, say
from qwen2vl_fast.positions import block_rows


@dataclass(frozen=True)
class Device:
    """A device by its data sheet; `copy` and `matmul` are what a copy and a matrix product reach of that."""

    capability: int
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    flops: float  # bf16, float32 accumulators, dense
    shared: int  # bytes a multiprocessor
    threads: int  # resident, a multiprocessor
    lanes: int = 128  # float32 operations a clock and multiprocessor
    copy: float = 0.90
    matmul: float = 0.80


DEVICES = {
    "A100": Device(80, 108, 1.41e9, 2.04e12, 312e12, 164 << 10, 2048, 64),
    "H100": Device(90, 132, 1.755e9, 3.35e12, 989e12, 228 << 10, 2048),
    "H200": Device(90, 132, 1.755e9, 4.80e12, 989e12, 228 << 10, 2048),
    "4090": Device(89, 128, 2.52e9, 1.008e12, 165e12, 100 << 10, 1536),
}
REGISTERS = 65536  # a multiprocessor, on all of these
LAUNCH = 2e-6  # seconds that a kernel takes beyond its work when it stands in a graph
EXPONENTIALS = 16  # a clock and multiprocessor
# Share of a matrix product's rate that the attention loop reaches while it runs. Hopper: what csrc/fwd_sm90.cuh is built for.
LOOP = {80: 0.80, 89: 0.85, 90: 0.80}
HEADERS = ("host/runtime.h", "tiles.cuh", "fwd_sm80.cuh", "bwd_rows.cuh", "bwd_sm80.cuh", "fwd_sm90.cuh")  # those with a kernel
PROBLEM, HEADS = 4 * (4096,), 16  # on which the CUDA kernels are predicted one by one
KEYS = {80: 64, 89: 64, 90: 96}  # of a block; the rows are what positions.block_rows chooses

# Bytes a token of each kernel in bf16: every input read once, every output written once.
BYTES = {
    "vision rope": 10240, "vision rope backward": 10240,
    "mrope 2B": 7168, "mrope 7B": 16384, "mrope 72B": 36864, "mrope 7B backward": 16384,
    **{f"add {kind} {width}": 8 * width for kind, width in
       (("layer norm", 1280), ("rms norm", 1536), ("rms norm", 3584), ("rms norm", 8192))},
    **{f"{kind} {width} backward": 8 * width for kind, width in
       (("layer norm", 1280), ("rms norm", 1536), ("rms norm", 3584), ("rms norm", 8192))},
    "merge": 5120, "merge from raster order": 5120, "merge from raster order backward": 7680,
    "bias quick gelu": 20480, "bias gelu": 20480, "bias quick gelu backward": 30720, "bias gelu backward": 30720,
    "swiglu 8960": 6 * 8960, "swiglu 18944": 6 * 18944, "swiglu 29568": 6 * 29568, "swiglu 18944 backward": 10 * 18944,
    **{f"gated {width}": 6 * width for width in (8960, 18944, 29568)}, "gated 18944 backward": 10 * 18944,
    "loss": 2 * 151936, "loss backward": 4 * 151936,  # of a token over all blocks of words
    "patchify": 3 * 1176,
}  # fmt: skip


def operations(kernel: str) -> int | None:
    """Of a token, counted in qwen2vl_fast/reference.py: sums, products, quotients, roots, exp, erf, sines are one each."""
    if kernel not in BYTES:
        return None
    back = kernel.endswith("backward")
    if "rope" in kernel:  # a pair: four products, two sums; an angle, its sine and its cosine for all heads
        return 3 * BYTES[kernel] // 4 + 3 * (40 if kernel.startswith("vision") else 64)
    if kernel == "patchify":
        return 2 * 1176
    if kernel.startswith("loss"):  # of a word: the largest, a difference, exp, a sum; two differences, exp, a product
        return 4 * 151936
    if "gated" in kernel or "swiglu" in kernel:  # a sigmoid of three, two products; their gradients
        return (10 if back else 5) * int(re.search(r"\d+", kernel)[0])
    if "gelu" in kernel:
        a_value = {"bias quick gelu": 6, "bias gelu": 6, "bias quick gelu backward": 11, "bias gelu backward": 12}
        return a_value[kernel] * 5120
    layer = "layer norm" in kernel or "merge" in kernel
    width = 1280 if "merge" in kernel else int(re.search(r"\d+", kernel)[0])
    if back:
        return (18 if layer else 12) * width
    return (7 if layer else 4) * width + (width if kernel.startswith("add") else 0)


# kernel -> (subject, op) of the measured results
MEASURED = {
    "vision rope": ("rope", "vision RoPE"),
    "mrope 2B": ("mrope", "M-RoPE 2B"),
    "mrope 7B": ("mrope", "M-RoPE 7B"),
    "mrope 72B": ("mrope", "M-RoPE 72B"),
    "merge": ("merge", "LayerNorm + merge"),
    "merge from raster order": ("merge", "LayerNorm + merge from raster order"),
    "add layer norm 1280": ("norms", "add + LayerNorm 1280"),
    "add rms norm 1536": ("norms", "add + RMSNorm 1536"),
    "add rms norm 3584": ("norms", "add + RMSNorm 3584"),
    "bias quick gelu": ("activations", "bias + quick_gelu 5120"),
    "bias gelu": ("activations", "bias + gelu 5120"),
    "swiglu 8960": ("activations", "swiglu 8960 (2B)"),
    "swiglu 18944": ("activations", "swiglu 18944 (7B)"),
    "gated 8960": ("activations", "swiglu of two 8960 (2B)"),
    "gated 18944": ("activations", "swiglu of two 18944 (7B)"),
    "patchify": ("patchify", "patchify"),
}
CLASSES = {
    "load": r"LDG|LDGSTS|UTMALDG", "store": r"STG|UTMASTG", "shared": r"LDS|STS|LDSM|STSM", "mma": r"HMMA|HGMMA",
    "exp and the like": r"MUFU", "float": r"F(?:ADD|MUL|FMA|MNMX)\d*|HFMA2", "convert": r"F2F\w*|I2F\w*|PRMT",
    "barrier": r"BAR|SYNCS",
}  # fmt: skip


def instructions(code: str) -> dict[str, int]:
    """Counts of the machine code by class, and all of them."""
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE))
    counts = {name: sum(n for op, n in found.items() if re.fullmatch(pattern, op)) for name, pattern in CLASSES.items()}
    return counts | {"all": sum(found.values())}


def occupancy(registers: int, threads: int, shared: int, device: Device) -> int:
    """Blocks that are resident on a multiprocessor at once. Registers come in units of 256 a warp."""
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_shared = device.shared // (shared + 1024) if shared else 32
    return min(by_registers, device.threads // threads, by_shared, 32 if device.capability != 89 else 24)


def triton_kernels() -> list[dict[str, Any]]:
    """Each launch of tests.compiled for sm_80 and sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget

    from tests import compiled

    rows = []
    for name, launch in compiled.cases().items():
        row: dict[str, Any] = {"kernel": name, "kind": "Triton", "bytes_a_token": BYTES.get(name)}
        row["flop_a_token"] = operations(name)
        for capability in compiled.CAPABILITIES:
            source, options = compiled.source(launch)
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                usage, code = (cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
            row[f"sm_{capability}"] = {
                "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                "threads": 32 * binary.metadata.num_warps,
                "shared": binary.metadata.shared,
                "instructions": instructions(code),
            }
        rows.append(row)
    return rows


def cuda_kernels() -> list[dict[str, Any]]:
    """Every kernel in the built extension. Dynamic shared memory is the launcher's: it comes from the sources."""
    built = sorted((ROOT / "qwen2vl_fast").glob("_C*.so"))
    if not built:
        return []
    usage, code, elf = (cuobjdump(flag, str(built[-1])) for flag in ("-res-usage", "-sass", "-elf"))
    threads = {
        name: int(value, 16)
        for name, value in re.findall(
            r"^\.nv\.info\.(\S+)$(?:(?!^\.nv\.info\.).)*?EIATTR_MAX_THREADS.*?Value:\s+(0x\w+)", elf, re.MULTILINE | re.DOTALL
        )
    }
    listings: dict[tuple[str, str], str] = {}
    for image in re.split(r"(?=^Fatbin elf code:)", code, flags=re.MULTILINE):
        arch = re.search(r"^arch = (\w+)", image, re.MULTILINE)
        for name, listing in re.findall(r"Function : (\S+)\n(.*?)(?=^\s+\.{5,}|\Z)", image, re.MULTILINE | re.DOTALL):
            listings[(arch[1], name)] = listing
    rows: dict[str, dict[str, Any]] = {}
    for image in re.split(r"(?=^Fatbin elf code:)", usage, flags=re.MULTILINE):
        arch = re.search(r"^arch = (\w+)", image, re.MULTILINE)
        for name, registers in re.findall(r"Function (\S+):\n\s+REG:(\d+)", image):
            row = rows.setdefault(name, {"kernel": readable(name), "kind": "CUDA", "bytes_a_token": None})
            row["flop"], row["bytes"] = cuda_work(row["kernel"])
            row[arch[1].removesuffix("a")] = {
                "registers": int(registers),
                "threads": threads.get(name),
                "instructions": instructions(listings[(arch[1], name)]),
            }
    known = [row["kernel"] for row in rows.values() if row["kernel"].split("<")[0] not in rows]
    shared = shared_bytes(known)
    for row in rows.values():
        for arch in ("sm_80", "sm_90"):
            if arch in row:
                row[arch]["shared"] = shared.get(row["kernel"])
    return list(rows.values())


def readable(mangled: str) -> str:
    """'ForwardSm80<true, 80, 2>' of a mangled name: the kernel's struct, its numbers and flags."""
    struct = re.search(r"entryINS_(\d+)(\w+)", mangled)
    if struct is None:
        return mangled
    length = int(struct[1])
    name, rest = struct[2][:length], struct[2][length:]
    found = re.findall(r"L([bij])(\d+)E", rest.split("EEEv")[0])
    values = [("false", "true")[int(value)] if kind == "b" else value for kind, value in found]
    return f"{name}<{', '.join(values)}>" if values else name


def shared_bytes(kernels: list[str]) -> dict[str, int]:
    """Dynamic shared memory of the CUDA kernels: SMEM of their structs, which g++ reads as the host execution does; else {}."""
    compiler = shutil.which("g++")
    if compiler is None or not kernels:
        return {}
    headers = "".join(f'#include "{name}"\n' for name in HEADERS)
    prints = "".join(f'  printf("%d\\n", int({name}::SMEM));\n' for name in kernels)
    text = f"{headers}#include <cstdio>\nusing namespace qwen2vl_fast;\nint main() {{\n{prints}}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "shared.cpp", Path(folder) / "shared"
        source.write_text(text)
        command = [compiler, "-std=c++17", "-w", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'host'}", source, "-o", program]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ does not read csrc/*.cuh:\n{done.stderr[-2000:]}")
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(kernels, map(int, printed.split()), strict=True))


def cuda_work(kernel: str) -> tuple[float, float]:
    """(operations, bytes) of a CUDA kernel on PROBLEM at its own head dim, not causal: products of L x L x D that it makes for
    every segment and head, tensors [T, H, D] in 16 bits that it reads and writes."""
    name, *rest = re.findall(r"\w+", kernel)
    dim = int(rest[1]) if len(rest) > 1 else 0
    adds = rest[4] == "true" if name == "BackwardKeys" else False
    # S, P V; S, dP, dV, dK, and with the flag dQ too, added in float32; S, dP, dQ
    products = {"ForwardSm80": 2, "ForwardSm90": 2, "BackwardKeys": 4 + adds, "BackwardQueries": 3}.get(name, 0)
    tensors = {"ForwardSm80": 4, "ForwardSm90": 4, "BackwardKeys": 6 + 4 * adds, "BackwardQueries": 5, "RowSums": 2}
    tensors["RoundDq"] = 3  # float32 to 16 bits
    tokens = sum(PROBLEM)
    return 2 * products * dim * HEADS * sum(n * n for n in PROBLEM), 2 * tensors.get(name, 0) * tokens * HEADS * dim


def cuobjdump(flag: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


def attention_seconds(lengths: tuple[int, ...], device: Device, *, heads: int = 16, dim: int = 80) -> float:
    """The longest of the multiprocessors' times when tiles are dealt longest first; a tile is its rows x its keys, padded."""
    rows, keys = block_rows(lengths, heads, dim, divmod(device.capability, 10), False), KEYS[device.capability]
    clocks = []
    for length in lengths:
        padded = -(-length // keys) * keys
        mma = 4 * rows * padded * dim / (device.flops / device.multiprocessors / device.clock)
        exponentials = rows * padded / EXPONENTIALS
        clocks += [max(mma / device.matmul / LOOP[device.capability], exponentials)] * (-(-length // rows) * heads)
    loads = [0.0] * device.multiprocessors
    for work in sorted(clocks, reverse=True):
        heapq.heappush(loads, heapq.heappop(loads) + work)
    return max(loads) / device.clock + LAUNCH


def measured_passes() -> dict[str, dict[str, Any]]:
    """{kernel: {device, tokens, seconds}} of the results at hand."""
    found = {}
    for kernel, (subject, op) in MEASURED.items():
        path = RESULTS / f"{subject}_cuda.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            if row["op"] == op and "qwen2vl_fast" in row["contenders"]:
                seconds = row["contenders"]["qwen2vl_fast"]["seconds"]["median"]
                found[kernel] = {"device": result["environment"]["device"], "tokens": row["tokens"], "seconds": seconds}
    return found  # the last row of an op has the most tokens


def measured_attention() -> dict[str, dict[str, Any]]:
    path = RESULTS / "attention_cuda.json"
    if not path.exists():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        row["case"]: {
            "device": result["environment"]["device"],
            "seconds": row["contenders"]["qwen2vl_fast"]["seconds"]["median"],
        }
        for row in result["rows"]
        if "seconds" in row["contenders"].get("qwen2vl_fast", {})
    }


def kernel_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    measured = measured_passes()
    rows = triton_kernels() + cuda_kernels()
    for row in rows:
        row["resident_blocks"], row["predicted_seconds"] = {}, {}
        for name, device in DEVICES.items():
            facts = row.get(f"sm_{80 if device.capability < 90 else 90}") or row.get(
                "sm_90a" if device.capability == 90 else ""
            )
            if facts and facts["threads"]:
                blocks = occupancy(facts["registers"], facts["threads"], facts.get("shared") or 0, device)
                row["resident_blocks"][name] = blocks
            if row["bytes_a_token"]:
                row["predicted_seconds"][name] = pass_seconds(row["kernel"], options.tokens, device)
            elif facts and "flop" in row:
                loop = device.flops * device.matmul * LOOP[device.capability]
                row["predicted_seconds"][name] = max(row["flop"] / loop, row["bytes"] / device.bandwidth / device.copy) + LAUNCH
        if row["kernel"] in measured:
            row["measured"] = compare(measured[row["kernel"]], row["kernel"])
    return rows


def pass_seconds(kernel: str, tokens: int, device: Device) -> float:
    """Its bytes, or its operations if they take longer."""
    moved = BYTES[kernel] / device.bandwidth / device.copy
    return tokens * max(moved, operations(kernel) / (device.lanes * device.multiprocessors * device.clock)) + LAUNCH


def compare(measured: dict[str, Any], kernel: str) -> dict[str, Any]:
    """The measured time, and the prediction for its device and number of tokens."""
    device = model_of(measured["device"])
    if device is None:
        return measured
    predicted = pass_seconds(kernel, measured["tokens"], device)
    return measured | {"predicted_seconds": predicted, "measured_over_predicted": measured["seconds"] / predicted}


def model_of(name: str) -> Device | None:
    return next((device for key, device in DEVICES.items() if key in name), None)


def attention_rows() -> list[dict[str, Any]]:
    measured, rows = measured_attention(), []
    for case, lengths in CASES.items():
        useful = 4 * 80 * 16 * sum(n * n for n in lengths)
        row: dict[str, Any] = {"case": case, "useful_flop": useful, "predicted_seconds": {}, "predicted_flops": {}}
        for name, device in DEVICES.items():
            seconds = attention_seconds(lengths, device)
            row["predicted_seconds"][name], row["predicted_flops"][name] = seconds, useful / seconds
        if case in measured and (device := model_of(measured[case]["device"])):
            predicted = attention_seconds(lengths, device)
            seconds = measured[case]["seconds"]
            row["measured"] = measured[case] | {"predicted_seconds": predicted, "measured_over_predicted": seconds / predicted}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    arguments = parser("static_model", __doc__, repeats=1)
    arguments.add_argument("--tokens", type=int, default=32768, help="for which times are predicted (default: 32768)")
    options = arguments.parse_args(argv)
    with torch.device("cpu"):
        rows = kernel_rows(options)
    attention = attention_rows()
    say(options, f"{'kernel':<40} {'registers 80/90':>16} {'blocks A100/H100':>17}   predicted us " + " ".join(DEVICES))
    for row in rows:
        registers = "/".join(str(row[arch]["registers"]) for arch in ("sm_80", "sm_90") if arch in row)
        blocks = "/".join(str(row["resident_blocks"].get(name, "-")) for name in ("A100", "H100"))
        times = " ".join(f"{seconds * 1e6:6.0f}" for seconds in row["predicted_seconds"].values())
        say(options, f"{row['kernel']:<40} {registers:>16} {blocks:>17}   {times}")
    for row in attention:
        speeds = ", ".join(f"{name} {speed / 1e12:.0f}" for name, speed in row["predicted_flops"].items())
        say(options, f"attention ({row['case']}): useful TFLOP/s predicted: {speeds}")
    devices = {name: asdict(device) for name, device in DEVICES.items()}
    publish("static_model", options, rows, attention=attention, devices=devices)


if __name__ == "__main__":
    main()
