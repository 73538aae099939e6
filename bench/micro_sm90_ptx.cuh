// The instructions that micro_sm90.cu measures: wgmma, TMA, mbarrier, exp2 by the special-function unit and by polynomial.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEV __device__ __forceinline__

using bf16 = __nv_bfloat16;

DEV uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- layout of an operand in shared memory: rows of WIDTH/2 elements, chunk after chunk of columns, swizzled ----

// Byte of element (row, column) among `rows` rows. K-major: row = m or n, column = k. MN-major: row = k, column = n.
template <int WIDTH>
DEV uint32_t place(int row, int column, int rows) {
  constexpr int columns = WIDTH / 2;
  uint32_t byte = (column / columns) * rows * WIDTH + row * WIDTH + column % columns * 2;
  return byte ^ (((byte >> 7) & (WIDTH / 16 - 1)) << 4);
}

template <int WIDTH>
DEV uint64_t descriptor(uint32_t address, int rows) {
  static_assert(WIDTH == 32 || WIDTH == 128);
  constexpr uint64_t swizzle = WIDTH == 128 ? 1 : 3;
  return (address >> 4) | uint64_t(rows * WIDTH >> 4) << 16 | uint64_t(8 * WIDTH >> 4) << 32 | swizzle << 62;
}

// Descriptor units (16 bytes) from one k16 step to the next.
template <int WIDTH, bool MN>
DEV int step_offset(int step, int rows) {
  if (MN) return step * 16 * WIDTH >> 4;
  return (step * 32 / WIDTH * rows * WIDTH + step * 32 % WIDTH) >> 4;
}

// ---- wgmma m64nNk16, bf16 to float32; T = 1 takes B as MN-major ----

#define REGS0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGS1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGS2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define REGS3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define REGS4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REGS5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define REGS7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define REGS8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define REGS9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define REGS10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define REGS16 REGS0
#define REGS64 REGS0 REGS1 REGS2 REGS3
#define REGS80 REGS64 REGS4
#define REGS88 REGS80 ",%40,%41,%42,%43"
#define REGS96 REGS80 REGS5
#define REGS112 REGS96 REGS6
#define REGS128 REGS112 REGS7
#define REGS176 REGS128 REGS8 REGS9 REGS10
#define OUT8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUT16 OUT8(0)
#define OUT64 OUT8(0), OUT8(8), OUT8(16), OUT8(24)
#define OUT80 OUT64, OUT8(32)
#define OUT88 OUT80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define OUT96 OUT80, OUT8(40)
#define OUT112 OUT96, OUT8(48)
#define OUT128 OUT112, OUT8(56)
#define OUT176 OUT128, OUT8(64), OUT8(72), OUT8(80)

// P0.. are the operand numbers after the N/2 accumulators.
#define WGMMA(N, P0, P1, P2, P3, P4, P5, P6)                                                                                  \
  template <int T>                                                                                                            \
  DEV void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate = 1) {                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                                       \
                 ", 0;\n"                                                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS##N "}, " P0 ", " P1 ", p, 1, 1, 0, " P3    \
                                                                                      ";\n}"                                  \
                 : OUT##N                                                                                                     \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(T));                                                                  \
  }                                                                                                                           \
  template <int T>                                                                                                            \
  DEV void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate = 1) {                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                                       \
                 ", 0;\n"                                                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS##N "}, {" P0 "," P1 "," P2 "," P3 "}, " P4 \
                                                                                      ", p, 1, 1, " P6 ";\n}"                 \
                 : OUT##N                                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(T));                              \
  }
WGMMA(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
WGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA(80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
WGMMA(88, "%44", "%45", "%46", "%47", "%48", "%49", "%50")
WGMMA(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
WGMMA(112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
WGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WGMMA(176, "%88", "%89", "%90", "%91", "%92", "%93", "%94")

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
DEV void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Row and column of accumulator value v of a thread, in its warpgroup's 64 x N tile.
DEV int row_of(int thread, int v) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (v / 2 & 1); }
DEV int column_of(int thread, int v) { return 8 * (v / 4) + 2 * (thread % 4) + (v & 1); }

// ---- mbarrier and TMA ----

DEV void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEV void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEV bool barrier_try(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}
DEV void barrier_wait(uint32_t barrier, int parity) {
  while (!barrier_try(barrier, parity)) {
  }
}
DEV void arrive_remote(uint32_t barrier, uint32_t rank) {  // on the barrier at the same place in block `rank` of the cluster
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
DEV void barrier_wait_cluster(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}
DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Whether every thread of a warpgroup says yes.
DEV bool all_agree(bool yes, int group) {
  uint32_t all;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 q, %1, 0;\nbar.red.and.pred p, %2, 128, q;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(all)
               : "r"(uint32_t(yes)), "r"(group + 1)
               : "memory");
  return all;
}
DEV void turn_take(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory"); }
DEV void turn_give(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(group + 1) : "memory"); }

DEV void tma_3d(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
DEV void tma_4d(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
DEV void tma_3d_multicast(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(uint16_t(mask))
      : "memory");
}
DEV void tma_4d_multicast(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3, int mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(uint16_t(mask))
      : "memory");
}
DEV void bulk_copy(uint32_t to, const void* from, uint32_t barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(to), "l"(from),
               "r"(barrier), "r"(bytes)
               : "memory");
}

// ---- exp2 ----

DEV float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x = 2^n * p(x - n), n = round(x): degree 3, minimax of the relative error on [-0.5, 0.5] (7.5e-5).
DEV float exp2_polynomial(float x) {
  constexpr float shift = 12582912.0f;               // 1.5 * 2^23: adding it leaves n in the low bits
  asm("max.NaN.f32 %0, %0, 0fC2FC0000;" : "+f"(x));  // -126; a NaN stays one
  float n = x + shift;
  float f = x - (n - shift);
  float p = fmaf(fmaf(fmaf(0.055171665f, f, 0.242611122f), f, 0.693260986f), f, 0.999928074f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(n) << 23));
}

// SIXTEENTHS of every sixteen exponentials by polynomial, the others by the special-function unit.
template <int SIXTEENTHS>
DEV float exp2_mixed(float x, int i) {
  if constexpr (SIXTEENTHS == 0)
    return exp2_unit(x);
  else
    return i * SIXTEENTHS % 16 < SIXTEENTHS ? exp2_polynomial(x) : exp2_unit(x);
}

DEV uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(both);
}
