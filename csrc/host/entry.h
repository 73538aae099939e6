// How tests start a kernel on the CPU: by C functions of a shared library, which return 0, or 1 and a message.
#pragma once

#include <cstdio>
#include <new>
#include <stdexcept>

#include "runtime.h"

#define HOST_ENTRY extern "C" __attribute__((visibility("default")))

namespace qwen2vl_fast {
namespace host {

// Mirrored by tests/host/runner.py.
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

// The status of launch(kernel) for the kernel that `select` finds, with which it calls its argument.
template <class Select, class Launch>
int run_selected(const Run& run, Select select, Launch launch) {
  int status = 0;
  try {
    select([&](auto found) { status = launch(found); });
  } catch (const std::invalid_argument& refused) {
    return finish(run, refused.what());
  }
  return status;
}

}  // namespace host
}  // namespace qwen2vl_fast
