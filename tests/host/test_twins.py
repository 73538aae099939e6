"""The twins of single instructions against CuTe's layouts and PyTorch's conversions (tests/host/layouts.py)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.compare import same_bits
from tests.host import build
from tests.host.layouts import (
    K_MAJOR,
    LDMATRIX,
    LDMATRIX_TRANSPOSED,
    MMA_A,
    MMA_B,
    MMA_C,
    MN_MAJOR,
    WGMMA_A,
    WGMMA_C,
    layout,
    swizzled,
)
from tests.host.runner import HostError, call, load

BF16, FP16 = torch.bfloat16, torch.float16
HALVES = {"bf16": BF16, "fp16": FP16}
halves = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


class Arguments(ctypes.Structure):
    """Of tests/host/operations.cpp."""

    _fields_ = [
        ("image", ctypes.c_void_p), ("words", ctypes.c_int), ("in_", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p), ("global_", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def twins() -> ctypes.CDLL:
    return load(build.own_library("operations"))


def run(
    function, out: Tensor, *choices: int, image=None, words=None, in_=None, numbers=None, global_=None, seed: int = 0
) -> None:
    numbers = torch.tensor(numbers or [0], dtype=torch.int64).to(torch.int32)
    words = (0 if image is None else image.numel() * image.element_size() // 4) if words is None else words
    pointers = [None if x is None else x.data_ptr() for x in (image, in_, out, numbers, global_)]
    arguments = Arguments(pointers[0], words, *pointers[1:])
    call(function, ctypes.byref(arguments), *choices, grid=1, seed=seed)


def small(*shape: int, seed: int = 0, dtype: torch.dtype) -> Tensor:
    """Integers whose products and sums every type here holds exactly."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def words(registers: Tensor) -> Tensor:
    """[threads, 2 n] halves -> [threads, n] words."""
    return registers.contiguous().view(torch.int32)


def dealt(matrix: Tensor, table: list[list[int]]) -> Tensor:
    """[threads, registers] of a matrix whose places are counted down the columns."""
    return matrix.T.flatten()[torch.tensor(table)]


@halves
def test_mma(twins, dtype):
    a, b, c = small(16, 16, dtype=dtype), small(8, 16, seed=1, dtype=dtype), small(16, 8, seed=2, dtype=torch.float32)
    deal_c = layout(MMA_C)
    registers = [words(dealt(a, layout(MMA_A))), words(dealt(b, layout(MMA_B))), dealt(c, deal_c).view(torch.int32)]
    out = torch.empty(32, 4)
    run(twins.mma, out, dtype == torch.bfloat16, in_=torch.cat(registers, 1).contiguous())
    assert torch.equal(out, dealt(a.float() @ b.float().T + c, deal_c))


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(twins, transposed):
    rows = torch.randint(-32768, 32768, (32, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:32]  # a row may lie anywhere
    image = torch.zeros(64, 8, dtype=torch.int16)
    image[order] = rows
    out = torch.empty(32, 4, dtype=torch.int32)
    run(twins.matrices, out, image=image, numbers=[int(transposed), *(16 * order).tolist()])
    bits = torch.tensor(layout(LDMATRIX_TRANSPOSED if transposed else LDMATRIX))
    expected = rows.flatten()[bits[:, ::16] // 16]  # [32, 8] halves, by the place of their first bit
    assert torch.equal(out.view(torch.int16), expected)


def tile_image(matrix: Tensor, table: list[list[int]], width: int, total: int) -> Tensor:
    """Shared memory that holds matrix[i, j] at table[i][j], swizzled; NaN elsewhere."""
    image = torch.full((total,), torch.nan, dtype=matrix.dtype)
    places = [swizzled(2 * x, width) // 2 for row in table for x in row]
    image[torch.tensor(places)] = matrix.flatten()
    return image


def sizes(rows: int, columns: int) -> dict[str, int]:
    return {"rows_8": rows // 8, **{f"columns_{w}": columns // w for w in (16, 32, 64)}}


def high_word(stride: int, width: int) -> int:
    """Upper half of a descriptor: stride offset / 16, swizzle 1 for 128 bytes, 2 for 64, 3 for 32."""
    word = stride >> 4 | {128: 1, 64: 2, 32: 3}[width] << 30
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "n"), [(BF16, 64), (BF16, 112), (FP16, 112), (BF16, 176)])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_products_of_shared_memory(twins, dtype, n, width, seed):
    """A [64, 16 columns of 128] and B [n, the same] K-major, at every step of 16 columns."""
    columns = 128
    a, b = small(64, columns, dtype=dtype), small(n, columns, seed=1, dtype=dtype)
    tables = [layout(K_MAJOR[width], rows=rows, **sizes(rows, columns)) for rows in (64, n)]
    images = [tile_image(x, table, width, x.numel()) for x, table in zip((a, b), tables, strict=True)]
    d = small(64, n, seed=2, dtype=torch.float32)
    deal = layout(WGMMA_C, n_8=n // 8)
    for step in range(columns // 16):
        starts = [table[0][16 * step] * 2 for table in tables]  # where CuTe's slice of 16 columns begins
        starts[1] += 64 * columns * 2
        for accumulate in (0, 1):
            out = torch.empty(128, n // 2)
            numbers = [accumulate, starts[0] >> 4, starts[1] >> 4, high_word(8 * width, width)]
            run(twins.wgmma_shared, out, dtype == torch.bfloat16, n, image=torch.cat(images), numbers=numbers,
                in_=dealt(d, deal).contiguous(), seed=seed)  # fmt: skip
            k = slice(16 * step, 16 * step + 16)
            assert torch.equal(out, dealt(a[:, k].float() @ b[:, k].float().T + accumulate * d, deal))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "n", "width"),
    [(BF16, 80, 32), (FP16, 80, 32), (BF16, 64, 128), (BF16, 128, 128), (BF16, 64, 32), (BF16, 64, 64)],
)
def test_products_of_registers(twins, dtype, n, width, seed):
    """A [64, 16] in registers, B [16 rows of 48, n] with n contiguous, at every step of 16 rows."""
    rows = 48
    a, b = small(64, 16, dtype=dtype), small(rows, n, seed=1, dtype=dtype)
    table = layout(MN_MAJOR[width], rows=rows, **sizes(rows, n))
    image = tile_image(b.T.contiguous(), table, width, b.numel())
    d = small(64, n, seed=2, dtype=torch.float32)
    deal = layout(WGMMA_C, n_8=n // 8)
    for step in range(rows // 16):
        low = table[0][16 * step] * 2 >> 4 | (rows * width >> 4) << 16  # leading offset: from one group of columns to the next
        out = torch.empty(128, n // 2)
        registers = torch.cat([words(dealt(a, layout(WGMMA_A))), dealt(d, deal).view(torch.int32)], 1).contiguous()
        run(twins.wgmma_registers, out, dtype == torch.bfloat16, n, image=image, numbers=[low, high_word(8 * width, width)],
            in_=registers, seed=seed)  # fmt: skip
        assert torch.equal(out, dealt(a.float() @ b[16 * step : 16 * step + 16].float() + d, deal))


@pytest.mark.parametrize(("columns", "groups"), [(16, 5), (64, 2), (32, 2)])
@pytest.mark.parametrize("first", [0, 3, 90, 100, -5])
def test_tma(twins, columns, groups, first):
    """Boxes of [rows, groups x columns] of a head, in CuTe's K-major layout; rows outside of the tensor come as zeros."""
    tokens, heads, rows, head = 100, 3, 48, 1
    x = torch.arange(tokens * heads * groups * columns).remainder(251).to(torch.bfloat16).view(tokens, heads, groups * columns)
    strides = [2 * x.stride(0), 2 * columns, 2 * x.stride(1)]
    numbers = [columns, tokens, groups, heads, *strides, columns, rows, groups, 1, 2 * columns, 0, first, 0, head,
               2 * rows * groups * columns]  # fmt: skip
    out = torch.empty(rows * groups * columns, dtype=torch.bfloat16)
    run(twins.tma, out, words=out.numel() // 2, numbers=numbers, global_=x)
    expected = torch.zeros(rows, groups * columns, dtype=torch.bfloat16)
    inside = [i for i in range(rows) if 0 <= first + i < tokens]
    expected[inside] = x[[first + i for i in inside], head]
    table = [[g * rows * columns + i * columns + c for g in range(groups) for c in range(columns)] for i in range(rows)]
    assert same_bits(out, tile_image(expected, table, 2 * columns, out.numel()))


@pytest.mark.parametrize(
    ("change", "message"),
    [({4: 40}, "stride"), ({7: 128, 11: 128}, "wider than the swizzle"), ({8: 300}, "side of the box"), ({16: 16}, "deadlock")],
)
def test_tma_refuses(twins, change, message):
    numbers = [16, 100, 5, 3, 480, 32, 160, 16, 48, 5, 1, 32, 0, 0, 0, 0, 48 * 160]
    for place, value in change.items():
        numbers[place] = value
    x, out = torch.zeros(100, 3, 80, dtype=torch.bfloat16), torch.empty(48 * 80, dtype=torch.bfloat16)
    with pytest.raises(HostError, match=message):
        run(twins.tma, out, words=out.numel() // 2, numbers=numbers, global_=x)


def test_conversions(twins):
    """pack and unpack as torch rounds and widens: every half, their neighbours and midpoints, special values."""
    every = torch.arange(65536).to(torch.uint16)
    values = torch.cat([every.view(d).float() for d in HALVES.values()])
    bits = torch.cat([values.view(torch.int32), torch.randint(-(2**31), 2**31 - 1, (2**16,)).to(torch.int32)])
    steps = [0, 1, -1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001]
    values = torch.cat([(bits.long() + s).to(torch.int32).view(torch.float32) for s in steps])
    values = values[: values.numel() // 2 * 2]
    out = torch.empty(values.numel() // 2, 6, dtype=torch.int32)
    run(twins.conversions, out, words=len(out), in_=values)
    for column, dtype in enumerate(HALVES.values()):
        expected = values.to(dtype)
        found = out[:, column].contiguous().view(dtype)
        back = out[:, 2 + 2 * column : 4 + 2 * column].contiguous().view(torch.float32).flatten()
        assert torch.equal(found.isnan(), values.isnan()) and torch.equal(back.isnan(), values.isnan())
        assert same_bits(found[~values.isnan()], expected[~values.isnan()])
        assert same_bits(back[~values.isnan()], expected[~values.isnan()].float())
