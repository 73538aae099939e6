// Alternatives of the Hopper forward at D = 80, bfloat16: bench/variants.py times them on a device, tests/host runs them on the CPU.
#pragma once

#include "fwd_sm90.cuh"

namespace qwen2vl_fast {

template <int KEYS_, int STAGES_, bool TURNS_ = true, int POLYNOMIAL_ = 0, Reference REFERENCE_ = Reference::FIRST, bool NARROW_ = false>
struct VariantSm90 {
  static constexpr int KEYS = KEYS_;
  static constexpr int STAGES = STAGES_;
  static constexpr bool TURNS = TURNS_;
  static constexpr int POLYNOMIAL = POLYNOMIAL_;
  static constexpr Reference REFERENCE = REFERENCE_;
  static constexpr bool NARROW = NARROW_;
};

template <int ROWS, class Options>
using VariantKernelSm90 = ForwardSm90<true, 80, ROWS, Options::KEYS, Options::STAGES, false, Options>;

// visit(name, rows, options) for each; a kernel is VariantKernelSm90<rows, options>.
template <class Visit>
void each_variant_sm90(Visit visit) {
  using std::integral_constant;
  const auto both = [&](const char* name, auto options) {
    visit(name, integral_constant<int, 192>{}, options);
    visit(name, integral_constant<int, 128>{}, options);
  };
  both("chosen", ChosenSm90{});
  visit("64 rows, two blocks", integral_constant<int, 64>{}, VariantSm90<ChosenSm90::KEYS, 2>{});
  both("96 keys", VariantSm90<96, 4>{});
  both("96 keys, three stages", VariantSm90<96, 3>{});
  both("112 keys", VariantSm90<112, 3>{});
  visit("128 keys", integral_constant<int, 128>{}, VariantSm90<128, 3>{});
  visit("176 keys", integral_constant<int, 128>{}, VariantSm90<176, 2>{});
  both("no turns", VariantSm90<96, 4, false>{});
  both("1/16 by polynomial", VariantSm90<96, 4, true, 1>{});
  both("2/16 by polynomial", VariantSm90<96, 4, true, 2>{});
  both("4/16 by polynomial", VariantSm90<96, 4, true, 4>{});
  both("maximum, rescaled where it grew", VariantSm90<96, 4, true, 0, Reference::CONDITIONAL>{});
  both("maximum, rescaled always", VariantSm90<96, 4, true, 0, Reference::ALWAYS>{});
  both("maximum where it grew, 2/16 by polynomial", VariantSm90<96, 4, true, 2, Reference::CONDITIONAL>{});
  both("groups of 16 columns", VariantSm90<96, 4, true, 0, Reference::FIRST, true>{});
}

}  // namespace qwen2vl_fast
