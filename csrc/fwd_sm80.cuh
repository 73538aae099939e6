// Forward of variable-length attention with mma.m16n8k16 and cp.async: sm_80, and whatever has no kernel of its own.
//
// A block of four warps takes one tile of work after another. Each warp owns 16 * M_TILES rows of q and goes through the
// tile's keys in steps of BLOCK_N: scores by tensor cores, softmax in registers, P in registers straight into P V. K and V of
// the next step are copied while this one is computed. docs/attention.md derives the tile.
#pragma once

#include <cmath>

#include "ptx.cuh"
#include "varlen_attention.h"

namespace qwen2vl_fast {

template <bool BF16, int D, int M_TILES>
struct ForwardSm80 {
  static constexpr int WARPS = 4;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int BLOCKS = M_TILES == 1 ? 3 : 2;  // resident on a multiprocessor: holds the registers to 168 or 255
  static constexpr int BLOCK_M = 16 * WARPS * M_TILES;
  static constexpr int BLOCK_N = D <= 80 ? 64 : 32;
  static constexpr int K_STEPS = D / 16;   // of q k^T
  static constexpr int S_TILES = BLOCK_N / 8;
  static constexpr int O_TILES = D / 8;
  // At head_dim 128 the accumulators leave no registers for q, which is then read from shared memory in every step.
  static constexpr bool Q_IN_REGISTERS = D <= 80;

  // A row in shared memory is padded to an odd multiple of 16 bytes: eight rows then lie in eight different groups of banks.
  static constexpr int ROW = 2 * D + 16;
  static constexpr int STAGE = 2 * BLOCK_N * ROW;  // K, then V
  static constexpr int STAGES = 2;
  // In registers q needs shared memory only until the second step's keys come: it lies where they will.
  static constexpr int Q_OFFSET = Q_IN_REGISTERS ? STAGE : STAGES * STAGE;
  static constexpr int SMEM = STAGES * STAGE + (Q_IN_REGISTERS ? 0 : BLOCK_M * ROW);
  static_assert(D % 16 == 0 && (ROW / 16) % 2 == 1);
  static_assert(!Q_IN_REGISTERS || BLOCK_M * ROW <= STAGE);

  // 16-byte pieces of a row go to neighbouring lanes; lanes that are left over stay idle.
  static constexpr int PIECES = D / 8;
  static constexpr int ROWS_A_WARP = 32 / PIECES;
  static constexpr int ROWS_A_PASS = WARPS * ROWS_A_WARP;

  using Fragment = uint32_t[4];
  using Accumulator = float[4];

  // The 16-byte pieces that this lane copies: of every ROWS_A_PASS-th row from `row` on.
  struct Lane {
    int row, offset;  // row: past every block for a lane that copies nothing. offset: bytes within a row

    DEV Lane() {
      const int thread = not_foreseen(thread_index()), lane = thread % 32;
      row = lane < PIECES * ROWS_A_WARP ? thread / 32 * ROWS_A_WARP + lane / PIECES : 1 << 20;
      offset = lane % PIECES * 16;
    }
  };

  // ROWS rows to shared memory, those from `valid` on as zeros: 0 * NaN of a neighbour's V would be NaN. `from` is the lane's
  // piece of its first row, `stride` in elements.
  template <int ROWS>
  static DEV void load_rows(uint32_t to, const char* from, int64_t stride, int valid, const Lane& lane) {
    to += lane.row * ROW + lane.offset;
#pragma unroll
    for (int pass = 0; pass < ROWS; pass += ROWS_A_PASS) {
      if (lane.row + pass < ROWS) copy_async_16(to + pass * ROW, from, lane.row + pass < valid ? 16 : 0);
      from += 2 * ROWS_A_PASS * stride;
    }
  }

  static DEV const char* piece(const void* base, int64_t row, int64_t stride_t, int head, int64_t stride_h, const Lane& lane) {
    return static_cast<const char*>(base) + 2 * ((row + lane.row) * stride_t + head * stride_h) + lane.offset;
  }

  // Copies one step of K and V; `left` keys are left of the tile.
  static DEV void load_keys(const VarlenAttention& args, const char* k, const char* v, int left, uint32_t stage,
                            const Lane& lane) {
    load_rows<BLOCK_N>(stage, k, args.k_stride_t, left, lane);
    load_rows<BLOCK_N>(stage + BLOCK_N * ROW, v, args.v_stride_t, left, lane);
    copy_async_commit();
  }

  // Rows 16i.. of q, columns 16k..: the address that each lane gives to load_matrices.
  static DEV uint32_t q_address(uint32_t q, int i, int k) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    return q + ((warp * M_TILES + i) * 16 + lane % 16) * ROW + k * 32 + lane / 16 * 16;
  }

  static DEV void scores(Accumulator (&s)[M_TILES][S_TILES], const Fragment (&q)[M_TILES][K_STEPS], uint32_t q_shared,
                         uint32_t keys) {
    const int lane = thread_index() % 32;
    const uint32_t address = keys + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int n = 0; n < S_TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      Fragment a[M_TILES];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) {
        if constexpr (Q_IN_REGISTERS) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = q[i][k][e];
        } else {
          load_matrices(a[i], q_address(q_shared, i, k));
        }
      }
#pragma unroll
      for (int n = 0; n < S_TILES; n += 2) {
        Fragment b;
        load_matrices(b, address + n * 8 * ROW + k * 32);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
          mma_16x8x16<BF16>(s[i][n], a[i], b[0], b[1]);
          mma_16x8x16<BF16>(s[i][n + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Scores of keys that a row must not see become -inf. `first` is the step's first key.
  static DEV void mask(Accumulator (&s)[M_TILES][S_TILES], const Tile& tile, bool causal, int first) {
    const int thread = not_foreseen(thread_index()), lane = thread % 32;
    const int row = thread / 32 * 16 * M_TILES + lane / 4;
    const int column = first + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int end = causal ? min_of(tile.keys, row + i * 16 + half * 8 + tile.diagonal + 1) : tile.keys;
#pragma unroll
        for (int n = 0; n < S_TILES; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (column + n * 8 + e >= end) s[i][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }

  static DEV int min_of(int a, int b) { return a < b ? a : b; }

  // Turns scores into weights and rescales what was summed so far to the new maximum. The sums stay partial: each lane adds
  // the columns that it holds.
  static DEV void softmax(Accumulator (&s)[M_TILES][S_TILES], Accumulator (&o)[M_TILES][O_TILES], float (&top)[M_TILES][2],
                          float (&sum)[M_TILES][2], float scale_log2) {
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = s[i][0][2 * half];
#pragma unroll
        for (int n = 0; n < S_TILES; ++n) {
          highest = fmaxf(highest, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
        }
        highest = fmaxf(highest, shuffle_xor(highest, 1));
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        // In units of log2. A row that has seen no key yet keeps -inf, and 0 stands in for it: -inf - -inf would be NaN.
        const float before = top[i][half];
        const float after = fmaxf(before, highest * scale_log2);
        const float shift = after == -INFINITY ? 0.0f : after;
        const float shrink = exp2_fast(before - shift);
        top[i][half] = after;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < S_TILES; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[i][n][2 * half + e];
            x = exp2_fast(fmaf(x, scale_log2, -shift));
            added += x;
          }
        }
        sum[i][half] = fmaf(sum[i][half], shrink, added);
#pragma unroll
        for (int n = 0; n < O_TILES; ++n) {
          o[i][n][2 * half] *= shrink;
          o[i][n][2 * half + 1] *= shrink;
        }
      }
    }
  }

  static DEV void weigh_values(Accumulator (&o)[M_TILES][O_TILES], const Accumulator (&p)[M_TILES][S_TILES], uint32_t values) {
    const int lane = thread_index() % 32;
    const uint32_t address = values + lane % 16 * ROW + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k) {
      Fragment a[M_TILES];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) {
        a[i][0] = pack<BF16>(p[i][2 * k][0], p[i][2 * k][1]);
        a[i][1] = pack<BF16>(p[i][2 * k][2], p[i][2 * k][3]);
        a[i][2] = pack<BF16>(p[i][2 * k + 1][0], p[i][2 * k + 1][1]);
        a[i][3] = pack<BF16>(p[i][2 * k + 1][2], p[i][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < O_TILES; n += 2) {
        Fragment b;
        load_matrices_transposed(b, address + k * 16 * ROW + n * 16);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
          mma_16x8x16<BF16>(o[i][n], a[i], b[0], b[1]);
          mma_16x8x16<BF16>(o[i][n + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // o / sum and the log-sum-exp to global memory. A warp gathers its rows in shared memory, to write them in 16-byte pieces.
  static DEV void write(const VarlenAttention& args, const Tile& tile, const Accumulator (&o)[M_TILES][O_TILES],
                        const float (&top)[M_TILES][2], float (&sum)[M_TILES][2], uint32_t staging) {
    const int thread = not_foreseen(thread_index());
    const int lane = thread % 32, warp_row = thread / 32 * 16 * M_TILES;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[i][half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const int row = warp_row + i * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < O_TILES; ++n) {
          store_shared(staging + row * ROW + n * 16 + lane % 4 * 4,
                       pack<BF16>(o[i][n][2 * half] * inverse, o[i][n][2 * half + 1] * inverse));
        }
        if (lane % 4 == 0 && row < tile.rows) {
          const float lse = total == 0.0f ? -INFINITY : (top[i][half] + log2f(total)) * 0.693147180559945309f;
          args.lse[static_cast<int64_t>(tile.head) * args.T + tile.q_row + row] = lse;
        }
      }
    }
    warp_barrier();
    if (lane >= PIECES * ROWS_A_WARP) return;
    char* target = static_cast<char*>(args.o) + 2 * (tile.q_row * args.o_stride_t + tile.head * args.o_stride_h);
#pragma unroll
    for (int pass = 0; pass < 16 * M_TILES; pass += ROWS_A_WARP) {
      const int within = pass + lane / PIECES, row = warp_row + within;
      if (within < 16 * M_TILES && row < tile.rows) {
        *reinterpret_cast<Words4*>(target + 2 * (row * args.o_stride_t) + lane % PIECES * 16) =
            load_shared_16(staging + row * ROW + lane % PIECES * 16);
      }
    }
  }

  static DEV void run(const VarlenAttention& args) {
    const uint32_t memory = shared_memory();
    for (int index = block_index(); index < args.tile_count; index += block_count()) {
      if (args.tiles[index].rows > 0) run_tile(args, index, memory);
    }
  }

  static DEV void run_tile(const VarlenAttention& args, int index, uint32_t memory) {
    const Tile tile = args.tiles[index];
    const float scale_log2 = args.scale * 1.44269504088896341f;
    const int steps = (tile.keys + BLOCK_N - 1) / BLOCK_N;
    const uint32_t q_shared = memory + Q_OFFSET;
    Fragment q[M_TILES][K_STEPS];
    Accumulator o[M_TILES][O_TILES];
    float top[M_TILES][2], sum[M_TILES][2];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int n = 0; n < O_TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][n][e] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[i][half] = -INFINITY;
        sum[i][half] = 0.0f;
      }
    }

    const Lane lane;
    const int key_head = tile.head / (args.H / args.Hk);
    const char* k = piece(args.k, tile.k_row, args.k_stride_t, key_head, args.k_stride_h, lane);
    const char* v = piece(args.v, tile.k_row, args.v_stride_t, key_head, args.v_stride_h, lane);
    barrier();  // other warps may still write out the tile before this one
    if (steps > 0) {
      const char* rows = piece(args.q, tile.q_row, args.q_stride_t, tile.head, args.q_stride_h, lane);
      load_rows<BLOCK_M>(q_shared, rows, args.q_stride_t, tile.rows, lane);
      load_keys(args, k, v, tile.keys, memory, lane);
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t stage = memory + step % STAGES * STAGE;
      copy_async_wait<0>();
      barrier();  // this step's keys are here for all, and nobody reads the last step's any more
      if (Q_IN_REGISTERS && step == 0) {
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
          for (int k = 0; k < K_STEPS; ++k) load_matrices(q[i][k], q_address(q_shared, i, k));
        }
        barrier();  // before keys replace q
      }
      if (step + 1 < steps) {
        k += 2 * BLOCK_N * args.k_stride_t;
        v += 2 * BLOCK_N * args.v_stride_t;
        load_keys(args, k, v, tile.keys - (step + 1) * BLOCK_N, memory + (step + 1) % STAGES * STAGE, lane);
      }

      Accumulator s[M_TILES][S_TILES];
      scores(s, q, q_shared, stage);
      const int first = step * BLOCK_N, end = first + BLOCK_N;
      const int warp_row = thread_index() / 32 * 16 * M_TILES;
      if (end > tile.keys || (args.causal && end > warp_row + tile.diagonal + 1)) mask(s, tile, args.causal, first);
      softmax(s, o, top, sum, scale_log2);
      weigh_values(o, s, stage + BLOCK_N * ROW);
    }
    if (Q_IN_REGISTERS) barrier();  // o goes where other warps may still read keys
    write(args, args.tiles[not_foreseen(index)], o, top, sum, q_shared);
  }
};

}  // namespace qwen2vl_fast
