#include "launch.h"

#include "checks.h"
#include "fwd_sm80.cuh"
#include "instances.cuh"
#include "launch_sm90.h"
#include "start.cuh"
#include "tiles.cuh"

namespace qwen2vl_fast {
namespace {

template <class Start>
void select_forward_sm80(const VarlenAttention& p, int rows, Start start) {
  by_type_and_dim(p, [&](auto bf16, auto dim) {
    constexpr bool BF16 = decltype(bf16)::value;
    constexpr int D = decltype(dim)::value;
    if (rows == 64) return start(ForwardSm80<BF16, D, 1>{});
    if (rows == 128) return start(ForwardSm80<BF16, D, 2>{});
    throw std::invalid_argument("rows: expected 64 or 128 for the sm_80 kernel, got " + std::to_string(rows));
  });
}

}  // namespace

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
