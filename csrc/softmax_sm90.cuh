// The softmax of the Hopper forward, of a thread's two rows, in the registers in which wgmma leaves the scores.
#pragma once

#include <cmath>

#include "ptx_sm90.cuh"

namespace qwen2vl_fast {

// What a row's exponents are taken from. Softmax needs no maximum, only a reference that keeps the exponentials in range: floating
// point is as exact at 2^40 as at 1.
enum class Reference {
  FIRST,        // the maximum of the row's first key block; a block that outgrows it is computed again
  CONDITIONAL,  // the maximum so far, followed where it has grown by more than 2^8
  ALWAYS,       // the maximum so far
};

template <bool BF16, int KEYS, class Options>
struct SoftmaxSm90 {
  using Scores = float[KEYS / 2];

  // A block whose sum of exponentials breaks LIMIT, or is a NaN (rows without keys so far have the reference -inf), has outgrown the
  // reference. float16 holds P to 2^16 only.
  static constexpr float LIMIT = BF16 ? 1099511627776.0f : 32768.0f;  // 2^40, 2^15
  static constexpr float GROWTH = Options::REFERENCE == Reference::ALWAYS ? 0.0f : 8.0f;

  float top[2];  // the reference, scale * log2(e) included
  float sum[2];  // this thread's share of the sum of exponentials

  DEV void begin() {
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // s -> 2^(scale s - top).
  DEV void exponentiate(Scores& s, float scale) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      s[i] = exp2_mixed(fmaf(s[i], scale, -top[i / 2 % 2]), i);
      sum[i / 2 % 2] += s[i];
    }
  }

  // The same with a new reference where the maximum is GROWTH beyond the old one; what was accumulated before is then to be multiplied
  // by `factor`.
  DEV void exponentiate_exactly(Scores& s, float scale, float (&factor)[2]) {
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = s[2 * r];
#pragma unroll
      for (int i = 0; i < KEYS / 2; i += 4) most = fmaxf(most, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2)) * scale;
      const float before = top[r];
      const bool grows = !(most - before <= GROWTH) && most != -INFINITY;
      top[r] = grows ? most : before;
      factor[r] = grows ? exp2_fast(before - most) : 1.0f;
      sum[r] *= factor[r];
      shift[r] = top[r] == -INFINITY ? 0.0f : top[r];
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      const float x = fmaf(s[i], scale, -shift[i / 2 % 2]);
      s[i] = Options::REFERENCE == Reference::FIRST ? exp2_fast(x) : exp2_mixed(x, i);
      sum[i / 2 % 2] += s[i];
    }
  }

  // POLYNOMIAL of every 16 exponentials by the FMA pipe, the others by the unit for them.
  static DEV float exp2_mixed(float x, int i) {
    return i * Options::POLYNOMIAL % 16 < Options::POLYNOMIAL ? exp2_polynomial(x) : exp2_fast(x);
  }

  // 2^x = 2^n 2^f, |f| <= 1/2, by a polynomial of degree 3 with a relative error of 7.5e-5, a fiftieth of bfloat16's; n is rounded by adding
  // 1.5 * 2^23 + 127, which leaves the exponent's bits lowest. Results under 2^-126 are zero, a NaN stays one.
  static DEV float exp2_polynomial(float x) {
    constexpr float ROUND = 12583039.0f;
    x = clamp_or_nan(x, -127.0f, 128.0f);
    const float n = x + ROUND;
    const float f = x - (n - ROUND);
    const float p = fmaf(fmaf(fmaf(0.055171665f, f, 0.242611122f), f, 0.693260986f), f, 0.999928074f);
    return p * float_of_bits(float_bits(n) << 23);
  }
};

}  // namespace qwen2vl_fast
