// What the backward of variable-length attention does row by row, before its large kernels and behind them.
#pragma once

#include <cmath>

#include "ptx.cuh"
#include "varlen_attention.h"

namespace qwen2vl_fast {

// Of each row of o and dO: sum(dO * o), and lse in units of log2. Clears the row of dq_sum and its turns, where there are any.
template <bool BF16, int D>
struct RowSums {
  static constexpr int THREADS = 256;
  static constexpr int BLOCKS = 4;
  static constexpr int SMEM = 0;
  static constexpr int LANES = 8;  // of a row: a power of two, so that shuffles can add
  static constexpr int ROWS = THREADS / LANES;

  static DEV void run(const VarlenAttentionBackward& args) {
    const VarlenAttention& p = args.problem;
    const int64_t count = static_cast<int64_t>(p.T) * p.H;
    if (args.turns != nullptr && block_index() == 0 && thread_index() == 0) args.turns[count] = 0;
    // Every lane makes every turn, since all lanes meet in the shuffles.
    for (int64_t first = static_cast<int64_t>(block_index()) * ROWS; first < count;
         first += static_cast<int64_t>(block_count()) * ROWS) {
      const int64_t index = first + thread_index() / LANES;
      const int lane = thread_index() % LANES;
      const bool valid = index < count;
      const int64_t row = valid ? index / p.H : 0;
      const int head = valid ? static_cast<int>(index % p.H) : 0;
      const char* o = static_cast<const char*>(p.o) + 2 * (row * p.o_stride_t + head * p.o_stride_h);
      const char* grad = static_cast<const char*>(args.grad) + 2 * (row * args.grad_stride_t + head * args.grad_stride_h);
      float sum = 0.0f;
      for (int piece = lane; piece < D / 8; piece += LANES) {
        const Words4 x = reinterpret_cast<const Words4*>(o)[piece], y = reinterpret_cast<const Words4*>(grad)[piece];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x0, x1, y0, y1;
          unpack<BF16>(x0, x1, x.word[i]);
          unpack<BF16>(y0, y1, y.word[i]);
          sum = fmaf(x1, y1, fmaf(x0, y0, sum));
        }
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      sum += shuffle_xor(sum, 4);
      if (!valid) continue;
      const int64_t place = static_cast<int64_t>(head) * p.T + row;
      if (lane == 0) {
        const float lse = p.lse[place];
        // A row without keys: with +inf its masked scores get the weight 0, with -inf they would get NaN.
        args.shift[place] = lse == -INFINITY ? INFINITY : lse * 1.44269504088896341f;
        args.delta[place] = sum;
        if (args.turns != nullptr) args.turns[place] = 0;
      }
      if (args.dq_sum != nullptr) {
        Words4* target = reinterpret_cast<Words4*>(args.dq_sum + index * D);
        for (int piece = lane; piece < D / 4; piece += LANES) target[piece] = Words4{};
      }
    }
  }
};

// dq_sum, rounded, to dq.
template <bool BF16, int D>
struct RoundDq {
  static constexpr int THREADS = 256;
  static constexpr int BLOCKS = 4;
  static constexpr int SMEM = 0;

  static DEV void run(const VarlenAttentionBackward& args) {
    const VarlenAttention& p = args.problem;
    const int64_t count = static_cast<int64_t>(p.T) * p.H * (D / 8);
    for (int64_t index = static_cast<int64_t>(block_index()) * THREADS + thread_index(); index < count;
         index += static_cast<int64_t>(block_count()) * THREADS) {
      const int64_t place = index / (D / 8), row = place / p.H, head = place % p.H;
      const int column = static_cast<int>(index % (D / 8)) * 8;
      const float* sum = args.dq_sum + place * D + column;
      Words4 rounded;
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded.word[i] = pack<BF16>(sum[2 * i], sum[2 * i + 1]);
      char* target = static_cast<char*>(args.dq) + 2 * (row * args.dq_stride_t + head * args.dq_stride_h + column);
      *reinterpret_cast<Words4*>(target) = rounded;
    }
  }
};

}  // namespace qwen2vl_fast
