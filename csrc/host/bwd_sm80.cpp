// The sm_80 backward on the CPU.
#include "../bwd_sm80.cuh"
#include "entry.h"

using namespace qwen2vl_fast;

namespace {

template <bool BF16, int D, int M_TILES, int KEY_STEP, int QUERY_STEP>
int part(const VarlenAttentionBackward& args, const std::string& kernel, const host::Run& run) {
  if (kernel == "row_sums") return host::run_kernel<RowSums<BF16, D>>(args, run);
  if (kernel == "keys") {
    if (args.dq_sum == nullptr) return host::run_kernel<BackwardKeys<BF16, D, M_TILES, KEY_STEP, false>>(args, run);
    return host::run_kernel<BackwardKeys<BF16, D, M_TILES, KEY_STEP, true>>(args, run);
  }
  if (kernel == "queries") return host::run_kernel<BackwardQueries<BF16, D, M_TILES, QUERY_STEP>>(args, run);
  if (kernel == "round") return host::run_kernel<RoundDq<BF16, D>>(args, run);
  return host::finish(run, "kernel: expected row_sums, keys, queries or round");
}

template <bool BF16>
int part(const VarlenAttentionBackward& args, const std::string& kernel, int rows, const host::Run& run) {
  const int D = args.problem.D;
  if (D == 64 && rows == 64) return part<BF16, 64, 1, 64, 64>(args, kernel, run);
  if (D == 64 && rows == 128) return part<BF16, 64, 2, 32, 64>(args, kernel, run);
  if (D == 80 && rows == 64) return part<BF16, 80, 1, 64, 64>(args, kernel, run);
  if (D == 80 && rows == 128) return part<BF16, 80, 2, 32, 32>(args, kernel, run);
  if (D == 128 && rows == 64) return part<BF16, 128, 1, 32, 64>(args, kernel, run);
  return host::finish(run, "rows: expected 64, or 128 up to D = 80");
}

}  // namespace

// kernel: one of the launches of launch_bwd.cu; rows: of its blocks.
HOST_ENTRY int backward_sm80(const VarlenAttentionBackward* args, const char* kernel, int rows, const host::Run* run) {
  return args->problem.bfloat16 ? part<true>(*args, kernel, rows, *run) : part<false>(*args, kernel, rows, *run);
}
