#include "launch.h"

#include "fwd_sm80.cuh"
#include "launch_sm90.h"
#include "start.cuh"
#include "tiles.cuh"

namespace qwen2vl_fast {
namespace {

template <bool BF16, int D, int M_TILES>
void forward_sm80(const VarlenAttention& problem, int device, void* stream) {
  launch<ForwardSm80<BF16, D, M_TILES>>("varlen_attention_forward_sm80", problem, problem.tile_count, device, stream);
}

template <bool BF16, int D>
void forward_sm80(const VarlenAttention& problem, int rows, int device, void* stream) {
  if (rows == 64) return forward_sm80<BF16, D, 1>(problem, device, stream);
  if (rows == 128) return forward_sm80<BF16, D, 2>(problem, device, stream);
  throw std::invalid_argument("rows: expected 64 or 128 for the sm_80 kernel, got " + std::to_string(rows));
}

template <bool BF16>
void forward_sm80(const VarlenAttention& problem, int rows, int device, void* stream) {
  if (problem.D == 64) return forward_sm80<BF16, 64>(problem, rows, device, stream);
  if (problem.D == 80) return forward_sm80<BF16, 80>(problem, rows, device, stream);
  if (problem.D == 128) return forward_sm80<BF16, 128>(problem, rows, device, stream);
  throw std::invalid_argument("D: expected 64, 80 or 128, got " + std::to_string(problem.D));
}

}  // namespace

void forward(const VarlenAttention& problem, const std::string& kernel, int rows, int device, void* stream) {
  check_problem(problem);
  require(kernel == "sm_80" || kernel == "sm_90", "kernel: expected sm_80 or sm_90, got " + kernel);
  require(rows > 0, "rows: expected a positive number, got " + std::to_string(rows));
  if (problem.tile_count == 0) return;
  const CurrentDevice current(device, "varlen_attention_forward_" + kernel);
  if (kernel == "sm_90") return forward_sm90(problem, rows, device, stream);
  if (problem.bfloat16) return forward_sm80<true>(problem, rows, device, stream);
  return forward_sm80<false>(problem, rows, device, stream);
}

void build_tiles(const TileList& list, int device, void* stream) {
  require(list.N >= 0 && list.T >= 0 && list.Tk >= 0 && list.heads > 0 && list.rows > 0,
          "N, T, Tk, heads, rows: expected no negative number, and at least one head and one row");
  const int64_t count = (static_cast<int64_t>(list.by_keys ? list.Tk : list.T) / list.rows + list.N) * list.heads;
  if (list.N == 0 || count == 0) return;
  require(list.bounds != nullptr && list.bounds_k != nullptr && list.tiles != nullptr, "bounds, bounds_k, tiles: null pointer");
  const CurrentDevice current(device, "varlen_attention_tiles");
  launch<BuildTiles>("varlen_attention_tiles", list, (count + BuildTiles::THREADS - 1) / BuildTiles::THREADS, device, stream);
}

}  // namespace qwen2vl_fast
