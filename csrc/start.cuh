// Starting a kernel struct: what the launching files share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "ptx.cuh"
#include "status.h"

namespace qwen2vl_fast {

constexpr int MAX_DEVICES = 64;  // of one machine

// Blocks of a kernel that the current device holds at once; asked once a device, where it is also told of the shared memory.
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

enum class Grid {
  each,      // a block for each piece of work: the device starts the next one where one has ended, so lengths may differ
  resident,  // as many as the device holds, which take the pieces in turns
  together,  // the same, and all run at once, so that one may wait for another: the device refuses what it can't promise
};

template <class Kernel, class Args>
void launch(const std::string& name, const Args& args, int64_t pieces, Grid grid, int device, void* stream) {
  const int resident = resident_blocks<Kernel, Args>(name, device);
  const int count = static_cast<int>(std::min<int64_t>(pieces, grid == Grid::each ? INT32_MAX : resident));
  void* parameters[] = {const_cast<Args*>(&args)};
  const auto start = grid == Grid::together ? cudaLaunchCooperativeKernel<void(Args)> : cudaLaunchKernel<void(Args)>;
  check(start(entry<Kernel, Args>, count, Kernel::THREADS, parameters, Kernel::SMEM, static_cast<cudaStream_t>(stream)), name);
}

}  // namespace qwen2vl_fast
