"""Argument checks shared by the ops. Shapes, dtypes and devices only: values on a device are never read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..positions import check_tensor

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))  # a look here is cheaper than isinstance
INTEGERS = frozenset((torch.int32, torch.int64))
_BLOCK_BYTES = 1 << 20  # per thread: it survives the passes made over it in L2 or L3, and hides what it costs to start them
_GRAIN, _LANES = 1 << 15, 64  # of torch's elementwise loops: what one thread takes at least, what no loop takes less of at once


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


def row_blocks(x: torch.Tensor, buffers: int = 0) -> Iterator[Any]:
    """Slices of x's first dim small enough to stay in cache over several passes; one slice for a device tensor.

    With buffers: (slice, that many tensors of the slice's shape in float32, float64 for float64). All slices share their
    memory, since a tensor made anew for each is often mapped anew by the system, which costs more than a pass over it.
    """
    count = x.shape[0]
    row_bytes = max(1, x[0].numel() * max(x.element_size(), 4)) if count else 1
    step = max(1, _BLOCK_BYTES * torch.get_num_threads() // row_bytes) if x.device.type == "cpu" else max(1, count)
    shape = buffers, min(step, count), *x.shape[1:]
    made = x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32)) if buffers else None
    for start in range(0, count, step):
        block = slice(start, min(count, start + step))
        yield block if made is None else (block, *made[:, : block.stop - start])


def wide(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """x in the dtype of buffer: itself where it has that, else a copy in buffer."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def total(sums: list[torch.Tensor], parameter: torch.Tensor) -> torch.Tensor:
    """The sum of what the blocks of rows give to the gradient of a parameter, in its dtype."""
    return torch.stack(sums).sum(0).to(parameter.dtype) if sums else torch.zeros_like(parameter)


def in_vectors(function: Callable[..., Any], x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """function(x, *others), which writes x by elements, all contiguous: the same bits wherever an element stands.

    torch's sigmoid and silu take what is left of each thread's share after whole vectors by another path with other bits.
    Here shares are whole vectors: as many elements as that allows, then the rest on one thread, filled up with zeros.
    """
    flat = [y.view(-1) for y in (x, *others)]
    count = x.numel()
    if x.device.type != "cpu" or count == 0:
        function(*flat)
        return x
    threads = min(torch.get_num_threads(), -(-count // _GRAIN))
    body = count - count % (_LANES * threads)
    if body <= (threads - 1) * _GRAIN:  # which would be shared by one thread less
        body = (threads - 1) * _GRAIN
    if body:
        function(*(y[:body] for y in flat))
    if body < count:
        rest = flat[0].new_zeros(len(flat), -(-(count - body) // _LANES) * _LANES)
        for row, y in zip(rest, flat, strict=True):
            row[: count - body] = y[body:]
        function(*rest)
        flat[0][body:] = rest[0, : count - body]
    return x
