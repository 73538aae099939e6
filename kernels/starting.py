"""Starting a kernel with little Python: the binary for arguments of a kind is remembered.

Triton looks at every argument of every call to find that binary, constants and options too: half of a call's time on the
host. Here the key is what the search depends on, and no more.
"""

from __future__ import annotations

from typing import Any

import torch

KINDS = 4096  # kept at most: the strides of padded batches can differ from call to call
_binaries: dict[tuple, Any] = {}


def start(
    kernel: Any,
    blocks: int,
    tensors: tuple[torch.Tensor, ...],
    counts: tuple[float, ...],
    strides: tuple[int, ...],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """kernel[(blocks,)](*tensors, *counts, *strides, **constants) on the tensors' device.

    That is the order of a kernel's signature, constants too. counts are what it does not specialise.
    """
    device, places = tensors[0].device.index, 0
    for x in tensors:
        places |= x.data_ptr()
    if not tensors[0].is_cuda or places % 16 or max(counts) >= 2**31:
        _anew(kernel, blocks, tensors, counts, strides, constants, num_warps)
        return
    key = (kernel, device, tuple([x.dtype for x in tensors]), strides, tuple(constants.values()), num_warps)
    binary = _binaries.get(key)
    if binary is None:
        binary = _anew(kernel, blocks, tensors, counts, strides, constants, num_warps)
        if len(_binaries) >= KINDS:
            _binaries.clear()
        _binaries[key] = binary
    elif device == torch.cuda.current_device():
        binary[(blocks, 1, 1)](*tensors, *counts, *strides, *constants.values())
    else:
        with torch.cuda.device(device):
            binary[(blocks, 1, 1)](*tensors, *counts, *strides, *constants.values())


def _anew(kernel, blocks, tensors, counts, strides, constants, num_warps) -> Any:
    """By Triton's own search; returns the binary (None where kernels are interpreted)."""
    with torch.cuda.device_of(tensors[0]):
        return kernel[(blocks,)](*tensors, *counts, *strides, **constants, num_warps=num_warps)
