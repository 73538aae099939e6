#include "checks.h"
#include "instances.cuh"
#include "launch.h"
#include "start.cuh"

namespace qwen2vl_fast {

void backward(const VarlenAttentionBackward& args, int rows, int key_rows, int device, void* stream) {
  const VarlenAttention& p = args.problem;
  check_problem(args);
  if (p.T == 0 && args.key_tile_count == 0) return;
  const CurrentDevice current(device, "varlen_attention_backward");
  const auto start = [&](auto found, const char* name, int64_t pieces, Grid grid) {
    if (pieces > 0) launch<decltype(found)>(name, args, pieces, grid, device, stream);
  };
  const int64_t count = static_cast<int64_t>(p.T) * p.H;
  const bool add_dq = args.dq_sum != nullptr;
  // Refused before anything is launched.
  select_backward_keys(args, key_rows, [](auto) {});
  if (!add_dq) select_backward_queries(args, rows, [](auto) {});

  select_backward_row_sums(p, [&](auto found) {
    constexpr int ROWS = decltype(found)::ROWS;
    start(found, "varlen_attention_backward_row_sums", std::max<int64_t>((count + ROWS - 1) / ROWS, 1), Grid::resident);  // turns also for no rows
  });
  select_backward_keys(args, key_rows, [&](auto found) {
    using Kernel = decltype(found);
    constexpr const char* NAME = "varlen_attention_backward_keys";
    if (args.turns == nullptr) return start(found, NAME, args.key_tile_count, Grid::each);
    if (args.key_tile_count == 0) return;
    VarlenAttentionBackward told = args;
    told.resident = resident_blocks<Kernel, VarlenAttentionBackward>(NAME, device);
    launch<Kernel>(NAME, told, args.key_tile_count, Grid::together, device, stream);
  });
  if (add_dq) {
    select_backward_round(p, [&](auto found) {
      constexpr int THREADS = decltype(found)::THREADS;
      start(found, "varlen_attention_backward_round", (count * (p.D / 8) + THREADS - 1) / THREADS, Grid::resident);
    });
  } else {
    select_backward_queries(args, rows, [&](auto found) { start(found, "varlen_attention_backward_queries", p.tile_count, Grid::each); });
  }
}

}  // namespace qwen2vl_fast
