"""What is installed here and what can run: versions, devices, the CUDA extension and every backend of every op."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from .ops import backends
from .ops.backends import extension_error
from .version import __version__

CORE = ("torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "pillow", "huggingface_hub")
OPTIONAL = ("av", "transformers", "flash-attn", "matplotlib")


def versions() -> str:
    """The Python, this package and its dependencies, optional ones too: one a line."""
    rows = [("qwen2vl-fast", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows.append(("platform", platform.platform()))
    for names, absence in ((CORE, "not installed"), (OPTIONAL, "not installed (optional)")):
        for name in names:
            try:
                rows.append((name, importlib.metadata.version(name)))
            except importlib.metadata.PackageNotFoundError:
                rows.append((name, absence))
    return _table(rows)


def devices() -> str:
    """The CPU as torch uses it, and each CUDA device or why there is none."""
    rows = [("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            rows.append((f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}"))
    elif torch.version.cuda is None:
        rows.append(("cuda", f"torch {torch.__version__} was built without CUDA"))
    else:
        rows.append(("cuda", f"torch was built for CUDA {torch.version.cuda} but finds no device"))
    rows.append(("driver", _driver()))
    return _table(rows)


def extension() -> str:
    """What the CUDA extension was compiled for and whether it finds a device, or why there is none."""
    if reason := extension_error():
        return f"extension: {reason}"
    from . import _C

    info = _C.build_info()
    try:
        found = f"{_C.device_count()} devices"
    except RuntimeError as error:
        found = str(error)
    code = ", ".join([*info["architectures"], *(f"{ptx} (PTX)" for ptx in info["ptx"])])
    return f"extension: built with CUDA {info['cuda_version']} for {code}; {found}"


def report() -> str:
    """Everything of this module as text; the reason stands beside each backend that can't run."""
    return "\n".join([versions(), "", devices(), "", extension(), "", "Backends", "", str(backends())])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report. argv: none is expected."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        print(f"doctor takes no arguments, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    print(report())
    return 0


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _driver() -> str:
    """The NVIDIA driver's version as nvidia-smi tells it, or what it says instead."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi not found"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[0] if lines else f"nvidia-smi said nothing (exit status {result.returncode})"


if __name__ == "__main__":
    sys.exit(main())
