// Hopper's own instructions (sm_90a): mbarriers, the tensor memory accelerator (TMA), fences of warpgroup products, and
// registers that move between warpgroups. As in ptx.cuh, under another compiler than nvcc each is its twin on the CPU.
#pragma once

#include "ptx.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace qwen2vl_fast {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = host::TensorMap;
#endif

// mbarriers, 8 bytes of shared memory each. A phase ends when all its arrivals and all announced bytes have come; waiting is by
// the phase's parity, and a fresh mbarrier lets a wait for parity 1 pass.

DEV void mbarrier_init(uint32_t barrier, int arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  host::mbarrier_init(barrier, arrivals);
#endif
}

// Makes initialised mbarriers visible to the TMA.
DEV void fence_mbarrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  host::fence_mbarrier_init();
#endif
}

DEV void mbarrier_arrive(uint32_t barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  host::mbarrier_arrive(barrier);
#endif
}

// Arrives, and makes the phase wait for `bytes` more.
DEV void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  host::mbarrier_arrive_expect(barrier, bytes);
#endif
}

DEV void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  host::mbarrier_wait(barrier, parity);
#endif
}

// Makes this thread's ordinary stores to shared memory visible to TMA and wgmma, which read through another proxy.
DEV void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  host::fence_proxy_async();
#endif
}

// Copies a box of a tensor to shared memory at `to`; its bytes count towards the phase of `barrier`. Coordinates are innermost
// first, in elements; what lies outside the tensor is filled with zeros and counted like the rest.
DEV void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#else
  host::tma_load(to, map, barrier, c0, c1, c2);
#endif
}

DEV void tma_prefetch(const TensorMap& map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// Warpgroup products run asynchronously. A fence comes before the first one and after their registers were touched; products
// are committed in groups; accumulators may be read, and operands overwritten, once the group has been waited for.

DEV void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  host::wgmma_fence();
#endif
}

DEV void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  host::wgmma_commit();
#endif
}

// Waits until at most PENDING groups of this warp are under way.
template <int PENDING>
DEV void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#else
  host::wgmma_wait(PENDING);
#endif
}

// The warpgroup's registers a thread from here on: the producer gives some back, consumers take them.

template <int REGISTERS>
DEV void give_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#else
  host::give_registers(REGISTERS);
#endif
}

template <int REGISTERS>
DEV void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#else
  host::take_registers(REGISTERS);
#endif
}

// Barriers 1 to 15 of the block, each for `threads` threads: those that wait and those that only arrive.

DEV void named_barrier_wait(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::named_barrier_wait(id, threads);
#endif
}

DEV void named_barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::named_barrier_arrive(id, threads);
#endif
}

// The value of lane 0, which all lanes hold: tells the compiler that branches on it are taken together.
DEV int warp_uniform(int x) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, x, 0);
#else
  return x;
#endif
}

DEV uint32_t shuffle_xor(uint32_t x, int lanes) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, x, lanes);
#else
  return host::shuffle_xor(x, lanes);
#endif
}

DEV uint32_t float_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  return host::float_bits(x);
#endif
}

DEV float float_of_bits(uint32_t x) {
#ifdef __CUDACC__
  return __uint_as_float(x);
#else
  return host::bits_float(x);
#endif
}

// x between low and high; a NaN stays one.
DEV float clamp_or_nan(float x, float low, float high) {
#ifdef __CUDACC__
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
#else
  return x < low ? low : x > high ? high : x;
#endif
}

}  // namespace qwen2vl_fast
