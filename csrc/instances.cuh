// Which instance of a kernel for sm_80 takes a problem: one table for the launches and for the tests on the CPU, so that what is
// proved is what is started. `start` is called with the kernel, an empty struct; none is std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "bwd_sm80.cuh"
#include "fwd_sm80.cuh"

namespace qwen2vl_fast {

// use(BF16, D), both as std::integral_constant.
template <class Use>
void by_type_and_dim(const VarlenAttention& p, Use use) {
  const auto by_dim = [&](auto bf16) {
    if (p.D == 64) return use(bf16, std::integral_constant<int, 64>{});
    if (p.D == 80) return use(bf16, std::integral_constant<int, 80>{});
    if (p.D == 128) return use(bf16, std::integral_constant<int, 128>{});
    throw std::invalid_argument("D: expected 64, 80 or 128, got " + std::to_string(p.D));
  };
  if (p.bfloat16) return by_dim(std::true_type{});
  by_dim(std::false_type{});
}

template <class Start>
void select_forward_sm80(const VarlenAttention& p, int rows, Start start) {
  by_type_and_dim(p, [&](auto bf16, auto dim) {
    constexpr bool BF16 = decltype(bf16)::value;
    constexpr int D = decltype(dim)::value;
    if (rows == 64) return start(ForwardSm80<BF16, D, 1>{});
    if (rows == 128) return start(ForwardSm80<BF16, D, 2>{});
    throw std::invalid_argument("rows: expected 64 or 128 for the sm_80 kernel, got " + std::to_string(rows));
  });
}

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

}  // namespace qwen2vl_fast
