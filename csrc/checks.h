// What can be told of a problem without a device: the checks before every launch, on a GPU and on the CPU alike. A problem that no
// kernel takes is std::invalid_argument.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "varlen_attention.h"

namespace qwen2vl_fast {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

inline void check_rows(const char* name, const void* pointer, int64_t stride_t, int64_t stride_h, bool empty) {
  require(empty || pointer != nullptr, std::string(name) + ": null pointer");
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, std::string(name) + ": expected an address that is a multiple of 16");
  require(stride_t % 8 == 0 && stride_h % 8 == 0 && stride_t >= 0 && stride_h >= 0,
          std::string(name) + ": expected strides that are multiples of 8 elements, got " + std::to_string(stride_t) + " and " +
              std::to_string(stride_h));
}

inline void check_problem(const VarlenAttention& p) {
  require(p.D == 64 || p.D == 80 || p.D == 128, "D: expected 64, 80 or 128, got " + std::to_string(p.D));
  require(p.H > 0 && p.Hk > 0 && p.H % p.Hk == 0,
          "H: expected a multiple of Hk, got " + std::to_string(p.H) + " and " + std::to_string(p.Hk));
  require(p.T >= 0 && p.Tk >= 0 && p.tile_count >= 0, "T, Tk, tile_count: expected no negative number");
  require(std::isfinite(p.scale) && p.scale > 0, "scale: expected a finite positive number, got " + std::to_string(p.scale));
  check_rows("q", p.q, p.q_stride_t, p.q_stride_h, p.T == 0);
  check_rows("k", p.k, p.k_stride_t, p.k_stride_h, p.Tk == 0);
  check_rows("v", p.v, p.v_stride_t, p.v_stride_h, p.Tk == 0);
  check_rows("o", p.o, p.o_stride_t, p.o_stride_h, p.T == 0);
  require(p.T == 0 || p.lse != nullptr, "lse: null pointer");
  require(p.tile_count == 0 || p.tiles != nullptr, "tiles: null pointer");
}

inline void check_problem(const VarlenAttentionBackward& args) {
  const VarlenAttention& p = args.problem;
  check_problem(p);
  check_rows("grad", args.grad, args.grad_stride_t, args.grad_stride_h, p.T == 0);
  check_rows("dq", args.dq, args.dq_stride_t, args.dq_stride_h, p.T == 0);
  check_rows("dk", args.dk, args.dk_stride_t, args.dk_stride_h, p.Tk == 0);
  check_rows("dv", args.dv, args.dv_stride_t, args.dv_stride_h, p.Tk == 0);
  require(args.key_tile_count >= 0, "key_tile_count: expected no negative number");
  require(args.key_tile_count == 0 || args.key_tiles != nullptr, "key_tiles: null pointer");
  require(p.T == 0 || (args.shift != nullptr && args.delta != nullptr), "shift, delta: null pointer");
  require(args.turns == nullptr || (args.dq_sum != nullptr && !p.causal), "turns: expected dq_sum, and no causal mask");
}

inline int64_t tile_slots(const TileList& list) {
  return (static_cast<int64_t>(list.by_keys ? list.Tk : list.T) / list.rows + list.N) * list.heads;
}

inline void check_problem(const TileList& list) {
  require(list.N >= 0 && list.T >= 0 && list.Tk >= 0 && list.heads > 0 && list.rows > 0,
          "N, T, Tk, heads, rows: expected no negative number, and at least one head and one row");
  require(list.N == 0 || tile_slots(list) == 0 || (list.bounds != nullptr && list.bounds_k != nullptr && list.tiles != nullptr),
          "bounds, bounds_k, tiles: null pointer");
}

}  // namespace qwen2vl_fast
