// Inside of the host runtime: the running block, its scheduler, its shared memory. Kernels see twins.h alone.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "twins.h"

namespace qwen2vl_fast {
namespace host {

constexpr int LANES = 32;
constexpr uint32_t POISON = 0xffffffffu;  // NaN in float32, and twice in bf16 and fp16

struct Launch {
  int grid = 1;
  int threads = 0;
  int shared_bytes = 0;
  int resident = 1;    // blocks of a multiprocessor, which share its registers
  uint64_t seed = 0;   // 0: in order; else threads, blocks and asynchronous copies take a random order
  bool races = true;   // vector clocks over shared memory
  bool together = false;  // all blocks run at once and may wait for each other; else one after another
};

// Runs body(args) in every thread of every block. Returns what went wrong, or an empty string.
std::string run_grid(void (*body)(const void*), const void* args, const Launch& launch);

struct Copy {
  uint32_t to;
  int group;
  unsigned char bytes[16];
};

// Registers of a thread that a warpgroup product has used, as they were at the last fence.
struct Registers {
  const void* at;
  int words;
  std::vector<uint32_t> fenced;
};

struct Thread {
  int index = 0;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  bool done = false;
  const char* waits = nullptr;  // operation that it waits in; null: it can run
  int64_t detail = 0;
  const int* place = nullptr;  // with `waits` in wait_for: until it holds at least `detail`
  std::vector<Copy> copies;     // cp.async under way, oldest first
  int committed = 0;            // groups
  std::vector<uint32_t> proxy_fences;  // own times of its fence_proxy_async, rising
  bool inits_fenced = true;
  std::vector<Registers> registers;
};

struct Product {
  int group, n;
  bool accumulate, bf16, from_registers, computed;
  uint32_t a, b, high;
  const uint32_t* a_at[LANES];
  uint32_t a_words[LANES][4];
  float* d[LANES];
};

struct Accumulators {
  float* d[LANES];
  int n, last_group;
  std::vector<float> values;  // [LANES, n / 2]
};

struct Warp {
  const char* operation = nullptr;  // that its lanes are meeting in
  int64_t key = 0;
  int arrived = 0;
  void* operands[LANES];
  int registers = 0;
  uint32_t matrix_loads = 0;
  // Warpgroup products.
  bool fenced = false;
  int groups = 0, retired = 0;
  uint64_t hash = 0;
  std::vector<uint64_t> history;  // a hash for each group
  std::vector<Product> products;
  std::vector<Accumulators> accumulators;
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<int> waiting;  // warps
  std::vector<uint32_t> clock;
};

struct Mbarrier {
  int arrivals = 0, pending = 0, bytes = 0, phase = 0;
  int component = 0;  // of the clocks: what TMA writes on its account
  int creator = 0;
  uint32_t created = 0;
  std::vector<uint32_t> gathering, complete;
};

struct Tma {
  uint32_t to;
  uint32_t barrier;
  std::vector<unsigned char> bytes;
  std::vector<uint32_t> offsets;  // of 16-byte pieces
};

struct Shadow {
  uint32_t time = 0;      // of the last write
  uint16_t writer = 0;    // component of the clocks
  uint8_t pending = 0;    // an asynchronous copy is under way
  uint8_t asynchronous = 0;  // the last write came through the asynchronous proxy
};

enum class Access { load, store, async_load, async_store };

struct Block {
  Launch launch;
  int index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> runnable;
  std::vector<int> watching;  // threads in wait_for
  size_t next = 0;  // in order: runnable is a queue that starts here
  Thread* current = nullptr;
  std::map<int, Barrier> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<Tma> loads;
  int free_registers = 0;
  int slow_warp = -1, slow_steps = 0;

  uint32_t base = 0;             // address of shared memory
  std::vector<uint32_t> memory;  // words
  // Vector clocks: components are threads, then each warp's warpgroup products, then its loads of matrices, then mbarriers (what
  // TMA writes), then, of blocks that run together, the threads of all.
  int components = 0;
  int foreign = 0;  // the first of the last kind
  std::vector<uint32_t> clocks;  // [threads, components]
  std::vector<Shadow> shadow;    // a word
  std::vector<uint32_t> reads;   // [words, 3 * warps]: time of a warp's last load, of its products', of its matrices'
  std::vector<uint8_t> readers;  // [words, warps]: lane of the last load
};

extern Block block;

uint64_t random_number();
inline uint64_t random_below(uint64_t n) { return random_number() % n; }

// Ends the run with this message; from inside a kernel's thread it does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_text(const std::string& text);

void wait_in(const char* operation, int64_t detail);  // blocks the current thread until wake
void wake(int thread);
void wake_warp(int warp);

// Called by every lane of a warp with its own operand; the last one runs compute(warp, key), which returns whether the lanes go on
// at once. Lanes that meet in different operations or with different keys end the run.
void meet(const char* operation, int64_t key, void* operand, bool (*compute)(int warp, int64_t key));
template <class X>
struct Vote {
  X in, out;
};

template <class Operand>
Operand& operand_of(int warp, int lane) {
  return *static_cast<Operand*>(block.warps[warp].operands[lane]);
}

// Shared memory by address: checks bounds, alignment and order, and gives the place.
unsigned char* touch(uint32_t address, int size, Access access, int thread);
// The same for one row of a matrix that a warp loads: no lane goes on before all rows were read.
const unsigned char* touch_matrix(uint32_t address, int thread);
// The same for a group of a warp's products, whose loads last until it is waited for.
const unsigned char* touch_product(uint32_t address, int size, int warp, int group, const std::vector<uint32_t>& known);
unsigned char* place(uint32_t address, int size);
void set_pending(uint32_t address, int size, bool pending);
void record_write(uint32_t address, int size, int component, uint32_t time, bool asynchronous);

inline uint32_t* clock_of(int thread) { return block.clocks.data() + static_cast<size_t>(thread) * block.components; }
void join(uint32_t* into, const uint32_t* from);
void release(int thread, std::vector<uint32_t>& into);   // what the thread did so far is known to who acquires `into`
void acquire(int thread, const std::vector<uint32_t>& from);

bool arrive_at_barrier(int warp, int id, int threads, bool waits);
bool mbarrier_try(uint32_t barrier, uint32_t parity);
void mark_mbarrier(uint32_t address);  // its 8 bytes are for mbarrier operations alone
bool land_load();            // completes one TMA load; false if none is under way
void check_end_of_block();   // things that must not be left over

bool wake_watching();         // those threads in wait_for whose value has come; false if there are none
void forget_global_memory();  // of the last launch

float to_float(uint16_t x, bool bf16);
uint16_t from_float(float x, bool bf16);

}  // namespace host
}  // namespace qwen2vl_fast
