// Hopper's asynchronous parts: mbarriers, TMA, warpgroup products, registers that move between warpgroups.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace qwen2vl_fast {
namespace host {

namespace {

using Floats8 = float __attribute__((vector_size(32), aligned(4)));

Mbarrier& mbarrier_at(uint32_t address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("no mbarrier was initialised at %lld", static_cast<long long>(address) - block.base);
  Mbarrier& barrier = found->second;
  if (block.launch.races && block.current != nullptr && clock_of(block.current->index)[barrier.creator] < barrier.created) {
    fail("race: the mbarrier at %u is used without order after its initialisation", address - block.base);
  }
  return barrier;
}

// Ends the phase if nothing is missing, and lets those go on who wait for it.
void complete_phase(uint32_t address, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  if (block.launch.races) {
    barrier.gathering[barrier.component] = static_cast<uint32_t>(barrier.phase);
    barrier.complete = barrier.gathering;
  }
  for (Thread& thread : block.threads) {
    if (thread.waits != nullptr && std::strcmp(thread.waits, "mbarrier_wait") == 0 && thread.detail / 2 == address - block.base) {
      wake(thread.index);
    }
  }
}

void arrive(uint32_t address, int bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  if (barrier.pending == 0) fail("mbarrier at %u: more arrivals than the phase's %d", address - block.base, barrier.arrivals);
  barrier.bytes += bytes;
  --barrier.pending;
  release(block.current->index, barrier.gathering);
  complete_phase(address, barrier);
}

// The hardware exchanges 16-byte units within 1024, 512 or 256 bytes, by bits of the address itself.
uint32_t swizzled(uint32_t address, int width) { return address ^ ((address >> 7 & (width / 16 - 1)) << 4); }

}  // namespace

void mbarrier_init(uint32_t address, int arrivals) {
  if (arrivals < 1) fail("mbarrier_init for %d arrivals", arrivals);
  if (block.mbarriers.count(address)) fail("the mbarrier at %u is initialised twice", address - block.base);
  Thread& self = *block.current;
  touch(address, 8, Access::store, self.index);
  mark_mbarrier(address);
  Mbarrier barrier;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.component = static_cast<int>(block.threads.size() + 2 * block.warps.size() + block.mbarriers.size());
  barrier.creator = self.index;
  if (block.launch.races) {
    if (barrier.component >= block.components) fail("more than 32 mbarriers");
    barrier.created = clock_of(self.index)[self.index];
    barrier.gathering.assign(block.components, 0);
    barrier.complete.assign(block.components, 0);
  }
  self.inits_fenced = false;
  block.mbarriers.emplace(address, barrier);
}

void fence_mbarrier_init() { block.current->inits_fenced = true; }

void mbarrier_arrive(uint32_t address) { arrive(address, 0); }

void mbarrier_arrive_expect(uint32_t address, int bytes) { arrive(address, bytes); }

bool mbarrier_try(uint32_t address, uint32_t parity) {
  Mbarrier& barrier = mbarrier_at(address);
  if (parity > 1) fail("parity %u", parity);
  if ((barrier.phase & 1) == static_cast<int>(parity)) return false;
  acquire(block.current->index, barrier.complete);
  return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  while (!mbarrier_try(address, parity)) wait_in("mbarrier_wait", (address - block.base) * 2 + parity);
}

void fence_proxy_async() {
  Thread& self = *block.current;
  self.inits_fenced = true;
  if (block.launch.races) self.proxy_fences.push_back(clock_of(self.index)[self.index]++);
}

// TMA.

const char* encode_tensor_map(TensorMap& map, const void* base, int rank, const int64_t* sizes, const int64_t* strides,
                              const int* box, int swizzle) {
  map = {};
  map.base = base;
  map.rank = rank;
  map.swizzle = swizzle;
  if (rank < 3 || rank > 5) return "rank is not 3 to 5";
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return "base is not a multiple of 16";
  if (swizzle != 32 && swizzle != 64 && swizzle != 128) return "swizzle is not 32, 64 or 128 bytes";
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > (int64_t(1) << 32)) return "a size is not 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return "a side of the box is not 1 to 256";
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
  }
  for (int i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 != 0 || strides[i] < 0 || strides[i] >= (int64_t(1) << 40)) return "a stride is not a multiple of 16";
    map.strides[i] = strides[i];
  }
  if (box[0] * 2 % 16 != 0) return "the box's rows are not multiples of 16 bytes";
  if (box[0] * 2 > swizzle) return "the box's rows are wider than the swizzle";
  return nullptr;
}

namespace {

void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int rank, const int* first) {
  Thread& self = *block.current;
  mbarrier_at(barrier);
  if (map.rank != rank) fail("TMA with %d coordinates of a tensor of %d dimensions", rank, map.rank);
  if (!block.threads[block.mbarriers[barrier].creator].inits_fenced) fail("TMA uses an mbarrier without fence_mbarrier_init");
  if (to % 128 != 0) fail("TMA writes to %u, which is not a multiple of 128", to);
  const int row = map.box[0] * 2, units = row / 16;
  int rows = 1;
  for (int i = 1; i < rank; ++i) rows *= map.box[i];
  Tma load{to, barrier, std::vector<unsigned char>(static_cast<size_t>(rows) * row), {}};
  load.offsets.reserve(static_cast<size_t>(rows) * units);
  for (int r = 0; r < rows; ++r) {
    bool inside = true;
    int64_t offset = 0;
    for (int i = 1, rest = r; i < rank; rest /= map.box[i], ++i) {
      const int64_t at = static_cast<int64_t>(first[i]) + rest % map.box[i];
      inside = inside && at >= 0 && at < map.sizes[i];
      offset += at * map.strides[i - 1];
    }
    for (int x = 0; x < map.box[0] && inside; ++x) {
      const int64_t at = static_cast<int64_t>(first[0]) + x;
      if (at < 0 || at >= map.sizes[0]) continue;
      std::memcpy(&load.bytes[static_cast<size_t>(r) * row + 2 * x], static_cast<const unsigned char*>(map.base) + offset + at * 2, 2);
    }
    for (int unit = 0; unit < units; ++unit) load.offsets.push_back(swizzled(to + r * row + 16 * unit, map.swizzle));
  }
  for (uint32_t address : load.offsets) {
    std::memset(touch(address, 16, Access::async_store, self.index), 0xff, 16);
    set_pending(address, 16, true);
  }
  block.loads.push_back(std::move(load));
}

}  // namespace

void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
  const int first[3] = {c0, c1, c2};
  load_box(to, map, barrier, 3, first);
}

void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  const int first[4] = {c0, c1, c2, c3};
  load_box(to, map, barrier, 4, first);
}

bool land_load() {
  if (block.loads.empty()) return false;
  const size_t at = block.launch.seed == 0 ? 0 : random_below(block.loads.size());
  const Tma load = std::move(block.loads[at]);
  block.loads.erase(block.loads.begin() + static_cast<std::ptrdiff_t>(at));
  Mbarrier& barrier = mbarrier_at(load.barrier);
  for (size_t i = 0; i < load.offsets.size(); ++i) {
    std::memcpy(place(load.offsets[i], 16), &load.bytes[16 * i], 16);
    record_write(load.offsets[i], 16, barrier.component, static_cast<uint32_t>(barrier.phase) + 1, true);
  }
  barrier.bytes -= static_cast<int>(load.bytes.size());
  complete_phase(load.barrier, barrier);
  return true;
}

// Warpgroup products. Each warp computes its own 16 of the 64 rows.

namespace {

struct Issue {
  float* d;
  const uint32_t* a_at;
  int n;
  uint32_t a, b, high;
  bool accumulate, bf16;
};

uint32_t start_of(uint32_t low) { return (low & 0x3fff) << 4; }
uint32_t leading_of(uint32_t low) { return (low >> 16 & 0x3fff) << 4; }
uint32_t stride_of(uint32_t high) { return (high & 0x3fff) << 4; }

int swizzle_of(uint32_t high) {
  static const int widths[4] = {0, 128, 64, 32};
  const int width = widths[high >> 30];
  if (width == 0) fail("a descriptor without swizzle is not modelled");
  if (high >> 17 & 7) fail("a descriptor with a base offset is not modelled");
  return width;
}

// K-major: element (r, k) of rows of 16-bit elements. The 16 values of a row are two 16-byte units.
void load_k_major(float (*x)[16], int rows, int first_row, uint32_t low, uint32_t high, bool bf16, int warp, int group,
                  const std::vector<uint32_t>& known) {
  const int width = swizzle_of(high);
  for (int i = 0; i < rows; ++i) {
    const int r = first_row + i;
    for (int unit = 0; unit < 2; ++unit) {
      const uint32_t address = swizzled(start_of(low) + r % 8 * width + r / 8 * stride_of(high) + 16 * unit, width);
      uint16_t elements[8];
      std::memcpy(elements, touch_product(address, 16, warp, group, known), 16);
      for (int k = 0; k < 8; ++k) x[i][unit * 8 + k] = to_float(elements[k], bf16);
    }
  }
}

// MN-major: element (n, k), eight neighbouring n in a 16-byte unit; x is [16][n].
void load_mn_major(std::vector<float>& x, int n, uint32_t low, uint32_t high, bool bf16, int warp, int group,
                   const std::vector<uint32_t>& known) {
  const int width = swizzle_of(high), across = width / 2;
  for (int k = 0; k < 16; ++k) {
    for (int at = 0; at < n; at += 8) {
      const uint32_t offset = 2 * (at % across) + at / across * leading_of(low) + k % 8 * width + k / 8 * stride_of(high);
      uint16_t elements[8];
      std::memcpy(elements, touch_product(swizzled(start_of(low) + offset, width), 16, warp, group, known), 16);
      for (int i = 0; i < 8; ++i) x[static_cast<size_t>(k) * n + at + i] = to_float(elements[i], bf16);
    }
  }
}

// What every lane of the warp knows: a wait by some lanes alone orders nothing for the others.
std::vector<uint32_t> known_to_warp(int warp) {
  std::vector<uint32_t> known(block.components);
  if (!block.launch.races) return known;
  std::copy_n(clock_of(warp * LANES), block.components, known.begin());
  for (int lane = 1; lane < LANES; ++lane) {
    const uint32_t* clock = clock_of(warp * LANES + lane);
    for (int i = 0; i < block.components; ++i) {
      // A lane's own stores are the warp's: wgmma is issued by all lanes after them.
      if (i / LANES != warp) known[i] = std::min(known[i], clock[i]);
    }
  }
  for (int lane = 0; lane < LANES && warp * LANES + lane < block.components; ++lane) {
    known[warp * LANES + lane] = clock_of(warp * LANES + lane)[warp * LANES + lane];
  }
  return known;
}

Accumulators& accumulators_of(int warp, float* const (&d)[LANES], int n) {
  Warp& own = block.warps[warp];
  for (Accumulators& each : own.accumulators) {
    if (each.d[0] == d[0]) {
      if (each.n != n) fail("products of different widths into the same registers");
      return each;
    }
  }
  own.accumulators.emplace_back();
  Accumulators& fresh = own.accumulators.back();
  std::copy_n(d, LANES, fresh.d);
  fresh.n = n;
  fresh.values.resize(static_cast<size_t>(LANES) * n / 2);
  for (int lane = 0; lane < LANES; ++lane) std::copy_n(d[lane], n / 2, &fresh.values[static_cast<size_t>(lane) * n / 2]);
  return fresh;
}

void compute(int warp, Product& product) {
  product.computed = true;
  const int n = product.n;
  const std::vector<uint32_t> known = known_to_warp(warp);
  float a[16][16];
  std::vector<float> b(static_cast<size_t>(16) * n);
  if (product.from_registers) {
    for (int lane = 0; lane < LANES; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float* at = &a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
        unpack(at[0], at[1], product.a_words[lane][i], product.bf16);
      }
    }
    load_mn_major(b, n, product.b, product.high, product.bf16, warp, product.group, known);
  } else {
    load_k_major(a, 16, warp % 4 * 16, product.a, product.high, product.bf16, warp, product.group, known);
    std::vector<float> rows(static_cast<size_t>(16) * n);
    load_k_major(reinterpret_cast<float(*)[16]>(rows.data()), n, 0, product.b, product.high, product.bf16, warp, product.group, known);
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < 16; ++k) b[static_cast<size_t>(k) * n + i] = rows[static_cast<size_t>(i) * 16 + k];
    }
  }
  Accumulators& accumulators = accumulators_of(warp, product.d, n);
  for (int row = 0; row < 16; ++row) {
    for (int at = 0; at < n; at += 8) {
      Floats8 sum = {};
      for (int k = 0; k < 16; ++k) sum += a[row][k] * *reinterpret_cast<const Floats8*>(&b[static_cast<size_t>(k) * n + at]);
      for (int column = 0; column < 8; ++column) {
        const int lane = row % 8 * 4 + column / 2, i = at / 2 + row / 8 * 2 + column % 2;
        float& value = accumulators.values[static_cast<size_t>(lane) * n / 2 + i];
        value = (product.accumulate ? value : 0.0f) + sum[column];
      }
    }
  }
}

Registers& registers_of(Thread& thread, const void* at, int words) {
  for (Registers& each : thread.registers) {
    if (each.at == at && each.words == words) return each;
  }
  thread.registers.push_back({at, words, {}});
  return thread.registers.back();
}

// The registers must be as they were at the last fence. Of those that are used for the first time nothing is known.
void check_fenced(Thread& thread, const void* at, int words, const char* what) {
  const Registers& known = registers_of(thread, at, words);
  if (!known.fenced.empty() && std::memcmp(known.fenced.data(), at, words * 4) != 0) {
    fail("%s of a product changed after the last wgmma_fence", what);
  }
}

bool issue(int warp, int64_t) {
  Warp& own = block.warps[warp];
  if (!own.fenced) fail("a product without wgmma_fence since the registers were last free");
  const Issue& first = operand_of<Issue>(warp, 0);
  Product product{};
  product.group = own.groups;
  product.n = first.n;
  product.accumulate = first.accumulate;
  product.bf16 = first.bf16;
  product.from_registers = first.a_at != nullptr;
  product.a = first.a;
  product.b = first.b;
  product.high = first.high;
  for (int lane = 0; lane < LANES; ++lane) {
    const Issue& each = operand_of<Issue>(warp, lane);
    if (each.a != first.a || each.b != first.b || each.high != first.high || each.accumulate != first.accumulate) {
      fail("lane %d names other operands of a product than lane 0", lane);
    }
    product.d[lane] = each.d;
    product.a_at[lane] = each.a_at;
    if (each.a_at != nullptr) std::memcpy(product.a_words[lane], each.a_at, 16);
  }
  const bool chained = std::any_of(own.accumulators.begin(), own.accumulators.end(),
                                   [&](const Accumulators& each) { return each.d[0] == first.d; });
  for (int lane = 0; lane < LANES; ++lane) {
    Thread& thread = block.threads[warp * LANES + lane];
    if (product.from_registers) check_fenced(thread, product.a_at[lane], 4, "operand A");
    if (!chained && product.accumulate) check_fenced(thread, product.d[lane], product.n / 2, "an accumulator");
    if (!chained && !product.accumulate) registers_of(thread, product.d[lane], product.n / 2);
  }
  for (uint64_t part : {uint64_t(product.n), uint64_t(product.a), uint64_t(product.b), uint64_t(product.high),
                        uint64_t(product.accumulate), uint64_t(product.from_registers)}) {
    own.hash = (own.hash ^ part) * 0x100000001b3u;
  }
  Accumulators& accumulators = accumulators_of(warp, product.d, product.n);
  accumulators.last_group = own.groups;
  for (int lane = 0; lane < LANES; ++lane) std::memset(product.d[lane], 0xff, product.n / 2 * 4);
  own.products.push_back(product);
  // The hardware reads its operands some time between issue and wait: at once, or in a shuffled run perhaps at the wait.
  const bool early = block.launch.seed == 0 || (block.launch.seed + static_cast<uint64_t>(own.groups)) % 2 == 0;
  if (early) compute(warp, own.products.back());
  return true;
}

bool retire(int warp, int64_t pending) {
  Warp& own = block.warps[warp];
  const int retired = std::max(own.retired, own.groups - static_cast<int>(pending));
  for (Product& product : own.products) {
    if (product.group >= retired) break;
    if (!product.computed) compute(warp, product);
    for (int lane = 0; lane < LANES && product.from_registers; ++lane) {
      if (std::memcmp(product.a_at[lane], product.a_words[lane], 16) != 0) {
        fail("lane %d changed operand A of a product that was under way", lane);
      }
    }
  }
  auto under_way = [&](const Product& product) { return product.group >= retired; };
  own.products.erase(own.products.begin(), std::find_if(own.products.begin(), own.products.end(), under_way));
  for (size_t i = 0; i < own.accumulators.size();) {
    Accumulators& each = own.accumulators[i];
    if (each.last_group >= retired) {
      ++i;
      continue;
    }
    for (int lane = 0; lane < LANES; ++lane) std::copy_n(&each.values[static_cast<size_t>(lane) * each.n / 2], each.n / 2, each.d[lane]);
    own.accumulators.erase(own.accumulators.begin() + static_cast<std::ptrdiff_t>(i));
    own.fenced = false;  // the registers are free again: another fence before the next product
  }
  own.retired = retired;
  if (block.launch.races) {
    for (int lane = 0; lane < LANES; ++lane) {
      clock_of(warp * LANES + lane)[block.threads.size() + warp] = static_cast<uint32_t>(retired);
    }
  }
  return true;
}

bool fence(int warp, int64_t) {
  block.warps[warp].fenced = true;
  for (int lane = 0; lane < LANES; ++lane) {
    for (Registers& each : block.threads[warp * LANES + lane].registers) {
      each.fenced.resize(each.words);
      std::memcpy(each.fenced.data(), each.at, static_cast<size_t>(each.words) * 4);
    }
  }
  return true;
}

}  // namespace

void wgmma_fence() { meet("wgmma_fence", 0, nullptr, fence); }

void wgmma_commit() {
  meet("wgmma_commit", 0, nullptr, [](int warp, int64_t) {
    Warp& own = block.warps[warp];
    ++own.groups;
    own.history.push_back(own.hash);
    return true;
  });
}

void wgmma_wait(int pending) { meet("wgmma_wait", pending, nullptr, retire); }

void wgmma_shared(float* d, int n, uint32_t a, uint32_t b, uint32_t high, int accumulate, bool bf16) {
  Issue own{d, nullptr, n, a, b, high, accumulate != 0, bf16};
  meet("wgmma_shared", n, &own, issue);
}

void wgmma_registers(float* d, int n, const uint32_t (&a)[4], uint32_t b, uint32_t high, bool bf16) {
  Issue own{d, a, n, 0, b, high, true, bf16};
  meet("wgmma_registers", n, &own, issue);
}

// Registers move between the warpgroups of a block; a warp waits until enough are free.

namespace {

void check_registers(int registers) {
  if (registers < 24 || registers > 256 || registers % 8 != 0) fail("%d registers: 24 to 256 in steps of 8", registers);
}

bool take(int warp, int64_t registers) {
  Warp& own = block.warps[warp];
  const int wanted = (static_cast<int>(registers) - own.registers) * LANES;
  if (wanted < 0) fail("take_registers(%d) gives some up: the warp has %d", static_cast<int>(registers), own.registers);
  if (wanted > block.free_registers) return false;
  block.free_registers -= wanted;
  own.registers = static_cast<int>(registers);
  return true;
}

}  // namespace

void give_registers(int registers) {
  check_registers(registers);
  meet("give_registers", registers, nullptr, [](int warp, int64_t wanted) {
    Warp& own = block.warps[warp];
    if (wanted > own.registers) fail("give_registers(%d) takes some: the warp has %d", static_cast<int>(wanted), own.registers);
    block.free_registers += (own.registers - static_cast<int>(wanted)) * LANES;
    own.registers = static_cast<int>(wanted);
    for (size_t w = 0; w < block.warps.size(); ++w) {
      const Thread& first = block.threads[w * LANES];
      const bool blocked = first.waits != nullptr && std::strcmp(first.waits, "take_registers") == 0 && block.warps[w].arrived == 0;
      if (blocked && take(static_cast<int>(w), first.detail)) wake_warp(static_cast<int>(w));
    }
    return true;
  });
}

void take_registers(int registers) {
  check_registers(registers);
  meet("take_registers", registers, nullptr, take);
}

}  // namespace host
}  // namespace qwen2vl_fast
