"""bench/micro_sm90.cu compiles for sm_90a, and the machine code still holds what it is meant to measure."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from bench import micro, profile, variants

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """(the program, what the assembler said)."""
    nvcc = micro.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    program = tmp_path_factory.mktemp("micro") / "micro_sm90"
    return program, micro.build(nvcc, program)


@pytest.fixture(scope="module")
def code(built) -> dict[str, str]:
    """{mangled kernel name: its instructions, one a line}."""
    done = subprocess.run([CUOBJDUMP, "-sass", built[0]], capture_output=True, text=True, check=True)
    kernels: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            lines = kernels[name[1]] = []
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1].strip())
    return {name: "\n".join(lines) for name, lines in kernels.items()}


def only(code: dict[str, str], name: str) -> str:
    """The one kernel whose mangled name holds `name`."""
    (found,) = [text for kernel, text in code.items() if name in kernel]
    return found


def test_nothing_spills_or_is_serialised(built):
    log = built[1]
    assert not re.findall(r"C75\d\d.*", log)
    spills = re.findall(r"(\d+) bytes spill stores", log)
    assert len(spills) > 30 and set(spills) == {"0"}


# Template arguments: N, A in registers, B as MN-major, swizzle, k16 steps, split.
@pytest.mark.parametrize(
    ("arguments", "instruction", "count"),
    [
        ("80ELb1ELb1ELi32ELi7ELb0", r"HGMMA\.64x80x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", 7),
        ("80ELb0ELb1ELi32ELi7ELb0", r"HGMMA\.64x80x16\.F32\.BF16 R\d+, gdesc\[UR\d+\]\.tnspB", 7),
        ("80ELb1ELb1ELi32ELi7ELb1", r"HGMMA\.64x64x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", 7),
        ("80ELb1ELb1ELi32ELi7ELb1", r"HGMMA\.64x16x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", 7),
        ("112ELb0ELb0ELi32ELi5ELb0", r"HGMMA\.64x112x16\.F32\.BF16 R\d+, gdesc\[UR\d+\], R", 5),
        ("112ELb0ELb0ELi128ELi4ELb0", r"HGMMA\.64x112x16\.F32\.BF16 R\d+, gdesc\[UR\d+\], R", 4),
        ("128ELb1ELb0ELi32ELi5ELb0", r"HGMMA\.64x128x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\], R", 5),
        ("176ELb0ELb0ELi32ELi5ELb0", r"HGMMA\.64x176x16\.F32\.BF16 R\d+, gdesc\[UR\d+\], R", 5),
    ],
)
def test_the_loop_holds_the_wgmma_meant(code, arguments, instruction, count):
    text = only(code, f"wgmma_rateILi{arguments}")
    assert len(re.findall(instruction, text)) == count
    loop = text.split("WARPGROUP.ARRIVE")[1].split("WARPGROUP.DEPBAR")[0]
    assert loop.count("HGMMA") == text.count("HGMMA"), "the products stand in one loop, under one fence"
    assert "R2UR" not in loop, "descriptors are made before the loop"


@pytest.mark.parametrize(("sixteenths", "units"), [(0, 16), (1, 15), (2, 14), (4, 12), (16, 0)])
def test_the_exponentials_are_mixed_as_said(code, sixteenths, units):
    text = only(code, f"exp2_rateILi{sixteenths}E")
    clamps = text.count("FMNMX.NAN")
    rounds = (text.count("MUFU.EX2") + clamps) // 16
    assert rounds >= 2  # the unrolled loop and what is left of it
    assert text.count("MUFU.EX2") == rounds * units
    assert clamps == rounds * (16 - units)


# Template arguments: order, sixteenths by polynomial, when to rescale, sums by wgmma. Orders 2 and 3 run them under P V.
@pytest.mark.parametrize(
    ("order", "sixteenths", "rescale", "ones"),
    [(2, 0, 0, 0), (2, 1, 0, 0), (2, 2, 0, 0), (2, 0, 1, 0), (2, 1, 1, 0), (2, 0, 2, 0), (2, 0, 1, 1), (2, 0, 2, 1)]
    + [(3, 0, 0, 0), (3, 0, 1, 0), (3, 1, 1, 0)],
)
def test_the_exponentials_run_under_the_second_product(code, order, sixteenths, rescale, ones):
    text = only(code, f"skeletonILi112EL5Order{order}ELi{sixteenths}EL7Rescale{rescale}ELb{ones}E")
    parts = text.split("WARPGROUP.DEPBAR")
    units = 56 - sum(i * sixteenths % 16 < sixteenths for i in range(56)) + (0 if rescale == 2 else 2)
    assert parts[0].count("HGMMA.64x112x16") == 5
    assert parts[0].count("HGMMA.64x88x16" if ones else "HGMMA.64x80x16") == 7
    assert parts[1].count("MUFU.EX2") == units, "the assembler moved a wait above the exponentials"


@pytest.mark.parametrize(
    ("kernel", "instruction", "count"),
    [
        ("tma_rateIL4Load0E", "UTMALDG.4D ", 1),
        ("tma_rateIL4Load1E", "UTMALDG.3D ", 2),
        ("tma_rateIL4Load2E", "UTMALDG.3D ", 1),
        ("tma_rateIL4Load3E", "UTMALDG.3D ", 5),
        ("tma_rateIL4Load4E", "UTMALDG.3D ", 1),
        ("tma_rateIL4Load5E", "UBLKCP", 1),
        ("tma_rateIL4Load6E", "UTMALDG.3D ", 2),
        ("tma_sharedIL4Load0E", "UTMALDG.4D.MULTICAST", 1),
        ("tma_sharedIL4Load1E", "UTMALDG.3D.MULTICAST", 2),
        ("loads_besideIL4Load0E", "UTMALDG.4D ", 1),
        ("loads_besideIL4Load1E", "UTMALDG.3D ", 2),
        ("loads_besideIL4Load0E", "HGMMA", 12),
        ("wait_coverage", "HGMMA", 20),
    ],
)
def test_the_loads_are_the_ones_meant(code, kernel, instruction, count):
    assert only(code, kernel).count(instruction) == count


# Template arguments: operation, products of scores (five wgmma) or of outputs (seven).
@pytest.mark.parametrize(
    ("operation", "instructions"),
    [(0, ("MUFU.EX2",)), (1, ("FMUL",)), (2, ("FADD", "FFMA")), (3, ("FFMA",)), (4, ("FMNMX",)), (5, ("F2FP",))],
)
def test_the_operation_stands_beside_the_products(code, operation, instructions):
    for scores, products in ((1, 5), (0, 7)):
        text = only(code, f"operation_besideIL9Operation{operation}ELb{scores}E")
        assert text.count("HGMMA") == products
        assert sum(text.count(name) for name in instructions) >= 8 * 16


def test_without_a_device_it_says_so(built, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert micro.main(["--output", str(tmp_path / "none.json")]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(micro, "find_nvcc", lambda: None)
    assert micro.main([]) == 0
    assert "no nvcc" in capsys.readouterr().out


def test_variants_and_profile_say_what_they_lack(monkeypatch, capsys):
    monkeypatch.setattr(variants, "find_nvcc", lambda: None)
    assert variants.main([]) == 0
    assert "no nvcc" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        profile.main([])


def test_a_program_that_fails_keeps_its_rows(tmp_path):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho \'{"device": "d"}\'\necho \'{"item": "tma"}\'\necho \'{"error": "line 3"}\'\nexit 1\n')
    program.chmod(0o755)
    assert micro.measure(program, "tma") == ([{"device": "d"}, {"item": "tma"}], "line 3")
    program.write_text('#!/bin/sh\necho \'{"device": "d"}\'\nprintf \'{"item\'\nexec sleep 60\n')
    rows, failure = micro.measure(program, "tma", seconds=0.5)
    assert rows == [{"device": "d"}] and failure


@pytest.mark.gpu
def test_every_result_is_right(built):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("measures Hopper's instructions alone")
    rows, failures = micro.measure_all(built[0], micro.ITEMS)
    assert not failures
    assert len(rows) > 100 and not [row["name"] for row in rows if not row["right"]]
