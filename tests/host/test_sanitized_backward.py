"""The sm_80 backward and the lists of tiles with sanitizers (address, undefined behaviour), without a byte to spare."""

from __future__ import annotations

import pytest

from tests.compare import same_bits
from tests.host import build
from tests.host.backward import WAYS, Attention, key_tiles, ways
from tests.host.cases import FP16, Case
from tests.host.planted import GRID, sanitized_backward, sanitized_tiles
from tests.host.runner import tiles

CASES = (
    (64, Case((65, 0, 3, 70), layout="contiguous")),
    (128, Case((129, 1, 0), heads=4, heads_k=2, layout="contiguous")),
    (128, Case((33, 0, 97), (40, 5, 30), dim=64, causal=True, dtype=FP16, layout="contiguous")),
    (64, Case((33, 66), (70, 0), dim=128, heads=2, heads_k=2, causal=True, layout="contiguous")),
    (64, Case((0, 0), layout="contiguous")),
)
# (file, old, new): reads past the last row that change no gradient
PLANTED = ("bwd_rows.cuh", "row = valid ? index / p.H : 0;", "row = index / p.H;")


def check_backward(program, folder, way: str) -> None:
    for rows, case in CASES:
        for seed in (0, 3) if way in ways(case.causal) else ():
            op = Attention(rows, way, seed=seed, grid=GRID)
            found, expected = sanitized_backward(program, folder, op, case)
            assert all(same_bits(found[name], expected[name]) for name in "qkv"), f"{case} {rows}"


def check_tiles(program, folder) -> None:
    for rows, case in CASES:
        for by_keys, listed, heads in ((False, tiles, case.heads), (True, key_tiles, case.heads_k)):
            expected = listed(case.lengths, case.key_lengths, heads, rows, case.causal).tolist()
            assert sorted(sanitized_tiles(program, folder, case, rows, by_keys)) == sorted(expected)


@pytest.mark.parametrize("way", WAYS)
def test_backward(way, tmp_path):
    """The bits of the plain build."""
    check_backward(build.program(), tmp_path, way)


def test_tiles(tmp_path):
    check_tiles(build.program(), tmp_path)


def test_a_read_past_the_end_is_seen(tmp_path):
    program = build.program(build.altered(tmp_path, *PLANTED))
    folder = tmp_path / "call"
    folder.mkdir()
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        check_backward(program, folder, WAYS[0])
