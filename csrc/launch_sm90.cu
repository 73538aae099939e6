// Launches the Hopper forward: builds the tensor maps, chooses the variant. Ends in an error for what no variant covers.
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

// x [tokens, heads, D] as {W, tokens, D / W, heads}, boxes of `rows` tokens and all columns of one head.
template <typename Kernel>
CUtensorMap tensor_map(const char* name, const void* x, int tokens, int heads, int64_t stride_t, int64_t stride_h, int rows) {
  CUtensorMap map;
  constexpr cuuint64_t W = Kernel::W, CHUNKS = Kernel::CHUNKS;
  // A tensor without rows is never loaded, yet a map of no rows can't be made.
  const cuuint64_t sizes[4] = {W, cuuint64_t(std::max(tokens, 1)), CHUNKS, cuuint64_t(heads)};
  const cuuint64_t strides[3] = {cuuint64_t(stride_t) * 2, W * 2, cuuint64_t(stride_h) * 2};
  const cuuint32_t box[4] = {cuuint32_t(W), cuuint32_t(rows), cuuint32_t(CHUNKS), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encoder()(
      &map, std::is_same_v<typename Kernel::Element, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      Kernel::SWIZZLE == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string("varlen_attention_forward_sm90: cuTensorMapEncodeTiled refused ") + name + " (CUresult " +
                             std::to_string(int(status)) + ")");
  return map;
}

template <typename Kernel>
void launch(const VarlenAttention& problem, cudaStream_t stream) {
  const VarlenAttention& p = problem;
  typename Kernel::Args args;
  args.problem = problem;
  args.maps.q = tensor_map<Kernel>("q", p.q, p.T, p.H, p.q_stride_t, p.q_stride_h, Kernel::ROWS);
  args.maps.k = tensor_map<Kernel>("k", p.k, p.Tk, p.Hk, p.k_stride_t, p.k_stride_h, Kernel::KEYS);
  args.maps.v = tensor_map<Kernel>("v", p.v, p.Tk, p.Hk, p.v_stride_t, p.v_stride_h, Kernel::KEYS);
  args.scale_log2 = p.scale * 1.4426950408889634f;
  args.zero = 0;
  auto* kernel = &varlen_attention_forward_sm90<Kernel>;
  int device, processors;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES), "cudaFuncSetAttribute");
  kernel<<<std::min(processors, p.tile_count), Kernel::THREADS, Kernel::SHARED_BYTES, stream>>>(args);
  check(cudaGetLastError(), "launch");
}

}  // namespace

}  // namespace qwen2vl_fast
