// Starts a Hopper forward: its tensor maps, its arguments, the kernel.
#pragma once

#include <cuda.h>

#include "fwd_sm90.cuh"
#include "start.cuh"

namespace qwen2vl_fast {

inline const char* const FORWARD_SM90 = "varlen_attention_forward_sm90";

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// libcuda is not linked, so that the extension loads without a driver: its one function that is needed is asked for here.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050  // the one came with 12.5, the other is gone with 13.0
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &pointer, cudaEnableDefault, &found);
#endif
    check(status, std::string(FORWARD_SM90) + ": cudaGetDriverEntryPoint");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string(FORWARD_SM90) + ": the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTensorMap>(pointer);
  }();
  return function;
}

struct MappedTensor {
  const char* name;
  const void* start;  // [tokens, heads, D]
  int tokens, heads;
  int64_t stride_t, stride_h;
};

// Boxes of `columns` columns and `rows` tokens of one head.
inline TensorMap tensor_map(const MappedTensor& x, int D, bool bfloat16, int columns, int rows) {
  TensorMap map;
  // A tensor without rows is never loaded, yet a map of no rows can't be made.
  const cuuint64_t sizes[3] = {cuuint64_t(D), cuuint64_t(std::max(x.tokens, 1)), cuuint64_t(x.heads)};
  const cuuint64_t strides[2] = {cuuint64_t(x.stride_t) * 2, cuuint64_t(x.stride_h) * 2};
  const cuuint32_t box[3] = {cuuint32_t(columns), cuuint32_t(rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult status =
      tensor_map_encoder()(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<void*>(x.start), sizes,
                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(FORWARD_SM90) + ": cuTensorMapEncodeTiled refused " + x.name + " (CUresult " +
                             std::to_string(int(status)) + ")");
  return map;
}

template <class Layout>
void tensor_maps(TensorMap& wide, TensorMap& narrow, const MappedTensor& x, int D, bool bfloat16) {
  if (Layout::WIDE > 0) wide = tensor_map(x, D, bfloat16, 64, Layout::ROWS);
  if (Layout::NARROW > 0) narrow = tensor_map(x, D, bfloat16, 16, Layout::ROWS);
}

template <class Kernel>
void run_forward_sm90(const VarlenAttention& p, int device, void* stream) {
  ForwardSm90Args args = {};
  args.problem = p;
  tensor_maps<typename Kernel::QLayout>(args.q_wide, args.q_narrow, {"q", p.q, p.T, p.H, p.q_stride_t, p.q_stride_h}, p.D, p.bfloat16);
  tensor_maps<typename Kernel::KLayout>(args.k_wide, args.k_narrow, {"k", p.k, p.Tk, p.Hk, p.k_stride_t, p.k_stride_h}, p.D, p.bfloat16);
  args.v = tensor_map({"v", p.v, p.Tk, p.Hk, p.v_stride_t, p.v_stride_h}, p.D, p.bfloat16, Kernel::V_ROW / 2, Kernel::VLayout::ROWS);
  args.scale_log2 = p.scale * 1.4426950408889634f;
  args.zero = 0;
  launch<Kernel>(FORWARD_SM90, args, p.tile_count, Grid::resident, device, stream);
}

}  // namespace qwen2vl_fast
