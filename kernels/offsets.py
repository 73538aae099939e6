"""The one place where an index becomes an address, and the integer helpers of launchers.

Not triton.cdiv and next_power_of_2: those are wrapped for use inside kernels, at several microseconds a call.
"""

import triton
import triton.language as tl


@triton.jit
def offset(index, stride):
    """index * stride in elements, in 64 bits: 262 144 tokens of 64 heads of 128 are 2^31 already."""
    return index.to(tl.int64) * stride


@triton.jit
def wide(x):
    """x in the type that is computed in: float32, float64 for float64."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


LIMIT = 1 << 30  # rows, columns and heads are counted in 32 bits, and the last block may reach beyond them


def refuse(count: int) -> None:
    raise ValueError(f"the triton backend takes fewer than 2^30 rows, columns or heads, got {count}; 'torch' takes more")


def blocks_of(count: int, block: int) -> int:
    """How many blocks cover count."""
    return -(-count // block)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
