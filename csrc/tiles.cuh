// The work list of varlen attention, built on the device from boundaries that the host does not know.
#pragma once

#include "ptx.cuh"
#include "varlen_attention.h"

namespace qwen2vl_fast {

// One thread a slot. A segment with boundaries a, b has its blocks in the slots from a / rows + n on: there are at most
// b / rows - a / rows + 1 of them, so that they never reach the next segment's, and no thread needs another's result. Slots
// that no block takes get rows = 0.
struct BuildTiles {
  static constexpr int THREADS = 256;
  static constexpr int BLOCKS = 4;
  static constexpr int SMEM = 0;

  static DEV int min_of(int a, int b) { return a < b ? a : b; }
  static DEV int clamp(int x, int low, int high) { return x < low ? low : min_of(x, high); }

  static DEV void run(const TileList& args) {
    const int slots = (args.by_keys ? args.Tk : args.T) / args.rows + args.N;
    for (int64_t index = static_cast<int64_t>(block_index()) * THREADS + thread_index();
         index < static_cast<int64_t>(slots) * args.heads; index += static_cast<int64_t>(block_count()) * THREADS) {
      args.tiles[index] = tile(args, static_cast<int>(index % slots), static_cast<int>(index / slots));
    }
  }

  static DEV Tile tile(const TileList& args, int slot, int head) {
    const int* bounds = args.by_keys ? args.bounds_k : args.bounds;
    const int total = args.by_keys ? args.Tk : args.T;
    // The last segment whose first slot is not past this one. Values are clamped, since nobody has checked them: a decreasing
    // list gives wrong tiles, but none outside of the tensors.
    int low = 0, high = args.N - 1;
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (clamp(bounds[middle], 0, total) / args.rows + middle <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int start = clamp(args.bounds[low], 0, args.T), end = clamp(args.bounds[low + 1], start, args.T);
    const int start_k = clamp(args.bounds_k[low], 0, args.Tk), end_k = clamp(args.bounds_k[low + 1], start_k, args.Tk);
    const int queries = end - start, keys = end_k - start_k;
    const int own_start = args.by_keys ? start_k : start, own = args.by_keys ? keys : queries;
    const int first = clamp(slot - own_start / args.rows - low, 0, total / args.rows + 1) * args.rows;
    Tile found = {};
    if (first >= own) return found;
    const int block = min_of(args.rows, own - first);
    found.head = head;
    if (args.by_keys) {
      const int unseeing = args.causal ? clamp(first - (keys - queries), 0, queries) : 0;
      found.q_row = start + unseeing;
      found.rows = queries - unseeing;
      found.k_row = start_k + first;
      found.keys = block;
      found.block = first / args.rows;
      found.blocks = (keys + args.rows - 1) / args.rows;
      found.diagonal = unseeing + (keys - queries) - first;
    } else {
      found.q_row = start + first;
      found.rows = block;
      found.k_row = start_k;
      found.diagonal = first + keys - queries;
      found.keys = args.causal ? clamp(found.diagonal + block, 0, keys) : keys;
    }
    return found;
  }
};

}  // namespace qwen2vl_fast
