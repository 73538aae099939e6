// The CUDA runtime of kernels that run on the CPU: what csrc/launch*.cu ask of it, and refuses as a device does. Device n has n + 1
// multiprocessors, each with room for one block, and one stream, whose handle is n + 1.
#include <cxxabi.h>

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <functional>
#include <utility>

#include "entry.h"

using namespace qwen2vl_fast;
using host::Function;

namespace {

constexpr int DEVICES = 64;
constexpr int SHARED = 48 * 1024;      // bytes of a block that nobody asks for
constexpr int MOST_SHARED = 227 * 1024;  // of a block on a Hopper

int current = 0;
cudaError_t last = cudaSuccess;
host::Run run_now = {};
std::string launched;
std::map<std::pair<const Function*, int>, int> shared_limits;  // of a kernel on a device

cudaError_t keep(cudaError_t status) {
  if (status != cudaSuccess) last = status;
  return status;
}

int shared_limit(const Function* kernel) {
  const auto found = shared_limits.find({kernel, current});
  return found == shared_limits.end() ? SHARED : found->second;
}

std::string name_of(const Function& kernel) {
  char* text = abi::__cxa_demangle(kernel.type->name(), nullptr, nullptr, nullptr);
  const std::string name = text;
  std::free(text);
  return name;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) return CUDA_ERROR_INVALID_VALUE;
  int64_t own_sizes[5], own_strides[4];
  int own_box[5];
  for (cuuint32_t i = 0; i < rank && i < 5; ++i) {
    if (steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    own_sizes[i] = static_cast<int64_t>(sizes[i]);
    own_box[i] = static_cast<int>(box[i]);
    if (i + 1 < rank) own_strides[i] = static_cast<int64_t>(strides[i]);
  }
  const int bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << swizzle;
  const char* refused = host::encode_tensor_map(*map, base, static_cast<int>(rank), own_sizes, own_strides, own_box, bytes);
  return refused == nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t status) { return cudaGetErrorName(status); }

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return keep(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  if (device < 0 || device >= DEVICES) return keep(cudaErrorInvalidDevice);
  *value = device + 1;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const Function* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > MOST_SHARED) return keep(cudaErrorInvalidValue);
  shared_limits[{kernel, current}] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const Function* kernel, int threads, size_t shared_bytes) {
  *blocks = threads <= kernel->threads && static_cast<int>(shared_bytes) <= shared_limit(kernel);
  return cudaSuccess;
}

namespace qwen2vl_fast {
namespace host {

// What the kernel does wrong is no status, which could be overlooked, but an exception.
cudaError_t launch(const Function& kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes, cudaStream_t stream, bool together) {
  const int blocks = static_cast<int>(grid.x), threads = static_cast<int>(block.x), shared = static_cast<int>(shared_bytes);
  if (reinterpret_cast<uintptr_t>(stream) != static_cast<uintptr_t>(current) + 1) return keep(cudaErrorInvalidResourceHandle);
  if (blocks <= 0 || threads <= 0 || grid.y * grid.z * block.y * block.z != 1) return keep(cudaErrorInvalidConfiguration);
  if (threads > kernel.threads || shared > shared_limit(&kernel)) return keep(cudaErrorInvalidValue);
  if (together && blocks > current + 1) return keep(cudaErrorCooperativeLaunchTooLarge);
  Launch settings;
  settings.grid = blocks;
  settings.threads = threads;
  settings.shared_bytes = shared;
  settings.resident = kernel.blocks;
  settings.seed = run_now.seed;
  settings.races = run_now.races != 0;
  settings.together = together;
  const std::string name = name_of(kernel), fault = run_grid(kernel.run, args[0], settings);
  if (!fault.empty()) throw std::runtime_error(name + ": " + fault);
  launched += name + " in " + std::to_string(blocks) + (together ? " blocks together\n" : " blocks\n");
  return cudaSuccess;
}

int run_launches(const Run& run, const std::function<void()>& work) {
  run_now = run;
  launched.clear();
  last = cudaSuccess;
  const int before = current = DEVICES - 1;
  std::string error;
  try {
    work();
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  if (current != before) error += "\nleft behind: another current device";
  if (last != cudaSuccess) error += std::string("\nleft behind: ") + cudaGetErrorName(last);
  if (error.empty()) std::snprintf(run.message, run.message_bytes, "%s", launched.c_str());
  return finish(run, error);
}

}  // namespace host
}  // namespace qwen2vl_fast
