"""The machine code of the Triton kernels for sm_80 and sm_90, made and read without a GPU."""

from __future__ import annotations

import json

import pytest
import torch
import triton

from qwen2vl_fast.kernels import activation, gated, loss, merge, norm, patchify, resize, rope
from tests.compiled import CAPABILITIES, TABLE, Launch, cases, compiled, kernels, recorded, source

REGISTERS = 65536  # of a multiprocessor


def narrow_allowed(name: str) -> set[str]:
    """Global accesses below 16 bytes that a kernel may have."""
    if name == "resize":
        return {"LDG 1", "LDG 4", "STG 1"}  # bytes at any place, first samples and weights
    if name.endswith("sums"):
        return {"STG 2", "STG 4", "STG 8"}  # one column a thread, so that many programs share the work
    if "rope" in name:
        return {"LDG 8", "LDG 4"}  # positions and frequencies
    if "loss" in name:
        return {"LDG 2", "LDG 4", "LDG 8", "STG 4", "STG 8"}  # of a row: the label, its logit, the statistics
    if "raster" in name:
        return {"LDG 8", "LDGSTS 8"}  # row numbers
    if name == "layer norm 1280 backward":
        return {"LDG 8"}  # weight, once a program
    if "160" in name:
        return {"LDG 2", "LDG 4", "STG 8"}  # weight, bias and partial sums: 160 of them a program
    return {"LDG 2"} if "patchify" in name else set()  # three bytes a pixel, a gather


def narrow(name: str, accesses: dict[str, int]) -> list[str]:
    found = [f"{n} of {access}" for access, n in accesses.items()
             if not access.endswith(" 16") and access not in narrow_allowed(name)]  # fmt: skip
    wide_store = "STG 16" in accesses or name.endswith("sums") or name.removesuffix(" fp64") in ("resize", "loss")
    wide_load = {"LDG 16", "LDGSTS 16"} & set(accesses) or name == "resize" or "patchify" in name
    return found if wide_store and wide_load else [*found, "no access of 16 bytes"]


def problems(name: str, row: dict, warps: int) -> list[str]:
    """What the machine code has that it must not have."""
    found = [] if "odd width" in name else narrow(name, row["accesses"])
    if row["stack"]:
        found.append(f"{row['stack']} bytes of local memory")
    if row["registers"] * 32 * warps > REGISTERS:
        found.append(f"{row['registers']} registers: no block fits a multiprocessor")
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code_is_as_recorded(capability):
    """docs/registers.json holds for its Triton release exactly; for others, the limits alone do."""
    recorded_table = json.loads(TABLE.read_text())
    launches = cases()
    assert set(recorded_table["kernels"]) == set(launches), "run python -m tests.compiled"
    assert {launch.kernel.__name__ for launch in launches.values()} == set(kernels()), "a kernel without a case"
    for name, launch in launches.items():
        row = compiled(launch, capability)
        assert problems(name, row, launch.options["num_warps"]) == [], f"{name}, sm_{capability}: {row}"
        if recorded_table["triton"] == triton.__version__:
            assert row == recorded_table["kernels"][name][f"sm_{capability}"], f"{name}: run python -m tests.compiled"


def test_spills_and_narrow_accesses_are_seen():
    launch = cases()["mrope 7B"]
    starved = compiled(Launch(launch.kernel, launch.arguments, {**launch.options, "maxnreg": 32}), 90)
    found = problems("mrope 7B", starved, 2)
    assert any("local memory" in p for p in found) and any("STL" in p for p in found), starved
    gate_up = torch.empty(48 * 512 + 1, dtype=torch.bfloat16)[1:].view(48, 512)  # two bytes off
    with recorded() as launches:
        activation.launch_swiglu(gate_up)
    assert problems("swiglu", compiled(launches[0], 90), 4) != []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_narrow_rows_in_float64_do_not_spill(capability):
    """What half a tile is for in float64: the table's rows are wider, and take one row a tile either way."""
    x, weight = torch.empty(48, 65, dtype=torch.float64), torch.empty(65, dtype=torch.float64)
    with recorded() as launches:
        norm.launch_backward(x, x, weight, weight, 1e-6, grad_total=x)
    assert compiled(launches[0], capability)["stack"] == 0


def specialised(launcher, *arguments, **options) -> tuple:
    with recorded() as launches:
        launcher(*arguments, **options)
    found = []
    for launch in launches:
        made, meta = source(launch)
        found += [made.signature, made.constants, str(made.attrs), meta]
    return tuple(found)


def test_no_recompilation_when_lengths_change():
    """Tokens, batch, number of images, sizes of frames: the same specialisation, hence the same binary."""
    weight = torch.empty(160, dtype=torch.float16)
    seen: dict[str, list] = {}

    def note(name, *arguments, **options):
        seen.setdefault(name, []).append(specialised(*arguments, **options))

    for count in (1, 2, 15, 16, 17, 1000, 4096):
        qkv = torch.empty(count, 8, 128, dtype=torch.float16)
        positions = torch.empty(3, count, dtype=torch.int64)
        q, k = qkv[:, :4], qkv[:, 4:6]
        note("mrope", rope.launch, q, k, q, k, positions, torch.empty(64), (16, 24, 24), 1.0, 1.0)
        x = torch.empty(count, 160, dtype=torch.float16)
        note("norm", norm.launch, x, weight, weight, 1e-6, residual=x)
        note("norm backward", norm.launch_backward, x, x, weight, weight, 1e-6, grad_total=x)
        note("raster", merge.launch, x.repeat(4, 1), weight, weight, torch.zeros(4 * count, dtype=torch.int64), 1e-6)
        note("gelu", activation.launch, x, weight, False)
        note("gelu backward", activation.launch_backward, x, x, weight, False)
        note("swiglu", activation.launch_swiglu, x)
        note("gated", gated.launch, x, x.clone())
        labels, rows = torch.zeros(count, dtype=torch.int64), [torch.empty(count) for _ in range(3)]
        for words in (160, 1024):  # a block's follow from the rows, and are multiples of 16 for the released vocabulary
            note("loss", loss.launch, x.new_empty(count, words), labels, words * count, *rows)
            note("loss backward", loss.launch_slopes, x.new_empty(count, words), labels, words * count, *rows)
        note("gated backward", gated.launch_backward, x, x, x.clone())
        note("swiglu backward", activation.launch_swiglu_backward, x[:, :80], x)
        for batch in (1, 3):
            q = torch.empty(batch, count, 4, 128, dtype=torch.float16)
            ids = torch.empty(3, batch, count, dtype=torch.int64)
            note("mrope batch", rope.launch, q, q, q.clone(), q.clone(), ids, torch.empty(64), (16, 24, 24), 1.0, 1.0)
        if count < 100:
            frames = torch.empty(2 * count, 28, 28 * count, 3, dtype=torch.uint8)
            taps = torch.empty(28 * count, count, dtype=torch.int32)
            note("resize", resize.launch, frames, 2, taps[:, 0].contiguous(), taps)
            note("patchify", patchify.launch, frames, torch.float16, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    for name, found in seen.items():
        assert all(other == found[0] for other in found), f"{name}: specialised by a length"
