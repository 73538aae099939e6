// Collectives of a warp, and arithmetic: what the instructions compute, with the layouts of their registers.
#include <cmath>
#include <cstring>

#include "runtime.h"

namespace qwen2vl_fast {
namespace host {

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

namespace {

using Floats8 = float __attribute__((vector_size(32), aligned(4)));

float from_half(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

// Conversions are most of a product's time, hence the table.
struct Halves {
  float value[65536];
  Halves() {
    for (int i = 0; i < 65536; ++i) value[i] = from_half(static_cast<uint16_t>(i));
  }
};
const Halves halves;

uint16_t to_half(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(bits_float(size), 24))));
  }
  const uint32_t rounded = size + 0xfffu + (size >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

struct Matrices {
  uint32_t row;
  uint32_t* x;
};

bool load_matrices_of_warp(int warp, int64_t transposed) {
  uint16_t elements[4][8][8];
  const uint32_t count = ++block.warps[warp].matrix_loads;
  for (int lane = 0; lane < LANES; ++lane) {
    const unsigned char* row = touch_matrix(operand_of<Matrices>(warp, lane).row, warp * LANES + lane);
    std::memcpy(elements[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < LANES && block.launch.races; ++lane) {
    clock_of(warp * LANES + lane)[block.threads.size() + block.warps.size() + warp] = count;
  }
  for (int lane = 0; lane < LANES; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = transposed ? elements[i][t][g] : elements[i][g][t];
      const uint32_t high = transposed ? elements[i][t + 1][g] : elements[i][g][t + 1];
      operand_of<Matrices>(warp, lane).x[i] = high << 16 | low;
    }
  }
  return true;
}

struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};

bool mma_of_warp(int warp, int64_t bf16) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < LANES; ++lane) {
    const Mma& own = operand_of<Mma>(warp, lane);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) unpack(a[g + i % 2 * 8][t + i / 2 * 8], a[g + i % 2 * 8][t + i / 2 * 8 + 1], own.a[i], bf16);
    unpack(b[t][g], b[t + 1][g], own.b0, bf16);
    unpack(b[t + 8][g], b[t + 9][g], own.b1, bf16);
  }
  float c[16][8];
  for (int row = 0; row < 16; ++row) {
    Floats8 sum = {};
    for (int k = 0; k < 16; ++k) sum += a[row][k] * *reinterpret_cast<const Floats8*>(b[k]);
    std::memcpy(c[row], &sum, sizeof sum);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    float* own = operand_of<Mma>(warp, lane).c;
    for (int i = 0; i < 4; ++i) own[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  return true;
}

}  // namespace

float to_float(uint16_t x, bool bf16) { return bf16 ? bits_float(static_cast<uint32_t>(x) << 16) : halves.value[x]; }
uint16_t from_float(float x, bool bf16) { return bf16 ? to_bfloat16(x) : to_half(x); }

uint32_t pack(float low, float high, bool bf16) {
  return static_cast<uint32_t>(from_float(high, bf16)) << 16 | from_float(low, bf16);
}

void unpack(float& low, float& high, uint32_t x, bool bf16) {
  low = to_float(static_cast<uint16_t>(x), bf16);
  high = to_float(static_cast<uint16_t>(x >> 16), bf16);
}

float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed) {
  Matrices own{row, x};
  meet("load_matrices", transposed, &own, load_matrices_of_warp);
}

void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  Mma own{c, a, b0, b1};
  meet("mma", bf16, &own, mma_of_warp);
}

float shuffle_xor(float x, int lanes) {
  Vote<float> own{x, 0.0f};
  meet("shuffle_xor", lanes, &own, [](int warp, int64_t key) {
    for (int lane = 0; lane < LANES; ++lane) {
      operand_of<Vote<float>>(warp, lane).out = operand_of<Vote<float>>(warp, (lane ^ static_cast<int>(key)) % LANES).in;
    }
    return true;
  });
  return own.out;
}

uint32_t shuffle_xor(uint32_t x, int lanes) { return float_bits(shuffle_xor(bits_float(x), lanes)); }

bool any(bool x) {
  Vote<bool> own{x, false};
  meet("any", 0, &own, [](int warp, int64_t) {
    bool found = false;
    for (int lane = 0; lane < LANES; ++lane) found |= operand_of<Vote<bool>>(warp, lane).in;
    for (int lane = 0; lane < LANES; ++lane) operand_of<Vote<bool>>(warp, lane).out = found;
    return true;
  });
  return own.out;
}

}  // namespace host
}  // namespace qwen2vl_fast
