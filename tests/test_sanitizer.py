"""compute-sanitizer on the sm_80 attention: silent about it, and loud about bugs planted into it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.host import build
from tests.test_package import load_setup

pytestmark = pytest.mark.gpu
SOURCE = Path(__file__).with_name("sanitized.cu")
# tool -> (file, old, new) of a bug that it must find
PLANTED = {
    "memcheck": ("rows_sm80.cuh", "row + pass < valid ? 16 : 0", "16"),
    "racecheck": ("fwd_sm80.cuh", "      barrier();  // this step's keys are here", "      // this step's keys are here"),
    "initcheck": ("bwd_rows.cuh", "target[piece] = Words4{};", "(void)target;"),
    "synccheck": (
        "fwd_sm80.cuh", "    if (Q_IN_REGISTERS) barrier();  // o goes where",
        "    if (thread_index() % 32 < 16) warp_barrier();\n    if (Q_IN_REGISTERS) barrier();  // o goes where",
    ),
}  # fmt: skip


def compiled(folder: Path, csrc: Path) -> Path:
    program = folder / "sanitized"
    nvcc = load_setup().find_nvcc()
    assert nvcc is not None, "this test needs nvcc"
    command = [nvcc, "-std=c++17", "-O2", "-lineinfo", "-arch=native", f"-I{csrc}", SOURCE, "-o", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program


def sanitized(tool: str, program: Path) -> subprocess.CompletedProcess:
    found = shutil.which("compute-sanitizer")
    assert found is not None, "this test needs compute-sanitizer, which is part of the CUDA toolkit"
    command = [found, "--tool", tool, "--error-exitcode", "7", "--print-limit", "3", program]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


def test_nothing_is_found(tmp_path):
    program = compiled(tmp_path, build.CSRC)
    for tool in PLANTED:
        result = sanitized(tool, program)
        assert result.returncode == 0 and re.search(r"^done$", result.stdout, re.MULTILINE), f"{tool}\n{result.stdout}"


@pytest.mark.parametrize("tool", PLANTED)
def test_planted_bugs_are_found(tool, tmp_path):
    result = sanitized(tool, compiled(tmp_path, build.altered(tmp_path, *PLANTED[tool])))
    assert result.returncode == 7, result.stdout
