"""Builds csrc/host with g++: shared libraries for ctypes, sanitized programs, and altered copies of the sources.

Objects are kept in build/host under a hash of all that goes into them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
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
RUNTIME = ("host/runtime.cpp", "host/memory.cpp", "host/twins.cpp", "host/hopper.cpp", "host/cuda.cpp")
LAUNCHES = ("host/launches.cpp", "launch.cu", "launch_sm90.cu", "launch_bwd.cu")
STAND_IN = "host/cuda"  # the headers in the place of CUDA's
# Value range propagation of g++ 12.2 folds the last four of eight k-steps of the Hopper kernel at head_dim 128 onto the first.
FLAGS = ("-std=c++17", "-O2", "-fno-tree-vrp", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@functools.cache
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


def _output(name: str, inputs: Sequence[Path], flags: Sequence[str], command: Sequence[object]) -> Path:
    """The file that `g++ flags command -o file` makes; made again when the flags or what the inputs hold differ."""
    digest = hashlib.sha256(" ".join([compiler(), *flags]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = CACHE / f"{digest.hexdigest()[:24]}-{name}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # other processes may build the same
            _run(compiler(), *flags, *command, "-o", Path(folder, name))
            os.replace(Path(folder, name), target)
    return target


def _with_headers(csrc: Path, source: Path) -> list[Path]:
    """The source and all of ours that it includes, so that an altered file makes only those build again that see it."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include [<"](.+)[>"]', path.read_text(), re.MULTILINE):
            places = [(folder / name).resolve() for folder in (path.parent, csrc / STAND_IN)]
            found += [place for place in places if place.exists() and place not in found][:1]
    return found


def _objects(csrc: Path, units: Sequence[str], flags: Sequence[str]) -> list[Path]:
    def build(unit: str) -> Path:
        source = (csrc / unit).resolve()
        command = [f"-I{csrc / STAND_IN}", "-x", "c++", "-c", source]
        return _output(f"{source.stem}.o", _with_headers(csrc, source), flags, command)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, units))


@functools.cache
def library(csrc: Path = CSRC, units: Sequence[str] = LAUNCHES) -> Path:
    """A shared library with these units of csrc."""
    objects = _objects(csrc, [*RUNTIME, *units], FLAGS)
    return _output("library.so", objects, ["-shared"], [*objects, "-ldl"])


def own_library(unit: str) -> Path:
    """The shared library of tests/host/<unit>.cpp."""
    return library(units=(f"../tests/host/{unit}.cpp",))


@functools.cache
def program(csrc: Path = CSRC) -> Path:
    """host/main.cpp with the address and undefined-behaviour sanitizers."""
    objects = _objects(csrc, [*RUNTIME, *LAUNCHES, "host/main.cpp"], (*FLAGS, *SANITIZED))
    return _output("program", objects, SANITIZED, [*objects, "-ldl"])


def change(csrc: Path, file: str, old: str, new: str) -> None:
    """`old`, found once in the file, now reads `new`."""
    text = (csrc / file).read_text()
    assert text.count(old) == 1, f"csrc/{file} holds {text.count(old)} times, not once:\n{old}"
    (csrc / file).write_text(text.replace(old, new))


def altered(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc in folder with this change."""
    copy = Path(shutil.copytree(CSRC, folder / "csrc"))
    change(copy, file, old, new)
    return copy
