"""Frames of pixels to normalised patch rows."""

from __future__ import annotations

import torch

from ..reference import IMAGE_MEAN, IMAGE_STD
from . import checks
from .backends import choose, define


def patchify(frames, *, dtype: torch.dtype = torch.float32, backend: str | None = None):
    """Normalises frames and cuts them into patch rows, in merge order.

    row(t, h/2, w/2, m, n)[c, f, y, x] = (frames[2t + f, 14(h + m) + y, 14(w + n) + x, c] / 255 - mean[c]) / std[c]

    Args:
        frames: uint8 [N, H, W, 3] (RGB), N even, H and W multiples of 28. A still image is two identical frames.
        dtype: of the result, a floating dtype.
        backend: None for the fastest that can run the tensor.
    Returns: [N/2 * H/14 * W/14, 1176], contiguous, on the device of frames.
    Raises: TypeError, ValueError for a dtype or shape that doesn't fit; RuntimeError for an unusable backend.
    Precision: float32 (float64 for float64) from one multiplication and one addition a value, then one rounding.
    Source: MODEL.md section 1. Definition: `reference.patchify`.
    """
    if checks.check_tensor("frames", frames).dtype != torch.uint8:
        raise TypeError(f"frames: expected uint8, got {frames.dtype}")
    if frames.dim() != 4 or frames.shape[0] % 2 or frames.shape[1] % 28 or frames.shape[2] % 28 or frames.shape[3] != 3:
        raise ValueError(f"frames: expected [N, H, W, 3] with N even, H and W multiples of 28, got {list(frames.shape)}")
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    return _patchify(frames, dtype, choose("patchify", backend, frames.device))


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
