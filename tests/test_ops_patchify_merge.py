"""Frames to patch rows, and the merge of 2x2 patches: order, units in the last place, odd layouts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_fast import ops, reference
from tests import oracle
from tests.compare import HALVES, check, check_definition, check_units, error, same_bits
from tests.samples import SAMPLES
from tests.test_ops_every import dtypes, sweep, usable
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")


def frames(n: int, height: int, width: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8).to(device)


def check_patchify(dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Two frame pairs, not square, against the oracle; PyTorch's error is the definition's."""
    pixels = frames(4, 56, 84, device=device)
    truth = oracle.patch_rows(pixels)
    peer = reference.patchify(pixels.cpu(), dtype=dtype)
    for backend in usable("patchify", device):
        out = ops.patchify(pixels, dtype=dtype, backend=backend)
        assert out.shape == (2 * 4 * 6, 1176) and out.is_contiguous()
        if dtype == torch.float64:
            check_definition(out.cpu(), truth, f"patchify {backend}")
        else:
            check(out.cpu(), truth, [error(peer, truth)], name=f"patchify {backend}")


@dtypes
def test_patchify(dtype, device):
    check_patchify(dtype, device)


def check_places(ops=ops, device: str = "cpu") -> None:
    """One bright pixel at a time lands where the oracle puts it, and nowhere else."""
    for place in ((0, 0, 0, 0), (1, 13, 14, 2), (2, 29, 55, 1), (3, 55, 83, 0)):
        pixels = torch.zeros(4, 56, 84, 3, dtype=torch.uint8, device=device)
        dark = ops.patchify(pixels)
        pixels[place] = 255
        n, y, x, c = place
        row = oracle.merge_order([[2, 4, 6]]).index((n // 2 * 4 + y // 14) * 6 + x // 14)
        column = ((c * 2 + n % 2) * 14 + y % 14) * 14 + x % 14
        assert (ops.patchify(pixels) != dark).nonzero().tolist() == [[row, column]]


def test_places(device):
    check_places(device=device)


def test_patchify_layouts_and_sizes(device):
    """A crop, a channel-first picture seen channel-last, a repeated still; no frames at all."""
    pixels = frames(2, 84, 112, device=device)
    expected = ops.patchify(pixels[:, 28:84, 14:98].contiguous())
    assert same_bits(ops.patchify(pixels[:, 28:84, 14:98]), expected)
    first = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert same_bits(ops.patchify(first), ops.patchify(pixels))
    still = pixels[:1].expand(2, -1, -1, -1)
    rows = ops.patchify(still).view(-1, 3, 2, 196)
    assert same_bits(rows[:, :, 0], rows[:, :, 1])
    for size in ((0, 28, 28), (2, 0, 28), (2, 28, 0)):
        assert ops.patchify(frames(*size, device=device)).shape == (0, 1176)


def test_patchify_isolated_from_other_frames(device):
    pixels = frames(6, 28, 56, device=device)
    whole = ops.patchify(pixels)
    for pair in range(3):
        assert same_bits(ops.patchify(pixels[2 * pair : 2 * pair + 2]), whole[8 * pair : 8 * pair + 8])


SIZES = [  # height, width, new height, new width: each axis shrinks, grows, stays; either one first; one sample, many taps
    (1, 1, 28, 56), (28, 56, 28, 56), (40, 56, 28, 56), (28, 90, 28, 56), (61, 47, 84, 112), (60, 21, 28, 28),
    (157, 202, 84, 56), (300, 40, 28, 28), (40, 300, 56, 28), (74, 21, 84, 84), (222, 223, 56, 140), (90, 90, 84, 84),
]  # fmt: skip


def check_resize(backends: Sequence[str], device: str = "cpu", sizes=SIZES) -> None:
    """The levels of Pillow's bicubic filter, for noise and for black and white, which overshoot; in a strided view too."""
    for height, width, new_height, new_width in sizes:
        noise = frames(2, height, width + 2)[:, :, 1:-1]
        noise[1] = (noise[1] > 127).byte() * 255
        size = (new_width, new_height)
        images = [Image.fromarray(frame.numpy()).resize(size, Image.Resampling.BICUBIC) for frame in noise]
        resized = torch.stack([torch.from_numpy(np.array(image)) for image in images]).to(device)
        for backend in backends:
            rows = ops.patchify(noise.to(device), size=size[::-1], backend=backend)
            assert same_bits(rows, ops.patchify(resized, backend=backend)), f"{backend}: {height} x {width} to {size[::-1]}"


def test_resize(device):
    check_resize(usable("patchify", device), device)


def test_resize_compiles(device):
    """Without breaks, and once for every number of frames."""
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(ops.patchify, size=(28, 56)), backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (2, 4, 6):
        pixels = frames(count, 31, 40, device=device)
        assert same_bits(compiled(pixels), ops.patchify(pixels, size=(28, 56)))


def test_resize_refusals(device):
    pixels = frames(2, 30, 30, device=device)
    for size, kind, message in (
        ((28, 30), ValueError, "size: expected positive multiples of 28, got"),
        ((0, 28), ValueError, "size: expected positive multiples of 28, got"),
        ((28, 28, 3), TypeError, "size: expected .height, width., two integers, got"),
        ((28.0, 28), TypeError, "size: expected .height, width., two integers, got"),
        (28, TypeError, "size: expected .height, width., two integers, got 28"),
    ):
        with pytest.raises(kind, match=message):
            ops.patchify(pixels, size=size)
    with pytest.raises(ValueError, match="frames: expected .N, H, W, 3. with N even, H and W at least 1"):
        ops.patchify(pixels[:, :0], size=(28, 28))
    with pytest.raises(ValueError, match="H and W multiples of 28"):
        ops.patchify(pixels)
    assert ops.patchify(pixels[:0], size=(28, 28)).shape == (0, 1176)


def check_merge_units(kind: str, seed: int, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Within one unit of the correctly rounded result, where cancellation against the bias counts as the larger term."""
    sample = SAMPLES[kind](seed)
    call, _ = sample.call(dtype, device)
    wide = call.to(torch.float64)
    ref = reference.merge_patches(**wide.tensors, **call.rest)
    scaled = reference.merge_patches(**{**wide.tensors, "bias": torch.zeros_like(wide.tensors["bias"])}, **call.rest)
    for backend in usable("merge_patches", device):
        out = ops.merge_patches(**call.tensors, **call.rest, backend=backend)
        check_units(out, ref, torch.maximum(ref.abs(), scaled.abs()), f"merge seed {seed} {dtype} {backend}")


@pytest.mark.parametrize("dtype", HALVES)
def test_merge_units(dtype, device):
    sweep(check_merge_units, range(20), kind="merge_patches", dtype=dtype, device=device)


def check_raster(ops=ops, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Raster order with the grid equals merge order without: rows say where they come from."""
    grids = [[2, 4, 6], [1, 2, 2], [1, 6, 4]]
    order = torch.tensor(oracle.merge_order(grids), device=device)
    total = order.numel()
    x = randn(total, 16, device=device, dtype=dtype)
    weight, bias = (randn(16, seed=i, device=device, dtype=dtype) for i in (1, 2))
    for backend in usable("merge_patches", device):
        merge = functools.partial(ops.merge_patches, weight=weight, bias=bias, backend=backend)
        expected = merge(x[order])
        assert same_bits(merge(x, grid_thw=torch.tensor(grids)), expected), backend
        assert same_bits(expected, ops.layer_norm(x[order], weight, bias, eps=1e-6, backend=backend).view(-1, 64)), backend
        leaf = x.detach().requires_grad_()
        upstream = randn(total // 4, 64, seed=3, device=device, dtype=dtype)
        (raster,) = torch.autograd.grad(merge(leaf, grid_thw=torch.tensor(grids)), leaf, upstream)
        (merged,) = torch.autograd.grad(merge(leaf[order]), leaf, upstream)
        assert same_bits(raster, merged), backend


@dtypes
def test_raster(dtype, device):
    check_raster(device=device, dtype=dtype)


@dtypes
def test_merge_sizes(dtype, device):
    """Nothing, and one 2x2 image."""
    weight = torch.ones(8, device=device, dtype=dtype)
    for backend in usable("merge_patches", device):
        for rows, grid in ((0, None), (0, torch.zeros(0, 3, dtype=torch.int64)), (4, None), (4, torch.tensor([[1, 2, 2]]))):
            x = randn(rows, 8, device=device, dtype=dtype).requires_grad_()
            out = ops.merge_patches(x, weight, weight, grid_thw=grid, backend=backend)
            assert out.shape == (rows // 4, 32)
            out.float().sum().backward()
            assert x.grad.shape == x.shape
