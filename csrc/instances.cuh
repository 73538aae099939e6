// Which instance of a kernel for sm_80 takes a problem. A selection calls `start` with the kernel, an empty struct; that there is none
// is std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "varlen_attention.h"

namespace qwen2vl_fast {

// use(BF16, D), both as std::integral_constant.
template <class Use>
void by_type_and_dim(const VarlenAttention& p, Use use) {
  const auto by_dim = [&](auto bf16) {
    if (p.D == 64) return use(bf16, std::integral_constant<int, 64>{});
    if (p.D == 80) return use(bf16, std::integral_constant<int, 80>{});
    if (p.D == 128) return use(bf16, std::integral_constant<int, 128>{});
    throw std::invalid_argument("D: expected 64, 80 or 128, got " + std::to_string(p.D));
  };
  if (p.bfloat16) return by_dim(std::true_type{});
  by_dim(std::false_type{});
}

}  // namespace qwen2vl_fast
