// Runs a Hopper forward on the CPU, with tensor maps as launch_sm90.cuh describes them.
#pragma once

#include <string>

#include "../fwd_sm90.cuh"
#include "entry.h"

namespace qwen2vl_fast {
namespace host {

struct MappedTensor {
  const void* data;  // [tokens, heads, D]
  int tokens, heads;
  int64_t stride_t, stride_h;
};

inline std::string tensor_map(TensorMap& map, const MappedTensor& x, int D, int columns, int rows) {
  const int64_t sizes[3] = {D, max(x.tokens, 1), x.heads};
  const int64_t strides[2] = {2 * x.stride_t, 2 * x.stride_h};
  const int box[3] = {columns, rows, 1};
  const char* refused = encode_tensor_map(map, x.data, 3, sizes, strides, box, 2 * columns);
  return refused == nullptr ? "" : refused;
}

template <class Layout>
std::string tensor_maps(TensorMap& wide, TensorMap& narrow, const MappedTensor& x, int D) {
  std::string refused;
  if (Layout::WIDE > 0) refused = tensor_map(wide, x, D, 64, Layout::ROWS);
  if (Layout::NARROW > 0 && refused.empty()) refused = tensor_map(narrow, x, D, 16, Layout::ROWS);
  return refused;
}

template <class Kernel>
int forward_sm90(const VarlenAttention& p, const Run& run) {
  ForwardSm90Args args = {};
  args.problem = p;
  args.scale_log2 = p.scale * 1.4426950408889634f;
  std::string refused =
      tensor_maps<typename Kernel::QLayout>(args.q_wide, args.q_narrow, {p.q, p.T, p.H, p.q_stride_t, p.q_stride_h}, p.D);
  refused += tensor_maps<typename Kernel::KLayout>(args.k_wide, args.k_narrow, {p.k, p.Tk, p.Hk, p.k_stride_t, p.k_stride_h}, p.D);
  refused += tensor_map(args.v, {p.v, p.Tk, p.Hk, p.v_stride_t, p.v_stride_h}, p.D, Kernel::V_ROW / 2, Kernel::VLayout::ROWS);
  if (!refused.empty()) return finish(run, refused);
  return run_kernel<Kernel>(args, run);
}

}  // namespace host
}  // namespace qwen2vl_fast
