// Variable-length attention forward for Hopper (sm_90a): TMA, wgmma with P in registers at the native head dim.
//
// One CTA is a producer warpgroup and ROWS / 64 consumer warpgroups of 64 query rows each. It is persistent over the list of tiles.
// The producer's first warp loads Q, K and V; its second zeroes the rows of V past the end of the segment (0 * NaN of the next
// segment would be NaN). A consumer issues S = Q K^T of the next key block, then O += P V of the current one, and exponentiates
// that S while P V runs. Key blocks go from the last to the first, so that only the first one that is processed has a mask.
#pragma once

#include <type_traits>

#include "varlen_attention.h"
#include "wgmma.cuh"

namespace qwen2vl_fast {

struct VarlenAttentionMaps {
  // Dimensions {W, tokens, D / W, heads}: a box is a tile of `rows` tokens, as D / W chunks of W columns.
  CUtensorMap q, k, v;
};

template <typename Element_, int D_, int ROWS_, int KEYS_, int STAGES_, bool CAUSAL_, int POLY_ = 0, bool RESCALE_ALWAYS_ = false,
          bool IN_TURN_ = false>
struct ForwardSm90 {
  using Element = Element_;
  static constexpr int D = D_, ROWS = ROWS_, KEYS = KEYS_, STAGES = STAGES_, POLY = POLY_;
  static constexpr bool CAUSAL = CAUSAL_, RESCALE_ALWAYS = RESCALE_ALWAYS_, IN_TURN = IN_TURN_;
  static constexpr int CONSUMERS = ROWS / 64;
  static constexpr int THREADS = 128 * (CONSUMERS + 1);
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : CONSUMERS == 2 ? 40 : 56;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : CONSUMERS == 2 ? 232 : 256 - 8;

  // A row of D elements is cut into chunks as wide as a swizzle: 160-byte rows fit the 32-byte swizzle alone.
  static constexpr int W = D % 64 == 0 ? 64 : 16;
  static constexpr int CHUNKS = D / W;
  static constexpr int SWIZZLE = 2 * W;  // bytes
  static constexpr uint32_t DESCRIPTOR_HIGH = (8 * SWIZZLE >> 4) | (SWIZZLE == 128 ? 1u << 30 : 3u << 30);
  static constexpr int Q_BYTES = ROWS * D * 2, KV_BYTES = KEYS * D * 2;

  struct Shared {
    alignas(1024) unsigned char q[Q_BYTES];
    alignas(1024) unsigned char k[STAGES][KV_BYTES];
    alignas(1024) unsigned char v[STAGES][KV_BYTES];
    alignas(8) uint64_t q_full, q_empty, v_tail;
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    Tile tiles[2];
  };
  static constexpr int SHARED_BYTES = sizeof(Shared) + 1024;

  struct Args {
    VarlenAttention problem;
    VarlenAttentionMaps maps;
    float scale_log2;  // scale * log2(e)
    uint32_t zero;     // 0, and the compiler can't know
  };

  // Position in the ring of stages, and the parity of its current round.
  struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    DEV void next() {
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  };

  DEV static uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

  DEV static float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // 2^x on the FMA pipe: x = n + f, |f| <= 1/2, a cubic in f (relative error 7.5e-5, an eighth of a bf16 unit), n added to the exponent.
  DEV static float exp2_polynomial(float x) {
    float clamped, rounded;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(x), "f"(-126.0f));
    rounded = clamped + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low mantissa bits
    float f = clamped - (rounded - 12582912.0f);
    float y = 0.05592203f;
    y = fmaf(y, f, 0.24264008f);
    y = fmaf(y, f, 0.69312103f);
    y = fmaf(y, f, 0.99992448f);
    return __int_as_float(__float_as_int(y) + (__float_as_int(rounded) << 23));
  }

  DEV static uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (sizeof(Element) == 2 && std::is_same_v<Element, __nv_bfloat16>)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }

  DEV static int blocks(const Tile& tile) { return (tile.keys + KEYS - 1) / KEYS; }

  DEV static void run(const Args& args, unsigned char* dynamic_shared) {
    Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic_shared) + 1023) & ~uintptr_t(1023));
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(address(&shared.q_full), 1);
      ptx::mbarrier_init(address(&shared.q_empty), 4 * CONSUMERS);
      ptx::mbarrier_init(address(&shared.v_tail), 1);
      for (int i = 0; i < STAGES; ++i) {
        ptx::mbarrier_init(address(&shared.k_full[i]), 1);
        ptx::mbarrier_init(address(&shared.v_full[i]), 1);
        ptx::mbarrier_init(address(&shared.k_empty[i]), 4 * CONSUMERS);
        ptx::mbarrier_init(address(&shared.v_empty[i]), 4 * CONSUMERS);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (warpgroup == 0) {
      ptx::register_release<PRODUCER_REGISTERS>();
      const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
      if (warp == 0 && threadIdx.x == 0) produce(args, shared);
      if (warp == 1) zero_tails(args, shared);
    } else {
      ptx::register_acquire<CONSUMER_REGISTERS>();
      consume(args, shared, warpgroup - 1);
    }
  }

  DEV static void produce(const Args& args, Shared& shared) {
    ptx::tma_prefetch_descriptor(&args.maps.q);
    ptx::tma_prefetch_descriptor(&args.maps.k);
    ptx::tma_prefetch_descriptor(&args.maps.v);
    const int group = args.problem.H / args.problem.Hk;
    Ring ring;
    int count = 0;
#pragma unroll 1
    for (int t = blockIdx.x; t < args.problem.tile_count; t += gridDim.x, ++count) {
      const Tile tile = args.problem.tiles[t];
      ptx::mbarrier_wait(address(&shared.q_empty), (count & 1) ^ 1);
      shared.tiles[count & 1] = tile;
      ptx::mbarrier_arrive_expect(address(&shared.q_full), Q_BYTES);
      ptx::tma_load_4d(address(shared.q), &args.maps.q, address(&shared.q_full), 0, tile.q_row, 0, tile.head);
      const int key_head = tile.head / group;
      const int last = blocks(tile) - 1;
#pragma unroll 1
      for (int block = last; block >= 0; --block, ring.next()) {
        const int stage = ring.stage;
        const int row = tile.k_row + block * KEYS;
        ptx::mbarrier_wait(address(&shared.k_empty[stage]), ring.parity ^ 1);
        ptx::mbarrier_arrive_expect(address(&shared.k_full[stage]), KV_BYTES);
        ptx::tma_load_4d(address(shared.k[stage]), &args.maps.k, address(&shared.k_full[stage]), 0, row, 0, key_head);
        ptx::mbarrier_wait(address(&shared.v_empty[stage]), ring.parity ^ 1);
        const bool partial = block == last && tile.keys % KEYS != 0;
        const uint32_t barrier = address(partial ? &shared.v_tail : &shared.v_full[stage]);
        ptx::mbarrier_arrive_expect(barrier, KV_BYTES);
        ptx::tma_load_4d(address(shared.v[stage]), &args.maps.v, barrier, 0, row, 0, key_head);
      }
    }
  }

  // Zeroes the rows of V that lie past the segment, once they have landed, and completes V's barrier in the producer's place.
  DEV static void zero_tails(const Args& args, Shared& shared) {
    const int lane = threadIdx.x % 32;
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int t = blockIdx.x; t < args.problem.tile_count; t += gridDim.x) {
      const Tile tile = args.problem.tiles[t];
      const int valid = tile.keys % KEYS;
      if (valid != 0) {
        ptx::mbarrier_wait(address(&shared.v_tail), parity);
        parity ^= 1;
        // Swizzling permutes 16-byte units inside a row of a chunk: whole rows are zeroed without knowing it.
        constexpr int UNITS = SWIZZLE / 16;
#pragma unroll 1
        for (int i = lane; i < (KEYS - valid) * UNITS; i += 32)
#pragma unroll 1
          for (int chunk = 0; chunk < CHUNKS; ++chunk)
            reinterpret_cast<uint4*>(shared.v[stage])[(chunk * KEYS + valid) * UNITS + i] = uint4{0, 0, 0, 0};
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(address(&shared.v_full[stage]));
      }
      stage = (stage + blocks(tile)) % STAGES;
    }
  }

  DEV static void consume(const Args& args, Shared& shared, int warpgroup) {
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int row = 16 * (thread / 32) + lane / 4;  // and row + 8, of the warpgroup's 64
    const float scale = args.scale_log2;
    const uint32_t q_low = (address(shared.q) + warpgroup * 64 * SWIZZLE) >> 4;
    const uint32_t k_low = address(shared.k) >> 4;
    // The leading offset of V is the distance of its chunks of columns.
    const uint32_t v_low = (address(shared.v) >> 4) | (uint32_t(KEYS * SWIZZLE >> 4) << 16);
    Ring k_ring, v_ring;
    int count = 0;
    if (IN_TURN && warpgroup == CONSUMERS - 1) ptx::named_barrier_arrive(1, 256);

#pragma unroll 1
    for (int t = blockIdx.x; t < args.problem.tile_count; t += gridDim.x, ++count) {
      ptx::mbarrier_wait(address(&shared.q_full), count & 1);
      const Tile& tile = shared.tiles[count & 1];
      const int key_count = tile.keys;
      int block = (key_count + KEYS - 1) / KEYS - 1;

      float s[KEYS / 2], o[D / 2];
      uint32_t p[KEYS / 16][4];
      float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

      // Keys that the thread's rows see, counted from the first key of `block`.
      const int own_row = warpgroup * 64 + row;
      int limit[2];
      limit[0] = key_count, limit[1] = key_count;
      if constexpr (CAUSAL) {
        limit[0] = min(key_count, own_row + tile.diagonal + 1);
        limit[1] = min(key_count, own_row + 8 + tile.diagonal + 1);
      }
      const int unmasked = CAUSAL ? min(key_count, warpgroup * 64 + tile.diagonal + 1) : key_count;

      if (block >= 0) {
        ptx::mbarrier_wait(address(&shared.k_full[k_ring.stage]), k_ring.parity);
        ptx::wgmma_fence();
        scores(s, q_low, k_low + k_ring.stage * (KV_BYTES >> 4));
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        if (lane == 0) ptx::mbarrier_arrive(address(&shared.k_empty[k_ring.stage]));
        k_ring.next();
        mask(s, limit, block);
        float factor[2];
        exponentiate(s, m, l, scale, factor);
        pack_all(p, s);
        ptx::mbarrier_wait(address(&shared.v_full[v_ring.stage]), v_ring.parity);

#pragma unroll 1
        for (--block; block >= 0; --block) {
          ptx::mbarrier_wait(address(&shared.k_full[k_ring.stage]), k_ring.parity);
          if constexpr (IN_TURN) ptx::named_barrier_sync(1 + warpgroup, 256);
          ptx::wgmma_fence();
          scores(s, q_low, k_low + k_ring.stage * (KV_BYTES >> 4));
          ptx::wgmma_commit();
          accumulate(o, p, v_low + v_ring.stage * (KV_BYTES >> 4));
          ptx::wgmma_commit();
          if constexpr (IN_TURN) ptx::named_barrier_arrive(1 + (warpgroup + 1) % CONSUMERS, 256);
          ptx::wgmma_wait<1>();
          if (lane == 0) ptx::mbarrier_arrive(address(&shared.k_empty[k_ring.stage]));
          k_ring.next();
          if constexpr (CAUSAL)
            if ((block + 1) * KEYS > unmasked) mask(s, limit, block);
          float factor[2];
          exponentiate(s, m, l, scale, factor);
          const int used = v_ring.stage;
          v_ring.next();
          // The next V is awaited here, at an address that depends on the last exponential: else ptxas moves the wait below
          // above the exponentials, and P V no longer runs under them.
          const uint32_t late = (__float_as_uint(l[0]) ^ __float_as_uint(l[1])) & args.zero;
          ptx::mbarrier_wait(address(&shared.v_full[v_ring.stage]) + late, v_ring.parity);
          ptx::wgmma_wait<0>();
          if (lane == 0) ptx::mbarrier_arrive(address(&shared.v_empty[used]));
          rescale(o, factor);
          pack_all(p, s);
        }
        if (lane == 0) ptx::mbarrier_arrive(address(&shared.q_empty));
        ptx::wgmma_fence();
        accumulate(o, p, v_low + v_ring.stage * (KV_BYTES >> 4));
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        if (lane == 0) ptx::mbarrier_arrive(address(&shared.v_empty[v_ring.stage]));
        v_ring.next();
      } else {
        if (lane == 0) ptx::mbarrier_arrive(address(&shared.q_empty));
      }
      store(args, tile, o, m, l, scale, own_row);
    }
  }

  // S = Q K^T of one key block.
  DEV static void scores(float (&s)[KEYS / 2], uint32_t q, uint32_t k) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int chunk = step * 16 / W, inside = step * 16 % W * 2;
      ptx::WgmmaShared<KEYS, Element>::template run<DESCRIPTOR_HIGH>(s, q + ((chunk * ROWS * SWIZZLE + inside) >> 4),
                                                                     k + ((chunk * KEYS * SWIZZLE + inside) >> 4), step > 0);
    }
  }

  // O += P V of one key block.
  DEV static void accumulate(float (&o)[D / 2], const uint32_t (&p)[KEYS / 16][4], uint32_t v) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step)
      ptx::WgmmaRegisters<D, Element>::template run<DESCRIPTOR_HIGH>(o, p[step], v + (step * 16 * SWIZZLE >> 4));
  }

  DEV static void mask(float (&s)[KEYS / 2], const int (&limit)[2], int block) {
    const int column = block * KEYS + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (column + 8 * (i / 4) + i % 2 >= limit[i / 2 % 2]) s[i] = -INFINITY;
  }

  DEV static float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }

  // s -> exp2(scale (s - m)) with the running maximum m; l gathers this thread's share of the row sums. o is to be multiplied by factor.
  DEV static void exponentiate(float (&s)[KEYS / 2], float (&m)[2], float (&l)[2], float scale, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
      for (int i = 4; i < KEYS / 2; i += 4) {
        top[0] = fmaxf(top[0], s[i + 2 * r]);
        top[1] = fmaxf(top[1], s[i + 2 * r + 1]);
      }
      const float candidate = fmaxf(m[r], quad_max(fmaxf(top[0], top[1])));
      // A maximum that grows by less than 2^8 stays: P then reaches 256 at most, which float32 sums and both types hold.
      const bool grow = RESCALE_ALWAYS || !((candidate - m[r]) * scale <= 8.0f);
      const float fresh = grow ? candidate : m[r];
      factor[r] = grow ? exp2_fast((m[r] - (fresh == -INFINITY ? 0.0f : fresh)) * scale) : 1.0f;
      m[r] = fresh;
      const float shift = fresh == -INFINITY ? 0.0f : fresh * scale;
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < KEYS / 2; i += 4)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[i + 2 * r + c];
          x = fmaf(x, scale, -shift);
          x = (POLY > 0 && (i / 4) % (POLY > 0 ? POLY : 1) == 0 && c == 0) ? exp2_polynomial(x) : exp2_fast(x);
          sum[c] += x;
        }
      l[r] = fmaf(l[r], factor[r], sum[0] + sum[1]);
    }
  }

  DEV static void rescale(float (&o)[D / 2], const float (&factor)[2]) {
    if constexpr (!RESCALE_ALWAYS)
      if (__all_sync(~0u, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= factor[i / 2 % 2];
  }

  DEV static void pack_all(uint32_t (&p)[KEYS / 16][4], const float (&s)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) p[i][j] = pack(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
  }

  DEV static void store(const Args& args, const Tile& tile, float (&o)[D / 2], const float (&m)[2], const float (&l)[2], float scale,
                        int own_row) {
    const VarlenAttention& problem = args.problem;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = l[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const bool valid = own_row + 8 * r < tile.rows;
      const int64_t token = tile.q_row + own_row + 8 * r;
      if (valid && lane % 4 == 0)
        problem.lse[int64_t(tile.head) * problem.T + token] = sum == 0.0f ? -INFINITY : (m[r] * scale + log2f(sum)) * 0.6931471805599453f;
      if (valid) {
        Element* out = static_cast<Element*>(problem.o) + token * problem.o_stride_t + tile.head * problem.o_stride_h;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
          *reinterpret_cast<uint32_t*>(out + 8 * i + 2 * (lane % 4)) = pack(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
      }
    }
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, 1) varlen_attention_forward_sm90(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ unsigned char dynamic_shared[];
  Kernel::run(args, dynamic_shared);
}

}  // namespace qwen2vl_fast
