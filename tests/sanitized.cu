// The sm_80 attention once, forward and backward in blocks of 64 and 128 rows, on small ragged segments: a program for compute-sanitizer.
#include <cstdio>
#include <vector>

#include "bwd_sm80.cuh"
#include "fwd_sm80.cuh"
#include "tiles.cuh"

using namespace qwen2vl_fast;

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <class T>
T* device_memory(size_t count) {
  T* pointer = nullptr;
  check(cudaMalloc(&pointer, count * sizeof(T)), "cudaMalloc");
  return pointer;
}

template <class Kernel, class Args>
void start(const char* name, Args args, int blocks, bool together = false) {
  auto* kernel = &entry<Kernel, Args>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SMEM), name);
  void* parameters[] = {&args};
  const auto launch = together ? cudaLaunchCooperativeKernel<void(Args)> : cudaLaunchKernel<void(Args)>;
  check(launch(kernel, blocks, Kernel::THREADS, parameters, Kernel::SMEM, nullptr), name);
  check(cudaDeviceSynchronize(), name);
}

const Tile* tiles(const int* bounds, int segments, int tokens, int heads, int rows, bool by_keys, int& count) {
  TileList list = {};
  list.bounds = list.bounds_k = bounds;
  list.N = segments;
  list.T = list.Tk = tokens;
  list.heads = heads;
  list.rows = rows;
  list.by_keys = by_keys;
  count = (tokens / list.rows + segments) * heads;
  list.tiles = device_memory<Tile>(count);
  start<BuildTiles>("tiles", list, 2);
  return list.tiles;
}

}  // namespace

int main() {
  const std::vector<int> bounds = {0, 1, 65, 65, 235};
  constexpr int T = 235, H = 2, D = 80;
  const std::vector<uint16_t> ones(T * H * D, 0x3f80);  // bf16
  uint16_t* inputs[4];
  for (auto& x : inputs) {
    x = device_memory<uint16_t>(ones.size());
    check(cudaMemcpy(x, ones.data(), 2 * ones.size(), cudaMemcpyHostToDevice), "copy");
  }
  int* cu = device_memory<int>(bounds.size());
  check(cudaMemcpy(cu, bounds.data(), 4 * bounds.size(), cudaMemcpyHostToDevice), "copy");
  VarlenAttentionBackward args = {};
  VarlenAttention& p = args.problem;
  p.q = inputs[0];
  p.k = inputs[1];
  p.v = inputs[2];
  args.grad = inputs[3];
  p.o = device_memory<uint16_t>(ones.size());
  p.lse = device_memory<float>(H * T);
  p.tiles = tiles(cu, 4, T, H, 64, false, p.tile_count);
  args.key_tiles = tiles(cu, 4, T, H, 64, true, args.key_tile_count);
  p.T = p.Tk = T;
  p.H = p.Hk = H;
  p.D = D;
  for (int64_t* stride : {&p.q_stride_t, &p.k_stride_t, &p.v_stride_t, &p.o_stride_t, &args.grad_stride_t, &args.dq_stride_t,
                          &args.dk_stride_t, &args.dv_stride_t}) {
    stride[0] = H * D;
    stride[1] = D;  // the stride of heads stands behind that of tokens
  }
  p.scale = 0.1f;
  p.bfloat16 = true;
  args.dq = device_memory<uint16_t>(ones.size());
  args.dk = device_memory<uint16_t>(ones.size());
  args.dv = device_memory<uint16_t>(ones.size());
  args.shift = device_memory<float>(H * T);
  args.delta = device_memory<float>(H * T);
  args.dq_sum = device_memory<float>(ones.size());
  start<ForwardSm80<true, D, 1>>("forward", p, 3);
  start<RowSums<true, D>>("row sums", args, 3);
  start<BackwardKeys<true, D, 1, 64, true, false>>("keys", args, 3);
  start<RoundDq<true, D>>("round", args, 3);
  start<BackwardQueries<true, D, 1, 64>>("queries", args, 3);
  p.tiles = tiles(cu, 4, T, H, 128, false, p.tile_count);
  args.key_tiles = tiles(cu, 4, T, H, 128, true, args.key_tile_count);
  start<RowSums<true, D>>("row sums", args, 3);
  start<BackwardKeys<true, D, 2, 32, true, false>>("keys, 128 rows", args, 3);
  start<RoundDq<true, D>>("round", args, 3);
  args.turns = device_memory<int>(H * T + 1);
  for (int resident : {12, 3}) {  // around the steps, and one block behind the other
    args.resident = resident;
    start<RowSums<true, D>>("row sums", args, 3);
    start<BackwardKeys<true, D, 2, 32, true, true>>("keys, in turn", args, 3, true);
    start<RoundDq<true, D>>("round", args, 3);
  }
  args.turns = nullptr;
  args.dq_sum = nullptr;
  start<BackwardKeys<true, D, 2, 32, false, false>>("keys, two passes", args, 3);
  start<BackwardQueries<true, D, 2, 32>>("queries, 128 rows", args, 3);
  std::printf("done\n");
  return 0;
}
