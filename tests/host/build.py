"""Builds csrc/host with g++: shared libraries for ctypes, sanitized programs, and altered copies of the sources.

Objects are kept in build/host under a hash of all that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "host"
RUNTIME = ("runtime", "memory", "twins", "hopper")
# Value range propagation of g++ 12.2 folds the last four of eight k-steps of the Hopper kernel at head_dim 128 onto the first.
FLAGS = ("-std=c++17", "-O2", "-fno-tree-vrp", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> str:
    """g++. Missing, it is a failure wherever CUDA code is compiled at all."""
    found = shutil.which("g++")
    if found is None:
        from tests.test_package import load_setup

        if load_setup().find_nvcc() is None:
            pytest.skip("neither g++ nor nvcc is here: no CUDA code is compiled on this machine, and none of it is proved")
        pytest.fail("host execution of the CUDA kernels needs g++")
    return found


def _run(*command: object) -> None:
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-8000:]}"


def _output(name: str, inputs: Sequence[Path], command: Sequence[object]) -> Path:
    """The file that `command -o file` makes; made again when the inputs or the command differ."""
    digest = hashlib.sha256(" ".join(map(str, command)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = CACHE / f"{digest.hexdigest()[:24]}-{name}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # other processes may build the same
            _run(*command, "-o", Path(folder, name))
            os.replace(Path(folder, name), target)
    return target


def _headers(csrc: Path) -> list[Path]:
    return sorted([*csrc.glob("*.h"), *csrc.glob("*.cuh"), *(csrc / "host").glob("*.h")])


def _objects(csrc: Path, units: Sequence[str], flags: Sequence[str], folder: str) -> list[Path]:
    gcc = compiler()

    def build(unit: str) -> Path:
        # The runtime knows nothing of the kernels, and is not built again for an altered one.
        own = unit in RUNTIME
        source = CSRC / "host" / f"{unit}.cpp" if own else csrc.parent / folder / f"{unit}.cpp"
        headers = sorted((CSRC / "host").glob("*.h")) if own else _headers(csrc)
        return _output(f"{unit}.o", [source, *headers], [gcc, *flags, "-c", source])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, units))


def library(unit: str, csrc: Path = CSRC, folder: str = "csrc/host") -> Path:
    """The shared library of <folder>/<unit>.cpp."""
    objects = _objects(csrc, [*RUNTIME, unit], FLAGS, folder)
    return _output(f"{unit}.so", objects, [compiler(), "-shared", *objects, "-ldl"])


def program(units: Sequence[str], csrc: Path = CSRC) -> Path:
    """The program of these units with the address and undefined-behaviour sanitizers."""
    objects = _objects(csrc, [*RUNTIME, *units], (*FLAGS, *SANITIZED), "csrc/host")
    return _output("program", objects, [compiler(), *SANITIZED, *objects, "-ldl"])


def altered(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc in folder in which `old`, found once in `file`, reads `new`."""
    text = (CSRC / file).read_text()
    assert text.count(old) == 1, f"csrc/{file} holds {text.count(old)} times, not once:\n{old}"
    copy = Path(shutil.copytree(CSRC, folder / "csrc"))
    (copy / file).write_text(text.replace(old, new))
    return copy
