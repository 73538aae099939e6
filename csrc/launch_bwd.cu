#include "bwd_sm80.cuh"
#include "checks.h"
#include "instances.cuh"
#include "launch.h"
#include "start.cuh"

namespace qwen2vl_fast {
namespace {

template <class Start>
void select_backward_row_sums(const VarlenAttention& p, Start start) {
  by_type_and_dim(p, [&](auto bf16, auto dim) { start(RowSums<decltype(bf16)::value, decltype(dim)::value>{}); });
}

template <class Start>
void select_backward_round(const VarlenAttention& p, Start start) {
  by_type_and_dim(p, [&](auto bf16, auto dim) { start(RoundDq<decltype(bf16)::value, decltype(dim)::value>{}); });
}

// The rows of a step are what the registers of M_TILES blocks of 16 rows leave room for.
template <class Start>
void select_backward_keys(const VarlenAttentionBackward& args, int key_rows, Start start) {
  const auto by_way = [&](auto add_dq, auto in_turn) {
    constexpr bool ADD_DQ = decltype(add_dq)::value, IN_TURN = decltype(in_turn)::value;
    by_type_and_dim(args.problem, [&](auto bf16, auto dim) {
      constexpr bool BF16 = decltype(bf16)::value;
      constexpr int D = decltype(dim)::value;
      if (key_rows == 64) return start(BackwardKeys<BF16, D, 1, D <= 80 ? 64 : 32, ADD_DQ, IN_TURN>{});
      if constexpr (D <= 80) {
        if (key_rows == 128) return start(BackwardKeys<BF16, D, 2, 32, ADD_DQ, IN_TURN>{});
      }
      throw std::invalid_argument("key_rows: expected 64, or 128 up to D = 80, got " + std::to_string(key_rows));
    });
  };
  if (args.dq_sum == nullptr) return by_way(std::false_type{}, std::false_type{});
  if (args.turns == nullptr) return by_way(std::true_type{}, std::false_type{});
  by_way(std::true_type{}, std::true_type{});
}

template <class Start>
void select_backward_queries(const VarlenAttentionBackward& args, int rows, Start start) {
  by_type_and_dim(args.problem, [&](auto bf16, auto dim) {
    constexpr bool BF16 = decltype(bf16)::value;
    constexpr int D = decltype(dim)::value;
    // At D = 128 shared memory is what ends first: 99 KB is all that a block gets on 8.6 and 8.9.
    if (rows == 64) return start(BackwardQueries<BF16, D, 1, D == 128 ? 32 : 64>{});
    if constexpr (D <= 80) {
      if (rows == 128) return start(BackwardQueries<BF16, D, 2, D == 64 ? 64 : 32>{});
    }
    throw std::invalid_argument("rows: expected 64, or 128 up to D = 80, got " + std::to_string(rows));
  });
}

}  // namespace

void backward(const VarlenAttentionBackward& args, int rows, int key_rows, int device, void* stream) {
  const VarlenAttention& p = args.problem;
  check_problem(args);
  if (p.T == 0 && args.key_tile_count == 0) return;
  const CurrentDevice current(device, "varlen_attention_backward");
  const auto start = [&](auto found, const char* name, int64_t pieces, Grid grid) {
    if (pieces > 0) launch<decltype(found)>(name, args, pieces, grid, device, stream);
  };
  const int64_t count = static_cast<int64_t>(p.T) * p.H;
  const bool add_dq = args.dq_sum != nullptr;
  // Refused before anything is launched.
  select_backward_keys(args, key_rows, [](auto) {});
  if (!add_dq) select_backward_queries(args, rows, [](auto) {});

  select_backward_row_sums(p, [&](auto found) {
    constexpr int ROWS = decltype(found)::ROWS;
    start(found, "varlen_attention_backward_row_sums", std::max<int64_t>((count + ROWS - 1) / ROWS, 1), Grid::resident);  // turns also for no rows
  });
  select_backward_keys(args, key_rows, [&](auto found) {
    using Kernel = decltype(found);
    constexpr const char* NAME = "varlen_attention_backward_keys";
    if (args.turns == nullptr) return start(found, NAME, args.key_tile_count, Grid::each);
    if (args.key_tile_count == 0) return;
    VarlenAttentionBackward told = args;
    told.resident = resident_blocks<Kernel, VarlenAttentionBackward>(NAME, device);
    launch<Kernel>(NAME, told, args.key_tile_count, Grid::together, device, stream);
  });
  if (add_dq) {
    select_backward_round(p, [&](auto found) {
      constexpr int THREADS = decltype(found)::THREADS;
      start(found, "varlen_attention_backward_round", (count * (p.D / 8) + THREADS - 1) / THREADS, Grid::resident);
    });
  } else {
    select_backward_queries(args, rows, [&](auto found) { start(found, "varlen_attention_backward_queries", p.tile_count, Grid::each); });
  }
}

}  // namespace qwen2vl_fast
