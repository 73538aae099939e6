// Backward of variable-length attention with mma.m16n8k16 and cp.async, for sm_80 and later.
//
//   P = exp(scale q k^T - lse)     dP = dO v^T     dS = P * (dP - sum(dO * o))
//   dv = P^T dO                    dk = scale dS^T q                    dq = scale dS k
//
// RowSums (bwd_rows.cuh) prepares the two numbers that each query row needs. BackwardKeys owns a block of keys and goes through the queries
// that see them: it computes the transposed scores, whose accumulators are at once the left operands of dv and dk. BackwardQueries
// owns a block of queries and goes through their keys for dq: the same bits in every run, at the price of computing S and dP
// twice. With ADD_DQ BackwardKeys adds dq itself, in float32: in whatever order blocks come, or IN_TURN, in an order that lengths
// and the device alone decide, so that the bits are the same in every run. docs/attention.md compares them.
#pragma once

#include <cmath>

#include "bwd_rows.cuh"
#include "rows_sm80.cuh"
#include "varlen_attention.h"

namespace qwen2vl_fast {

// dk and dv of one block of keys of one key head, over all query heads of its group.
template <bool BF16, int D, int M_TILES, int STEP_, bool ADD_DQ, bool IN_TURN>
struct BackwardKeys : RowsSm80<BF16, D, M_TILES, STEP_> {
  using Rows = RowsSm80<BF16, D, M_TILES, STEP_>;
  using typename Rows::Accumulator;
  using typename Rows::Fragment;
  using typename Rows::Step;
  using typename Rows::Sum;
  using Rows::ROW;
  using Rows::THREADS;
  static constexpr int STEP = STEP_;
  static constexpr int BLOCKS = 2;
  static constexpr int BLOCK = Rows::BLOCK;

  // K and V of the block; two stages of q, dO, shift, delta; dS^T of a step, where dq is added here.
  static constexpr int STATISTICS = 2 * STEP * ROW;  // within a stage
  static constexpr int STAGE = STATISTICS + 2 * STEP * 4;
  static constexpr int STAGES = 2;
  static constexpr int STAGE_OFFSET = 2 * BLOCK * ROW;
  static constexpr int SLOPE_ROW = 2 * STEP + 16;
  static constexpr int SLOPE_OFFSET = STAGE_OFFSET + STAGES * STAGE;
  static constexpr int TILE_OFFSET = SLOPE_OFFSET + (ADD_DQ ? BLOCK * SLOPE_ROW : 0);
  // In turn, the block's tile, how many steps it has, and the tile's number or already the next one's. Blocks take tiles as they
  // become free there, so that the compiler can't know of a tile's number that all threads share it; in registers it spills.
  static constexpr int STEPS_OFFSET = TILE_OFFSET + 32, NUMBER_OFFSET = STEPS_OFFSET + 4;
  static constexpr int SMEM = TILE_OFFSET + (IN_TURN ? 48 : 0);
  static_assert(2 * STEP <= THREADS && STAGE % 16 == 0 && (SLOPE_ROW / 16) % 2 == 1 && (ADD_DQ || !IN_TURN));

  // For dq the warps share a step's STEP rows and, where those are fewer than 64, the columns.
  static constexpr int DQ_ROW_WARPS = STEP / 16;
  static constexpr int DQ_COLUMN_WARPS = Rows::WARPS / DQ_ROW_WARPS;
  static constexpr int DQ_PAIRS = (D / 16 + DQ_COLUMN_WARPS - 1) / DQ_COLUMN_WARPS;  // of 16 columns

  // Of numbers that are not negative: unsigned division takes fewer registers.
  static DEV int quotient(int a, int b) { return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b)); }

  static DEV Tile tile_of(const VarlenAttentionBackward& args, int index) {
    if constexpr (!IN_TURN) return args.key_tiles[not_foreseen(index)];
    const uint32_t place = shared_memory() + TILE_OFFSET;
    const Words4 a = load_shared_16(place), b = load_shared_16(place + 16);
    return {static_cast<int>(a.word[0]), static_cast<int>(a.word[1]), static_cast<int>(a.word[2]), static_cast<int>(a.word[3]),
            static_cast<int>(b.word[0]), static_cast<int>(b.word[1]), static_cast<int>(b.word[2]), static_cast<int>(b.word[3])};
  }

  static DEV int steps_of(const VarlenAttentionBackward& args, const Tile& tile) {
    return (tile.rows + STEP - 1) / STEP * (args.problem.H / args.problem.Hk);
  }

  // In turn: how many steps lie between the first steps of neighbouring blocks of a segment. Where its blocks are few enough to
  // run all at once, they go around its steps one behind the other; 0: they all begin with the first, and none ever waits for a
  // block behind it in the list, which may start late. docs/attention.md says why more than half are too many.
  static DEV int spacing(const VarlenAttentionBackward& args, const Tile& tile, int all) {
    return IN_TURN && tile.blocks <= args.resident / 2 ? quotient(all, tile.blocks) : 0;
  }

  // Which queries a step takes: of query head `head`, rows first.. of the tile.
  struct Queries {
    int head, first;
    int number;  // of the step among all, in the order of heads and rows
    int space;

    DEV Queries(const VarlenAttentionBackward& args, const Tile& tile, int step) {
      const int group = quotient(args.problem.H, args.problem.Hk), steps = (tile.rows + STEP - 1) / STEP;
      space = spacing(args, tile, steps * group);
      number = step + tile.block * space;
      if (IN_TURN && number >= steps * group) number -= steps * group;
      const int past = quotient(number, steps);
      head = tile.head * group + past;
      first = (number - past * steps) * STEP;
    }

    // In turn: how many blocks add to the step's dq before this one.
    DEV int turn(const Tile& tile) const {
      if (space == 0) return tile.block;
      const int last = Rows::min_of(tile.blocks - 1, quotient(number, space));  // that comes here before it has begun anew
      return last - tile.block + (tile.block <= last ? 0 : tile.blocks);
    }
  };

  // In turn: where the blocks count that have added to a step's dq.
  static DEV int* count_of(const VarlenAttentionBackward& args, const Tile& tile, const Queries& queries) {
    return args.turns + static_cast<int64_t>(queries.head) * args.problem.T + tile.q_row + queries.first;
  }

  static DEV void wait_for_turn(const VarlenAttentionBackward& args, int index, int step) {
    const Tile tile = tile_of(args, index);
    const Queries queries(args, tile, step);
    wait_for(count_of(args, tile, queries), queries.turn(tile));
  }

  // By one thread, after all have added.
  static DEV void pass_turn(const VarlenAttentionBackward& args, int index, int step) {
    const Tile tile = tile_of(args, index);
    const Queries queries(args, tile, step);
    publish(count_of(args, tile, queries), queries.turn(tile) + 1);
  }

  // Starts a step's copies. Returns what this thread will put among the statistics: they come by registers, since their
  // addresses are multiples of 4 bytes only. Rows past the end have q = dO = 0 and any finite statistics, so they add nothing.
  static DEV float load_step(const VarlenAttentionBackward& args, int index, int step, uint32_t stage) {
    const VarlenAttention& p = args.problem;
    const Tile tile = tile_of(args, index);
    const Queries queries(args, tile, step);
    const int64_t first = static_cast<int64_t>(tile.q_row) + queries.first;
    const int valid = tile.rows - queries.first;
    Rows::template load_rows<STEP>(stage, p.q, first, p.q_stride_t, queries.head * p.q_stride_h, valid);
    Rows::template load_rows<STEP>(stage + STEP * ROW, args.grad, first, args.grad_stride_t, queries.head * args.grad_stride_h,
                                   valid);
    copy_async_commit();
    const int thread = not_foreseen(thread_index()), row = thread % STEP;
    if (thread >= 2 * STEP || row >= valid) return 0.0f;
    return (thread < STEP ? args.shift : args.delta)[static_cast<int64_t>(queries.head) * p.T + first + row];
  }

  // Scores [keys, queries] that a query must not see become -inf. Rows past the block's keys need none where each row's sums are
  // its own; dq adds over the keys, and there an infinite weight would meet k = 0.
  static DEV void mask(Step& s, const VarlenAttentionBackward& args, int index, int step) {
    const VarlenAttention& p = args.problem;
    const Tile tile = tile_of(args, index);
    const bool causal = !IN_TURN && p.causal;
    const int first = causal ? Queries(args, tile, step).first + tile.diagonal : 0;  // the last key that the step's first query sees
    if (!(causal && first < BLOCK - 1) && !(ADD_DQ && tile.keys < BLOCK)) return;
    const int thread = not_foreseen(thread_index()), lane = thread % 32;
#pragma unroll
    for (int n = 0; n < Rows::STEP_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int seen = first + n * 8 + lane % 4 * 2 + e;
        const int last = causal ? Rows::min_of(seen, tile.keys - 1) : tile.keys - 1;
        const int end = last - thread / 32 * 16 * M_TILES - lane / 4;
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (i * 16 + half * 8 > end) s[i][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }

  // Scores to weights.
  static DEV void weights(Step& s, float scale_log2, uint32_t stage) {
    const int lane = not_foreseen(thread_index()) % 32;
#pragma unroll
    for (int n = 0; n < Rows::STEP_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = load_shared_float(stage + STATISTICS + (n * 8 + lane % 4 * 2 + e) * 4);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[i][n][2 * half + e];
            x = exp2_fast(fmaf(x, scale_log2, -shift));
          }
        }
      }
    }
  }

  // dP to dS; FROM_DELTA: dP - delta to dS.
  template <bool FROM_DELTA>
  static DEV void slopes(Step& x, const Step& weight, uint32_t stage) {
    const int lane = not_foreseen(thread_index()) % 32;
#pragma unroll
    for (int n = 0; n < Rows::STEP_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float delta = FROM_DELTA ? 0.0f : load_delta(stage, lane, n, e);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            x[i][n][2 * half + e] = weight[i][n][2 * half + e] * (x[i][n][2 * half + e] - delta);
          }
        }
      }
    }
  }

  static DEV float load_delta(uint32_t stage, int lane, int n, int e) {
    return load_shared_float(stage + STATISTICS + (STEP + n * 8 + lane % 4 * 2 + e) * 4);
  }

  // -delta, to which dP is added.
  static DEV void begin_slopes(Step& x, uint32_t stage) {
    const int lane = not_foreseen(thread_index()) % 32;
#pragma unroll
    for (int n = 0; n < Rows::STEP_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float delta = load_delta(stage, lane, n, e);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) x[i][n][2 * half + e] = -delta;
        }
      }
    }
  }

  static DEV void share_slopes(const Step& x, uint32_t to) {
    const int thread = not_foreseen(thread_index()), lane = thread % 32;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (thread / 32 * M_TILES + i) * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < Rows::STEP_TILES; ++n) {
          store_shared(to + row * SLOPE_ROW + n * 16 + lane % 4 * 4, pack<BF16>(x[i][n][2 * half], x[i][n][2 * half + 1]));
        }
      }
    }
  }

  // dq_sum += scale dS k for the step's queries. Keys past the block's end have k = 0 and finite dS.
  static DEV void add_dq(const VarlenAttentionBackward& args, int index, int step, uint32_t slope, uint32_t keys) {
    const VarlenAttention& p = args.problem;
    const Tile tile = tile_of(args, index);
    const int thread = not_foreseen(thread_index()), lane = thread % 32, warp = thread / 32;
    const int row = warp % DQ_ROW_WARPS * 16, pair = warp / DQ_ROW_WARPS * DQ_PAIRS;
    const uint32_t left_address = slope + (lane / 16 * 8 + lane % 8) * SLOPE_ROW + (row + lane / 8 % 2 * 8) * 2;
    const uint32_t right_address = keys + lane % 16 * ROW + lane / 16 * 16 + pair * 32;
    Accumulator sum[2 * DQ_PAIRS] = {};
#pragma unroll
    for (int k = 0; k < BLOCK / 16; ++k) {
      Fragment left;
      load_matrices_transposed(left, left_address + k * 16 * SLOPE_ROW);
#pragma unroll
      for (int n = 0; n < DQ_PAIRS; ++n) {
        if (pair + n >= D / 16) continue;
        Fragment right;
        load_matrices_transposed(right, right_address + k * 16 * ROW + n * 32);
        mma_16x8x16<BF16>(sum[2 * n], left, right[0], right[1]);
        mma_16x8x16<BF16>(sum[2 * n + 1], left, right[2], right[3]);
      }
    }
    const Queries queries(args, tile, step);
    const int first = queries.first + row + lane / 4;
    float* target = args.dq_sum + ((static_cast<int64_t>(tile.q_row) + first) * p.H + queries.head) * D + pair * 16 + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first + half * 8 >= tile.rows) continue;
#pragma unroll
      for (int n = 0; n < 2 * DQ_PAIRS; ++n) {
        if (pair + n / 2 >= D / 16) continue;
        add_global(target + half * 8 * p.H * D + n * 8, sum[n][2 * half] * p.scale, sum[n][2 * half + 1] * p.scale);
      }
    }
  }

  static DEV void run(const VarlenAttentionBackward& args) {
    const uint32_t memory = shared_memory();
    if constexpr (IN_TURN) {
      run_as_free(args, memory);
    } else {
      for (int index = block_index(); index < args.key_tile_count; index += block_count()) {
        if (args.key_tiles[index].keys > 0) run_tile(args, index, memory);
      }
    }
  }

  // First the tile of the block's own number, then whenever it is done the first one that no block has taken.
  static DEV void run_as_free(const VarlenAttentionBackward& args, uint32_t memory) {
    const int thread = thread_index();
    if (thread == 0) store_shared(memory + NUMBER_OFFSET, static_cast<uint32_t>(block_index()));
    for (;;) {
      barrier();  // the number is there, and no warp needs the tile before it any more
      const int index = static_cast<int>(load_shared_word(memory + NUMBER_OFFSET));
      if (index >= args.key_tile_count) return;
      const Tile* tile = args.key_tiles + index;
      if (thread < 2) store_shared(memory + TILE_OFFSET + 16 * thread, reinterpret_cast<const Words4*>(tile)[thread]);
      if (thread == 0) store_shared(memory + STEPS_OFFSET, static_cast<uint32_t>(tile->keys > 0 ? steps_of(args, *tile) : 0));
      barrier();  // the tile is there
      run_tile(args, index, memory);
    }
  }

  static DEV int take_tile(const VarlenAttentionBackward& args) {
    return block_count() + count_up(args.turns + static_cast<int64_t>(args.problem.H) * args.problem.T);
  }

  static DEV void run_tile(const VarlenAttentionBackward& args, int index, uint32_t memory) {
    const VarlenAttention& p = args.problem;
    const Tile tile = tile_of(args, index);
    const uint32_t keys = memory, values = memory + BLOCK * ROW;
    const int own_steps = steps_of(args, tile);
    const auto steps = [&] { return IN_TURN ? static_cast<int>(load_shared_word(memory + STEPS_OFFSET)) : own_steps; };
    Sum dk, dv;
    Rows::clear(dk);
    Rows::clear(dv);

    if constexpr (!IN_TURN) barrier();  // other warps may still write out the tile before this one
    float statistic = 0.0f;
    if (steps() > 0) {
      Rows::template load_rows<BLOCK>(keys, p.k, tile.k_row, p.k_stride_t, tile.head * p.k_stride_h, tile.keys);
      Rows::template load_rows<BLOCK>(values, p.v, tile.k_row, p.v_stride_t, tile.head * p.v_stride_h, tile.keys);
      statistic = load_step(args, index, 0, memory + STAGE_OFFSET);
    }
#pragma unroll 1
    for (int step = 0; step < steps(); ++step) {
      const uint32_t stage = memory + STAGE_OFFSET + step % STAGES * STAGE;
      const int thread = not_foreseen(thread_index());
      if (thread < 2 * STEP) store_shared(stage + STATISTICS + thread * 4, statistic);
      copy_async_wait<0>();
      barrier();  // this step's rows are here for all, and nobody reads the last step's any more
      if (step + 1 < steps()) statistic = load_step(args, index, step + 1, memory + STAGE_OFFSET + (step + 1) % STAGES * STAGE);

      Step weight, slope;
      Rows::multiply(weight, keys, stage);
      if (ADD_DQ || p.causal) mask(weight, args, index, step);
      // When the last step's additions have had time to arrive, so that little waits for them; by a warp with less of dq.
      if (IN_TURN && step > 0 && thread == THREADS - 1) pass_turn(args, index, step - 1);
      weights(weight, p.scale * 1.44269504088896341f, stage);
      Rows::accumulate(dv, weight, stage + STEP * ROW);
      // With dq beside it the registers suffice if delta needs none after the product; without dq they suffice if it comes then.
      if constexpr (ADD_DQ) {
        begin_slopes(slope, stage);
      } else {
        Rows::clear(slope);
      }
      Rows::multiply_add(slope, values, stage + STEP * ROW);
      slopes<ADD_DQ>(slope, weight, stage);
      if constexpr (ADD_DQ) share_slopes(slope, memory + SLOPE_OFFSET);
      Rows::accumulate(dk, slope, stage);
      if constexpr (ADD_DQ) {
        if (IN_TURN && thread == THREADS - 33) wait_for_turn(args, index, step);
        barrier();  // all of dS is there; the next step's first barrier keeps it until all have read it
        add_dq(args, index, step, memory + SLOPE_OFFSET, keys);
      }
    }
    if constexpr (ADD_DQ) barrier();  // all warps are done with the keys, over which dk is written
    if (IN_TURN && steps() > 0 && thread_index() == THREADS - 1) pass_turn(args, index, steps() - 1);
    // Now, and not before: this block waits for no other any more, so whoever waits for the next tile does not wait in vain.
    if (IN_TURN && thread_index() == 0) store_shared(memory + NUMBER_OFFSET, static_cast<uint32_t>(take_tile(args)));
    const Tile end = tile_of(args, index);
    Rows::write(args.dk, end.k_row, args.dk_stride_t, end.head * args.dk_stride_h, end.keys, dk, p.scale, keys);
    Rows::write(args.dv, end.k_row, args.dv_stride_t, end.head * args.dv_stride_h, end.keys, dv, 1.0f, values);
  }
};

// dq of one block of queries of one head.
template <bool BF16, int D, int M_TILES, int STEP_>
struct BackwardQueries : RowsSm80<BF16, D, M_TILES, STEP_> {
  using Rows = RowsSm80<BF16, D, M_TILES, STEP_>;
  using typename Rows::Step;
  using typename Rows::Sum;
  using Rows::ROW;
  static constexpr int STEP = STEP_;
  static constexpr int BLOCKS = 2;
  static constexpr int BLOCK = Rows::BLOCK;

  // q and dO of the block; two stages of K and V.
  static constexpr int STAGE = 2 * STEP * ROW;
  static constexpr int STAGES = 2;
  static constexpr int STAGE_OFFSET = 2 * BLOCK * ROW;
  static constexpr int SMEM = STAGE_OFFSET + STAGES * STAGE;

  static DEV void load_step(const VarlenAttention& p, int index, int step, uint32_t stage) {
    const Tile tile = p.tiles[not_foreseen(index)];
    const int head = tile.head / (p.H / p.Hk);
    const int64_t first = static_cast<int64_t>(tile.k_row) + step * STEP;
    const int valid = tile.keys - step * STEP;
    Rows::template load_rows<STEP>(stage, p.k, first, p.k_stride_t, head * p.k_stride_h, valid);
    Rows::template load_rows<STEP>(stage + STEP * ROW, p.v, first, p.v_stride_t, head * p.v_stride_h, valid);
    copy_async_commit();
  }

  // Scores [queries, keys] of keys that a query must not see become -inf. `first` is the step's first key.
  static DEV void mask(Step& s, const VarlenAttention& p, int index, int first) {
    const Tile tile = p.tiles[not_foreseen(index)];
    const int thread = not_foreseen(thread_index()), lane = thread % 32;
    const int warp_row = thread / 32 * 16 * M_TILES;
    if (first + STEP <= tile.keys && !(p.causal && first + STEP > warp_row + tile.diagonal + 1)) return;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + i * 16 + half * 8 + lane / 4;
        const int end = (p.causal ? Rows::min_of(tile.keys, row + tile.diagonal + 1) : tile.keys) - first - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < Rows::STEP_TILES; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (n * 8 + e >= end) s[i][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }

  // dP to dS, from the scores.
  static DEV void slopes(Step& x, const Step& s, float scale_log2, const float (&shift)[M_TILES][2],
                         const float (&delta)[M_TILES][2]) {
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < Rows::STEP_TILES; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float weight = exp2_fast(fmaf(s[i][n][2 * half + e], scale_log2, -shift[i][half]));
            float& slope = x[i][n][2 * half + e];
            slope = weight * (slope - delta[i][half]);
          }
        }
      }
    }
  }

  static DEV void run(const VarlenAttentionBackward& args) {
    const uint32_t memory = shared_memory();
    for (int index = block_index(); index < args.problem.tile_count; index += block_count()) {
      if (args.problem.tiles[index].rows > 0) run_tile(args, index, memory);
    }
  }

  static DEV void run_tile(const VarlenAttentionBackward& args, int index, uint32_t memory) {
    const VarlenAttention& p = args.problem;
    const Tile tile = p.tiles[index];
    const uint32_t queries = memory, grads = memory + BLOCK * ROW;
    const int steps = (tile.keys + STEP - 1) / STEP;
    Sum dq;
    Rows::clear(dq);
    float shift[M_TILES][2], delta[M_TILES][2];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (thread_index() / 32 * M_TILES + i) * 16 + half * 8 + thread_index() % 32 / 4;
        const int64_t place = static_cast<int64_t>(tile.head) * p.T + tile.q_row + row;
        shift[i][half] = row < tile.rows ? args.shift[place] : 0.0f;
        delta[i][half] = row < tile.rows ? args.delta[place] : 0.0f;
      }
    }

    barrier();  // other warps may still write out the tile before this one
    if (steps > 0) {
      Rows::template load_rows<BLOCK>(queries, p.q, tile.q_row, p.q_stride_t, tile.head * p.q_stride_h, tile.rows);
      Rows::template load_rows<BLOCK>(grads, args.grad, tile.q_row, args.grad_stride_t, tile.head * args.grad_stride_h,
                                      tile.rows);
      load_step(p, index, 0, memory + STAGE_OFFSET);
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t stage = memory + STAGE_OFFSET + step % STAGES * STAGE;
      copy_async_wait<0>();
      barrier();  // this step's rows are here for all, and nobody reads the last step's any more
      if (step + 1 < steps) load_step(p, index, step + 1, memory + STAGE_OFFSET + (step + 1) % STAGES * STAGE);

      Step s, slope;
      Rows::multiply(s, queries, stage);
      mask(s, p, index, step * STEP);
      Rows::multiply(slope, grads, stage + STEP * ROW);
      slopes(slope, s, p.scale * 1.44269504088896341f, shift, delta);
      Rows::accumulate(dq, slope, stage);
    }
    const Tile end = p.tiles[not_foreseen(index)];
    Rows::write(args.dq, end.q_row, args.dq_stride_t, end.head * args.dq_stride_h, end.rows, dq, p.scale, queries);
  }
};

}  // namespace qwen2vl_fast
