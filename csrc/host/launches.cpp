// launch.h for tests: the launches that a device gets, of kernels on the CPU.
#include "../launch.h"

#include "entry.h"

using qwen2vl_fast::host::run_launches;

HOST_ENTRY int forward(const qwen2vl_fast::VarlenAttention* problem, const char* kernel, int rows, int device, void* stream,
                       const qwen2vl_fast::host::Run* run) {
  return run_launches(*run, [&] { qwen2vl_fast::forward(*problem, kernel, rows, device, stream); });
}

HOST_ENTRY int backward(const qwen2vl_fast::VarlenAttentionBackward* problem, int rows, int key_rows, int device, void* stream,
                        const qwen2vl_fast::host::Run* run) {
  return run_launches(*run, [&] { qwen2vl_fast::backward(*problem, rows, key_rows, device, stream); });
}

HOST_ENTRY int build_tiles(const qwen2vl_fast::TileList* list, int device, void* stream, const qwen2vl_fast::host::Run* run) {
  return run_launches(*run, [&] { qwen2vl_fast::build_tiles(*list, device, stream); });
}
