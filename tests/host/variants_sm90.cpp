// The alternatives of the Hopper forward on the CPU, by their names in csrc/variants_sm90.cuh.
#include "../../csrc/variants_sm90.cuh"

#include <stdexcept>
#include <string>

#include "../../csrc/host/entry.h"
#include "../../csrc/launch_sm90.cuh"

using namespace qwen2vl_fast;

HOST_ENTRY int variant_name(int index, char* name, int bytes) {
  int count = 0;
  each_variant_sm90([&](const char* own, auto rows, auto) {
    if (count++ == index) std::snprintf(name, bytes, "%s, %d rows", own, int(rows));
  });
  return count;
}

// As forward of host/launches.cpp, with a variant in the place of the kernel.
HOST_ENTRY int forward(const VarlenAttention* p, const char* variant, int rows, int device, void* stream, const host::Run* run) {
  return host::run_launches(*run, [&] {
    const CurrentDevice current(device, variant);
    bool found = false;
    each_variant_sm90([&](const char* name, auto own, auto options) {
      if (own != rows || std::string(name) != variant) return;
      run_forward_sm90<VariantKernelSm90<own, decltype(options)>>(*p, device, stream);
      found = true;
    });
    if (!found) throw std::invalid_argument("no variant of this name and rows");
  });
}
