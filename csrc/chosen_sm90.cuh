// Which variant of the Hopper forward runs at D = 80. Written by `python -m bench.variants --choose`.
#pragma once

#include "softmax_sm90.cuh"

namespace qwen2vl_fast {

// By the trials of 2026-11-23 (docs/hopper.md): bench/results has no variants_cuda.json yet.
struct ChosenSm90 {
  static constexpr int KEYS = 96;
  static constexpr int STAGES = 4;
  static constexpr bool TURNS = true;
  static constexpr int POLYNOMIAL = 0;
  static constexpr Reference REFERENCE = Reference::FIRST;
  static constexpr bool NARROW = false;
};

}  // namespace qwen2vl_fast
