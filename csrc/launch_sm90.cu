// Launches the Hopper forward: builds the tensor maps, chooses the variant. Ends in an error for what no variant covers.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "fwd_sm90.cuh"
#include "launch_sm90.h"

namespace qwen2vl_fast {
namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("varlen_attention_forward_sm90: ") + call + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// libcuda is not linked: its one function that is needed is asked for at run time, so that the extension loads without a driver.
Encode encoder() {
  static const Encode function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
    return reinterpret_cast<Encode>(pointer);
  }();
  return function;
}

// x [tokens, heads, D] as {D, tokens, heads}; a box is `columns` of `rows` tokens of a head.
TensorMap tensor_map(const char* name, bool bf16, const void* x, int D, int tokens, int heads, int64_t stride_t, int64_t stride_h, int columns,
                     int rows) {
  TensorMap map;
  // A tensor without rows is never loaded, yet a map of no rows can't be made.
  const cuuint64_t sizes[3] = {cuuint64_t(D), cuuint64_t(std::max(tokens, 1)), cuuint64_t(heads)};
  const cuuint64_t strides[2] = {cuuint64_t(stride_t) * 2, cuuint64_t(stride_h) * 2};
  const cuuint32_t box[3] = {cuuint32_t(columns), cuuint32_t(rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult status = encoder()(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<void*>(x),
                                    sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string("varlen_attention_forward_sm90: cuTensorMapEncodeTiled refused ") + name + " (CUresult " +
                             std::to_string(int(status)) + ")");
  return map;
}

template <class Layout>
void tensor_maps(TensorMap& wide, TensorMap& narrow, const char* name, bool bf16, const void* x, int D, int tokens, int heads, int64_t stride_t,
                 int64_t stride_h, int rows) {
  if (Layout::WIDE > 0) wide = tensor_map(name, bf16, x, D, tokens, heads, stride_t, stride_h, 64, rows);
  if (Layout::NARROW > 0) narrow = tensor_map(name, bf16, x, D, tokens, heads, stride_t, stride_h, 16, rows);
}

template <class Kernel>
void launch(const VarlenAttention& p, cudaStream_t stream) {
  ForwardSm90Args args;
  args.problem = p;
  tensor_maps<typename Kernel::QLayout>(args.q_wide, args.q_narrow, "q", p.bfloat16, p.q, p.D, p.T, p.H, p.q_stride_t, p.q_stride_h, Kernel::ROWS);
  tensor_maps<typename Kernel::KLayout>(args.k_wide, args.k_narrow, "k", p.bfloat16, p.k, p.D, p.Tk, p.Hk, p.k_stride_t, p.k_stride_h, Kernel::KEYS);
  tensor_maps<typename Kernel::VLayout>(args.v_wide, args.v_narrow, "v", p.bfloat16, p.v, p.D, p.Tk, p.Hk, p.v_stride_t, p.v_stride_h, Kernel::KEYS);
  args.scale_log2 = p.scale * 1.4426950408889634f;
  args.zero = 0;
  auto* kernel = &entry<Kernel, ForwardSm90Args>;
  int device, processors;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SMEM), "cudaFuncSetAttribute");
  kernel<<<std::min(processors, p.tile_count), Kernel::THREADS, Kernel::SMEM, stream>>>(args);
  check(cudaGetLastError(), "launch");
}

}  // namespace

}  // namespace qwen2vl_fast
