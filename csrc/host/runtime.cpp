// Fibers, the scheduler, meetings of warps, barriers.
#include "runtime.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the context switch of the host runtime is written for x86-64"
#endif

extern "C" void qwen2vl_fast_switch(void** save, void* load);
// Callee-saved registers go on the stack that is left and come from the one that is entered.
asm(R"(
.text
.globl qwen2vl_fast_switch
.hidden qwen2vl_fast_switch
.type qwen2vl_fast_switch, @function
qwen2vl_fast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qwen2vl_fast_switch, .-qwen2vl_fast_switch
)");

namespace qwen2vl_fast {
namespace host {

Block block;

namespace {

constexpr size_t STACK = 256 * 1024, GUARD = 4096;

uint64_t random_state;
void* scheduler_stack_pointer;
void (*kernel_body)(const void*);
const void* kernel_args;
std::string error;

#ifdef __SANITIZE_ADDRESS__
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;
#endif

// Stacks with a page below each that faults. Each is two mappings, of which a process has some 65 000 at most.
constexpr size_t KEPT_STACKS = 512;
std::vector<unsigned char*> stacks;

unsigned char* stack_of(int thread) {
  if (block.launch.together) thread += block.index * block.launch.threads;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory) + GUARD);
  }
  return stacks[thread];
}

// After a run. Blocks that run together have thousands, and every library that tests load has its own.
void drop_stacks() {
  for (; stacks.size() > KEPT_STACKS; stacks.pop_back()) munmap(stacks.back() - GUARD, STACK + GUARD);
}

// From the current thread to the scheduler; `last`: for ever.
void leave(bool last) {
  Thread* self = block.current;
  block.current = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
#endif
  (void)last;
  qwen2vl_fast_switch(&self->stack_pointer, scheduler_stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void enter(Thread& thread) {
  block.current = &thread;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_of(thread.index), STACK);
#endif
  qwen2vl_fast_switch(&scheduler_stack_pointer, thread.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  kernel_body(kernel_args);
  block.current->done = true;
  leave(true);
  __builtin_unreachable();
}

void prepare_stack(Thread& thread) {
  unsigned char* bottom = stack_of(thread.index);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom, STACK);  // an abandoned fiber leaves its marks
#endif
  void** top = reinterpret_cast<void**>(bottom + STACK);
  top[-1] = nullptr;  // where thread_main would return to; it also sets the alignment that a call has
  top[-2] = reinterpret_cast<void*>(&thread_main);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  thread.stack_pointer = top - 8;
}

std::string where_threads_wait() {
  std::string text;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    for (int lane = 0; lane < LANES;) {
      const Thread& first = block.threads[w * LANES + lane];
      int last = lane;
      auto same = [&](const Thread& t) { return t.done == first.done && t.waits == first.waits && t.detail == first.detail; };
      while (last + 1 < LANES && same(block.threads[w * LANES + last + 1])) ++last;
      char line[200];
      if (first.done) {
        std::snprintf(line, sizeof line, "\n  warp %zu lanes %d-%d: ended", w, lane, last);
      } else {
        std::snprintf(line, sizeof line, "\n  warp %zu lanes %d-%d: in %s (%lld)", w, lane, last,
                      first.waits ? first.waits : "running", static_cast<long long>(first.detail));
      }
      text += line;
      lane = last + 1;
    }
  }
  for (const auto& [id, barrier] : block.barriers) {
    if (barrier.arrived == 0) continue;
    char line[120];
    std::snprintf(line, sizeof line, "\n  barrier %d: %d of %d threads have come", id, barrier.arrived, barrier.expected);
    text += line;
  }
  for (const auto& [address, barrier] : block.mbarriers) {
    char line[200];
    std::snprintf(line, sizeof line, "\n  mbarrier at %u: phase %d, %d of %d arrivals and %d bytes to come",
                  address - block.base, barrier.phase, barrier.pending, barrier.arrivals, barrier.bytes);
    text += line;
  }
  return text;
}

// Where the current thread is, as file+offset for addr2line.
std::string stack_of_calls() {
  void* frames[24];
  const int count = backtrace(frames, 24);
  std::string text;
  for (int i = 0; i < count; ++i) {
    Dl_info found;
    if (dladdr(frames[i], &found) == 0 || found.dli_fname == nullptr) continue;
    char line[512];
    std::snprintf(line, sizeof line, "\n  %s+0x%zx", found.dli_fname,
                  static_cast<size_t>(static_cast<char*>(frames[i]) - static_cast<char*>(found.dli_fbase)) - 1);
    text += line;
  }
  return text;
}

// The thread that runs next, or -1.
int pick() {
  auto& queue = block.runnable;
  if (block.launch.seed == 0) {
    if (block.next == queue.size()) {
      queue.clear();
      block.next = 0;
      return -1;
    }
    if (block.next >= 65536) {
      queue.erase(queue.begin(), queue.begin() + static_cast<std::ptrdiff_t>(block.next));
      block.next = 0;
    }
    return queue[block.next++];
  }
  if (queue.empty()) return -1;
  // Now and then one warp is held back for a while, so that others get far ahead of it.
  if (block.slow_steps-- <= 0) {
    block.slow_warp = static_cast<int>(random_below(block.warps.size() + 2));
    block.slow_steps = static_cast<int>(random_below(64 * block.threads.size()));
  }
  size_t at = random_below(queue.size());
  for (int tries = 0; tries < 6 && queue[at] / LANES == block.slow_warp; ++tries) at = random_below(queue.size());
  const int thread = queue[at];
  queue[at] = queue.back();
  queue.pop_back();
  return thread;
}

void start_block(const Launch& launch, int index) {
  block.launch = launch;
  block.index = index;
  block.current = nullptr;
  block.barriers.clear();
  block.mbarriers.clear();
  block.loads.clear();
  block.runnable.clear();
  block.watching.clear();
  block.next = 0;
  block.slow_steps = 0;
  const int warps = launch.threads / LANES;
  block.threads.assign(launch.threads, Thread());
  block.warps.assign(warps, Warp());
  // What a block gets at its launch, as __launch_bounds__ lets the compiler use; nothing besides is there to be taken later.
  const int registers = std::min(65536 / launch.resident / launch.threads / 8 * 8, 256);
  for (Warp& warp : block.warps) warp.registers = registers;
  block.free_registers = 0;
  // No more than its alignment may be assumed of the address of shared memory.
  block.base = 1024 + 128 * static_cast<uint32_t>(launch.seed % 8);
  const int words = (launch.shared_bytes + 3) / 4;
  block.memory.assign(words, POISON);
  if (launch.races) {
    block.foreign = launch.threads + 2 * warps + 32;
    block.components = block.foreign + (launch.together ? launch.grid * launch.threads : 0);
    block.clocks.assign(static_cast<size_t>(launch.threads) * block.components, 0);
    block.shadow.assign(words, Shadow());
    block.reads.assign(static_cast<size_t>(words) * 3 * warps, 0);
    block.readers.assign(static_cast<size_t>(words) * warps, 0);
  } else {
    block.components = 0;
  }
  for (int i = 0; i < launch.threads; ++i) {
    block.threads[i].index = i;
    if (launch.races) clock_of(i)[i] = 1;
    prepare_stack(block.threads[i]);
    block.runnable.push_back(i);
  }
}

enum class Ended { done, waiting, interrupted };  // waiting: for other blocks, without whom no thread can go on

// Until the block has ended, or its threads were entered so many times.
Ended run_block(int64_t entries = INT64_MAX) {
  while (entries-- > 0) {
    if (block.launch.seed != 0 && !block.loads.empty() && random_below(32) == 0) land_load();
    const int next = pick();
    if (next < 0) {
      if (land_load() || wake_watching()) continue;  // in order, a copy lands when nothing else can happen
      if (!block.watching.empty()) return Ended::waiting;
      for (const Thread& thread : block.threads) {
        if (!thread.done) fail("deadlock in block %d:%s", block.index, where_threads_wait().c_str());
      }
      check_end_of_block();
      return Ended::done;
    }
    enter(block.threads[next]);
    if (!error.empty()) return Ended::done;
  }
  return Ended::interrupted;
}

void run_one_by_one(const Launch& launch, const std::vector<int>& order) {
  for (int index : order) {
    start_block(launch, index);
    if (run_block() == Ended::waiting) fail("deadlock: block %d waits for another:%s", index, where_threads_wait().c_str());
    if (!error.empty()) return;
  }
}

// One block goes on until its threads all wait for others, or, shuffled, for a while of any length.
void run_together(const Launch& launch, const std::vector<int>& order) {
  std::vector<Block> blocks(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    start_block(launch, order[i]);
    std::swap(block, blocks[i]);
  }
  size_t at = 0, idle = 0;  // idle: blocks in a row that could not go on
  while (!blocks.empty()) {
    at = idle > 0 || launch.seed == 0 ? (at + 1) % blocks.size() : random_below(blocks.size());
    std::swap(block, blocks[at]);
    const bool goes_on = wake_watching() || block.next < block.runnable.size() || !block.loads.empty();
    const Ended ended = run_block(launch.seed == 0 ? INT64_MAX : int64_t{1} << random_below(20));
    if (!error.empty()) return;
    idle = goes_on ? 0 : idle + 1;
    if (idle == blocks.size()) fail("deadlock: block %d and all others wait:%s", block.index, where_threads_wait().c_str());
    std::swap(block, blocks[at]);
    if (ended == Ended::done) blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(at));
  }
}

}  // namespace

std::string run_grid(void (*body)(const void*), const void* args, const Launch& launch) {
  if (launch.threads <= 0 || launch.threads % LANES != 0 || launch.threads > 1024) return "a block has whole warps, at most 32";
  kernel_body = body;
  kernel_args = args;
  error.clear();
  forget_global_memory();
  random_state = launch.seed * 0x9e3779b97f4a7c15u + 1;
  std::vector<int> order(launch.grid);
  for (int i = 0; i < launch.grid; ++i) order[i] = i;
  if (launch.seed != 0) {
    for (int i = launch.grid - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
  }
  try {
    launch.together ? run_together(launch, order) : run_one_by_one(launch, order);
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  drop_stacks();
  return error;
}

uint64_t random_number() {  // splitmix64
  uint64_t x = random_state += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void fail_text(const std::string& text) {
  if (block.current == nullptr) throw std::runtime_error(text);
  char place[80];
  std::snprintf(place, sizeof place, "block %d thread %d (warp %d lane %d): ", block.index, block.current->index,
                block.current->index / LANES, block.current->index % LANES);
  error = place + text + stack_of_calls();
  leave(true);
  __builtin_unreachable();
}

void fail(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail_text(text);
}

void wait_in(const char* operation, int64_t detail) {
  Thread& self = *block.current;
  self.waits = operation;
  self.detail = detail;
  leave(false);
}

void wake(int thread) {
  Thread& sleeper = block.threads[thread];
  sleeper.waits = nullptr;
  block.runnable.push_back(thread);
}

void wake_warp(int warp) {
  for (int lane = 0; lane < LANES; ++lane) {
    const int thread = warp * LANES + lane;
    if (block.threads[thread].waits != nullptr) wake(thread);
  }
}

void meet(const char* operation, int64_t key, void* operand, bool (*compute)(int warp, int64_t key)) {
  const int self = block.current->index;
  Warp& warp = block.warps[self / LANES];
  if (warp.arrived > 0 && (std::strcmp(warp.operation, operation) != 0 || warp.key != key)) {
    fail("divergence: this lane is in %s (%lld), others of its warp are in %s (%lld)", operation, static_cast<long long>(key),
         warp.operation, static_cast<long long>(warp.key));
  }
  warp.operation = operation;
  warp.key = key;
  warp.operands[self % LANES] = operand;
  if (++warp.arrived < LANES) {
    wait_in(operation, key);
    return;
  }
  warp.arrived = 0;
  if (compute(self / LANES, key)) {
    wake_warp(self / LANES);
  } else {
    wait_in(operation, key);
  }
}

// Barriers.

bool arrive_at_barrier(int warp, int id, int threads, bool waits) {
  Barrier& barrier = block.barriers[id];
  if (threads <= 0 || threads % LANES != 0) fail("barrier %d for %d threads: whole warps meet", id, threads);
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.clock.assign(block.components, 0);
  } else if (barrier.expected != threads) {
    fail("barrier %d for %d threads, where others came for %d", id, threads, barrier.expected);
  }
  for (int waiting : barrier.waiting) {
    if (waiting == warp) fail("warp %d comes twice to barrier %d", warp, id);
  }
  for (int lane = 0; lane < LANES; ++lane) release(warp * LANES + lane, barrier.clock);
  barrier.arrived += LANES;
  if (waits) barrier.waiting.push_back(warp);
  if (barrier.arrived < barrier.expected) return !waits;
  const std::vector<int> waiting = std::move(barrier.waiting);
  barrier.waiting.clear();
  barrier.arrived = 0;
  for (int other : waiting) {
    for (int lane = 0; lane < LANES; ++lane) acquire(other * LANES + lane, barrier.clock);
    if (other != warp) wake_warp(other);
  }
  return true;
}

namespace {

bool meet_at_barrier(int warp, int64_t key) { return arrive_at_barrier(warp, key >> 32, static_cast<int>(key), true); }
bool pass_barrier(int warp, int64_t key) { return arrive_at_barrier(warp, key >> 32, static_cast<int>(key), false); }

void check_id(int id) {
  if (id < 1 || id > 15) fail("named barrier %d: there are 1 to 15", id);
}

}  // namespace

int thread_index() { return block.current->index; }
int block_index() { return block.index; }
int block_count() { return block.launch.grid; }
uint32_t shared_memory() { return block.base; }

void barrier() { meet("barrier", block.launch.threads, nullptr, meet_at_barrier); }

void named_barrier_wait(int id, int threads) {
  check_id(id);
  meet("named_barrier_wait", (static_cast<int64_t>(id) << 32) + threads, nullptr, meet_at_barrier);
}

void named_barrier_arrive(int id, int threads) {
  check_id(id);
  meet("named_barrier_arrive", (static_cast<int64_t>(id) << 32) + threads, nullptr, pass_barrier);
}

void warp_barrier() {
  meet("warp_barrier", 0, nullptr, [](int warp, int64_t) {
    std::vector<uint32_t> clock(block.components, 0);
    for (int lane = 0; lane < LANES; ++lane) release(warp * LANES + lane, clock);
    for (int lane = 0; lane < LANES; ++lane) acquire(warp * LANES + lane, clock);
    return true;
  });
}

void check_end_of_block() {
  if (!block.loads.empty()) fail("block %d ends while TMA loads are under way", block.index);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp &warp = block.warps[w], &first = block.warps[w / 4 * 4];
    if (warp.retired != warp.groups || !warp.products.empty()) fail("warp %zu ends while its products are under way", w);
    if (warp.history != first.history) fail("the warps of warpgroup %zu issued different products", w / 4);
    if (warp.registers != first.registers) fail("the warps of warpgroup %zu have different registers", w / 4);
  }
}

}  // namespace host
}  // namespace qwen2vl_fast
