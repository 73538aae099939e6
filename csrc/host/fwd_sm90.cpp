// The Hopper forward on the CPU, with tensor maps as launch_sm90.cu describes them.
#include "../fwd_sm90.cuh"

#include <string>

#include "entry.h"

using namespace qwen2vl_fast;

namespace {

std::string tensor_map(TensorMap& map, const void* x, int D, int tokens, int heads, int64_t stride_t, int64_t stride_h, int columns,
                       int rows) {
  const int64_t sizes[3] = {D, tokens > 0 ? tokens : 1, heads};
  const int64_t strides[2] = {2 * stride_t, 2 * stride_h};
  const int box[3] = {columns, rows, 1};
  const char* refused = host::encode_tensor_map(map, x, 3, sizes, strides, box, 2 * columns);
  return refused == nullptr ? "" : refused;
}

template <class Layout>
std::string tensor_maps(TensorMap& wide, TensorMap& narrow, const void* x, int D, int tokens, int heads, int64_t stride_t,
                        int64_t stride_h, int rows) {
  std::string refused;
  if (Layout::WIDE > 0) refused = tensor_map(wide, x, D, tokens, heads, stride_t, stride_h, 64, rows);
  if (Layout::NARROW > 0 && refused.empty()) refused = tensor_map(narrow, x, D, tokens, heads, stride_t, stride_h, 16, rows);
  return refused;
}

template <class Kernel>
int forward(const VarlenAttention& p, const host::Run& run) {
  ForwardSm90Args args = {};
  args.problem = p;
  args.scale_log2 = p.scale * 1.4426950408889634f;
  std::string refused =
      tensor_maps<typename Kernel::QLayout>(args.q_wide, args.q_narrow, p.q, p.D, p.T, p.H, p.q_stride_t, p.q_stride_h, Kernel::ROWS);
  refused += tensor_maps<typename Kernel::KLayout>(args.k_wide, args.k_narrow, p.k, p.D, p.Tk, p.Hk, p.k_stride_t, p.k_stride_h, Kernel::KEYS);
  refused += tensor_maps<typename Kernel::VLayout>(args.v_wide, args.v_narrow, p.v, p.D, p.Tk, p.Hk, p.v_stride_t, p.v_stride_h, Kernel::KEYS);
  if (!refused.empty()) return host::finish(run, refused);
  return host::run_kernel<Kernel>(args, run);
}

}  // namespace

HOST_ENTRY int forward_sm90(const VarlenAttention* problem, int rows, const host::Run* run) {
  return forward<ForwardSm90<true,80,192,112,2,false>>(*problem, *run);
}
