// The Hopper forward, compiled for sm_90a alone.
#include "checks.h"
#include "launch_sm90.cuh"
#include "launch_sm90.h"

namespace qwen2vl_fast {
namespace {

template <bool BF16, bool CAUSAL>
void choose(const VarlenAttention& p, int rows, int device, void* stream) {
  const bool found = choose_forward_sm90<BF16, CAUSAL>(
      p.D, rows, [&](auto kernel) { run_forward_sm90<decltype(kernel)>(p, device, stream); });
  require(found, "rows: expected 128, or with D = 80 64 or 192 too, for the sm_90 kernel, got " + std::to_string(rows) + " with D = " +
                     std::to_string(p.D));
}

}  // namespace

void forward_sm90(const VarlenAttention& problem, int rows, int device, void* stream) {
  if (problem.bfloat16)
    return problem.causal ? choose<true, true>(problem, rows, device, stream) : choose<true, false>(problem, rows, device, stream);
  return problem.causal ? choose<false, true>(problem, rows, device, stream) : choose<false, false>(problem, rows, device, stream);
}

}  // namespace qwen2vl_fast
