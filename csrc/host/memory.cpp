// Shared memory by address, cp.async, and the vector clocks that say which accesses are ordered.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "runtime.h"

namespace qwen2vl_fast {
namespace host {

namespace {

constexpr uint8_t MBARRIER = 2;  // in Shadow::asynchronous

std::string name_of(int component) {
  const int threads = static_cast<int>(block.threads.size()), warps = static_cast<int>(block.warps.size());
  char text[64];
  if (component < threads) {
    std::snprintf(text, sizeof text, "thread %d", component);
  } else if (component < threads + warps) {
    std::snprintf(text, sizeof text, "products of warp %d", component - threads);
  } else {
    std::snprintf(text, sizeof text, "TMA through mbarrier %d", component - threads - 2 * warps);
  }
  return text;
}

const char* name_of(Access access) {
  switch (access) {
    case Access::load: return "load";
    case Access::store: return "store";
    case Access::async_load: return "asynchronous load";
    default: return "asynchronous store";
  }
}

// Whether the writer's stores up to `time` went through a proxy fence that the holder of `known` knows of.
bool fenced(int writer, uint32_t time, const uint32_t* known) {
  const auto& fences = block.threads[writer].proxy_fences;
  const auto fence = std::lower_bound(fences.begin(), fences.end(), time);
  return fence != fences.end() && known[writer] > *fence;
}

void check_word(uint32_t word, Access access, const uint32_t* known) {
  const Shadow& shadow = block.shadow[word];
  if (shadow.asynchronous == MBARRIER) fail("%s of an mbarrier at %u", name_of(access), word * 4);
  if (shadow.pending) fail("%s at %u, which an asynchronous copy still writes", name_of(access), word * 4);
  if (shadow.time == 0) return;
  if (known[shadow.writer] < shadow.time) {
    fail("race: %s at %u is not ordered after the store by %s", name_of(access), word * 4, name_of(shadow.writer).c_str());
  }
  const bool asynchronous = access == Access::async_load || access == Access::async_store;
  if (asynchronous && !shadow.asynchronous && !fenced(shadow.writer, shadow.time, known)) {
    fail("proxy: %s at %u after the store by %s without its fence_proxy_async", name_of(access), word * 4,
         name_of(shadow.writer).c_str());
  }
}

void check_readers(uint32_t word, Access access, const uint32_t* known) {
  const size_t warps = block.warps.size(), threads = block.threads.size();
  uint32_t* times = block.reads.data() + word * 3 * warps;
  for (size_t w = 0; w < warps; ++w) {
    const size_t reader = w * LANES + block.readers[word * warps + w];
    if (known[reader] < times[w]) {
      fail("race: %s at %u is not ordered after the load by thread %zu", name_of(access), word * 4, reader);
    }
    if (known[threads + w] < times[warps + w]) {
      fail("race: %s at %u while products of warp %zu may still read it", name_of(access), word * 4, w);
    }
    if (known[threads + warps + w] < times[2 * warps + w]) {
      fail("race: %s at %u is not ordered after the load_matrices of warp %zu", name_of(access), word * 4, w);
    }
  }
  std::fill(times, times + 3 * warps, 0u);
}

}  // namespace

unsigned char* place(uint32_t address, int size) {
  const uint64_t end = block.base + static_cast<uint64_t>(block.launch.shared_bytes);
  if (address < block.base || address + static_cast<uint64_t>(size) > end) {
    fail("%d bytes at %lld of %d bytes of shared memory", size, static_cast<long long>(address) - block.base,
         block.launch.shared_bytes);
  }
  return reinterpret_cast<unsigned char*>(block.memory.data()) + (address - block.base);
}

unsigned char* touch(uint32_t address, int size, Access access, int thread) {
  unsigned char* bytes = place(address, size);
  if (address % size != 0) fail("%s of %d bytes at %u is not aligned", name_of(access), size, address - block.base);
  if (!block.launch.races) return bytes;
  const uint32_t* known = clock_of(thread);
  const size_t warps = block.warps.size();
  const bool stores = access == Access::store || access == Access::async_store;
  for (uint32_t word = (address - block.base) / 4; word < (address - block.base + size + 3) / 4; ++word) {
    check_word(word, access, known);
    if (stores) {
      check_readers(word, access, known);
      block.shadow[word] = {known[thread], static_cast<uint16_t>(thread), 0, access == Access::async_store};
    } else {
      block.reads[word * 3 * warps + thread / LANES] = known[thread];
      block.readers[word * warps + thread / LANES] = thread % LANES;
    }
  }
  return bytes;
}

const unsigned char* touch_matrix(uint32_t address, int thread) {
  const unsigned char* bytes = place(address, 16);
  if (address % 16 != 0) fail("a matrix's row at %u is not aligned", address - block.base);
  if (!block.launch.races) return bytes;
  const size_t warps = block.warps.size(), warp = thread / LANES;
  for (uint32_t word = (address - block.base) / 4; word < (address - block.base) / 4 + 4; ++word) {
    check_word(word, Access::load, clock_of(thread));
    block.reads[word * 3 * warps + 2 * warps + warp] = block.warps[warp].matrix_loads;
  }
  return bytes;
}

const unsigned char* touch_product(uint32_t address, int size, int warp, int group, const std::vector<uint32_t>& known) {
  const unsigned char* bytes = place(address, size);
  if (!block.launch.races) return bytes;
  const size_t warps = block.warps.size();
  for (uint32_t word = (address - block.base) / 4; word < (address - block.base + size + 3) / 4; ++word) {
    check_word(word, Access::async_load, known.data());
    block.reads[word * 3 * warps + warps + warp] = static_cast<uint32_t>(group) + 1;
  }
  return bytes;
}

void set_pending(uint32_t address, int size, bool pending) {
  if (!block.launch.races) return;
  for (uint32_t word = (address - block.base) / 4; word < (address - block.base + size + 3) / 4; ++word) {
    block.shadow[word].pending = pending;
  }
}

void record_write(uint32_t address, int size, int component, uint32_t time, bool asynchronous) {
  if (!block.launch.races) return;
  for (uint32_t word = (address - block.base) / 4; word < (address - block.base + size + 3) / 4; ++word) {
    block.shadow[word] = {time, static_cast<uint16_t>(component), 0, asynchronous};
  }
}

void mark_mbarrier(uint32_t address) {
  if (!block.launch.races) return;
  for (int i = 0; i < 2; ++i) block.shadow[(address - block.base) / 4 + i].asynchronous = MBARRIER;
}

void join(uint32_t* into, const uint32_t* from) {
  for (int i = 0; i < block.components; ++i) into[i] = std::max(into[i], from[i]);
}

void release(int thread, std::vector<uint32_t>& into) {
  if (!block.launch.races) return;
  join(into.data(), clock_of(thread));
  ++clock_of(thread)[thread];
}

void acquire(int thread, const std::vector<uint32_t>& from) {
  if (block.launch.races) join(clock_of(thread), from.data());
}

void store_shared(uint32_t to, const void* from, int size) {
  std::memcpy(touch(to, size, Access::store, block.current->index), from, size);
}

void load_shared(void* to, uint32_t from, int size) {
  std::memcpy(to, touch(from, size, Access::load, block.current->index), size);
}

// Between blocks. Of blocks that run together it is known who may build on what: a clock knows the threads of all of them.

namespace {

struct Addition {
  int block, thread;
  uint32_t time;
};

std::unordered_map<const float*, Addition> additions;                   // the last one to each place
std::unordered_map<const int*, std::vector<uint32_t>> published;        // [blocks, threads]: what was known to who published

uint32_t* foreign_clock(int thread, int other) { return clock_of(thread) + block.foreign + other * block.launch.threads; }

}  // namespace

void forget_global_memory() {
  additions.clear();
  published.clear();
}

void add_global(float* to, float x) {
  if (block.launch.together && block.launch.races) {
    const int self = block.current->index;
    const auto [found, first] = additions.try_emplace(to, Addition{block.index, self, clock_of(self)[self]});
    Addition& last = found->second;
    if (!first) {
      const uint32_t* known = last.block == block.index ? clock_of(self) : foreign_clock(self, last.block);
      if (known[last.thread] < last.time) {
        fail("race: an addition to global memory is not ordered after that by block %d thread %d", last.block, last.thread);
      }
      last = Addition{block.index, self, clock_of(self)[self]};
    }
  }
  *to += x;
}

int count_up(int* count) { return (*count)++; }

void publish(int* place, int value) {
  *place = value;
  if (!block.launch.together || !block.launch.races) return;
  const int self = block.current->index, threads = block.launch.threads;
  std::vector<uint32_t>& clock = published[place];
  clock.assign(foreign_clock(self, 0), foreign_clock(self, block.launch.grid));
  std::copy_n(clock_of(self), threads, clock.begin() + block.index * threads);
  ++clock_of(self)[self];
}

void wait_for(const int* place, int value) {
  Thread& self = *block.current;
  if (*place < value) {
    self.place = place;
    block.watching.push_back(self.index);
    wait_in("wait_for", value);
  }
  if (!block.launch.together || !block.launch.races) return;
  const auto found = published.find(place);
  if (found == published.end()) return;
  uint32_t* known = foreign_clock(self.index, 0);
  for (size_t i = 0; i < found->second.size(); ++i) known[i] = std::max(known[i], found->second[i]);
}

bool wake_watching() {
  bool woke = false;
  const std::vector<int> watching = std::move(block.watching);
  block.watching.clear();
  for (int thread : watching) {
    if (*block.threads[thread].place < block.threads[thread].detail) {
      block.watching.push_back(thread);
    } else {
      wake(thread);
      woke = true;
    }
  }
  return woke;
}

// cp.async.

void copy_async_16(uint32_t to, const void* from, int bytes) {
  Thread& self = *block.current;
  if (bytes != 0 && bytes != 16) fail("copy_async_16 of %d bytes", bytes);
  if (bytes != 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("copy_async_16 from an address that is not aligned");
  Copy copy{to, self.committed, {}};
  if (bytes != 0) std::memcpy(copy.bytes, from, 16);
  std::memset(touch(to, 16, Access::store, self.index), 0xff, 16);
  set_pending(to, 16, true);
  self.copies.push_back(copy);
}

void copy_async_commit() { ++block.current->committed; }

void copy_async_wait(int pending) {
  Thread& self = *block.current;
  size_t landed = 0;
  for (; landed < self.copies.size() && self.copies[landed].group < self.committed - pending; ++landed) {
    const Copy& copy = self.copies[landed];
    std::memcpy(place(copy.to, 16), copy.bytes, 16);
    record_write(copy.to, 16, self.index, block.launch.races ? clock_of(self.index)[self.index] : 0, false);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace host
}  // namespace qwen2vl_fast
