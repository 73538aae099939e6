#include "launch.h"

#include "checks.h"
#include "instances.cuh"
#include "launch_sm90.h"
#include "start.cuh"
#include "tiles.cuh"

namespace qwen2vl_fast {

void forward(const VarlenAttention& problem, const std::string& kernel, int rows, int device, void* stream) {
  check_problem(problem);
  require(kernel == "sm_80" || kernel == "sm_90", "kernel: expected sm_80 or sm_90, got " + kernel);
  require(rows > 0, "rows: expected a positive number, got " + std::to_string(rows));
  if (problem.tile_count == 0) return;
  const CurrentDevice current(device, "varlen_attention_forward_" + kernel);
  if (kernel == "sm_90") return forward_sm90(problem, rows, device, stream);
  select_forward_sm80(problem, rows, [&](auto found) {
    launch<decltype(found)>("varlen_attention_forward_sm80", problem, problem.tile_count, Grid::each, device, stream);
  });
}

void build_tiles(const TileList& list, int device, void* stream) {
  check_problem(list);
  const int64_t count = tile_slots(list);
  if (list.N == 0 || count == 0) return;
  const CurrentDevice current(device, "varlen_attention_tiles");
  const int64_t blocks = (count + BuildTiles::THREADS - 1) / BuildTiles::THREADS;
  launch<BuildTiles>("varlen_attention_tiles", list, blocks, Grid::resident, device, stream);
}

}  // namespace qwen2vl_fast
