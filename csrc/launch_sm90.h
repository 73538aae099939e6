// The Hopper forward (compute capability 9.0 and nowhere else).
#pragma once

#include <cuda_runtime_api.h>

#include "varlen_attention.h"

namespace qwen2vl_fast {

// Launches on `stream`: no allocation, no sync. `rows` is the block size that the tiles were made for.
// Throws std::runtime_error, with the call's name, for a CUDA error and for what no variant covers.
void launch_forward_sm90(const VarlenAttention& problem, int rows, cudaStream_t stream);

}  // namespace qwen2vl_fast
