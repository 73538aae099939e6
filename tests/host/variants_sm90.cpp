// The alternatives of the Hopper forward on the CPU, by their place in csrc/variants_sm90.cuh.
#include "../../csrc/host/fwd_sm90.h"
#include "../../csrc/variants_sm90.cuh"

using namespace qwen2vl_fast;

HOST_ENTRY int variant_name(int index, char* name, int bytes) {
  int count = 0;
  each_variant_sm90([&](const char* own, auto rows, auto) {
    if (count++ == index) std::snprintf(name, bytes, "%s, %d rows", own, int(rows));
  });
  return count;
}

// rows: those of the variant, as in forward_sm90.
HOST_ENTRY int forward_variant(const VarlenAttention* p, int rows, int index, const host::Run* run) {
  int count = 0, status = host::finish(*run, "no variant of this number and rows");
  each_variant_sm90([&](const char*, auto own, auto options) {
    if (count++ == index && own == rows) status = host::forward_sm90<VariantKernelSm90<own, decltype(options)>>(*p, *run);
  });
  return status;
}
