// How tests start kernels on the CPU: by C functions of a shared library, which return 0, or 1 and a message.
#pragma once

#include <cstdio>
#include <functional>
#include <new>
#include <stdexcept>

#include "runtime.h"

#define HOST_ENTRY extern "C" __attribute__((visibility("default")))

namespace qwen2vl_fast {
namespace host {

// Mirrored by tests/host/runner.py. grid: of tests' own kernels; a launch of csrc chooses it.
struct Run {
  int grid;
  int races;
  uint64_t seed;
  char* message;
  int message_bytes;
};

inline int finish(const Run& run, const std::string& error) {
  if (error.empty()) return 0;
  std::snprintf(run.message, run.message_bytes, "%s", error.c_str());
  return 1;
}

// A kernel of the tests, without a launch.
template <class Kernel, class Args>
int run_kernel(const Args& args, const Run& run, bool together = false) {
  Launch launch;
  launch.grid = run.grid;
  launch.threads = Kernel::THREADS;
  launch.shared_bytes = Kernel::SMEM;
  launch.resident = Kernel::BLOCKS;
  launch.seed = run.seed;
  launch.races = run.races != 0;
  launch.together = together;
  return finish(run, run_grid([](const void* args) { Kernel::run(*static_cast<const Args*>(args)); }, &args, launch));
}

// work: launches of csrc. The message is a line for each kernel that ran; a failure is what they throw, what a kernel does wrong,
// an error that is left to the next who asks, or a current device that is not the one before.
int run_launches(const Run& run, const std::function<void()>& work);

}  // namespace host
}  // namespace qwen2vl_fast
