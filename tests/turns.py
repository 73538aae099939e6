"""What waiting costs the backward that adds dq in turn: csrc/bwd_sm80.cuh's order, simulated step by step.

A step takes one unit of time in every block; what a block has added is seen by the next one `late` units after that step's
end. Of `resident` blocks each takes every resident-th tile of the list. No GPU has said yet how far that is from the truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def steps(lengths: Sequence[int], heads: int, rows: int, step: int, resident: int, late: float | None) -> float:
    """When the last block is done, in steps. late: None if nobody waits for anybody."""
    free = np.zeros(resident)
    next_tile = 0
    for length in sorted(lengths, reverse=True):
        blocks, count = -(-length // rows), -(-length // step)
        for _ in range(heads):
            own = (next_tile + np.arange(blocks)) % resident
            next_tile += blocks
            if late is None:
                for block in own:
                    free[block] += count
            elif blocks <= resident // 2 and count >= blocks:
                free[own] = _around(free[own], count, late)
            else:
                _behind(free, own, count, late)
    return free.max()


def _around(start: np.ndarray, count: int, late: float) -> np.ndarray:
    """Ends of the blocks of a segment that begin count / blocks steps apart and go around, as turn_of orders them."""
    blocks = len(start)
    space = count // blocks
    block = np.arange(blocks)
    done = np.zeros((blocks, count))
    end = start
    for turn in range(count):
        step = (block * space + turn) % count
        last = np.minimum(blocks - 1, step // space)
        place = last - block + np.where(block <= last, 0, blocks)
        before = np.where(place > 0, done[(block + 1) % blocks, step] + late, 0)
        end = np.maximum(end + 1, before)
        done[block, step] = end
    return end


def _behind(free: np.ndarray, own: np.ndarray, count: int, late: float) -> None:
    """Each block begins with step 0, and adds to a step after the block before it."""
    before = np.full(count, -np.inf)
    for block in own:
        free_steps = free[block] + 1 + np.arange(count)
        before = np.maximum.accumulate(np.maximum(before + late, free_steps) - np.arange(count)) + np.arange(count)
        free[block] = before[-1]
