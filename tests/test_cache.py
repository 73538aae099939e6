"""The key-value cache against lists of rows, one a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl_fast.cache import KVCache
from qwen2vl_fast.config import Config
from qwen2vl_fast.ops.attention import cache_attention
from tests import models
from tests.compare import check_parity

CONFIG = Config.from_dict(models.CONFIGS["other widths"]).text
HEADS, DIM, LAYERS = CONFIG.num_key_value_heads, CONFIG.head_dim, CONFIG.num_hidden_layers


def cache_of(batch: int, slots: int) -> KVCache:
    return KVCache(CONFIG, batch, slots, dtype=torch.float64, device=torch.device("cpu"))


class Rows:
    """The same by definition: for each layer and sequence the rows that were added."""

    def __init__(self, batch: int):
        self.rows = [[torch.zeros(0, 2, HEADS, DIM, dtype=torch.float64) for _ in range(batch)] for _ in range(LAYERS)]

    def add(self, layer: int, new: Tensor, counts: Sequence[int]) -> None:
        parts = new.split(list(counts))
        self.rows[layer] = [torch.cat(pair) for pair in zip(self.rows[layer], parts, strict=True)]


def add(cache: KVCache, counts: Sequence[int], rows: Rows, generator: torch.Generator):
    """One forward: fresh keys and values for every layer; yields what each layer's queries see, by sequence."""
    step = cache.begin(list(counts))
    assert step.lengths == tuple(cache.lengths)
    for layer in range(LAYERS):
        new = torch.randn(sum(counts), 2, HEADS, DIM, generator=generator, dtype=torch.float64)
        rows.add(layer, new, counts)
        seen = cache.append(layer, new[:, 0], new[:, 1], step)
        expected = rows.rows[layer]
        if step.decode:
            assert all(x.shape == (len(counts), max(cache.lengths), HEADS, DIM) for x in seen)
            parts = [[x[b, :length] for b, length in enumerate(cache.lengths)] for x in seen]
        else:
            bounds = step.cu_seqlens_k
            if bounds is not None:
                assert bounds.dtype == torch.int32 and bounds.diff().tolist() == cache.lengths
            parts = [x.split(cache.lengths) for x in seen]
        for index, tensors in enumerate(parts):
            assert all(torch.equal(got, want[:, index]) for got, want in zip(tensors, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    slots=st.integers(1, 12),
    data=st.data(),
)
def test_any_steps(batch, slots, data):
    """Prefill, chunks of different lengths and single tokens in any order; the room grows as it must."""
    generator = torch.Generator().manual_seed(0)
    cache, rows = cache_of(batch, slots), Rows(batch)
    one = st.just([1] * batch)
    some = st.lists(st.integers(1, 6), min_size=batch, max_size=batch)
    for counts in data.draw(st.lists(st.one_of(one, some), min_size=1, max_size=6)):
        add(cache, counts, rows, generator)
    assert cache.lengths == [part.shape[0] for part in rows.rows[0]]


def test_room_doubles():
    """Growing by one token at a time copies a logarithmic number of times."""
    cache, rooms = cache_of(1, 1), set()
    for _ in range(200):
        cache.begin([1])
        rooms.add(cache.slots)
    assert cache.lengths == [200] and len(rooms) <= 9 and cache.slots >= 200
    room = cache_of(2, 50)
    storage = [x.data_ptr() for x in room.keys + room.values]
    for _ in range(50):
        room.begin([1, 1])
    assert [x.data_ptr() for x in room.keys + room.values] == storage


def test_repeat():
    generator = torch.Generator().manual_seed(0)
    cache, rows = cache_of(2, 4), Rows(2)
    add(cache, [3, 2], rows, generator)
    cache.deltas = [5, -1]
    cache.repeat(3)
    assert cache.lengths == [3, 3, 3, 2, 2, 2] and cache.deltas == [5, 5, 5, -1, -1, -1]
    rows.rows = [[part for part in layer for _ in range(3)] for layer in rows.rows]
    add(cache, [1] * 6, rows, generator)
    add(cache, [1, 2, 3, 1, 2, 3], rows, generator)


def test_shortening_forgets():
    """Entries beyond a sequence's length are gone: what is added next takes their place."""
    generator = torch.Generator().manual_seed(0)
    cache, rows = cache_of(2, 8), Rows(2)
    add(cache, [5, 4], rows, generator)
    cache.lengths = [3, 4]
    rows.rows = [[layer[0][:3], layer[1]] for layer in rows.rows]
    add(cache, [1, 1], rows, generator)
    add(cache, [2, 1], rows, generator)


def test_another_batch():
    cache = cache_of(2, 4)
    with pytest.raises(ValueError, match="cache: holds 2 sequences, but the input has 3"):
        cache.begin([1, 1, 1])
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 9, 1), (4, 4)])
def test_attention_of_one_token(lengths):
    """cache_attention against softmax(q k / sqrt(D)) v of each sequence's own entries; beyond them anything may stand."""
    heads, batch = CONFIG.num_attention_heads, len(lengths)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, DIM, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(batch, max(lengths), HEADS, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = torch.zeros_like(q)
    for b, length in enumerate(lengths):
        for head in range(heads):
            source = head // (heads // HEADS)
            scores = torch.tensor([float(q[b, head] @ k[b, j, source]) for j in range(length)], dtype=torch.float64)
            weights = (scores / DIM**0.5).softmax(0)
            expected[b, head] = sum(weight * v[b, j, source] for j, weight in enumerate(weights))
        k[b, length:], v[b, length:] = 1e4, -1e4
    check_parity(cache_attention(q, k, v, lengths), expected, "lifted")
