"""An image's features are its own: alone, in any pack, split by max_pack_patches, beside an image of NaN (QUALITY.md)."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.inputs import capped_packs
from qwen2vl_fast.ops import linear
from tests import models
from tests.compare import PARITY, bounds_of, check, check_parity, error, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Towers(NamedTuple):
    """transformers' model, ours over the same weights, and ours with those weights in float64."""

    hf: nn.Module
    ours: Qwen2VL
    exact: Qwen2VL


@functools.cache
def towers(dtype: torch.dtype) -> Towers:
    hf = models.transformers_model(models.CONFIGS["released"], dtype)
    wide = models.transformers_model(models.CONFIGS["released"])
    wide.load_state_dict(hf.state_dict())
    return Towers(hf, Qwen2VL.from_transformers(hf), Qwen2VL.from_transformers(wide))


def pixels_of(grid: Tensor, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(int(count), 1176, generator=generator).to(dtype) for count in grid.prod(1)]


def peer_features(hf: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    output = hf.model.visual(pixels, grid_thw=grid)
    return output if models.OLD_TRANSFORMERS else output.pooler_output


def check_pack(dtype: torch.dtype, grid: Tensor, seed: int, cap: int | None = None) -> None:
    """Features of a pack, image by image, against those of each image alone in float64; transformers alone is the peer."""
    hf, ours, exact = towers(dtype)
    pixels = pixels_of(grid, seed, dtype)
    with torch.no_grad():
        alone = [exact.encode_images(rows.double(), one[None]) for rows, one in zip(pixels, grid, strict=True)]
        peers = [torch.cat([peer_features(hf, rows, one[None]) for rows, one in zip(pixels, grid, strict=True)])]
        if dtype == torch.float32:  # which library multiplies is not judged: here ours may take another one (ops/linear.py)
            plain = SimpleNamespace(linear=nn.functional.linear)
            with mock.patch.object(linear, "F", plain), mock.patch.object(nn.functional, "linear", linear.linear):
                peers.append(torch.cat([peer_features(hf, rows, one[None]) for rows, one in zip(pixels, grid, strict=True)]))
        before = ours.max_pack_patches
        ours.max_pack_patches = cap or before
        try:
            got = ours.encode_images(torch.cat(pixels), grid)
        finally:
            ours.max_pack_patches = before
    reference = torch.cat(alone)
    errors, bounds = [error(peer, reference) for peer in peers], bounds_of([x.shape[0] for x in alone])
    check(got, reference, errors, bounds=bounds, name=f"{grid.tolist()}")


sides = st.integers(1, 5).map(lambda side: 2 * side)
grids = st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=6).map(torch.tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(grid=grids, seed=st.integers(0, 1000), cap=st.sampled_from([None, 4, 16, 40, 100, 1000]))
def test_any_pack(dtype, grid, seed, cap):
    check_pack(dtype, grid, seed, cap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_images_side_by_side(dtype):
    """Runs of equal sizes are one batch for the library's attention: also at the start, in the middle and at the end."""
    check_pack(dtype, torch.tensor([[1, 4, 4], [1, 4, 4], [1, 2, 8], [2, 4, 4], [1, 4, 4], [1, 4, 4]]), 0)


@pytest.mark.parametrize("cap", [4, 8, 24, 30, 48, 10**6])
def test_packing_is_exact_in_float64(cap):
    """Whatever the packs, the same numbers to the last bits."""
    _, ours = models.pair()
    grid = torch.tensor([[1, 4, 6], [3, 2, 4], [1, 2, 2], [1, 6, 6], [2, 4, 4]])
    pixels = [rows.double() for rows in pixels_of(grid, 0, torch.float32)]
    own = Qwen2VL.from_transformers(models.pair()[0])
    own.max_pack_patches = cap
    with torch.no_grad():
        alone = torch.cat([ours.encode_images(rows, one[None]) for rows, one in zip(pixels, grid, strict=True)])
        check_parity(own.encode_images(torch.cat(pixels), grid), alone, "lifted")


@given(grid=grids, cap=st.integers(4, 200))
def test_packs_are_capped_and_whole(grid, cap):
    """Every frame pair is in one pack, in order; a pack over the cap is one frame pair that is itself larger."""
    packs = list(capped_packs(grid, cap))
    frames = [(1, h, w) for t, h, w in grid.tolist() for _ in range(t)]
    assert [tuple(row) for _, part in packs for row in part.tolist()] == frames
    stop = 0
    for rows, part in packs:
        count = int(part.prod(1).sum())
        assert (rows.start, rows.stop - rows.start) == (stop, count)
        assert count <= cap or part.shape[0] == 1
        stop = rows.stop
    assert stop == int(grid.prod(1).sum())
    sizes = [int(part.prod(1).sum()) for _, part in packs]
    firsts = [int(part[0].prod()) for _, part in packs]
    assert all(size + first > cap for size, first in zip(sizes, firsts[1:], strict=False)), "a frame pair had room before"


def test_tower_runs_once_a_pack(monkeypatch):
    """The cap is what the tower sees, in a forward, in generate, and for images and videos together."""
    own = Qwen2VL.from_transformers(models.pair()[0])
    own.max_pack_patches = 40
    seen = []
    forward = own.visual.forward
    monkeypatch.setattr(own.visual, "forward", lambda pixels, grid: seen.append(pixels.shape[0]) or forward(pixels, grid))
    inputs = models.batch([[("image", 4, 6), ("text", 2), ("video", 3, 4, 4)], [("image", 2, 2), ("image", 8, 8)]])
    with torch.no_grad():
        got = own(**inputs).logits
    assert seen == [24 + 4, 64, 16 + 16, 16]  # images in order, then the clip's frame pairs
    real = models.real_tokens(inputs)
    with torch.no_grad():
        check_parity(got[real], models.pair()[1](**inputs).logits[real], "lifted")
    seen.clear()
    own.generate(**inputs, max_new_tokens=3)
    assert seen == [28, 64, 32, 16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", range(5))
def test_nan_stays_in_its_image(dtype, bad):
    """At equal pack shape the features of all other images keep every bit."""
    _, ours, exact = towers(torch.float32)
    ours = exact if dtype == torch.float64 else towers(dtype).ours
    grid = torch.tensor([[1, 4, 4], [1, 4, 4], [2, 2, 6], [1, 4, 4], [1, 6, 2]])
    pixels = pixels_of(grid, 1, dtype)
    with torch.no_grad():
        clean = ours.encode_images(torch.cat(pixels), grid)
        for value in (float("nan"), float("inf")):
            spoilt = list(pixels)
            spoilt[bad] = torch.full_like(pixels[bad], value)
            got = ours.encode_images(torch.cat(spoilt), grid)
            counts = (grid.prod(1) // 4).tolist()
            for index, (a, b) in enumerate(zip(got.split(counts), clean.split(counts), strict=True)):
                assert a.isnan().all() if index == bad else same_bits(a, b), f"image {index} beside image {bad} of {value}"


def test_nan_in_one_frame_pair_stays_there():
    ours = towers(torch.float32).ours
    grid = torch.tensor([[4, 4, 4]])
    (pixels,) = pixels_of(grid, 2, torch.float32)
    spoilt = pixels.clone()
    spoilt[16 * 2] = float("nan")  # one patch of the third
    with torch.no_grad():
        clean, got = ours.encode_images(pixels, grid), ours.encode_images(spoilt, grid)
    for pair in range(4):
        part = slice(4 * pair, 4 * pair + 4)
        assert got[part].isnan().all() if pair == 2 else same_bits(got[part], clean[part])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nan_stays_in_its_sequence(dtype):
    """Logits and decoded tokens of the other sequences of a batch: their bits, too."""
    ours = towers(torch.float32).exact if dtype == torch.float64 else towers(dtype).ours
    rows = [[("image", 2, 4), ("text", 3)], [("text", 2), ("image", 4, 4), ("text", 2)], [("image", 2, 2), ("text", 9)]]
    inputs = models.batch(rows, dtype=dtype)
    spoilt = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    spoilt["pixel_values"][8 : 8 + 16] = float("nan")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "suppress_vision_tokens": False}
    with torch.no_grad():
        clean, got = ours(**inputs).logits, ours(**spoilt).logits
    real = models.real_tokens(inputs)
    assert same_bits(got[[0, 2]], clean[[0, 2]])
    where = (inputs["input_ids"][1] == models.IMAGE).nonzero()[0]
    seen = torch.arange(real.shape[1]) >= where
    assert got[1][seen].isnan().all()
    clean_answer, answer = (ours.generate(**given, **options) for given in (inputs, spoilt))
    assert torch.equal(answer[[0, 2]], clean_answer[[0, 2]])


def test_packing_tolerance_can_fail():
    """An image that looks at its neighbour is seen by the comparison that the other tests rest on."""
    _, ours = models.pair()
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    pixels = torch.cat(pixels_of(grid, 0, torch.float32)).double()
    with torch.no_grad():
        apart, joined = ours.encode_images(pixels, grid), ours.encode_images(pixels, torch.tensor([[1, 8, 4]]))
    assert ((apart - joined).abs().max() / apart.abs().max()).item() > 1e3 * PARITY["released"]
