// The sm_80 forward and the list of tiles on the CPU.
#include "../checks.h"
#include "../instances.cuh"
#include "../tiles.cuh"
#include "entry.h"

using namespace qwen2vl_fast;

HOST_ENTRY int forward_sm80(const VarlenAttention* problem, int rows, const host::Run* run) {
  const auto select = [&](auto start) {
    check_problem(*problem);
    select_forward_sm80(*problem, rows, start);
  };
  return host::run_selected(*run, select, [&](auto found) { return host::run_kernel<decltype(found)>(*problem, *run); });
}

HOST_ENTRY int build_tiles(const TileList* list, const host::Run* run) {
  const auto select = [&](auto start) {
    check_problem(*list);
    start(BuildTiles{});
  };
  return host::run_selected(*run, select, [&](auto) { return host::run_kernel<BuildTiles>(*list, *run); });
}
