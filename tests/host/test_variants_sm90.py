"""The alternatives of the Hopper forward (csrc/variants_sm90.cuh) on the host: right before a device times them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest

from tests.host import build
from tests.host.cases import BF16, Case, check_alone, check_isolation, check_rule, check_schedules, drawn
from tests.host.runner import Kernel, load
from tests.host.test_forward_sm80 import NAMED
from tests.host.test_forward_sm90 import EDGES, EXTREMES, VOTES

COUNT = 27  # variants and sizes; test_names counts


@pytest.fixture(scope="module")
def library() -> Path:
    return build.own_library("variants_sm90")


def names(library: Path) -> list[str]:
    text = ctypes.create_string_buffer(200)
    function = load(library).variant_name
    return [text.value.decode() for i in range(function(-1, text, 200)) if function(i, text, 200)]


def variant(library: Path, index: int, **options) -> Kernel:
    name, rows = names(library)[index].rsplit(", ", 1)
    return Kernel(library, name, int(rows.split()[0]), **options)


def test_names(library):
    found = names(library)
    assert len(found) == COUNT == len(set(found))


def check_values(own: Kernel) -> None:
    check_rule(own, Case((95, 96, 97, 0, 177, 193, 1), heads=2))
    check_rule(own, EXTREMES["scores of hundreds"])
    check_isolation(own, replace(VOTES, lengths=(259, 131)), 1)


@pytest.mark.parametrize("index", range(0, COUNT, 2))
def test_values_and_isolation(library, index):
    check_values(variant(library, index))


@pytest.mark.full
@pytest.mark.parametrize("index", range(COUNT))
def test_random_packs_and_orders(library, index):
    check_values(variant(library, index))
    for seed in range(12):
        case = replace(drawn(seed, EDGES, (80,), longest=420), causal=False, dtype=BF16)
        check_rule(variant(library, index, seed=seed, grid=1 + seed % 4), case)
    for name in ("edges", "chunked prefill", "no keys", "six heads share one"):
        check_rule(variant(library, index), replace(NAMED[name], dim=80, causal=False, dtype=BF16))
    for poisoned in (0, 1, 2):
        check_isolation(variant(library, index), VOTES, poisoned)
    check_alone(variant(library, index), VOTES)
    check_schedules(variant(library, index), Case((420, 65, 193), heads=1), (1, 2, 3))
