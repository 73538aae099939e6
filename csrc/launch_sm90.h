// The Hopper forward (compute capability 9.0 and nowhere else).
#pragma once

#include "varlen_attention.h"

namespace qwen2vl_fast {

// rows: the block size that the tiles were made for, 128, or with D = 80 64 or 192 too. Throws as forward() of launch.h does.
void forward_sm90(const VarlenAttention& problem, int rows, int device, void* stream);

}  // namespace qwen2vl_fast
