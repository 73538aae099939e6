// The kernels of micro_sm90.cu that compute.
#pragma once

#include "micro_sm90_ptx.cuh"

constexpr int TOKENS = 4096, HEADS = 16, D = 80, ROWS = 112;  // one image of 4096 patches, rows of a KV block
constexpr int TILE = ROWS * D * 2;                            // bytes
constexpr int MOST_WARPGROUPS = 4;

struct Clocks {  // of one warpgroup; `units`: how often it went round
  long long start, end, units;
};

extern __shared__ __align__(1024) unsigned char shared_bytes[];

DEV void record(Clocks* clocks, long long start, long long units) {
  if (threadIdx.x % 128 == 0) clocks[blockIdx.x * MOST_WARPGROUPS + threadIdx.x / 128] = {start, clock64(), units};
}

DEV void store_shared(uint32_t address, bf16 value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(__bfloat16_as_ushort(value)) : "memory");
}

DEV uint16_t load_shared(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

template <int WIDTH>
DEV void fill(uint32_t to, const bf16* from, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x)
    store_shared(to + place<WIDTH>(i / columns, i % columns, rows), from[i]);
}

template <int STEPS>
DEV void load_fragments(uint32_t (&a)[STEPS][4], const bf16* from, int columns) {
  int thread = threadIdx.x % 128;
  for (int step = 0; step < STEPS; step++)
    for (int i = 0; i < 4; i++) {
      int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i & 1), column = 16 * step + 2 * (thread % 4) + 8 * (i / 2);
      a[step][i] = *reinterpret_cast<const uint32_t*>(from + row * columns + column);
    }
}

// ---- 1 and 4: the rate of one wgmma ----

// d[64 a warpgroup, N] += a[64 a warpgroup, 16 STEPS] b, `passes` times. b is [N, 16 STEPS] (K-major) or [16 STEPS, N] (MN).
// SPLIT: columns 0..63 of b with the 128-byte swizzle, the others with the 32-byte one, two instructions a step.
template <int N, bool REGISTERS, bool MN, int WIDTH, int STEPS, bool SPLIT>
__global__ void __launch_bounds__(384, 1) wgmma_rate(const bf16* a, const bf16* b, float* d, int passes, Clocks* clocks) {
  constexpr int K = 16 * STEPS, rows = MN ? K : N, first = SPLIT ? 64 : N;
  static_assert(REGISTERS || WIDTH == 32 || STEPS <= 4);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const uint32_t at = shared_address(shared_bytes), a_at = at + 64 * 1024;
  if constexpr (SPLIT) {
    for (int i = threadIdx.x; i < K * N; i += blockDim.x) {
      int k = i / N, n = i % N;
      uint32_t byte = n < 64 ? place<128>(k, n, K) : K * 128 + place<32>(k, n - 64, K);
      store_shared(at + byte, b[i]);
    }
  } else {
    fill<WIDTH>(at, b, rows, MN ? N : K);
  }
  if constexpr (!REGISTERS)
    for (int g = 0; g < int(blockDim.x) / 128; g++) fill<WIDTH>(a_at + g * 64 * K * 2, a + g * 64 * K, 64, K);
  fence_proxy();
  uint32_t p[STEPS][4];
  if constexpr (REGISTERS) load_fragments(p, a + group * 64 * K, K);
  float low[first / 2] = {}, high[SPLIT ? (N - first) / 2 : 8] = {};
  const uint64_t b_descriptor = SPLIT ? descriptor<128>(at, K) : descriptor<WIDTH>(at, rows);
  const uint64_t high_descriptor = descriptor<32>(at + K * 128, K);
  const uint64_t a_descriptor = descriptor<WIDTH>(a_at + group * 64 * K * 2, 64);
  __syncthreads();
  long long start = clock64();
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint64_t from = b_descriptor + (SPLIT ? step_offset<128, true>(step, K) : step_offset<WIDTH, MN>(step, rows));
      if constexpr (REGISTERS)
        wgmma<MN>(low, p[step], from);
      else
        wgmma<MN>(low, a_descriptor + step_offset<WIDTH, false>(step, 64), from);
      if constexpr (SPLIT) wgmma<1>(high, p[step], high_descriptor + step_offset<32, true>(step, K));
    }
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  record(clocks, start, passes * STEPS);
  if (blockIdx.x != gridDim.x - 1) return;
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int v = 0; v < N / 2; v++) {
    float value = v < first / 2 ? low[v < first / 2 ? v : 0] : high[v < first / 2 ? 0 : v - first / 2];
    d[(group * 64 + row_of(thread, v)) * N + column_of(thread, v)] = value;
  }
}

// ---- 2: exp2 alone ----

// Sixteen chains a thread of x <- 2^(a x + b); with a = -1, b = 0 they go to 0.641186.
template <int SIXTEENTHS>
DEV void exp2_round(float (&x)[16], float a, float b) {
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] = exp2_mixed<SIXTEENTHS>(fmaf(x[i], a, b), i);
}

DEV void exp2_start(float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] = (threadIdx.x % 32 + i) * 0.01f;
}

template <int SIXTEENTHS>
__global__ void __launch_bounds__(512, 1) exp2_rate(float a, float b, float* out, int rounds, Clocks* clocks) {
  float x[16];
  exp2_start(x);
  __syncthreads();
  long long start = clock64();
#pragma unroll 2
  for (int round = 0; round < rounds; round++) exp2_round<SIXTEENTHS>(x, a, b);
  __syncthreads();
  record(clocks, start, rounds);
  float worst = 0.f;
  for (int i = 0; i < 16; i++) worst = fmaxf(worst, fabsf(x[i] - 0.64118574f));
  out[blockIdx.x * blockDim.x + threadIdx.x] = worst;
}

// ---- 2 and 6: matrix products in some warpgroups beside arithmetic in others ----

enum Work { EXP2, SOFTMAX };

// The matrix products of one block of N rows: S = Q K^T (five nN), O += P V (N / 16 n80). With 88 columns V has a column of
// ones behind its own, and the rows' sums come out beside O.
template <int N, int COLUMNS = D>
struct Products {
  static constexpr int Q_AT = N * D * 2 + N * 32 * ((COLUMNS + 15) / 16), BYTES = Q_AT + 64 * D * 2;
  float s[N / 2], o[COLUMNS / 2];
  uint32_t p[N / 16][4];
  uint64_t q, k, v;
  DEV Products(const bf16* a, const bf16* b, uint32_t at) : s{}, o{} {  // a [64, N], b [N, 80]; Q is a's first 80 columns
    load_fragments(p, a, N);
    q = descriptor<32>(at + Q_AT, 64);
    k = descriptor<32>(at, N);
    v = descriptor<32>(at + N * D * 2, N);
  }
  DEV void qk(bool keep = false) {
#pragma unroll
    for (int i = 0; i < 5; i++) wgmma<0>(s, q + step_offset<32, false>(i, 64), k + step_offset<32, false>(i, N), keep || i > 0);
  }
  DEV void pv() {
#pragma unroll
    for (int i = 0; i < N / 16; i++) wgmma<1>(o, p[i], v + step_offset<32, true>(i, N));
  }
  // BLOCK: Q K and P V. SCORES: Q K alone (A in shared memory). OUTPUT: P V alone (A in registers).
  enum Kind { BLOCK, SCORES, OUTPUT };
  // Block after block for `budget` clocks; how many. Warps of a warpgroup that differ in the number of their wgmma are an
  // illegal instruction, so they agree on going on, every eight blocks.
  template <Kind KIND>
  DEV long long repeat(long long start, long long budget, int group) {
    long long blocks = 0;
    do {
#pragma unroll 1
      for (int i = 0; i < 8; i++) {
        wgmma_fence();
        if constexpr (KIND != OUTPUT) qk(KIND == SCORES);  // kept: overwritten products would be removed
        if constexpr (KIND != SCORES) pv();
        wgmma_commit();
        wgmma_wait<1>();
      }
      blocks += 8;
    } while (all_agree(clock64() - start < budget, group));
    wgmma_wait<0>();
    return blocks;
  }
  DEV void store(float* d, int thread) const {
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[row_of(thread, i) * N + column_of(thread, i)] = s[i];
#pragma unroll
    for (int i = 0; i < 40; i++) d[64 * N + row_of(thread, i) * D + column_of(thread, i)] = o[i];
  }
};

template <int N, int COLUMNS = D>
DEV void fill_products(const bf16* a, const bf16* b, uint32_t at) {
  fill<32>(at, b, N, D);
  fill<32>(at + N * D * 2, b, N, D);
  if (COLUMNS > D)
    for (int i = threadIdx.x; i < 16 * N; i += blockDim.x)
      store_shared(at + N * D * 2 + place<32>(i / 16, D + i % 16, N), __float2bfloat16(i % 16 ? 0.f : 1.f));
  for (int i = threadIdx.x; i < 64 * D; i += blockDim.x)
    store_shared(at + Products<N, COLUMNS>::Q_AT + place<32>(i / D, i % D, 64), a[i / D * N + i % D]);
  fence_proxy();
}

// When O is multiplied because a row's maximum grew: with every block; by 2^8 or more alone; never, with a reference known
// before.
enum Rescale { ALWAYS, WHEN_DUE, NEVER };

struct Softmax {  // of one thread's two rows
  float maximum[2], sum[2], reference;
  DEV Softmax(float reference) : maximum{-INFINITY, -INFINITY}, sum{}, reference(reference) {}
  // s -> probabilities; returns what o is to be multiplied with.
  template <int SIXTEENTHS, Rescale RESCALE, bool ADD, int N>
  DEV float2 exponentials(float (&s)[N], float scale) {
    float alpha[2], minus[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      alpha[r] = 1.f, minus[r] = reference;
      if (RESCALE == NEVER) continue;
      float m = maximum[r];
#pragma unroll
      for (int i = 0; i < N / 2; i++) m = fmaxf(m, s[i / 2 * 4 + 2 * r + i % 2]);
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      if (RESCALE == WHEN_DUE && (m - maximum[r]) * scale < 8.f) m = maximum[r];
      alpha[r] = exp2_unit((maximum[r] - m) * scale);
      minus[r] = -m * scale;
      maximum[r] = m;
      sum[r] *= alpha[r];
    }
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = exp2_mixed<SIXTEENTHS>(fmaf(s[i], scale, minus[i / 2 & 1]), i);
#pragma unroll
    for (int i = 0; ADD && i < N; i++) sum[i / 2 & 1] += s[i];
    return {alpha[0], alpha[1]};
  }
};

template <Rescale RESCALE, int M, int N>
DEV void rescale_and_pack(float (&o)[M], uint32_t (&p)[N][4], const float (&s)[8 * N], float2 alpha) {
  if (RESCALE == ALWAYS || (RESCALE == WHEN_DUE && __any_sync(~0u, alpha.x != 1.f || alpha.y != 1.f))) {
#pragma unroll
    for (int i = 0; i < M; i++) o[i] *= i / 2 & 1 ? alpha.y : alpha.x;
  }
#pragma unroll
  for (int i = 0; i < 4 * N; i++) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1]);
}

// The first `product_groups` warpgroups multiply, the others compute, both for `budget` clocks.
template <Work WORK, int SIXTEENTHS>
__global__ void __launch_bounds__(384, 1) beside(const bf16* a, const bf16* b, float* d, float* out, int product_groups,
                                                 long long budget, float minus, float zero, Clocks* clocks) {
  const uint32_t at = shared_address(shared_bytes);
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  fill_products<ROWS>(a, b, at);
  __syncthreads();
  const long long start = clock64();
  long long units = 0;
  if (group < product_groups) {
    Products<ROWS> products(a, b, at);
    units = products.repeat<Products<ROWS>::BLOCK>(start, budget, group);
    record(clocks, start, units);
    if (blockIdx.x == gridDim.x - 1 && group == 0) products.store(d, thread);
  } else if constexpr (WORK == EXP2) {
    float x[16], worst = 0.f;
    exp2_start(x);
    while (clock64() - start < budget) {
#pragma unroll
      for (int round = 0; round < 8; round++) exp2_round<SIXTEENTHS>(x, minus, zero);
      units += 8;
    }
    record(clocks, start, units);
    for (int i = 0; i < 16; i++) worst = fmaxf(worst, fabsf(x[i] - 0.64118574f));
    out[blockIdx.x * blockDim.x + threadIdx.x] = worst;
  } else {
    // Probabilities are the next block's scores: they go to 1, so that a row's sum grows by 28 a block.
    float s[56], o[40], scaled = 0.f;
    uint32_t p[7][4], bits = 0;
    Softmax softmax(0.f);
    for (int i = 0; i < 56; i++) s[i] = -0.25f * i;
    for (int i = 0; i < 40; i++) o[i] = zero;
    while (clock64() - start < budget) {
      rescale_and_pack<ALWAYS>(o, p, s, softmax.exponentials<SIXTEENTHS, ALWAYS, true>(s, 0.125f));
#pragma unroll
      for (int i = 0; i < 28; i++) bits ^= p[i / 4][i % 4];
      units++;
    }
    record(clocks, start, units);
    for (int i = 0; i < 40; i++) scaled += o[i];
    float error = fmaxf(fabsf(softmax.sum[0] / (28.f * units) - 1.f), fabsf(softmax.sum[1] / (28.f * units) - 1.f));
    out[blockIdx.x * blockDim.x + threadIdx.x] = error + scaled + (bits == 1);
  }
}

// Single operations, sixteen chains a thread, each with a result that is known whatever the count.
enum Operation { UNIT, MULTIPLY, ADD, FUSED, MAXIMUM, PACK };
constexpr const char* OPERATION_NAMES[] = {"MUFU.EX2", "FMUL by a scalar", "FADD", "FFMA of three registers", "FMNMX", "F2FP"};

template <Operation OPERATION>
DEV void operate(float (&x)[16], const float (&y)[16], const float (&z)[16], float minus) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    if constexpr (OPERATION == UNIT) x[i] = exp2_unit(-x[i]);
    if constexpr (OPERATION == MULTIPLY) x[i] *= minus;
    if constexpr (OPERATION == ADD) x[i] += y[i];
    if constexpr (OPERATION == FUSED) x[i] = fmaf(x[i], y[i], z[i]);
    if constexpr (OPERATION == MAXIMUM) x[i] = fmaxf(x[i], x[(i + 1) % 16]);
    if constexpr (OPERATION == PACK) x[i] = __uint_as_float(pack(x[i], x[(i + 1) % 16]));
  }
}

// The first warpgroup multiplies (if `product_groups` is 1), the others do one operation over and over; units are rounds of 16.
template <Operation OPERATION, bool SCORES>
__global__ void __launch_bounds__(384, 1) operation_beside(const bf16* a, const bf16* b, float* out, int product_groups,
                                                           long long budget, float minus, Clocks* clocks) {
  using Tile = Products<ROWS>;
  const uint32_t at = shared_address(shared_bytes);
  const int group = threadIdx.x / 128;
  fill_products<ROWS>(a, b, at);
  __syncthreads();
  const long long start = clock64();
  if (group < product_groups) {
    Tile products(a, b, at);
    long long units = products.repeat<SCORES ? Tile::SCORES : Tile::OUTPUT>(start, budget, group);
    record(clocks, start, units);
    float sum = 0.f;
    for (int i = 0; i < 56; i++) sum += SCORES ? products.s[i] : products.o[i % 40];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum == 0.5f;  // sums of integers
    return;
  }
  float x[16], y[16], z[16], worst = 0.f;
  long long units = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    x[i] = -minus;
    y[i] = OPERATION == FUSED ? -minus * (32 + i) / 64.f : -minus * (i + 1);
    z[i] = -minus - y[i];
  }
  while (clock64() - start < budget) {
#pragma unroll
    for (int round = 0; round < 8; round++) operate<OPERATION>(x, y, z, minus);
    units += 8;
  }
  record(clocks, start, units);
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float expected = OPERATION == UNIT ? 0.64118574f : OPERATION == ADD ? 1.f + units * (i + 1) : 1.f;
    if (OPERATION == PACK) expected = __uint_as_float(0x3f803f80);
    worst = fmaxf(worst, fabsf(x[i] - expected));
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = worst;
}

// ---- 6: the loop of the attention kernel without its loads ----

// What a warpgroup does in a round: Q K, exponentials, P V, each waited for; or Q K of a block and P V of the one before
// together, then the exponentials, which only the neighbours' products run beside; or the exponentials under its own P V, and
// that with the warpgroups taking turns in issuing.
enum Order { SERIAL, TOGETHER, UNDER, TURNS };
constexpr const char* ORDER_NAMES[] = {"one after the other", "P V + Q K, then exponentials", "exponentials under P V",
                                       "exponentials under P V, in turns"};

// Every warpgroup goes `blocks` times over the same K and V. ONES: rows are summed by the tensor cores. `zero` is 0: it ties
// the last wait to the exponentials, or else the assembler moves that wait above the exponentials.
template <int N, Order ORDER, int SIXTEENTHS, Rescale RESCALE, bool ONES>
__global__ void __launch_bounds__(N <= 112 ? 384 : 256, 1)
    skeleton(const bf16* a, const bf16* b, float* d, int blocks, float scale, uint32_t zero, Clocks* clocks) {
  constexpr int COLUMNS = ONES ? 88 : D;
  using Tile = Products<N, COLUMNS>;
  const uint32_t at = shared_address(shared_bytes), barrier = at + Tile::BYTES;
  const int thread = threadIdx.x % 128, groups = blockDim.x / 128, group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    expect_bytes(barrier, 0);
  }
  fill_products<N, COLUMNS>(a, b, at);
  Tile products(a, b, at);
  Softmax softmax(__uint_as_float(zero));
#pragma unroll
  for (int i = 0; i < N / 4; i++) products.p[i / 4][i % 4] = zero;
  __syncthreads();
  const long long start = clock64();
  if (ORDER == TURNS && group == groups - 1) turn_give(0);
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    if constexpr (ORDER == TURNS) turn_take(group);
    wgmma_fence();
    if constexpr (ORDER == TOGETHER) products.pv();
    products.qk();
    wgmma_commit();
    if constexpr (ORDER == UNDER || ORDER == TURNS) {
      products.pv();
      wgmma_commit();
      if constexpr (ORDER == TURNS) turn_give(group + 1 == groups ? 0 : group + 1);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    float2 alpha = softmax.exponentials<SIXTEENTHS, RESCALE, !ONES>(products.s, scale);
    if constexpr (ORDER == UNDER || ORDER == TURNS) {
      barrier_wait(
          barrier + (__float_as_uint(ONES ? products.s[0] + products.s[N / 2 - 1] : softmax.sum[0] + softmax.sum[1]) & zero),
          0);
      wgmma_wait<0>();
    }
    rescale_and_pack<RESCALE>(products.o, products.p, products.s, alpha);
    if constexpr (ORDER == SERIAL) {
      wgmma_fence();
      products.pv();
      wgmma_commit();
      wgmma_wait<0>();
    }
  }
  if constexpr (ORDER != SERIAL) {
    wgmma_fence();
    products.pv();
    wgmma_commit();
    wgmma_wait<0>();
  }
  if (ORDER == TURNS && group == 0) turn_take(0);
  record(clocks, start, blocks);
  if (blockIdx.x != gridDim.x - 1 || threadIdx.x < blockDim.x - 128) return;
  for (int r = 0; r < 2; r++) {
    if (ONES) softmax.sum[r] = thread % 4 ? 0.f : products.o[COLUMNS / 2 - 4 + 2 * r];
    softmax.sum[r] += __shfl_xor_sync(~0u, softmax.sum[r], 1);
    softmax.sum[r] += __shfl_xor_sync(~0u, softmax.sum[r], 2);
  }
#pragma unroll
  for (int v = 0; v < 40; v++) d[row_of(thread, v) * D + column_of(thread, v)] = products.o[v] / softmax.sum[v / 2 & 1];
}

// ---- 5: whether one warp's wait covers its warpgroup ----

// Twenty wgmma by one warpgroup whose last warp comes `late` clocks after the others. The first warp to get through its wait
// (warp 0) destroys B at once. A warp's clocks: from its first wgmma to the end of its wait; units: its values that differ from
// those of an undisturbed run.
__global__ void __launch_bounds__(128, 1) wait_coverage(const bf16* a, const bf16* b, int late, Clocks* clocks) {
  const uint32_t at = shared_address(shared_bytes);
  const int warp = threadIdx.x / 32;
  fill_products<ROWS>(a, b, at);
  __syncthreads();
  Products<ROWS> products(a, b, at);
  float expected[56];
  long long start = 0, end = 0;
#pragma unroll 1
  for (int run = 0; run < 2; run++) {
#pragma unroll
    for (int i = 0; i < 56; i++) expected[i] = products.s[i];
    __syncthreads();
    const long long begin = clock64();
    if (run && warp == 3)
      while (clock64() - begin < late) {
      }
    start = clock64();
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) products.qk(i > 0);  // overwritten products would be removed
    wgmma_commit();
    wgmma_wait<0>();
    end = clock64();
    if (run && warp == 0)
      for (int i = threadIdx.x; i < TILE / 4; i += 32)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 4 * i), "r"(0x7fff7fff) : "memory");
  }
  int wrong = 0;
#pragma unroll
  for (int i = 0; i < 56; i++) wrong += !(products.s[i] == expected[i]);
  wrong = __reduce_add_sync(~0u, wrong);
  if (threadIdx.x % 32 == 0) clocks[blockIdx.x * MOST_WARPGROUPS + warp] = {start, end, wrong};
}
