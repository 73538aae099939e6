// Variable-length attention over packed segments: what a launch is told, and the entry points.
//
// Shapes: T packed query tokens, Tk packed key tokens, H query heads, Hk key heads (H a multiple of Hk), D head dim.
#pragma once

#include <cstdint>

namespace qwen2vl_fast {

// One tile of work: a block of query rows of one head of one segment, and the keys that it sees. It stands for itself: a
// kernel reads no cu_seqlens. The list of tiles is built once for a pack and serves every layer.
struct Tile {
  int q_row;     // first row of the block in q [T, H, D]
  int rows;      // rows of the block, 0 (nothing to do) to the block size of the kernel
  int k_row;     // first row of the segment in k and v [Tk, Hk, D]
  int keys;      // keys of the segment that some row of the block sees; 0: o = 0, lse = -inf
  int head;      // query head
  int diagonal;  // causal: row i of the block sees the segment's keys j <= i + diagonal (may be negative); else unused
  int block;     // of key_tiles: its number among the blocks of its segment and head, and how many they are
  int blocks;
};
static_assert(sizeof(Tile) == 32, "Python writes tiles as rows of eight int32");

struct VarlenAttention {
  const void* q;      // [T, H, D], last dimension contiguous, rows and heads 16-byte aligned
  const void* k;      // [Tk, Hk, D]
  const void* v;      // [Tk, Hk, D]
  void* o;            // [T, H, D]
  float* lse;         // [H, T], natural log
  const Tile* tiles;  // [tile_count], longest first
  int tile_count;
  int T, Tk, H, Hk, D;
  int64_t q_stride_t, q_stride_h;  // strides in elements
  int64_t k_stride_t, k_stride_h;
  int64_t v_stride_t, v_stride_h;
  int64_t o_stride_t, o_stride_h;
  float scale;
  bool causal;
  bool bfloat16;  // else float16
};

struct VarlenAttentionBackward {
  VarlenAttention problem;  // as in the forward, o and lse as it wrote them; tiles in blocks of the kernel for dq
  // Tiles by keys: keys k_row.. (`keys` of them) of key head `head`, and the query rows q_row.. (`rows`) that see any of them;
  // causal: row i sees the block's keys j <= i + diagonal. With `turns` the blocks of a head of a segment stand together, rising.
  const Tile* key_tiles;
  int key_tile_count;
  const void* grad;  // dO [T, H, D]
  void* dq;          // [T, H, D]
  void* dk;          // [Tk, Hk, D]
  void* dv;          // [Tk, Hk, D]
  float* shift;      // [H, T], workspace: lse in units of log2
  float* delta;      // [H, T], workspace: sum(dO * o)
  float* dq_sum;     // [T, H, D], workspace; null: dq by a second pass, bit for bit the same in every run
  int* turns;        // [H * T + 1], workspace; null: blocks of keys add to dq_sum in whatever order they come, else in a fixed one
  int resident;      // with `turns`: blocks of the device that are sure to run at once; the launch sets it
  int64_t grad_stride_t, grad_stride_h;
  int64_t dq_stride_t, dq_stride_h;
  int64_t dk_stride_t, dk_stride_h;
  int64_t dv_stride_t, dv_stride_h;
};

// What the device needs to build the list of tiles itself. The list has (T / rows + N) * heads entries; by keys it is the
// backward's key_tiles, has (Tk / rows + N) * heads entries, and `heads` are key heads.
struct TileList {
  const int* bounds;    // [N + 1], of q's rows
  const int* bounds_k;  // [N + 1], of k's and v's rows
  Tile* tiles;
  int N, T, Tk;
  int heads;
  int rows;  // of a block
  bool causal;
  bool by_keys;
};

}  // namespace qwen2vl_fast
