// What the host runtime must find, and beside each fault the same without it, for tests/host/test_misuse.py. `right` is whether
// the kernel does as it should.
#include "../../csrc/host/entry.h"
#include "../../csrc/wgmma.cuh"

using namespace qwen2vl_fast;

namespace {

struct Arguments {
  int fault;
  int right;
  const float* data;  // [4096]
  float* out;         // [256]
  int* count;         // 0
  TensorMap map;
};

// Two warpgroups, one of which plays the producer where there is one.
struct Faults {
  static constexpr int THREADS = 256, BLOCKS = 1, SMEM = 64 * 1024;

  static void run(const Arguments& args) {
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    const bool right = args.right != 0;
    const uint32_t memory = (shared_memory() + 1023) & ~1023u;
    const uint32_t full = memory + 32768, empty = full + 8;
    float x = 0.0f;
    switch (args.fault) {
      case 0:  // a barrier between stores and other warps' loads
        store_shared(memory + 4 * thread, args.data[thread]);
        if (right) barrier();
        x = load_shared_float(memory + 4 * (255 - thread));
        break;
      case 1:  // a warp's barrier between stores and other lanes' loads
        store_shared(memory + 4 * thread, args.data[thread]);
        right ? warp_barrier() : static_cast<void>(shuffle_xor(1.0f, 1));
        x = load_shared_float(memory + 4 * (thread ^ 31));
        break;
      case 2:  // a barrier before a stage is written again
        store_shared(memory + 4 * thread, args.data[thread]);
        barrier();
        x = load_shared_float(memory + 4 * (255 - thread));
        if (right) barrier();
        store_shared(memory + 4 * thread, 1.0f);
        break;
      case 3:  // a wait for an asynchronous copy
        copy_async_16(memory + 16 * thread, args.data + 4 * thread, 16);
        copy_async_commit();
        if (right) copy_async_wait<0>();
        x = load_shared_float(memory + 16 * thread);
        copy_async_wait<0>();
        break;
      case 4:  // a wait that is too weak by one group
        for (int i = 0; i < 2; ++i) {
          copy_async_16(memory + 4096 * i + 16 * thread, args.data + 4 * thread, 16);
          copy_async_commit();
        }
        right ? copy_async_wait<0>() : copy_async_wait<1>();
        x = load_shared_float(memory + 4096 + 16 * thread);
        break;
      case 5:  // a wait orders the thread's own copies alone
        copy_async_16(memory + 16 * thread, args.data + 4 * thread, 16);
        copy_async_commit();
        copy_async_wait<0>();
        if (right) barrier();
        x = load_shared_float(memory + 16 * (255 - thread));
        break;
      case 6:  // all lanes of a warp in the same collective
        x = right || lane < 16 ? shuffle_xor(1.0f, 1) : static_cast<float>(any(true));
        break;
      case 7:  // all threads at a barrier
        if (right || warp != 3) barrier();
        break;
      case 8:  // inside of shared memory
        store_shared(memory + (right ? 0 : 65536) + 4 * thread, 1.0f);
        break;
      case 9:  // aligned
        for (int i = 0; i < 4; ++i) x = host::bits_float(load_shared_16(memory + 16 * thread + (right ? 0 : 4)).word[0]);
        break;
      case 10:  // named barriers: the producer's arrival is part of the count
        if (warp < 4) {
          store_shared(memory + 4 * thread, args.data[thread]);
          if (right) named_barrier_arrive(1, 256);
        } else {
          named_barrier_wait(1, 256);
          x = load_shared_float(memory + 4 * (thread - 128));
        }
        break;
      case 11:  // named barriers order only those who meet there
        if (warp < 4) {
          store_shared(memory + 4 * thread, args.data[thread]);
          named_barrier_arrive(right ? 1 : 2, 256);
        } else {
          if (!right) named_barrier_arrive(2, 256);
          named_barrier_wait(1, right ? 256 : 128);
          x = load_shared_float(memory + 4 * (thread - 128));
        }
        break;
      case 12: case 13: case 14: case 15: case 16: case 17: case 18: case 19: case 20: case 21:
        mbarriers(args, memory, full, empty);
        return;
      case 22: case 23: case 24: case 25: case 26: case 27: case 28:
        products(args, memory);
        return;
      case 29:  // take_registers takes
        give_registers<64>();
        right ? take_registers<240>() : take_registers<24>();
        break;
      case 30:  // give_registers gives
        give_registers<64>();
        right ? give_registers<56>() : give_registers<240>();
        break;
      case 31: case 32: case 33: case 34:
        turns(args);
        return;
      default: host::fail("no such fault");
    }
    args.out[thread] = x;
  }

  // One thread of warp 0 loads boxes of [64 rows, 16 columns] in a ring of one stage; warps 4 to 7 read them.
  static void mbarriers(const Arguments& args, uint32_t memory, uint32_t full, uint32_t empty) {
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    const bool right = args.right != 0;
    const int fault = right ? 0 : args.fault;
    constexpr int BYTES = 64 * 32, ROUNDS = 3;
    if (thread == 0) {
      if (fault != 12) mbarrier_init(full, 1);
      mbarrier_init(empty, fault == 13 ? 3 : 4);
      if (fault != 14) fence_mbarrier_init();
    }
    if (fault != 15) barrier();
    if (thread == 0) {
      for (int i = 0; i < ROUNDS; ++i) {
        mbarrier_wait(empty, (i & 1) ^ (fault == 16 ? 0 : 1));
        mbarrier_arrive_expect(full, fault == 17 ? BYTES + 16 : BYTES);
        tma_load(memory, args.map, full, 0, 64 * i, 0);
      }
    }
    if (warp < 4) return;
    float x = 0.0f;
    for (int i = 0; i < ROUNDS; ++i) {
      if (fault != 18) mbarrier_wait(full, fault == 19 ? 0 : i & 1);
      if (fault == 20 && lane == 0) mbarrier_arrive(empty);
      x += host::bits_float(load_shared_16(memory + 16 * (thread - 128)).word[0]);
      if (fault != 21) warp_barrier();
      if (fault != 20 && lane == 0) mbarrier_arrive(empty);
    }
    args.out[thread] = x;
  }

  // Two blocks add to the same places, the second after the first.
  static void turns(const Arguments& args) {
    const int thread = thread_index();
    const int fault = args.right ? 0 : args.fault;
    if (block_index() == 1) {
      if (thread == 0 && fault != 31) wait_for(args.count, 1);
      if (fault != 34) barrier();
    }
    if (block_index() == 0 && fault == 32 && thread == 40) publish(args.count, 1);
    if (thread < 128) add_global(args.out + 2 * thread, args.data[thread], args.data[thread]);
    barrier();
    if (block_index() == 0 && fault != 32 && fault != 33 && thread == 40) publish(args.count, 1);
  }

  // Products of rows that threads stored themselves.
  static void products(const Arguments& args, uint32_t memory) {
    const int thread = thread_index();
    const int fault = args.right ? 0 : args.fault;
    for (int i = thread; i < 128 * 8; i += 256) store_shared(memory + 4 * i, 0x3f803f80u);  // ones
    if (fault != 22) fence_proxy_async();
    barrier();
    if (fault == 23 && thread / 32 == 2) return;  // one warp of the warpgroup leaves
    if (thread >= 128) return;
    constexpr uint32_t HIGH = (8 * 32 >> 4) | (3u << 30);
    const uint32_t a = memory >> 4, b = (memory + 64 * 32) >> 4;
    float d[32];
    for (int i = 0; i < 32; ++i) d[i] = 0.0f;
    for (int round = 0; round < 2; ++round) {
      if (fault != 24) wgmma_fence();
      if (fault == 25 && round == 1) d[3] += 1.0f;
      WgmmaShared<true, 64>::run(d, a, b, HIGH, round > 0 || fault == 25);
      wgmma_commit();
      if (fault == 26) args.out[thread] = d[0];
      if (fault == 27) {
        store_shared(memory + 32 * (thread % 64), 0u);  // while the product may still read it
        fence_proxy_async();
      }
      fault == 28 ? wgmma_wait<1>() : wgmma_wait<0>();
    }
    args.out[thread] = fault == 26 ? args.out[thread] : d[0];
  }
};

}  // namespace

HOST_ENTRY int misuse(Arguments* args, const host::Run* run) {
  const int64_t sizes[3] = {16, 128, 1}, strides[2] = {32, 32};
  const int box[3] = {16, 64, 1};
  if (const char* refused = host::encode_tensor_map(args->map, args->data, 3, sizes, strides, box, 32)) return host::finish(*run, refused);
  return host::run_kernel<Faults>(*args, *run, run->grid > 1);
}
