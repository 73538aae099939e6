// The sm_80 forward and the list of tiles on the CPU.
#include "../fwd_sm80.cuh"
#include "../tiles.cuh"
#include "entry.h"

using namespace qwen2vl_fast;

namespace {

template <bool BF16, int D>
int forward(const VarlenAttention& problem, int rows, const host::Run& run) {
  if (rows == 64) return host::run_kernel<ForwardSm80<BF16, D, 1>>(problem, run);
  if (rows == 128) return host::run_kernel<ForwardSm80<BF16, D, 2>>(problem, run);
  return host::finish(run, "rows: expected 64 or 128");
}

template <bool BF16>
int forward(const VarlenAttention& problem, int rows, const host::Run& run) {
  if (problem.D == 64) return forward<BF16, 64>(problem, rows, run);
  if (problem.D == 80) return forward<BF16, 80>(problem, rows, run);
  if (problem.D == 128) return forward<BF16, 128>(problem, rows, run);
  return host::finish(run, "D: expected 64, 80 or 128");
}

}  // namespace

HOST_ENTRY int forward_sm80(const VarlenAttention* problem, int rows, const host::Run* run) {
  return problem->bfloat16 ? forward<true>(*problem, rows, *run) : forward<false>(*problem, rows, *run);
}

HOST_ENTRY int build_tiles(const TileList* list, const host::Run* run) { return host::run_kernel<BuildTiles>(*list, *run); }
