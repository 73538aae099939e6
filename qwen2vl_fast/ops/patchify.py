"""Frames of pixels to normalised patch rows, resized before when asked."""

from __future__ import annotations

import functools

import torch
from PIL import Image

from ..reference import IMAGE_MEAN, IMAGE_STD
from . import checks
from .backends import choose, define

_BITS = 22  # of a weight's fraction, as in kernels/resize.py


def patchify(frames, *, dtype: torch.dtype = torch.float32, size: tuple[int, int] | None = None, backend: str | None = None):
    """Normalises frames and cuts them into patch rows, in merge order.

    row(t, h/2, w/2, m, n)[c, f, y, x] = (frames[2t + f, 14(h + m) + y, 14(w + n) + x, c] / 255 - mean[c]) / std[c]

    Args:
        frames: uint8 [N, H, W, 3] (RGB), N even, H and W multiples of 28. A still image is two identical frames.
        dtype: of the result, a floating dtype.
        size: None, or (height, width), multiples of 28: frames of any size are brought to it first by Pillow's bicubic filter,
            in integers, with the levels that Pillow has.
        backend: None for the fastest that can run the tensor.
    Returns: [N/2 * H/14 * W/14, 1176], contiguous, on the device of frames.
    Raises: TypeError, ValueError for a dtype, shape or size that doesn't fit; RuntimeError for an unusable backend.
    Precision: float32 (float64 for float64) from one multiplication and one addition a value, then one rounding.
    Source: MODEL.md section 1. Definition: `reference.patchify`; of the resize, Pillow's Image.resize.
    """
    if checks.check_tensor("frames", frames).dtype != torch.uint8:
        raise TypeError(f"frames: expected uint8, got {frames.dtype}")
    if size is None:
        if frames.dim() != 4 or frames.shape[0] % 2 or frames.shape[1] % 28 or frames.shape[2] % 28 or frames.shape[3] != 3:
            raise ValueError(f"frames: expected [N, H, W, 3] with N even, H and W multiples of 28, got {list(frames.shape)}")
    elif frames.dim() != 4 or frames.shape[0] % 2 or frames.shape[3] != 3 or 0 in frames.shape[1:3]:
        raise ValueError(f"frames: expected [N, H, W, 3] with N even, H and W at least 1, got {list(frames.shape)}")
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    name = choose("patchify", backend, frames.device)
    if size is not None:
        frames = _resize(frames, *_check_size(size), name)
    return _patchify(frames, dtype, name)


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int for n in size):
        raise TypeError(f"size: expected (height, width), two integers, got {size!r}")
    if min(size) < 28 or size[0] % 28 or size[1] % 28:
        raise ValueError(f"size: expected positive multiples of 28, got {tuple(size)}; smart_resize gives such a size")
    return size[0], size[1]


@functools.lru_cache(64)
def _taps(length: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(first sample [new], weights [new, K]) int32: the bicubic filter with a = -1/2, widened by the ratio when it shrinks.

    Weights have _BITS bits behind the point and are rounded away from zero at a half, as Pillow has them.
    """
    ratio = length / new
    widen = max(ratio, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * ratio
    start = (centre - 2 * widen + 0.5).trunc().clamp(min=0)
    end = (centre + 2 * widen + 0.5).trunc().clamp(max=length)
    place = torch.arange(int((end - start).max()), dtype=torch.float64) + start[:, None]
    x = ((place - centre[:, None] + 0.5) * (1.0 / widen)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = torch.where(x < 1, near, far.where(x < 2, 0.0)).where(place < end[:, None], 0.0)
    scaled = weight / weight.cumsum(1)[:, -1:] * (1 << _BITS)
    return start.int(), (scaled + scaled.sign() * 0.5).trunc().int()


def _height_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow shrinks the height before it resizes the width; found by trying 700 pairs of sizes on release 13."""
    shrinks = new_height < height and height - new_height > 2 * (width - new_width)
    return shrinks and _pillow_height_first()


@functools.cache
def _pillow_height_first() -> bool:
    """Whether this Pillow ever does; older releases always begin with the width."""
    image = Image.frombytes("L", (2, 16), bytes((97 * i + 31 * i * i) % 256 for i in range(32)))
    both, across = (image.resize(size, Image.Resampling.BICUBIC) for size in ((5, 3), (5, 16)))
    return both.tobytes() != across.resize((5, 3), Image.Resampling.BICUBIC).tobytes()


def _resize_impl(frames, height, width, backend="torch"):
    """One axis, then the other, each rounded to a level: in Pillow's order, and only where the size changes."""
    result, steps = frames, [(2, width), (1, height)]
    for axis, new in steps[::-1] if _height_first(*frames.shape[1:3], height, width) else steps:
        if result.shape[axis] == new:
            continue
        start, weight = (x.to(frames.device) for x in _taps(result.shape[axis], new))
        if backend == "triton":
            from ..kernels import resize as kernel

            result = kernel.launch(result.contiguous(), axis, start, weight)
        else:
            result = _resized(result, axis, start, weight)
    return frames.clone() if result is frames else result  # an op returns no view of its input


def _resized(frames: torch.Tensor, axis: int, start: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = 1 << (_BITS - 1)
    for k in range(weight.shape[1]):
        sample = frames.index_select(axis, (start + k).clamp(max=frames.shape[axis] - 1)).int()
        total = total + sample * weight[:, k].view([-1 if i == axis else 1 for i in range(4)])
    return (total >> _BITS).clamp(0, 255).to(torch.uint8)


_resize = define(
    "resize(Tensor frames, int height, int width, str backend='torch') -> Tensor",
    _resize_impl,
    lambda frames, height, width, *_: frames.new_empty((frames.shape[0], height, width, 3)),
)


def _patchify_impl(frames, dtype, backend="torch"):
    scale = tuple(1 / (255 * std) for std in IMAGE_STD)
    shift = tuple(-mean / std for mean, std in zip(IMAGE_MEAN, IMAGE_STD, strict=True))
    if backend == "triton":
        from ..kernels import patchify as kernel

        return kernel.launch(frames, dtype, scale, shift)
    compute = torch.promote_types(dtype, torch.float32)
    scale, shift = (torch.tensor(x, dtype=compute, device=frames.device)[:, None, None, None] for x in (scale, shift))
    n, height, width, _ = frames.shape
    blocks = frames.view(n // 2, 2, height // 28, 2, 14, width // 28, 2, 14, 3)
    #                   t       f  h/2           m  y   w/2          m  x   c -> t h/2 w/2 m m c f y x
    rows = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, 2, 14, 14)  # as bytes: a quarter of the traffic
    out = torch.empty((rows.shape[0], 3, 2, 14, 14), dtype=dtype, device=frames.device)
    for block in checks.row_blocks(out):
        out[block].copy_(torch.addcmul(shift, rows[block].to(compute), scale))
    return out.view(-1, 3 * 2 * 14 * 14)


_patchify = define(
    "patchify(Tensor frames, ScalarType dtype, str backend='torch') -> Tensor",
    _patchify_impl,
    lambda frames, dtype, *_: frames.new_empty((frames.numel() // 1176, 1176), dtype=dtype),
)
