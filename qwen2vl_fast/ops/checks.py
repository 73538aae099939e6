"""Argument checks shared by the ops. Shapes, dtypes and devices only: values on a device are never read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..positions import check_tensor

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))  # a look here is cheaper than isinstance
INTEGERS = frozenset((torch.int32, torch.int64))
_BLOCK_BYTES = 1 << 18  # per thread; a quarter of a common L2, so that a block survives the passes made over it


def floating(name: str, x: torch.Tensor) -> None:
    if type(x) not in TENSORS and not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        check_tensor(name, x)
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """x must have the dtype and device of other, whose dtype is a floating one."""
    if (type(x) in TENSORS or isinstance(x, torch.Tensor)) and x.dtype == other.dtype and x.device == other.device:
        return
    floating(name, x)
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    same_device(name, x, other_name, other)


def same_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def shape(name: str, x: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name}: expected {meaning} = {list(expected)}, got shape {list(x.shape)}")


def rows(name: str, x: torch.Tensor) -> None:
    floating(name, x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., width] with a width of at least 1, got shape {list(x.shape)}")


def fit(x: Any, residual: Any, *parameters: Any) -> bool:
    """Whether x is rows, residual None or a tensor like x and each parameter one of x's last dim, dtype and device.

    All of that at one look, since every call of a small op pays for it; what is wrong is for the other checks to say.
    """
    if type(x) not in TENSORS and not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        return False
    dtype, device, shape = x.dtype, x.device, x.shape
    if not shape or not shape[-1]:
        return False
    if residual is not None:
        if type(residual) not in TENSORS and not isinstance(residual, torch.Tensor) or residual.dtype != dtype:
            return False
        if residual.device != device or residual.shape != shape:
            return False
    for p in parameters:
        if type(p) not in TENSORS and not isinstance(p, torch.Tensor):
            return False
        if p.dtype != dtype or p.device != device or p.shape != shape[-1:]:
            return False
    return True


def integers(name: str, x: torch.Tensor) -> None:
    if check_tensor(name, x).dtype not in INTEGERS:
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")


def number(name: str, x: float) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    return x


def row_blocks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of x's first dim small enough to stay in cache over several passes; one slice for a device tensor."""
    count = x.shape[0]
    if x.device.type != "cpu" or count == 0:
        yield slice(0, count)
        return
    row_bytes = max(1, x[0].numel() * max(x.element_size(), 4))
    step = max(1, _BLOCK_BYTES * torch.get_num_threads() // row_bytes)
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))
