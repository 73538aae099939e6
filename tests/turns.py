"""What waiting costs the backward that adds dq in turn: csrc/bwd_sm80.cuh's order, simulated step by step.

A step takes one unit of time in every block; what a block has added is seen by the next one `late` units after that step's
end. Whatever block is free takes the next tile of the list. No GPU has said yet how far that is from the truth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def steps(lengths: Sequence[int], heads: int, rows: int, step: int, resident: int, late: float | None) -> float:
    """When the last block is done, in steps. late: None if nobody waits for anybody."""
    free = [0.0] * resident  # a heap: when each block is done with what it has
    for length in sorted(lengths, reverse=True):
        blocks, count = -(-length // rows), -(-length // step)
        for _ in range(heads):
            if late is None:
                for _ in range(blocks):
                    heapq.heapreplace(free, free[0] + count)
            elif blocks <= resident // 2 and count >= blocks:
                start = np.array([heapq.heappop(free) for _ in range(blocks)])
                for end in _around(start, count, late):
                    heapq.heappush(free, end)
            else:
                _behind(free, blocks, count, late)
    return max(free)


def _around(start: np.ndarray, count: int, late: float) -> np.ndarray:
    """Ends of the blocks of a segment that begin count / blocks steps apart and go around, as Queries::turn orders them."""
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


def _behind(free: list[float], blocks: int, count: int, late: float) -> None:
    """Each block begins with step 0, and adds to a step after the block before it."""
    before, turn = np.full(count, -np.inf), np.arange(count)
    for _ in range(blocks):
        before = np.maximum.accumulate(np.maximum(before + late, free[0] + 1 + turn) - turn) + turn
        heapq.heapreplace(free, before[-1])
