// The variants of the Hopper forward behind C functions, for bench/variants.py. Compiled for sm_90a.
#include <cstdio>
#include <exception>
#include <type_traits>

#include "../csrc/checks.h"
#include "../csrc/launch_sm90.cuh"
#include "../csrc/variants_sm90.cuh"

using namespace qwen2vl_fast;

// Mirrored by bench/variants.py.
struct Facts {
  const char* name;
  int rows, keys, stages, turns, polynomial, reference, narrow;
};

extern "C" int variants(Facts* facts, int most) {
  int count = 0;
  each_variant_sm90([&](const char* name, auto rows, auto options) {
    using Options = decltype(options);
    if (count < most)
      facts[count] = {name, rows, Options::KEYS, Options::STAGES, Options::TURNS, Options::POLYNOMIAL, int(Options::REFERENCE), Options::NARROW};
    ++count;
  });
  return count;
}

// 0, or 1 and a message.
extern "C" int run_variant(int index, const VarlenAttention* problem, int device, void* stream, char* message, int bytes) {
  int count = 0;
  try {
    check_problem(*problem);
    each_variant_sm90([&](const char*, auto rows, auto options) {
      if (count++ == index) run_forward_sm90<VariantKernelSm90<rows, decltype(options)>>(*problem, device, stream);
    });
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, bytes, "%s", error.what());
    return 1;
  }
}
