// What the backward kernels for sm_80 share: rows of D elements in shared memory, and products of warps with them.
#pragma once

#include "ptx.cuh"

namespace qwen2vl_fast {

// Four warps; each owns 16 * M_TILES rows of a block and goes through other rows in steps of STEP.
template <bool BF16, int D, int M_TILES, int STEP>
struct RowsSm80 {
  static constexpr int WARPS = 4;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int BLOCK = 16 * WARPS * M_TILES;
  static constexpr int K_STEPS = D / 16;
  static constexpr int STEP_TILES = STEP / 8;
  static constexpr int D_TILES = D / 8;

  // A row is padded to an odd multiple of 16 bytes: eight rows then lie in eight different groups of banks.
  static constexpr int ROW = 2 * D + 16;
  static_assert(D % 16 == 0 && STEP % 16 == 0 && (ROW / 16) % 2 == 1);

  // 16-byte pieces of a row go to neighbouring lanes; lanes that are left over stay idle.
  static constexpr int PIECES = D / 8;
  static constexpr int ROWS_A_WARP = 32 / PIECES;
  static constexpr int ROWS_A_PASS = WARPS * ROWS_A_WARP;

  using Fragment = uint32_t[4];
  using Accumulator = float[4];
  using Step = Accumulator[M_TILES][STEP_TILES];  // a warp's rows by a step's rows
  using Sum = Accumulator[M_TILES][D_TILES];      // a warp's rows by D

  static DEV int min_of(int a, int b) { return a < b ? a : b; }

  // ROWS rows to shared memory, those from `valid` on as zeros: what 0 multiplies later must not be NaN.
  template <int ROWS>
  static DEV void load_rows(uint32_t to, const void* from, int64_t first, int64_t stride, int64_t offset, int valid) {
    const int thread = not_foreseen(thread_index()), lane = thread % 32;
    if (lane >= PIECES * ROWS_A_WARP) return;
    const int row = thread / 32 * ROWS_A_WARP + lane / PIECES, bytes = lane % PIECES * 16;
    const char* source = static_cast<const char*>(from) + 2 * ((first + row) * stride + offset) + bytes;
    to += row * ROW + bytes;
#pragma unroll
    for (int pass = 0; pass < ROWS; pass += ROWS_A_PASS) {
      if (row + pass < ROWS) copy_async_16(to + pass * ROW, source, row + pass < valid ? 16 : 0);
      source += 2 * ROWS_A_PASS * stride;
    }
  }

  template <int TILES>
  static DEV void clear(Accumulator (&x)[M_TILES][TILES]) {
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][n][e] = 0.0f;
      }
    }
  }

  // x = a b^T: the warp's rows of the block `a` with the rows of the step `b`, over D.
  static DEV void multiply(Step& x, uint32_t a, uint32_t b) {
    clear(x);
    multiply_add(x, a, b);
  }

  // x += a b^T.
  static DEV void multiply_add(Step& x, uint32_t a, uint32_t b) {
    const int thread = not_foreseen(thread_index()), lane = thread % 32;
    const uint32_t rows = a + (thread / 32 * M_TILES * 16 + lane % 16) * ROW + lane / 16 * 16;
    const uint32_t columns = b + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      Fragment left[M_TILES];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) load_matrices(left[i], rows + i * 16 * ROW + k * 32);
#pragma unroll
      for (int n = 0; n < STEP_TILES; n += 2) {
        Fragment right;
        load_matrices(right, columns + n * 8 * ROW + k * 32);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
          mma_16x8x16<BF16>(x[i][n], left[i], right[0], right[1]);
          mma_16x8x16<BF16>(x[i][n + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  // sum += x b, over the step's rows; x is rounded to 16 bits.
  static DEV void accumulate(Sum& sum, const Step& x, uint32_t b) {
    const int lane = not_foreseen(thread_index()) % 32;
    const uint32_t rows = b + lane % 16 * ROW + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
      Fragment left[M_TILES];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) {
        left[i][0] = pack<BF16>(x[i][2 * k][0], x[i][2 * k][1]);
        left[i][1] = pack<BF16>(x[i][2 * k][2], x[i][2 * k][3]);
        left[i][2] = pack<BF16>(x[i][2 * k + 1][0], x[i][2 * k + 1][1]);
        left[i][3] = pack<BF16>(x[i][2 * k + 1][2], x[i][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < D_TILES; n += 2) {
        Fragment right;
        load_matrices_transposed(right, rows + k * 16 * ROW + n * 16);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
          mma_16x8x16<BF16>(sum[i][n], left[i], right[0], right[1]);
          mma_16x8x16<BF16>(sum[i][n + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  // factor * sum to rows first.. of `to`, by way of the warp's own rows of `staging`.
  static DEV void write(void* to, int64_t first, int64_t stride, int64_t offset, int valid, const Sum& sum, float factor,
                        uint32_t staging) {
    const int thread = not_foreseen(thread_index()), lane = thread % 32, warp_row = thread / 32 * 16 * M_TILES;
    warp_barrier();
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int n = 0; n < D_TILES; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store_shared(staging + (warp_row + i * 16 + half * 8 + lane / 4) * ROW + n * 16 + lane % 4 * 4,
                       pack<BF16>(sum[i][n][2 * half] * factor, sum[i][n][2 * half + 1] * factor));
        }
      }
    }
    warp_barrier();
    if (lane >= PIECES * ROWS_A_WARP) return;
    const int bytes = lane % PIECES * 16;
    char* target = static_cast<char*>(to) + 2 * (first * stride + offset) + bytes;
#pragma unroll
    for (int pass = 0; pass < 16 * M_TILES; pass += ROWS_A_WARP) {
      const int within = pass + lane / PIECES, row = warp_row + within;
      if (within < 16 * M_TILES && row < valid) {
        *reinterpret_cast<Words4*>(target + 2 * (row * stride)) = load_shared_16(staging + row * ROW + bytes);
      }
    }
  }
};

}  // namespace qwen2vl_fast
