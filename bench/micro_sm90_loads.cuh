// The kernels of micro_sm90.cu that load.
#pragma once

#include "micro_sm90_math.cuh"

// ---- 3: TMA loads that hit L2 ----

enum Load { CHUNKS, SPLIT_64_16, ROW_160, FIVE_BOXES, COLUMNS_64, CONTIGUOUS, PADDED };
constexpr const char* LOAD_NAMES[] = {"{16,112,5} 32-byte swizzle",
                                      "64 + 16 columns",
                                      "160-byte row, no swizzle",
                                      "five {16,112} boxes",
                                      "64 columns alone",
                                      "contiguous tile, bulk copy",
                                      "64 + 64 columns, 48 of them outside"};

template <Load LOAD>
constexpr int LOADED_BYTES = LOAD == COLUMNS_64 ? ROWS * 128
                             : LOAD == PADDED   ? ROWS * 256
                                                : TILE;
template <Load LOAD>
constexpr int STAGE_BYTES = (LOADED_BYTES<LOAD> + 1023) / 1024 * 1024;

// Tile i of a block: K and V in turn, of one head, from the last row block to the first.
DEV int3 tile_of(int i, int apart) {
  int blocks = TOKENS / ROWS, block = blocks - 1 - (i / 2 + apart * int(blockIdx.x)) % blocks;
  return {block * ROWS, 1 + i % 2, int(blockIdx.x) % HEADS};
}

template <Load LOAD>
DEV void load_tile(uint32_t to, const CUtensorMap& map, const CUtensorMap& map16, const bf16* qkv, uint32_t barrier,
                   int3 tile) {
  const int row = tile.x, head = tile.y * HEADS + tile.z;
  if constexpr (LOAD == CHUNKS) tma_4d(to, map, barrier, 0, row, 0, head);
  if constexpr (LOAD == SPLIT_64_16 || LOAD == ROW_160 || LOAD == COLUMNS_64) tma_3d(to, map, barrier, 0, row, head);
  if constexpr (LOAD == PADDED) {
    tma_3d(to, map, barrier, 0, row, head);
    tma_3d(to + ROWS * 128, map, barrier, 64, row, head);
  }
  if constexpr (LOAD == SPLIT_64_16) tma_3d(to + ROWS * 128, map16, barrier, 64, row, head);
  if constexpr (LOAD == FIVE_BOXES)
    for (int i = 0; i < 5; i++) tma_3d(to + i * ROWS * 32, map16, barrier, 16 * i, row, head);
  if constexpr (LOAD == CONTIGUOUS) bulk_copy(to, qkv + (head * TOKENS + row) * D, barrier, TILE);
}

template <Load LOAD>
DEV uint32_t loaded_place(int row, int column) {
  if (LOAD == CHUNKS || LOAD == FIVE_BOXES) return place<32>(row, column, ROWS);
  if (LOAD == ROW_160 || LOAD == CONTIGUOUS) return row * 160 + column * 2;
  if (LOAD == PADDED) return place<128>(row, column, ROWS);
  return column < 64 ? place<128>(row, column, ROWS) : ROWS * 128 + place<32>(row, column - 64, ROWS);
}

// One thread keeps `stages` tiles under way; the tiles that are in shared memory at the end are compared.
template <Load LOAD>
__global__ void __launch_bounds__(128, 1)
    tma_rate(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap map16, const bf16* qkv, int tiles,
             int stages, int apart, int* wrong, Clocks* clocks) {
  constexpr int stage_bytes = STAGE_BYTES<LOAD>;
  const uint32_t at = shared_address(shared_bytes), full = at + stages * stage_bytes;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) barrier_init(full + 8 * s, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    long long start = clock64();
    for (int i = 0, s = 0, parity = 1; i < tiles; i++) {
      if (i >= stages) barrier_wait(full + 8 * s, parity);
      expect_bytes(full + 8 * s, LOADED_BYTES<LOAD>);
      load_tile<LOAD>(at + s * stage_bytes, map, map16, qkv, full + 8 * s, tile_of(i, apart));
      if (++s == stages) s = 0, parity ^= 1;
    }
    for (int i = tiles - stages; i < tiles; i++) barrier_wait(full + 8 * (i % stages), i / stages & 1);
    record(clocks, start, tiles);
  }
  __syncthreads();
  int differ = 0;
  for (int i = tiles - stages; i < tiles; i++) {
    barrier_wait(full + 8 * (i % stages), i / stages & 1);
    int3 tile = tile_of(i, apart);
    constexpr int columns = LOADED_BYTES<LOAD> / ROWS / 2;
    for (int j = threadIdx.x; j < ROWS * columns; j += 128) {
      int row = j / columns, column = j % columns, head = tile.y * HEADS + tile.z;
      const bf16* source = LOAD == CONTIGUOUS ? qkv + (head * TOKENS + tile.x + row) * D + column
                                              : qkv + (tile.x + row) * 3 * HEADS * D + head * D + min(column, D - 1);
      uint16_t expected = column < D ? __bfloat16_as_ushort(*source) : 0;
      differ += load_shared(at + i % stages * stage_bytes + loaded_place<LOAD>(row, column)) != expected;
    }
  }
  if (differ) atomicAdd(wrong, differ);
}

// ---- 5: what a barrier counts ----

// One load of the box at `row`, waited for at most two million clocks. facts: whether the barrier flipped; values that are
// neither the tensor's nor the zeros outside it.
__global__ void __launch_bounds__(128, 1)
    bytes_counted(const __grid_constant__ CUtensorMap map, const bf16* qkv, int row, int bytes, int* facts) {
  const uint32_t at = shared_address(shared_bytes), full = at + TILE;
  for (int i = threadIdx.x; i < TILE / 2; i += 128) store_shared(at + 2 * i, __ushort_as_bfloat16(0x7fff));
  fence_proxy();
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect_bytes(full, bytes);
    tma_4d(at, map, full, 0, row, 0, 0);
    bool done = false;
    for (long long start = clock64(); !done && clock64() - start < 2000000;) done = barrier_try(full, 0);
    facts[0] = done;
  }
  __syncthreads();
  int wrong = 0;
  for (int i = threadIdx.x; i < ROWS * D; i += 128) {
    int r = row + i / D;
    uint16_t expected = r >= 0 && r < TOKENS ? __bfloat16_as_ushort(qkv[r * 3 * HEADS * D + i % D]) : 0;
    wrong += load_shared(at + place<32>(i / D, i % D, ROWS)) != expected;
  }
  if (wrong) atomicAdd(facts + 1, wrong);
}

// ---- 3: loads beside matrix products, and loads shared by two multiprocessors ----

// Two warpgroups multiply what lies still in shared memory, one thread of a third keeps `stages` tiles under way; all for
// `budget` clocks. The third's units are tiles.
template <Load LOAD>
__global__ void __launch_bounds__(384, 1)
    loads_beside(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap map16, const bf16* a,
                 const bf16* b, float* d, int product_groups, int stages, long long budget, Clocks* clocks) {
  constexpr int stage_bytes = STAGE_BYTES<LOAD>, resident = 64 * 1024;
  const uint32_t at = shared_address(shared_bytes), ring = at + resident, full = ring + stages * stage_bytes;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  fill_products<ROWS>(a, b, at);
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) barrier_init(full + 8 * s, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const long long start = clock64();
  if (group < product_groups) {
    Products<ROWS> products(a, b, at);
    const long long units = products.repeat<Products<ROWS>::BLOCK>(start, budget, group);
    record(clocks, start, units);
    if (blockIdx.x == gridDim.x - 1 && group == 0) products.store(d, thread);
  } else if (thread == 0 && stages) {
    int i = 0, s = 0, parity = 1;
    for (; i < stages || clock64() - start < budget; i++) {
      if (i >= stages) barrier_wait(full + 8 * s, parity);
      expect_bytes(full + 8 * s, LOADED_BYTES<LOAD>);
      load_tile<LOAD>(ring + s * stage_bytes, map, map16, nullptr, full + 8 * s, tile_of(i, 0));
      if (++s == stages) s = 0, parity ^= 1;
    }
    for (int left = i - stages; left < i; left++) barrier_wait(full + 8 * (left % stages), left / stages & 1);
    record(clocks, start, i);
  }
}

// Two blocks of a cluster work on the same head. Each tile is loaded by one of them and lands in both: K by the first, V by the
// second. A stage is loaded again when both have said that theirs is free.
template <Load LOAD>
__global__ void __launch_bounds__(128, 1) __cluster_dims__(2)
    tma_shared(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap map16, const bf16* qkv, int tiles,
               int stages, int* wrong, Clocks* clocks) {
  constexpr int stage_bytes = 18 * 1024;
  const uint32_t at = shared_address(shared_bytes), full = at + stages * stage_bytes, empty = full + 8 * stages;
  const uint32_t rank = blockIdx.x % 2;
  auto tile = [&](int i) {
    int blocks = TOKENS / ROWS;
    return int3{(blocks - 1 - i / 2 % blocks) * ROWS, 1 + i % 2, int(blockIdx.x / 2) % HEADS};
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 2);
    barrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    long long start = clock64();
    for (int i = 0, s = 0, parity = 0; i < tiles; i++) {
      if (i >= stages) barrier_wait(full + 8 * s, parity ^ 1);
      expect_bytes(full + 8 * s, TILE);
      arrive_remote(empty + 8 * s, i & 1);
      if (rank == uint32_t(i & 1)) {
        barrier_wait_cluster(empty + 8 * s, parity);
        int3 t = tile(i);
        const int head = t.y * HEADS + t.z;
        if constexpr (LOAD == CHUNKS) {
          tma_4d_multicast(at + s * stage_bytes, map, full + 8 * s, 0, t.x, 0, head, 3);
        } else {
          tma_3d_multicast(at + s * stage_bytes, map, full + 8 * s, 0, t.x, head, 3);
          tma_3d_multicast(at + s * stage_bytes + ROWS * 128, map16, full + 8 * s, 64, t.x, head, 3);
        }
      }
      if (++s == stages) s = 0, parity ^= 1;
    }
    for (int i = tiles - stages; i < tiles; i++) barrier_wait(full + 8 * (i % stages), i / stages & 1);
    record(clocks, start, tiles);
  }
  __syncthreads();
  int differ = 0;
  for (int i = tiles - stages; i < tiles; i++) {
    barrier_wait(full + 8 * (i % stages), i / stages & 1);
    int3 t = tile(i);
    for (int j = threadIdx.x; j < TILE / 2; j += 128) {
      const bf16* source = qkv + (t.x + j / D) * 3 * HEADS * D + (t.y * HEADS + t.z) * D + j % D;
      uint32_t from = at + i % stages * stage_bytes + loaded_place<LOAD>(j / D, j % D);
      differ += load_shared(from) != __bfloat16_as_ushort(*source);
    }
  }
  if (differ) atomicAdd(wrong, differ);
  cluster_sync();
}
