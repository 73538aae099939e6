// The Hopper forward on the CPU.
#include "fwd_sm90.h"

using namespace qwen2vl_fast;

namespace {

template <bool BF16, bool CAUSAL>
int forward(const VarlenAttention& p, int rows, const host::Run& run) {
  int status = host::finish(run, "no kernel for this D and rows");
  choose_forward_sm90<BF16, CAUSAL>(p.D, rows, [&](auto kernel) { status = host::forward_sm90<decltype(kernel)>(p, run); });
  return status;
}

}  // namespace

HOST_ENTRY int forward_sm90(const VarlenAttention* p, int rows, const host::Run* run) {
  if (p->bfloat16) return p->causal ? forward<true, true>(*p, rows, *run) : forward<true, false>(*p, rows, *run);
  return p->causal ? forward<false, true>(*p, rows, *run) : forward<false, false>(*p, rows, *run);
}
