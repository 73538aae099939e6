// The calls of the CUDA runtime that take a kernel. Here a kernel is a host::Function, the host's form of `entry` in ptx.cuh.
#pragma once

#include "../twins.h"
#include "cuda_runtime_api.h"

namespace qwen2vl_fast {
namespace host {

cudaError_t launch(const Function& kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes, cudaStream_t stream, bool together);

}  // namespace host
}  // namespace qwen2vl_fast

cudaError_t cudaFuncSetAttribute(const qwen2vl_fast::host::Function* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const qwen2vl_fast::host::Function* kernel, int threads,
                                                          size_t shared_bytes);

template <class>
cudaError_t cudaLaunchKernel(const qwen2vl_fast::host::Function& kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes,
                             cudaStream_t stream) {
  return qwen2vl_fast::host::launch(kernel, grid, block, args, shared_bytes, stream, false);
}

template <class>
cudaError_t cudaLaunchCooperativeKernel(const qwen2vl_fast::host::Function& kernel, dim3 grid, dim3 block, void** args,
                                        size_t shared_bytes, cudaStream_t stream) {
  return qwen2vl_fast::host::launch(kernel, grid, block, args, shared_bytes, stream, true);
}
