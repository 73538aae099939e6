"""uint8 frames on the device to normalised patch rows, against the definition in eager PyTorch and compiled.

qwen2vl-fast bench patchify [--peers NAME ...] [--repeats 30] [--json] [--save]
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.passes import COMPILED, Case, compiled, device, dtype, main, tokens
from bench.peers import OURS
from qwen2vl_fast import ops, reference

PEERS = ("torch", COMPILED)
SIDE = 32  # patches across and down a frame: 448 pixels


def cases() -> Iterator[Case]:
    for count in tokens():
        generator = torch.Generator().manual_seed(0)
        size = (2 * count // SIDE**2, 14 * SIDE, 14 * SIDE, 3)
        frames = torch.randint(256, size, generator=generator, dtype=torch.uint8).to(device())
        yield _case(frames, count)


def _case(frames: Tensor, count: int) -> Case:
    eager = functools.partial(reference.patchify, dtype=dtype())
    ours = functools.partial(ops.patchify, dtype=dtype())
    blocks = functools.partial(ops.patchify, dtype=dtype(), backend="torch")

    def definition(rows: slice) -> Tensor:
        pair = SIDE**2
        return reference.patchify(frames[2 * rows.start // pair : 2 * rows.stop // pair], dtype=torch.float64)

    contenders = {
        "qwen2vl_fast": lambda: ours(frames),
        f"{OURS}, torch backend": lambda: blocks(frames),
        "torch": lambda: eager(frames),
        **compiled(eager, frames),
    }
    return Case("patchify", count, count * 1176 * (1 + torch.finfo(dtype()).bits // 8), contenders, definition)


if __name__ == "__main__":
    main(("patchify",), __doc__)
