// Forward of variable-length attention for Hopper (sm_90a): TMA, wgmma with P in registers, the native head dim.
//
// A block is one producer warpgroup and ROWS / 64 consumer warpgroups of 64 query rows each; it stays resident, with one consumer beside
// another such block, and takes one tile of work after another. The producer's first warp loads tiles, Q, K and V; its second zeroes the rows of V past the end of a
// segment, since 0 * NaN of the next segment would be NaN. A consumer issues S = Q K^T of the next key block, then O += P V of the
// current one, and exponentiates that S while P V runs; the next key block may be the first of the next tile, so that neither
// the start of a tile nor its end leaves the tensor cores idle. A tile's key blocks go from the last to the first: only the
// first one processed has a mask, unless the tile is causal. docs/hopper.md has the counts.
#pragma once

#include "chosen_sm90.cuh"
#include "layout_sm90.cuh"
#include "softmax_sm90.cuh"
#include "varlen_attention.h"
#include "wgmma.cuh"

namespace qwen2vl_fast {

struct ForwardSm90Args {
  VarlenAttention problem;
  // [tokens, heads, D] as {D, tokens, heads}; a box is 64 (wide) or 16 (narrow) columns of all rows of a block. v has one kind.
  TensorMap q_wide, q_narrow, k_wide, k_narrow, v;
  float scale_log2;  // scale * log2(e)
  uint32_t zero;     // 0, which the compiler can't know
};

// Options: TURNS, warpgroups issue their products one after the other, else all would multiply at once and then exponentiate at once;
// POLYNOMIAL, of 16 exponentials, and REFERENCE: softmax_sm90.cuh; NARROW, q, k and v as groups of 16 columns only.
template <bool BF16, int D, int ROWS, int KEYS, int STAGES, bool CAUSAL, class Options = ChosenSm90>
struct ForwardSm90 {
  static constexpr int CONSUMERS = ROWS / 64;
  static constexpr int THREADS = 128 * (CONSUMERS + 1);
  static constexpr int BLOCKS = CONSUMERS == 1 ? 2 : 1;  // of a multiprocessor
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : CONSUMERS == 2 ? 232 : 216;
  static constexpr bool TURNS = Options::TURNS && CONSUMERS > 1;
  static_assert(CONSUMERS >= 1 && CONSUMERS <= 3);

  using QLayout = Layout<D, ROWS, Options::NARROW ? 0 : D / 64>;
  using KLayout = Layout<D, KEYS, Options::NARROW ? 0 : D / 64>;
  using VLayout = Layout<D, KEYS, Options::NARROW ? 0 : (D + 63) / 64>;  // one kind of group: n64 + n16 takes longer than n80
  static constexpr int V_ROW = VLayout::WIDE > 0 ? 128 : 32;  // bytes

  // Shared memory, in bytes from a multiple of 1024 on (the period of the 128-byte swizzle).
  static constexpr int SLOTS = 2;  // tiles whose Q is there
  static constexpr int Q = 0;
  static constexpr int K = Q + SLOTS * QLayout::STRIDE;
  static constexpr int V = K + STAGES * KLayout::STRIDE;
  static constexpr int TILES = V + STAGES * VLayout::STRIDE;
  static constexpr int Q_FULL = TILES + SLOTS * 32;
  static constexpr int Q_EMPTY = Q_FULL + SLOTS * 8;
  static constexpr int K_FULL = Q_EMPTY + SLOTS * 8;
  static constexpr int K_EMPTY = K_FULL + STAGES * 8;
  static constexpr int V_FULL = K_EMPTY + STAGES * 8;
  static constexpr int V_EMPTY = V_FULL + STAGES * 8;
  static constexpr int V_TAIL = V_EMPTY + STAGES * 8;
  static constexpr int SMEM = V_TAIL + STAGES * 8 + 1024;
  static_assert(KEYS % 16 == 0 && BLOCKS * (SMEM + 1024) <= 233472);  // of a multiprocessor, which takes 1024 for each block

  static constexpr int TURN = 1;  // the first of CONSUMERS named barriers

  using Softmax = SoftmaxSm90<BF16, KEYS, Options>;
  using Scores = typename Softmax::Scores;
  using Output = float[D / 2];
  using Probabilities = uint32_t[KEYS / 16][4];

  // A place in a ring, and the parity of the round.
  template <int SIZE>
  struct Ring {
    int at = 0;
    uint32_t parity = 0;
    DEV void next() {
      if (++at == SIZE) at = 0, parity ^= 1;
    }
  };

  // What consumers are told of a tile. No rows: the list has ended.
  struct Work {
    int q_row, rows, keys, head, diagonal;
  };

  static DEV int key_blocks(int keys) { return (keys + KEYS - 1) / KEYS; }

  static DEV void run(const ForwardSm90Args& args) {
    const uint32_t smem = (shared_memory() + 1023) & ~1023u;
    if (thread_index() == 0) {
      for (int i = 0; i < SLOTS; ++i) {
        mbarrier_init(smem + Q_FULL + 8 * i, 1);
        mbarrier_init(smem + Q_EMPTY + 8 * i, 4 * CONSUMERS + 1);
      }
      for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(smem + K_FULL + 8 * i, 1);
        mbarrier_init(smem + V_FULL + 8 * i, 1);
        mbarrier_init(smem + V_TAIL + 8 * i, 1);
        mbarrier_init(smem + K_EMPTY + 8 * i, 4 * CONSUMERS);
        mbarrier_init(smem + V_EMPTY + 8 * i, 4 * CONSUMERS);
      }
      fence_mbarrier_init();
    }
    barrier();
    const int warp = warp_uniform(thread_index() / 32);
    if (warp < 4) {
      give_registers<PRODUCER_REGISTERS>();
      if (warp == 0 && thread_index() == 0) produce(args, smem);
      if (warp == 1) zero_tails(smem);
    } else {
      take_registers<CONSUMER_REGISTERS>();
      consume(args, smem, warp / 4 - 1);
    }
  }

  // Producer ---------------------------------------------------------------------------------------------------------------

  template <class Where>
  static DEV void load(uint32_t to, const TensorMap& wide, const TensorMap& narrow, uint32_t barrier, int row, int head) {
#pragma unroll
    for (int i = 0; i < Where::WIDE; ++i) tma_load(to + i * Where::ROWS * 128, wide, barrier, 64 * i, row, head);
#pragma unroll
    for (int i = 0; i < Where::NARROW; ++i)
      tma_load(to + Where::NARROW_OFFSET + i * Where::ROWS * 32, narrow, barrier, 64 * Where::WIDE + 16 * i, row, head);
  }

  static DEV void produce(const ForwardSm90Args& args, uint32_t smem) {
    const VarlenAttention& problem = args.problem;
    const int group = problem.H / problem.Hk;
    Ring<SLOTS> slot;
    Ring<STAGES> stage;
#pragma unroll 1
    for (int t = block_index(); t < problem.tile_count; t += block_count()) {
      const Tile tile = problem.tiles[t];
      if (tile.rows == 0) continue;
      mbarrier_wait(smem + Q_EMPTY + 8 * slot.at, slot.parity ^ 1);
      put_tile(smem + TILES + 32 * slot.at, tile);
      const uint32_t q_full = smem + Q_FULL + 8 * slot.at;
      mbarrier_arrive_expect(q_full, QLayout::BYTES);
      load<QLayout>(smem + Q + slot.at * QLayout::STRIDE, args.q_wide, args.q_narrow, q_full, tile.q_row, tile.head);
      slot.next();
      const int key_head = tile.head / group;
      const int last = key_blocks(tile.keys) - 1;
#pragma unroll 1
      for (int block = last; block >= 0; --block, stage.next()) {
        const int row = tile.k_row + block * KEYS;
        const uint32_t k_full = smem + K_FULL + 8 * stage.at;
        mbarrier_wait(smem + K_EMPTY + 8 * stage.at, stage.parity ^ 1);
        mbarrier_arrive_expect(k_full, KLayout::BYTES);
        load<KLayout>(smem + K + stage.at * KLayout::STRIDE, args.k_wide, args.k_narrow, k_full, row, key_head);
        const bool partial = block == last && tile.keys % KEYS != 0;
        const uint32_t v_full = smem + (partial ? V_TAIL : V_FULL) + 8 * stage.at;
        mbarrier_wait(smem + V_EMPTY + 8 * stage.at, stage.parity ^ 1);
        mbarrier_arrive_expect(v_full, VLayout::BYTES);
        load<VLayout>(smem + V + stage.at * VLayout::STRIDE, args.v, args.v, v_full, row, key_head);
      }
    }
    mbarrier_wait(smem + Q_EMPTY + 8 * slot.at, slot.parity ^ 1);
    put_tile(smem + TILES + 32 * slot.at, Tile{});
    mbarrier_arrive(smem + Q_FULL + 8 * slot.at);
  }

  static DEV void put_tile(uint32_t to, const Tile& tile) {
    store_shared(to, Words4{uint32_t(tile.q_row), uint32_t(tile.rows), uint32_t(tile.keys), uint32_t(tile.head)});
    store_shared(to + 16, uint32_t(tile.diagonal));
  }

  static DEV Work get_tile(uint32_t from) {
    const Words4 x = load_shared_16(from);
    Work work{int(x.word[0]), int(x.word[1]), int(x.word[2]), int(x.word[3]), 0};
    if (CAUSAL) work.diagonal = int(load_shared_16(from + 16).word[0]);
    return work;
  }

  // Zeroes the rows of V that lie past the segment, once they have landed, and completes V's mbarrier in the producer's place.
  static DEV void zero_tails(uint32_t smem) {
    Ring<SLOTS> slot;
    int stage = 0;
    uint32_t parities = 0;  // a stage's bit flips with each of its tails
#pragma unroll 1
    while (true) {
      mbarrier_wait(smem + Q_FULL + 8 * slot.at, slot.parity);
      const Work work = get_tile(smem + TILES + 32 * slot.at);
      warp_barrier();
      if (thread_index() % 32 == 0) mbarrier_arrive(smem + Q_EMPTY + 8 * slot.at);
      slot.next();
      if (work.rows == 0) return;
      const int valid = work.keys % KEYS;
      if (valid != 0) {
        mbarrier_wait(smem + V_TAIL + 8 * stage, parities >> stage & 1);
        parities ^= 1u << stage;
        const uint32_t v = smem + V + stage * VLayout::STRIDE;
        for (int group = 0; group < VLayout::WIDE + VLayout::NARROW; ++group)
          zero(v + (group * KEYS + valid) * V_ROW, (KEYS - valid) * V_ROW);
        fence_proxy_async();
        warp_barrier();
        if (thread_index() % 32 == 0) mbarrier_arrive(smem + V_FULL + 8 * stage);
      }
      stage = (stage + key_blocks(work.keys)) % STAGES;
    }
  }

  static DEV void zero(uint32_t from, int bytes) {
#pragma unroll 1
    for (int i = 16 * (thread_index() % 32); i < bytes; i += 16 * 32) store_shared(from + i, Words4{0, 0, 0, 0});
  }

  // Consumers --------------------------------------------------------------------------------------------------------------

  static DEV void consume(const ForwardSm90Args& args, uint32_t smem, int warpgroup) {
    const int lane = thread_index() % 32;
    const int row = 64 * warpgroup + 16 * (thread_index() / 32 % 4) + lane / 4;  // of the tile; and row + 8
    const float scale = args.scale_log2;
    Ring<SLOTS> slot;
    Ring<STAGES> k, v;
    Scores s;
    Output o;
    Probabilities p;
    Softmax state;
    state.begin();

    if (TURNS && warpgroup == CONSUMERS - 1) named_barrier_arrive(TURN, 256);
    Work work = next_tile(args, smem, slot, row);
    if (work.rows == 0) return;
    int block = key_blocks(work.keys) - 1;

    // S = Q K^T of the next key block and, under way while S is exponentiated, O += P V of the current one.
    auto products = [&] {
      mbarrier_wait(smem + K_FULL + 8 * k.at, k.parity);
      if (TURNS) named_barrier_wait(TURN + warpgroup, 256);
      wgmma_fence();
      scores(s, smem, slot.at, k.at, warpgroup);
      wgmma_commit();
      accumulate(o, p, smem, v.at);
      wgmma_commit();
      if (TURNS) named_barrier_arrive(TURN + (warpgroup + 1) % CONSUMERS, 256);
      wgmma_wait<1>();
    };
    auto release_k = [&] {
      if (lane == 0) mbarrier_arrive(smem + K_EMPTY + 8 * k.at);
      k.next();
    };
    // The end of both, and V of the block whose P is nearly known.
    auto finish = [&] {
      const int used = v.at;
      v.next();
      // The next V is awaited here, at an address that depends on the exponentials so far: else ptxas moves the wait below above
      // them, and P V no longer runs under them.
      mbarrier_wait(smem + V_FULL + 8 * v.at + ((float_bits(state.sum[0]) ^ float_bits(state.sum[1])) & args.zero), v.parity);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(smem + V_EMPTY + 8 * used);
    };

    mbarrier_wait(smem + K_FULL + 8 * k.at, k.parity);
    wgmma_fence();
    scores(s, smem, slot.at, k.at, warpgroup);
    wgmma_commit();
    wgmma_wait<0>();
    release_k();
    clear(o);
    mask(s, work, row, block);
    float factor[2];
    state.exponentiate_exactly(s, scale, factor);
    pack_all(p, s);
    mbarrier_wait(smem + V_FULL + 8 * v.at, v.parity);

#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (--block; block >= 0; --block) {
        products();
        const bool masked = CAUSAL && (block + 1) * KEYS > first_masked(work, warpgroup);
        if (masked) mask(s, work, row, block);
        if constexpr (Options::REFERENCE == Reference::FIRST) {
          const float before[2] = {state.sum[0], state.sum[1]};
          state.exponentiate(s, scale);
          finish();
          pack_all(p, s);
          if (any_row(work, row, !(state.sum[0] - before[0] <= Softmax::LIMIT), !(state.sum[1] - before[1] <= Softmax::LIMIT))) {
            state.sum[0] = before[0];
            state.sum[1] = before[1];
            scores_of_warp(s, smem, slot.at, k.at, warpgroup);
            if (masked) mask(s, work, row, block);
            state.exponentiate_exactly(s, scale, factor);
            rescale(o, factor);
            pack_all(p, s);
          }
        } else {
          state.exponentiate_exactly(s, scale, factor);
          finish();
          if (Options::REFERENCE == Reference::ALWAYS || any_row(work, row, factor[0] != 1.0f, factor[1] != 1.0f)) rescale(o, factor);
          pack_all(p, s);
        }
        release_k();
      }
      // The first key block of the next tile goes with the last one of this tile.
      if (lane == 0) mbarrier_arrive(smem + Q_EMPTY + 8 * slot.at);
      slot.next();
      const Work ahead = next_tile(args, smem, slot, row);
      if (ahead.rows == 0) break;
      block = key_blocks(ahead.keys) - 1;
      products();
      const Softmax done = state;
      state.begin();
      mask(s, ahead, row, block);
      release_k();
      state.exponentiate_exactly(s, scale, factor);
      finish();
      store(args, work, row, o, done);
      work = ahead;
      clear(o);
      pack_all(p, s);
    }
    wgmma_fence();
    accumulate(o, p, smem, v.at);
    wgmma_commit();
    wgmma_wait<0>();
    store(args, work, row, o, state);
  }

  // The next tile that has keys; rows without keys are written on the way.
  static DEV Work next_tile(const ForwardSm90Args& args, uint32_t smem, Ring<SLOTS>& slot, int row) {
#pragma unroll 1
    while (true) {
      mbarrier_wait(smem + Q_FULL + 8 * slot.at, slot.parity);
      const Work work = get_tile(smem + TILES + 32 * slot.at);
      warp_barrier();  // all lanes have read it: lane 0 may free the slot
      if (work.rows == 0 || work.keys > 0) return work;
      store_nothing(args, work, row);
      if (thread_index() % 32 == 0) mbarrier_arrive(smem + Q_EMPTY + 8 * slot.at);
      slot.next();
    }
  }

  // Whether some row of the warp says so. Rows that are not this tile's may hold anything and must not decide how its rows are rounded.
  static DEV bool any_row(const Work& work, int row, bool first, bool second) {
    return any(((row < work.rows) & first) | ((row + 8 < work.rows) & second));
  }

  static DEV void clear(Output& o) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
  }

  // S = Q K^T of one key block.
  static DEV void scores(Scores& s, uint32_t smem, int slot, int stage, int warpgroup) {
    const uint32_t q_wide = (smem + Q + slot * QLayout::STRIDE + warpgroup * 64 * 128) >> 4;
    const uint32_t q_narrow = (smem + Q + slot * QLayout::STRIDE + warpgroup * 64 * 32) >> 4;
    const uint32_t k = (smem + K + stage * KLayout::STRIDE) >> 4;
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      WgmmaShared<BF16, KEYS>::run(s, (step < 4 * QLayout::WIDE ? q_wide : q_narrow) + (QLayout::offset(step) >> 4),
                                   k + (KLayout::offset(step) >> 4), KLayout::high(step), step > 0);
  }

  // O += P V of one key block.
  static DEV void accumulate(Output& o, const Probabilities& p, uint32_t smem, int stage) {
    const uint32_t v = (smem + V + stage * VLayout::STRIDE) >> 4;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step)
      WgmmaRegisters<BF16, D>::run(o, p[step], (v | (KEYS * V_ROW >> 4 << 16)) + step * (16 * V_ROW >> 4), VLayout::high(0));
  }

  // Key blocks that end beyond this have keys that some row of the warpgroup doesn't see.
  static DEV int first_masked(const Work& work, int warpgroup) { return 64 * warpgroup + work.diagonal + 1; }

  static DEV void mask(Scores& s, const Work& work, int row, int block) {
    const int column = block * KEYS + 2 * (thread_index() % 4);
    int limit[2] = {work.keys - column, work.keys - column};
    if (CAUSAL)
      for (int r = 0; r < 2; ++r) limit[r] = min(limit[r], row + 8 * r + work.diagonal + 1 - column);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (8 * (i / 4) + i % 2 >= limit[i / 2 % 2]) s[i] = -INFINITY;
  }

  // S of one warp's 16 rows by its own products: a warpgroup product would need all four warps. Same layout.
  static DEV void scores_of_warp(Scores& s, uint32_t smem, int slot, int stage, int warpgroup) {
    const uint32_t lane = thread_index() % 32;
    const uint32_t q = smem + Q + slot * QLayout::STRIDE, k = smem + K + stage * KLayout::STRIDE;
    const uint32_t q_row = 64 * warpgroup + thread_index() / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[4];
      load_matrices(a, QLayout::address(q, q_row, step, lane / 16));
      const uint32_t from = KLayout::address(k, lane / 16 * 8 + lane % 8, step, lane / 8 % 2);
#pragma unroll
      for (int i = 0; i < KEYS / 16; ++i) {
        uint32_t b[4];
        load_matrices(b, from + i * 16 * (step < 4 * KLayout::WIDE ? 128 : 32));
        mma_16x8x16<BF16>(reinterpret_cast<float(&)[4]>(s[8 * i]), a, b[0], b[1]);
        mma_16x8x16<BF16>(reinterpret_cast<float(&)[4]>(s[8 * i + 4]), a, b[2], b[3]);
      }
    }
  }

  // The accumulator's layout is, pair by pair, that of the operand.
  static DEV void pack_all(Probabilities& p, const Scores& s) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) p[i][j] = pack<BF16>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
  }

  static DEV void rescale(Output& o, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= factor[i / 2 % 2];
  }

  static DEV void store(const ForwardSm90Args& args, const Work& work, int row, const Output& o, const Softmax& state) {
    const VarlenAttention& problem = args.problem;
    const int lane = thread_index() % 32;
    const int quad = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = state.sum[r] + shuffle_xor(state.sum[r], 1);
      sum += shuffle_xor(sum, 2);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      uint32_t x[D / 8];
#pragma unroll
      for (int i = 0; i < D / 8; ++i) x[i] = pack<BF16>(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
      const bool valid = row + 8 * r < work.rows;
      const int64_t token = work.q_row + row + 8 * r;
      if (valid && quad == 0)
        problem.lse[work.head * int64_t(problem.T) + token] = sum == 0.0f ? -INFINITY : (state.top[r] + log2f(sum)) * 0.6931471805599453f;
      uint16_t* out = static_cast<uint16_t*>(problem.o) + token * problem.o_stride_t + work.head * problem.o_stride_h;
      // Four lanes hold 32 columns of a row in pairs; after a transposition each holds 8 neighbours.
#pragma unroll
      for (int i = 0; i + 4 <= D / 8; i += 4) {
        uint32_t y[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
        transpose(y, quad);
        if (valid) *reinterpret_cast<Words4*>(out + 8 * (i + quad)) = Words4{y[0], y[1], y[2], y[3]};
      }
#pragma unroll
      for (int i = D / 32 * 4; i < D / 8; ++i)
        if (valid) *reinterpret_cast<uint32_t*>(out + 8 * i + 2 * quad) = x[i];
    }
  }

  // y[j] of lane i of a group of four <-> y[i] of lane j.
  static DEV void transpose(uint32_t (&y)[4], int quad) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if ((i & bit) == 0) {
          const bool upper = quad & bit;
          const uint32_t sent = upper ? y[i] : y[i + bit];
          const uint32_t got = shuffle_xor(sent, bit);
          (upper ? y[i] : y[i + bit]) = got;
        }
  }

  static DEV void store_nothing(const ForwardSm90Args& args, const Work& work, int row) {
    const VarlenAttention& problem = args.problem;
    const int quad = thread_index() % 4;
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= work.rows) continue;
      const int64_t token = work.q_row + row + 8 * r;
      if (quad == 0) problem.lse[work.head * int64_t(problem.T) + token] = -INFINITY;
      uint16_t* out = static_cast<uint16_t*>(problem.o) + token * problem.o_stride_t + work.head * problem.o_stride_h;
      for (int i = quad; i < D / 8; i += 4) *reinterpret_cast<Words4*>(out + 8 * i) = Words4{0, 0, 0, 0};
    }
  }
};

// Calls run(kernel) with the kernel (an empty struct) for a head dim and the rows of a tile; false where there is none. All sizes at
// D = 80 take as many keys a block: the bits of a segment must not depend on the pack that the size was chosen for.
template <bool BF16, bool CAUSAL, class Run>
bool choose_forward_sm90(int D, int rows, Run run) {
  if (D == 80 && rows == 192) return run(ForwardSm90<BF16, 80, 192, ChosenSm90::KEYS, ChosenSm90::STAGES, CAUSAL>{}), true;
  if (D == 80 && rows == 128) return run(ForwardSm90<BF16, 80, 128, ChosenSm90::KEYS, ChosenSm90::STAGES, CAUSAL>{}), true;
  if (D == 80 && rows == 64) return run(ForwardSm90<BF16, 80, 64, ChosenSm90::KEYS, 2, CAUSAL>{}), true;
  if (D == 64 && rows == 128) return run(ForwardSm90<BF16, 64, 128, 128, 3, CAUSAL>{}), true;
  if (D == 128 && rows == 128) return run(ForwardSm90<BF16, 128, 128, 128, 2, CAUSAL>{}), true;
  return false;
}

}  // namespace qwen2vl_fast
