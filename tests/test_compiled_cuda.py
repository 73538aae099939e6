"""The machine code of the extension's attention kernels, as the build left it, read without a GPU."""

from __future__ import annotations

import json

import pytest

from qwen2vl_fast import positions
from qwen2vl_fast.ops.backends import extension_error
from tests import turns
from tests.compiled_cuda import (
    DEVICE_CODE,
    DOCUMENT,
    TABLE,
    backward_clocks,
    clocks,
    disassembly,
    document,
    main_loop,
    shared_clocks,
    table,
    unordered,
    waits,
)

pytestmark = pytest.mark.skipif(extension_error() is not None, reason=f"{extension_error()}; test_package judges that")
# Products of one turn of the main loop: a warp's rows (M_TILES * 16) and a step's rows as tiles of 16 x 8, over D / 16 or over
# STEP / 16 by D / 8; two of them in the forward, four for dk and dv, one more for dq beside them, three for dq alone.
PRODUCTS = {"ForwardSm80": 2, "BackwardKeys": 4, "BackwardQueries": 3}

SHARED = 99 << 10  # bytes that a block gets on 8.6 and 8.9, which run the machine code for 8.0


def problems(name: str, row: dict) -> list[str]:
    """What the machine code has that it must not have."""
    found = [f"{row[key]} {key}" for key in ("stack", "local") if row[key]]
    if row["blocks"] < 1:
        found.append("no block fits a multiprocessor")
    if row["shared"] > SHARED:
        found.append(f"{row['shared']} bytes of shared memory: no block fits a device of capability 8.6 or 8.9")
    family = name.split("<")[0]
    if family in PRODUCTS:
        if row["stores 16"] == 0:
            found.append("results are not stored in 16-byte pieces")
        if row["copy 16"] == 0 or row["ldmatrix"] == 0:
            found.append("no copies of 16 bytes, or no ldmatrix")
        if row["mma"] < 64:
            found.append(f"{row['mma']} products in the main loop")
    return found


def test_machine_code_is_as_recorded():
    """docs/cuda_registers.json holds for its release of nvcc exactly; for others, the limits alone do."""
    found, recorded = table(), json.loads(TABLE.read_text())
    assert set(found["kernels"]) == set(recorded["kernels"]), "run python -m tests.compiled_cuda"
    for name, archs in found["kernels"].items():
        for arch, row in archs.items():
            assert problems(name, row) == [], f"{name} {arch}: {row}"
            if found["cuda"] == recorded["cuda"]:
                assert row == recorded["kernels"][name][arch], f"{name} {arch}: run python -m tests.compiled_cuda"


def test_the_document_shows_the_table():
    text = DOCUMENT.read_text()
    assert text == document(text, json.loads(TABLE.read_text())), "run python -m tests.compiled_cuda"


def test_clocks_by_hand():
    """docs/attention.md's arithmetic of a step of 64 keys at D = 80 with 128 rows: 160 products of 8 clocks."""
    row = {"mma": 160, "ldmatrix": 40, "copy 16": 10, "ex2": 68, "loop": 900}
    assert clocks(row, "sm_80") == {"tensor": 1280, "shared": 800, "ex2": 544, "issue": 900}
    assert clocks(row, "sm_90a")["tensor"] == 640


def test_the_backward_is_predicted_to_lead():
    """By 1.1 over FlashAttention-2's, where dq is added; its turn by hand: 5 products of 64 x 128 x 96 on four tensor cores."""
    rows = json.loads(TABLE.read_text())
    for arch, products in (("sm_80", 256), ("sm_90a", 512)):
        found = backward_clocks(rows, arch)
        assert found["FlashAttention-2"]["tensor"] == 5 * 64 * 128 * 96 // (4 * products) // 2
        assert found["FlashAttention-2"]["all"] >= 1.1 * found["dq added"]["all"]


def test_turns_are_predicted_to_cost_little():
    """At most 12 % of the mode that adds as blocks come: by the largest unit, by the sum of all, and by that and the waits."""
    rows = json.loads(TABLE.read_text())
    for arch in DEVICE_CODE.values():
        found = backward_clocks(rows, arch)
        assert found["in turn"]["all"] <= 1.12 * found["dq added"]["all"]
        for size in (64, 128):
            assert shared_clocks(rows, arch, "in turn", size) <= 1.12 * shared_clocks(rows, arch, "dq added", size)
    slower = max(shared_clocks(rows, a, "in turn", 128) / shared_clocks(rows, a, "dq added", 128) for a in DEVICE_CODE.values())
    lines = [line.split("|")[3:-1] for line in waits().splitlines() if line.startswith("| 1.0")]
    assert len(lines) == 2 and all(slower * float(value) <= 1.12 for line in lines for value in line)


def test_what_waiting_costs():
    """By hand: two blocks of 128 keys, 8 steps; one block behind the other where half of the device is less."""
    for resident, late, expected in ((4, None, 8), (4, 1.0, 8), (4, 5.0, 9), (3, None, 8), (3, 1.0, 9), (3, 2.0, 10)):
        assert turns.steps([256], 1, 128, 32, resident, late) == expected, (resident, late)


def test_the_price_of_small_blocks():
    """What positions.backward_rows chooses by is the mean of both devices and head dims where dq is added, and near each; what
    that choice loses with two passes."""
    rows = json.loads(TABLE.read_text())

    def prices(way: str, dim: int) -> list[float]:
        return [shared_clocks(rows, a, way, 64, dim) / shared_clocks(rows, a, way, 128, dim) for a in DEVICE_CODE.values()]

    added = prices("dq added", 64) + prices("dq added", 80)
    assert positions._SMALL_STEP == round(sum(added) / len(added), 2)
    assert all(abs(price - positions._SMALL_STEP) < 0.03 for price in added)
    assert max(prices("two passes", 80)) < 1.09 * positions._SMALL_STEP


def test_turns_are_passed_with_fences():
    """A host sees no difference between `publish` and a store without its order; the machine code shows it."""
    code = disassembly()
    ends = {"STG.E.STRONG.GPU": 2, "LDG.E.STRONG.GPU": 1}  # passed on after a step, and after the last; awaited
    for arch in DEVICE_CODE.values():
        found = {name: [text for _, text in lines] for name, lines in code[arch].items() if "in turn" in name}
        assert len(found) == 10
        for name, lines in found.items():
            counts = {word: sum(word in text for text in lines) for word in ends}
            assert counts == ends and not unordered(lines), f"{name} {arch}: {counts} {unordered(lines)}"


def test_a_missing_fence_is_seen():
    right = ["MEMBAR.ALL.GPU", "ERRBAR", "STG.E.STRONG.GPU [R2], R1", "LDG.E.STRONG.GPU R3, [R4]", "CCTL.IVALL", "BAR.SYNC"]
    assert unordered(right) == []
    assert unordered(right[1:]) == ["STG.E.STRONG.GPU [R2], R1"]
    assert unordered([*right[:4], "BAR.SYNC", "CCTL.IVALL"]) == ["LDG.E.STRONG.GPU R3, [R4]"]


def test_products_are_those_that_the_algorithm_needs():
    """No more than the shapes ask for: 80 is computed as 80, and nothing is computed twice."""
    for name, archs in table()["kernels"].items():
        family, _, words = name.rstrip(">").partition("<")
        if family not in PRODUCTS:
            continue
        _, dim, m_tiles, *rest = words.split(", ")
        step = int(rest[0]) if rest else (64 if int(dim) <= 80 else 32)
        products = PRODUCTS[family] * int(m_tiles) * step * int(dim) // 128
        if rest[1:] in (["add dq"], ["in turn"]):
            column_warps = 64 // step  # of the four; they share D / 16 pairs of columns, and some compute one that is none
            products += 4 * int(m_tiles) * 2 * -(-int(dim) // (16 * column_warps))
        for arch, row in archs.items():
            assert row["mma"] == products, f"{name} {arch}: {row['mma']} products, expected {products}"
            if family == "ForwardSm80":
                # Every score, and for each row the rescaling of its sums.
                assert row["ex2"] == int(m_tiles) * (step // 2 + 2), f"{name} {arch}: {row['ex2']}"


def test_the_main_loop_is_found():
    """The innermost loop with most of the products, not the loop over tiles around it."""
    code = [(0, "MOV"), (16, "LDSM"), *((32 + 16 * i, "HMMA.16816") for i in range(4)), (96, "@P0 BRA 0x10"), (112, "BRA 0x0")]
    assert main_loop(code)[0] == "LDSM" and len(main_loop(code)) == 6
    assert main_loop([(0, "MOV"), (16, "BRA 0x0")]) == []
