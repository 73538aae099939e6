// The Hopper forward on the CPU, with tensor maps as launch_sm90.cu describes them.
#include "../fwd_sm90.cuh"

#include <string>

#include "entry.h"

using namespace qwen2vl_fast;

namespace {

struct Tensor {
  const void* data;  // [tokens, heads, D]
  int tokens, heads;
  int64_t stride_t, stride_h;
};

std::string tensor_map(TensorMap& map, const Tensor& x, int D, int columns, int rows) {
  const int64_t sizes[3] = {D, max(x.tokens, 1), x.heads};
  const int64_t strides[2] = {2 * x.stride_t, 2 * x.stride_h};
  const int box[3] = {columns, rows, 1};
  const char* refused = host::encode_tensor_map(map, x.data, 3, sizes, strides, box, 2 * columns);
  return refused == nullptr ? "" : refused;
}

template <class Layout>
std::string tensor_maps(TensorMap& wide, TensorMap& narrow, const Tensor& x, int D) {
  std::string refused;
  if (Layout::WIDE > 0) refused = tensor_map(wide, x, D, 64, Layout::ROWS);
  if (Layout::NARROW > 0 && refused.empty()) refused = tensor_map(narrow, x, D, 16, Layout::ROWS);
  return refused;
}

template <class Kernel>
int forward(const VarlenAttention& p, const host::Run& run) {
  ForwardSm90Args args = {};
  args.problem = p;
  args.scale_log2 = p.scale * 1.4426950408889634f;
  std::string refused =
      tensor_maps<typename Kernel::QLayout>(args.q_wide, args.q_narrow, {p.q, p.T, p.H, p.q_stride_t, p.q_stride_h}, p.D);
  refused += tensor_maps<typename Kernel::KLayout>(args.k_wide, args.k_narrow, {p.k, p.Tk, p.Hk, p.k_stride_t, p.k_stride_h}, p.D);
  refused += tensor_map(args.v, {p.v, p.Tk, p.Hk, p.v_stride_t, p.v_stride_h}, p.D, 64, Kernel::VLayout::ROWS);
  if (!refused.empty()) return host::finish(run, refused);
  return host::run_kernel<Kernel>(args, run);
}

template <bool BF16, bool CAUSAL>
int forward(const VarlenAttention& p, int rows, const host::Run& run) {
  if (p.D == 80 && rows == 192) return forward<ForwardSm90<BF16, 80, 192, 96, 4, CAUSAL>>(p, run);
  if (p.D == 80 && rows == 128) return forward<ForwardSm90<BF16, 80, 128, 96, 4, CAUSAL>>(p, run);
  if (p.D == 64 && rows == 128) return forward<ForwardSm90<BF16, 64, 128, 128, 3, CAUSAL>>(p, run);
  if (p.D == 128 && rows == 128) return forward<ForwardSm90<BF16, 128, 128, 128, 2, CAUSAL>>(p, run);
  return host::finish(run, "no variant for this D and rows");
}

}  // namespace

HOST_ENTRY int forward_sm90(const VarlenAttention* p, int rows, const host::Run* run) {
  if (p->bfloat16) return p->causal ? forward<true, true>(*p, rows, *run) : forward<true, false>(*p, rows, *run);
  return p->causal ? forward<false, true>(*p, rows, *run) : forward<false, false>(*p, rows, *run);
}
