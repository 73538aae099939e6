// Where the tiles of the Hopper kernels lie in shared memory, and how descriptors name them.
#pragma once

#include "ptx_sm90.cuh"

namespace qwen2vl_fast {

// How [rows, D] lies in shared memory: first WIDE groups of 64 columns, each [rows, 64] with the 128-byte swizzle, then groups of 16
// columns with the 32-byte swizzle. 160-byte rows fit no wider swizzle as a whole; a last wide group beyond D is filled up with zeros.
template <int D, int ROWS_, int WIDE_>
struct Layout {
  static constexpr int ROWS = ROWS_;
  static constexpr int WIDE = WIDE_;
  static constexpr int NARROW = WIDE * 64 < D ? (D - WIDE * 64) / 16 : 0;
  static constexpr int BYTES = ROWS * (128 * WIDE + 32 * NARROW);
  static constexpr int STRIDE = (BYTES + 1023) / 1024 * 1024;  // the 128-byte swizzle repeats after 1024 bytes
  static constexpr int NARROW_OFFSET = ROWS * 128 * WIDE;
  static constexpr uint32_t WIDE_HIGH = (8 * 128 >> 4) | (1u << 30);
  static constexpr uint32_t NARROW_HIGH = (8 * 32 >> 4) | (3u << 30);

  // Of the 16 columns from 16 * step on, as a K-major operand: descriptor's high word, byte offset.
  static constexpr DEV uint32_t high(int step) { return step < 4 * WIDE ? WIDE_HIGH : NARROW_HIGH; }
  static constexpr DEV int offset(int step) {
    return step < 4 * WIDE ? step / 4 * ROWS * 128 + step % 4 * 32 : NARROW_OFFSET + (step - 4 * WIDE) * ROWS * 32;
  }

  // Address of one half (0, 1) of those 16 columns in a row: a swizzle moves 16-byte units inside a row.
  static DEV uint32_t address(uint32_t start, uint32_t row, int step, uint32_t half) {
    if (step < 4 * WIDE) return start + step / 4 * ROWS * 128 + row * 128 + ((2 * (step % 4) + half) ^ (row % 8)) * 16;
    return start + NARROW_OFFSET + (step - 4 * WIDE) * ROWS * 32 + row * 32 + (half ^ (row / 4 % 2)) * 16;
  }
};

}  // namespace qwen2vl_fast
