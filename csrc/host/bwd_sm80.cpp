// The sm_80 backward on the CPU.
#include <cstring>

#include "../checks.h"
#include "../instances.cuh"
#include "entry.h"

using namespace qwen2vl_fast;

// kernel: one of the launches of launch_bwd.cu; rows: of its blocks.
HOST_ENTRY int backward_sm80(const VarlenAttentionBackward* args, const char* kernel, int rows, const host::Run* run) {
  const auto select = [&](auto start) {
    check_problem(*args);
    if (std::strcmp(kernel, "row_sums") == 0) return select_backward_row_sums(args->problem, start);
    if (std::strcmp(kernel, "keys") == 0) return select_backward_keys(*args, rows, start);
    if (std::strcmp(kernel, "queries") == 0) return select_backward_queries(*args, rows, start);
    if (std::strcmp(kernel, "round") == 0) return select_backward_round(args->problem, start);
    throw std::invalid_argument("kernel: expected row_sums, keys, queries or round");
  };
  const bool together = args->turns != nullptr && std::strcmp(kernel, "keys") == 0;
  return host::run_selected(*run, select, [&](auto found) { return host::run_kernel<decltype(found)>(*args, *run, together); });
}
