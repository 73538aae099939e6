#include "bwd_sm80.cuh"
#include "launch.h"
#include "start.cuh"

namespace qwen2vl_fast {
namespace {

using Args = VarlenAttentionBackward;

// Rows of a step: what the registers of M_TILES blocks of 16 rows leave room for.
template <int D, int M_TILES>
constexpr int KEY_STEP = M_TILES == 1 && D <= 80 ? 64 : 32;
template <int D, int M_TILES>
constexpr int QUERY_STEP = M_TILES == 1 || D == 64 ? 64 : 32;

template <bool BF16, int D, int M_TILES, bool ADD_DQ>
void keys(const Args& args, int device, void* stream) {
  launch<BackwardKeys<BF16, D, M_TILES, KEY_STEP<D, M_TILES>, ADD_DQ>>("varlen_attention_backward_keys", args,
                                                                       args.key_tile_count, device, stream);
}

template <bool BF16, int D, bool ADD_DQ>
void keys(const Args& args, int key_rows, int device, void* stream) {
  if (key_rows == 64) return keys<BF16, D, 1, ADD_DQ>(args, device, stream);
  if constexpr (D <= 80 && !ADD_DQ) {  // with dq beside them 128 rows would spill
    if (key_rows == 128) return keys<BF16, D, 2, ADD_DQ>(args, device, stream);
  }
  throw std::invalid_argument("key_rows: expected 64, or 128 for two passes up to D = 80, got " + std::to_string(key_rows));
}

template <bool BF16, int D, int M_TILES>
void queries(const Args& args, int device, void* stream) {
  launch<BackwardQueries<BF16, D, M_TILES, QUERY_STEP<D, M_TILES>>>("varlen_attention_backward_queries", args,
                                                                    args.problem.tile_count, device, stream);
}

template <bool BF16, int D>
void all(const Args& args, int rows, int key_rows, int device, void* stream) {
  const int64_t count = static_cast<int64_t>(args.problem.T) * args.problem.H;
  using Sums = RowSums<BF16, D>;
  if (count > 0) {
    launch<Sums>("varlen_attention_backward_row_sums", args, (count + Sums::ROWS - 1) / Sums::ROWS, device, stream);
  }
  if (args.dq_sum == nullptr) {
    if (args.key_tile_count > 0) keys<BF16, D, false>(args, key_rows, device, stream);
    if (args.problem.tile_count == 0) return;
    if (rows == 64) return queries<BF16, D, 1>(args, device, stream);
    if (rows == 128) return queries<BF16, D, 2>(args, device, stream);
    throw std::invalid_argument("rows: expected 64 or 128, got " + std::to_string(rows));
  }
  if (args.key_tile_count > 0) keys<BF16, D, true>(args, key_rows, device, stream);
  using Round = RoundDq<BF16, D>;
  if (count > 0) {
    launch<Round>("varlen_attention_backward_round", args, (count * (D / 8) + Round::THREADS - 1) / Round::THREADS, device, stream);
  }
}

template <bool BF16>
void all(const Args& args, int rows, int key_rows, int device, void* stream) {
  if (args.problem.D == 64) return all<BF16, 64>(args, rows, key_rows, device, stream);
  if (args.problem.D == 80) return all<BF16, 80>(args, rows, key_rows, device, stream);
  return all<BF16, 128>(args, rows, key_rows, device, stream);
}

}  // namespace

void backward(const Args& args, int rows, int key_rows, int device, void* stream) {
  const VarlenAttention& p = args.problem;
  check_problem(p);
  check_rows("grad", args.grad, args.grad_stride_t, args.grad_stride_h, p.T == 0);
  check_rows("dq", args.dq, args.dq_stride_t, args.dq_stride_h, p.T == 0);
  check_rows("dk", args.dk, args.dk_stride_t, args.dk_stride_h, p.Tk == 0);
  check_rows("dv", args.dv, args.dv_stride_t, args.dv_stride_h, p.Tk == 0);
  require(args.key_tile_count >= 0, "key_tile_count: expected no negative number");
  require(args.key_tile_count == 0 || args.key_tiles != nullptr, "key_tiles: null pointer");
  require(p.T == 0 || (args.shift != nullptr && args.delta != nullptr), "shift, delta: null pointer");
  if (p.T == 0 && args.key_tile_count == 0) return;
  const CurrentDevice current(device, "varlen_attention_backward");
  if (p.bfloat16) return all<true>(args, rows, key_rows, device, stream);
  all<false>(args, rows, key_rows, device, stream);
}

}  // namespace qwen2vl_fast
