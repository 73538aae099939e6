// Starts the kernels: checks what the host can check, launches on the caller's stream; no allocation, no sync, so that a CUDA
// graph can hold it. Loading this touches no device.
//
// Throws std::invalid_argument for a problem that no kernel takes, std::runtime_error, with the kernel's name, for a CUDA error.
#pragma once

#include <string>

#include "varlen_attention.h"

namespace qwen2vl_fast {

// kernel: "sm_80", or "sm_90" on compute capability 9.0 alone; rows: the block size that the tiles were made for. stream: a cudaStream_t of `device`.
void forward(const VarlenAttention& problem, const std::string& kernel, int rows, int device, void* stream);

// rows, key_rows: the block sizes of problem.tiles and of key_tiles, 64 or 128.
void backward(const VarlenAttentionBackward& problem, int rows, int key_rows, int device, void* stream);

void build_tiles(const TileList& list, int device, void* stream);

}  // namespace qwen2vl_fast
