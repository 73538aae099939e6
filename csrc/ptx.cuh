// Every line of inline assembly that a kernel for sm_80 and later uses, as thin functions; what only Hopper has stands in
// ptx_sm90.cuh. Under nvcc a function is its instruction; under any other compiler it is the same operation of host/twins.h,
// which runs the threads of a block on the CPU, so that a kernel written in these words runs in both places.
//
// Shared memory is named by 32-bit byte addresses, as the hardware does, and touched through these functions alone.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DEV __device__ __forceinline__
#else
#define DEV inline
#include "host/twins.h"
#endif

namespace qwen2vl_fast {

struct alignas(16) Words4 {
  uint32_t word[4];
};

// Where a thread stands.

DEV int thread_index() {
#ifdef __CUDACC__
  return static_cast<int>(threadIdx.x);
#else
  return host::thread_index();
#endif
}

DEV int block_index() {
#ifdef __CUDACC__
  return static_cast<int>(blockIdx.x);
#else
  return host::block_index();
#endif
}

DEV int block_count() {
#ifdef __CUDACC__
  return static_cast<int>(gridDim.x);
#else
  return host::block_count();
#endif
}

// Address of the launch's dynamic shared memory, a multiple of 128.
DEV uint32_t shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
#else
  return host::shared_memory();
#endif
}

// x itself, but the compiler does not know: it computes nothing from x ahead of time, to be kept in registers until then.
DEV int not_foreseen(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Meeting points.

DEV void barrier() {
#ifdef __CUDACC__
  __syncthreads();
#else
  host::barrier();
#endif
}

DEV void warp_barrier() {
#ifdef __CUDACC__
  __syncwarp();
#else
  host::warp_barrier();
#endif
}

DEV float shuffle_xor(float x, int lanes) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, x, lanes);
#else
  return host::shuffle_xor(x, lanes);
#endif
}

// True in every lane if it is in one; all lanes call it.
DEV bool any(bool x) {
#ifdef __CUDACC__
  return __any_sync(0xffffffffu, x);
#else
  return host::any(x);
#endif
}

// Copies between global and shared memory.

// 16 bytes, asynchronously, past L1: the first `bytes` (0 or 16) come from `from`, the others are zero. With 0 nothing is read.
DEV void copy_async_16(uint32_t to, const void* from, int bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  host::copy_async_16(to, from, bytes);
#endif
}

DEV void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::copy_async_commit();
#endif
}

// Until at most PENDING of this thread's committed groups are under way. Other threads' copies need a barrier after it.
template <int PENDING>
DEV void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  host::copy_async_wait(PENDING);
#endif
}

DEV void store_shared(uint32_t to, uint32_t x) {
#ifdef __CUDACC__
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
#else
  host::store_shared(to, &x, sizeof x);
#endif
}

DEV void store_shared(uint32_t to, float x) {
#ifdef __CUDACC__
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
#else
  host::store_shared(to, &x, sizeof x);
#endif
}

DEV void store_shared(uint32_t to, const Words4& x) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]),
               "r"(x.word[3])
               : "memory");
#else
  host::store_shared(to, &x, sizeof x);
#endif
}

DEV uint32_t load_shared_word(uint32_t from) {
  uint32_t x;
#ifdef __CUDACC__
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
#else
  host::load_shared(&x, from, sizeof x);
#endif
  return x;
}

DEV float load_shared_float(uint32_t from) {
  float x;
#ifdef __CUDACC__
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
#else
  host::load_shared(&x, from, sizeof x);
#endif
  return x;
}

DEV Words4 load_shared_16(uint32_t from) {
  Words4 x;
#ifdef __CUDACC__
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(from)
               : "memory");
#else
  host::load_shared(&x, from, sizeof x);
#endif
  return x;
}

// Adds to two neighbours in global memory, 8-byte aligned, in whatever order the threads come; nothing is returned.
DEV void add_global(float* to, float x, float y) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to + 1), "f"(y) : "memory");
#endif
#else
  host::add_global(to, x);
  host::add_global(to + 1, y);
#endif
}

// Adds 1 to a count in global memory; what it was before. Orders nothing.
DEV int count_up(int* count) {
#ifdef __CUDACC__
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
#else
  return host::count_up(count);
#endif
}

// Between blocks, through global memory: what was done before one thread's publish (by other threads: before a barrier that it
// passed), another thread may build on after a wait that it ended.

DEV void publish(int* place, int value) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(place), "r"(value) : "memory");
#else
  host::publish(place, value);
#endif
}

// Until `place` holds at least `value`; after some minutes in vain the launch fails.
DEV void wait_for(const int* place, int value) {
#ifdef __CUDACC__
  int found, left = 1 << 28;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(found) : "l"(place) : "memory");
    if (--left == 0) asm volatile("trap;");
  } while (found < value);
#else
  host::wait_for(place, value);
#endif
}

// Four 8x8 matrices of 16-bit elements. Lane 8i + r names the 16 bytes of row r of matrix i; afterwards x[i] holds, in lane l,
// elements 2(l%4) and 2(l%4) + 1 of row l/4 of matrix i.
DEV void load_matrices(uint32_t (&x)[4], uint32_t row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
#else
  host::load_matrices(x, row, false);
#endif
}

// The same with each matrix transposed: x[i] holds elements (2(l%4), l/4) and (2(l%4) + 1, l/4) of matrix i.
DEV void load_matrices_transposed(uint32_t (&x)[4], uint32_t row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
#else
  host::load_matrices(x, row, true);
#endif
}

// Arithmetic.

// c [16, 8] += a [16, 16] b [16, 8] by one warp. In lane l, with g = l/4 and t = l%4:
// a[0] (g, 2t..2t+1), a[1] (g + 8, the same), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..); b0 (2t..2t+1, g), b1 (2t + 8.., g);
// c[0..1] (g, 2t..2t+1), c[2..3] (g + 8, the same).
template <bool BF16>
DEV void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (BF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  host::mma_16x8x16(c, a, b0, b1, BF16);
#endif
}

// Two floats rounded to nearest into one word, `low` in its lower half.
template <bool BF16>
DEV uint32_t pack(float low, float high) {
  uint32_t x;
#ifdef __CUDACC__
  if constexpr (BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  }
#else
  x = host::pack(low, high, BF16);
#endif
  return x;
}

// The two halves of a word as floats.
template <bool BF16>
DEV void unpack(float& low, float& high, uint32_t x) {
#ifdef __CUDACC__
  if constexpr (BF16) {
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xffff0000u);
  } else {
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}" : "=f"(low), "=f"(high) : "r"(x));
  }
#else
  host::unpack(low, high, x, BF16);
#endif
}

// 2^x to two units in the last place; denormal results are zero.
DEV float exp2_fast(float x) {
  float y;
#ifdef __CUDACC__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  y = host::exp2_fast(x);
#endif
  return y;
}

#ifdef __CUDACC__
// The launchable form of a kernel struct.
template <class Kernel, class Args>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::BLOCKS) entry(const __grid_constant__ Args args) {
  Kernel::run(args);
}
#else
// The same as host/cuda takes it.
template <class Kernel, class Args>
inline const host::Function entry = {&typeid(Kernel), Kernel::THREADS, Kernel::BLOCKS,
                                     [](const void* args) { Kernel::run(*static_cast<const Args*>(args)); }};
#endif

}  // namespace qwen2vl_fast
