// What a kernel's words (ptx.cuh, ptx_sm90.cuh, wgmma.cuh) mean on the CPU. docs/host-execution.md says what is modelled.
//
// Threads of a block are fibers of one CPU thread. Functions that are marked "warp" are met by all 32 lanes of a warp: the
// last one to come computes for all.
#pragma once

#include <cstdint>
#include <typeinfo>

namespace qwen2vl_fast {

// A tensor of 16-bit elements in global memory and the box that one load copies; innermost dimension first. Outside of `host`,
// whose functions would else be found beside the kernel's own.
struct HostTensorMap {
  const void* base;
  int rank;            // 3 to 5
  int64_t sizes[5];    // elements
  int64_t strides[4];  // bytes, of dimension 1 on
  int box[5];          // elements
  int swizzle;         // bytes: 32, 64 or 128
};

namespace host {

// A kernel that can be launched: its launch bounds, and what each of its threads does.
struct Function {
  const std::type_info* type;
  int threads, blocks;
  void (*run)(const void* args);
};

int thread_index();
int block_index();
int block_count();
uint32_t shared_memory();

void barrier();                             // warp; all threads of the block
void warp_barrier();                        // warp; orders memory
float shuffle_xor(float x, int lanes);      // warp; orders nothing
uint32_t shuffle_xor(uint32_t x, int lanes);
bool any(bool x);                           // warp

// The destination is NaN from the issue on and receives its bytes at the wait.
void copy_async_16(uint32_t to, const void* from, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

void store_shared(uint32_t to, const void* from, int size);
void load_shared(void* to, uint32_t from, int size);
void add_global(float* to, float x);
int count_up(int* count);                    // what it was before
void publish(int* place, int value);         // seen by wait_for in other blocks, with all that this thread knows of
void wait_for(const int* place, int value);  // until it holds at least that

void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed);                            // warp
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);  // warp

uint32_t pack(float low, float high, bool bf16);
void unpack(float& low, float& high, uint32_t x, bool bf16);
float exp2_fast(float x);
uint32_t float_bits(float x);
float bits_float(uint32_t bits);
float bits_float(uint32_t x);

// Hopper.

using TensorMap = HostTensorMap;

// Refuses (returns why, or nullptr) what the driver's encoder refuses.
const char* encode_tensor_map(TensorMap& map, const void* base, int rank, const int64_t* sizes, const int64_t* strides,
                              const int* box, int swizzle);

void mbarrier_init(uint32_t barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_expect(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void fence_proxy_async();
void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2);
void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3);

void wgmma_fence();             // warp
void wgmma_commit();            // warp
void wgmma_wait(int pending);   // warp
// Accumulators are NaN from the issue on and receive their values at the wait.
void wgmma_shared(float* d, int n, uint32_t a, uint32_t b, uint32_t high, int accumulate, bool bf16);         // warp
void wgmma_registers(float* d, int n, const uint32_t (&a)[4], uint32_t b, uint32_t high, bool bf16);          // warp

void give_registers(int registers);                 // warp
void take_registers(int registers);                 // warp
void named_barrier_wait(int id, int threads);       // warp
void named_barrier_arrive(int id, int threads);     // warp

}  // namespace host

// Functions that CUDA has built in.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

}  // namespace qwen2vl_fast
