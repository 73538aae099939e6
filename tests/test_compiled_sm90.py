"""The machine code of the Hopper forward, as the build left it: no spills, products back to back, exponentials under them."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from bench import variants
from bench.micro import find_nvcc
from qwen2vl_fast.ops.backends import extension_error
from qwen2vl_fast.positions import hopper_blocks
from tests.compiled_sm90 import ROOT, TABLE, kernel_name, steps, table

pytestmark = pytest.mark.skipif(extension_error() is not None, reason=f"{extension_error()}; test_package judges that")
REGISTERS = {192: 160, 128: 232, 64: 216}  # of a consumer, by rows of a tile: fwd_sm90.cuh
PRODUCER = {192: 32, 128: 40, 64: 40}
SHARED = 233472  # bytes of a multiprocessor, of which every block takes 1024 besides its own
GAP = 20  # instructions between two products, of which one takes 40 clocks: the tensor cores' queue stays full


@pytest.fixture(scope="module")
def found() -> dict:
    return table()


def test_machine_code_is_as_recorded(found):
    """docs/hopper_code.json holds for its release of nvcc exactly; for others, the limits below do."""
    recorded = json.loads(TABLE.read_text())
    assert set(found["kernels"]) == set(recorded["kernels"]), "run python -m tests.compiled_sm90"
    if found["cuda"] == recorded["cuda"]:
        for name, row in found["kernels"].items():
            assert row == recorded["kernels"][name], f"{name}: run python -m tests.compiled_sm90"


def test_nothing_is_spilled_and_everything_fits(found):
    assert len(found["kernels"]) == 20  # two dtypes, causal or not, five shapes
    for name, row in found["kernels"].items():
        rows = int(name.split(", ")[2])
        assert row["stack"] == row["local"] == 0, name
        assert row["highest register"] < REGISTERS[rows] and row["blocks"] == hopper_blocks(rows), name
        assert row["blocks"] * (row["shared"] + 1024) <= SHARED, name
        assert row["blocks"] * row["registers at launch"] * (rows + 64) * 2 <= 65536, name
        # setmaxnreg moves what the block got at its launch: a consumer would wait for ever for more.
        assert row["registers at launch"] * (rows + 64) * 2 == PRODUCER[rows] * 128 + REGISTERS[rows] * rows * 2, name


def test_products_and_overlap(found):
    """In both places, within a tile and across the end of one, the products that the shape needs and no more, back to back; all
    exponentials of a block between the wait for S and the wait for O, which the compiler can move above them without a word.
    """
    for name, row in found["kernels"].items():
        dim, _, keys = (int(x) for x in name.split(", ")[1:4])
        expected = {str(keys): dim // 16}
        expected[str(dim)] = expected.get(str(dim), 0) + keys // 16
        assert len(row["steps"]) == 2, name
        for step in row["steps"]:
            assert step["products"] == expected and step["waits"] == ["0x1", "0x0"], f"{name}: {step}"
            assert step["gap"] <= GAP, f"{name}: {step}"
            assert step["under"] >= keys // 2, f"{name}: {step}"
        assert row["block of keys"]["MUFU.EX2"] == keys // 2, name
        assert row["block of keys"]["FMNMX"] == row["block of keys"]["SHFL"] == 0, f"{name}: a maximum in the main loop"


CODE = [
    "WARPGROUP.ARRIVE", "HGMMA.64x96x16.F32.BF16 R24", "NOP", "HGMMA.64x80x16.F32.BF16 R72",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MUFU.EX2 R1, R1", "MUFU.EX2 R2, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0",
]  # fmt: skip


def test_a_wait_above_the_exponentials_is_seen():
    listed = list(enumerate(CODE))
    assert steps(listed) == [
        {"products": {"96": 1, "80": 1}, "gap": 1, "under": 2, "waits": ["0x1", "0x0"], "from": 0}
    ]
    moved = list(enumerate([*CODE[:5], CODE[-1], *CODE[5:-1]]))
    assert steps(moved)[0]["under"] == 0
    serial = list(enumerate([*CODE[:2], "WARPGROUP.DEPBAR.LE gsb0, 0x0", *CODE[2:]]))
    assert steps(serial) == []


def test_the_choice_follows_from_the_results():
    assert variants.CHOSEN.read_text() == variants.header(variants.measured()), "run python -m bench.variants --choose"


def test_the_best_form_with_both_sizes_is_chosen():
    def entry(name: str, rows: int, seconds: float, keys: int) -> dict:
        facts = {"keys": keys, "stages": 3, "turns": 0, "polynomial": 2, "reference": 1, "narrow": 1}
        return {"name": name, "rows": rows, "seconds": {"median": seconds}, **facts}

    case = [entry("chosen", 192, 2.0, 96), entry("chosen", 128, 3.0, 96)]
    case += [entry("fast", 192, 1.0, 112), entry("fast", 128, 4.0, 112), entry("small", 128, 0.5, 128)]
    result = {"rows": [{"case": "a", "variants": case}], "environment": {"device": "a card", "date": "today"}}
    short = {"case": "s", "variants": [entry("chosen", 128, 1.0, 96), entry("fast", 128, 9.0, 112)]}
    result["rows"].append(short)
    assert variants.best(result["rows"]) == pytest.approx({"chosen": 1.0, "fast": 2.0, "small": 4.0})
    text = variants.header(result)
    for line in ("KEYS = 112;", "STAGES = 3;", "TURNS = false;", "POLYNOMIAL = 2;", "::CONDITIONAL;", "NARROW = true;"):
        assert line in text
    assert '"fast", 2.000 times' in text
    assert variants.best([{"case": "a", "variants": case[2:]}]) == {}, "a chosen form that failed is no measure"


def test_the_compiler_reads_the_variants(tmp_path):
    """Its front end alone, in a second: building all of them is the long test below."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-fdevice-syntax-only", "-cubin"]
    for number, old in enumerate(("", '#include "../csrc/checks.h"\n')):  # without it nothing declares check_problem
        source = tmp_path / f"variants_{number}.cu"
        text = variants.SOURCE.read_text()
        assert old in text
        source.write_text(text.replace(old, "").replace('"../csrc/', f'"{ROOT / "csrc"}/'))
        done = subprocess.run([*command, source, "-o", tmp_path / "out"], capture_output=True, text=True)
        assert (done.returncode == 0) == (not old), done.stderr


@pytest.mark.full
def test_the_assembler_serialises_and_spills_nothing(tmp_path):
    """C75xx: ptxas made wgmma wait for each other. Of the variants, 192 rows of 112 keys are known to spill."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run(
        [*command, ROOT / "csrc" / "launch_sm90.cu", "-o", tmp_path / "forward"], capture_output=True, text=True, check=True
    )
    log = done.stdout + done.stderr
    assert not re.findall(r"C75\d\d.*", log)
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    log = variants.build(nvcc, tmp_path / "variants.so")
    assert not re.findall(r"C75\d\d.*", log)
    spilled = re.findall(r"properties for (\S+)\n.*?[1-9]\d* bytes spill", log)
    assert {kernel_name(symbol) for symbol in spilled} <= {"ForwardSm90<bf16, 80, 192, 112, 3, full>"}
