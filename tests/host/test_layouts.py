"""tests/host/layouts.py is what CuTe prints: its headers come from PyPI, nvcc compiles the program that prints, cute.cu."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.host import layouts
from tests.host.test_twins import high_word, sizes
from tests.test_package import load_setup

HEADERS = "nvidia-cutlass==4.2.0.0"
ROWS, COLUMNS = 48, 128  # of cute.cu's tiles: rows of B in registers' products, columns of those in shared memory


def printed(folder: Path) -> dict[str, str]:
    """name -> what CuTe printed."""
    nvcc = load_setup().find_nvcc()
    assert nvcc is not None, "no nvcc: the layouts can't be printed"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, HEADERS]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    program, source = folder / "cute", Path(__file__).with_name("cute.cu")
    include = folder / "cutlass_library" / "source" / "include"
    subprocess.run([nvcc, "-std=c++17", "-arch=sm_90a", "-w", "-I", include, "-o", program, source], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split(": ", 1) for line in lines if not line.startswith("ERROR"))  # of an address that the host has not


def tile(text: str, width: int) -> list[list[int]]:
    """The table of a swizzled tile; the swizzle is that of the width."""
    bits, plain = re.fullmatch(r"Sw<(\d),4,3> o smem_ptr\[16b\]\(unset\) o (.*)", text).groups()
    assert int(bits) == layouts.SWIZZLE_BITS[width]
    return layouts.layout(plain.replace("_", ""))


@pytest.mark.full
def test_layouts_are_those_of_cute(tmp_path):
    found = printed(tmp_path)
    for name in ("MMA_A", "MMA_B", "MMA_C", "LDMATRIX", "LDMATRIX_TRANSPOSED", "WGMMA_A"):
        assert found.pop(name).replace("_", "") == getattr(layouts, name), name
    for n in (64, 80, 112):
        assert found.pop(f"WGMMA_C {n}").replace("_", "") == layouts.WGMMA_C.format(n_8=n // 8)
    assert len(found) == 2 * 11
    for name, text in found.items():
        major, *middle, width, n = name.split()
        width, n = int(width), int(n)
        if middle:  # a descriptor, as tests/host/test_twins.py makes it; K-major ones have no leading offset, and say 1
            low, high = map(int, text.split())
            assert high % 2**32 == high_word(8 * width, width) % 2**32, name
            leading = 1 if major == "K" else ROWS * width >> 4 if n > width // 2 else 0
            assert low == leading << 16, name
        elif major == "K":
            assert tile(text, width) == layouts.layout(layouts.K_MAJOR[width], rows=n, **sizes(n, COLUMNS)), name
        else:
            assert tile(text, width) == layouts.layout(layouts.MN_MAJOR[width], rows=ROWS, **sizes(ROWS, n)), name
