"""Starting a kernel with little Python: the binary for arguments of a kind is remembered.

Triton looks at every argument of every call to find that binary, constants and options too: half of a call's time on the
host. Here the key is what the search depends on, and no more. The last step is Triton's own: a binary found so is started by
CompiledKernel's own call. Whatever is not the plain case takes Triton's whole way, `kernel[grid](...)`: another release than
those whose launches were compared argument by argument (tests/test_starting.py), anything that watches or alters launches
(hooks of a profiler, debugging, instrumentation), other devices than NVIDIA's, a pointer off 16 bytes, 64-bit counts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel

COMPARED = ((3, 5), (3, 9))  # the oldest and the newest release
KINDS = 4096  # kept at most: the strides of padded batches can differ from call to call
_binaries: dict[tuple, CompiledKernel] = {}


def _is_compared(release: str) -> bool:
    """Whether a launch of this Triton ends as the compared ones do, on the devices that they were compared for."""
    numbers = release.split(".")[:2]
    known = all(n.isdigit() for n in numbers) and COMPARED[0] <= tuple(map(int, numbers)) <= COMPARED[1]
    return known and torch.version.hip is None


_remembers = _is_compared(triton.__version__)


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
    if not _remembers or not tensors[0].is_cuda or places % 16 or max(counts) >= 2**31 or _watched(kernel):
        _anew(kernel, blocks, tensors, counts, strides, constants, num_warps)
        return
    key = (kernel, device, tuple([x.dtype for x in tensors]), strides, tuple(constants.values()), num_warps)
    binary = _binaries.get(key)
    if binary is None:
        binary = _anew(kernel, blocks, tensors, counts, strides, constants, num_warps)
        if len(_binaries) >= KINDS:
            _binaries.clear()
        if type(binary) is CompiledKernel:  # not where one is compiled in the background, or kernels are interpreted
            _binaries[key] = binary
    elif device == torch.cuda.current_device():
        binary[(blocks, 1, 1)](*tensors, *counts, *strides, *constants.values())
    else:
        with torch.cuda.device(device):
            binary[(blocks, 1, 1)](*tensors, *counts, *strides, *constants.values())


def _watched(kernel: Any) -> bool:
    """Whether Triton does more at a launch than to find the binary and start it, or could find another one."""
    run, compilation = knobs.runtime, knobs.compilation
    enter, leave = run.launch_enter_hook, run.launch_exit_hook
    return bool(
        getattr(kernel, "pre_run_hooks", True)  # an interpreted kernel has none
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or run.debug
        or getattr(run, "add_stages_inspection_hook", None)
        or getattr(compilation, "instrumentation_mode", None)
    )


def _anew(kernel, blocks, tensors, counts, strides, constants, num_warps) -> Any:
    """By Triton's own search; returns the binary (None where kernels are interpreted)."""
    with torch.cuda.device_of(tensors[0]):
        return kernel[(blocks,)](*tensors, *counts, *strides, **constants, num_warps=num_warps)
