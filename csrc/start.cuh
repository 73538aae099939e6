// What the launching files share: starting a kernel struct, and the checks that need no device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "ptx.cuh"
#include "status.h"
#include "varlen_attention.h"

namespace qwen2vl_fast {

constexpr int MAX_DEVICES = 64;  // of one machine

// Blocks of a kernel that the current device holds at once; asked once a device.
template <class Kernel, class Args>
int resident_blocks(const std::string& name, int device) {
  static std::atomic<int> known[MAX_DEVICES];
  if (device < 0 || device >= MAX_DEVICES) throw std::invalid_argument(name + ": device " + std::to_string(device));
  if (const int count = known[device].load()) return count;
  auto* kernel = &entry<Kernel, Args>;
  int processors = 0, blocks = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SMEM), name + ": cudaFuncSetAttribute");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name + ": cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Kernel::THREADS, Kernel::SMEM), name + ": occupancy");
  if (blocks == 0) throw std::runtime_error(name + ": no block fits a multiprocessor of device " + std::to_string(device));
  known[device].store(blocks * processors);
  return blocks * processors;
}

template <class Kernel, class Args>
void launch(const std::string& name, const Args& args, int64_t blocks, int device, void* stream) {
  const int count = static_cast<int>(std::min<int64_t>(blocks, resident_blocks<Kernel, Args>(name, device)));
  entry<Kernel, Args><<<count, Kernel::THREADS, Kernel::SMEM, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), name);
}

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

}  // namespace qwen2vl_fast
