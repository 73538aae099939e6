// Small kernels in the words of ptx.cuh, for tests/host/test_twins.py: each lays one operation bare, or does one thing wrong.
#include "../../csrc/host/entry.h"
#include "../../csrc/wgmma.cuh"

using namespace qwen2vl_fast;

namespace {

// An image of shared memory, put there word by word.
DEV void fill(uint32_t memory, const uint32_t* image, int words) {
  for (int i = thread_index(); i < words; i += 128) store_shared(memory + 4 * i, image[i]);
  fence_proxy_async();
  barrier();
}

DEV uint32_t aligned_memory() { return (shared_memory() + 1023) & ~1023u; }

struct Arguments {
  const uint32_t* image;  // of shared memory
  int words;
  const uint32_t* in;     // [128, ...] words a thread
  uint32_t* out;
  const int* numbers;
  const void* global;
};

template <int SMEM_>
struct OneWarpgroup {
  static constexpr int THREADS = 128, BLOCKS = 1, SMEM = SMEM_;
};

// in [32, 10]: a, b, c; out [32, 4].
template <bool BF16>
struct Mma : OneWarpgroup<1024> {
  static void run(const Arguments& args) {
    if (thread_index() >= 32) return;
    const uint32_t* in = args.in + 10 * thread_index();
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = host::bits_float(in[6 + i]);
    mma_16x8x16<BF16>(c, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) args.out[4 * thread_index() + i] = host::float_bits(c[i]);
  }
};

// numbers: transposed, the byte offset of each lane's row. out [32, 4].
struct Matrices : OneWarpgroup<4096> {
  static void run(const Arguments& args) {
    fill(shared_memory(), args.image, args.words);
    if (thread_index() >= 32) return;
    uint32_t x[4];
    const uint32_t row = shared_memory() + args.numbers[1 + thread_index()];
    args.numbers[0] ? load_matrices_transposed(x, row) : load_matrices(x, row);
    for (int i = 0; i < 4; ++i) args.out[4 * thread_index() + i] = x[i];
  }
};

// numbers: accumulate, then the low words of a and b from a start of 0, and the high word. in, out [128, N / 2].
template <bool BF16, int N>
struct Shared : OneWarpgroup<65536> {
  static void run(const Arguments& args) {
    const uint32_t memory = aligned_memory();
    fill(memory, args.image, args.words);
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = host::bits_float(args.in[thread_index() * (N / 2) + i]);
    wgmma_fence();
    WgmmaShared<BF16, N>::run(d, args.numbers[1] + (memory >> 4), args.numbers[2] + (memory >> 4), args.numbers[3],
                              args.numbers[0]);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) args.out[thread_index() * (N / 2) + i] = host::float_bits(d[i]);
  }
};

// numbers: low and high word of b. in [128, 4 + N / 2]: a, d; out [128, N / 2].
template <bool BF16, int N>
struct FromRegisters : OneWarpgroup<65536> {
  static void run(const Arguments& args) {
    const uint32_t memory = aligned_memory();
    fill(memory, args.image, args.words);
    const uint32_t* in = args.in + thread_index() * (4 + N / 2);
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = host::bits_float(in[4 + i]);
    wgmma_fence();
    WgmmaRegisters<BF16, N>::run(d, a, args.numbers[0] + (memory >> 4), args.numbers[1]);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) args.out[thread_index() * (N / 2) + i] = host::float_bits(d[i]);
  }
};

// numbers: sizes 0..3, strides 4..6, box 7..10, swizzle 11, first coordinates 12..15, bytes announced 16. out: shared memory.
struct TmaImage : OneWarpgroup<65536> {
  struct Args {
    Arguments plain;
    TensorMap map;
  };
  static void run(const Args& args) {
    const uint32_t memory = aligned_memory(), full = memory + 60000;
    const int* n = args.plain.numbers;
    if (thread_index() == 0) {
      mbarrier_init(full, 1);
      fence_mbarrier_init();
    }
    barrier();
    if (thread_index() == 0) {
      mbarrier_arrive_expect(full, n[16]);
      host::tma_load(memory, args.map, full, n[12], n[13], n[14], n[15]);
    }
    mbarrier_wait(full, 0);
    for (int i = thread_index(); i < args.plain.words; i += 128) args.plain.out[i] = host::float_bits(load_shared_float(memory + 4 * i));
  }
};

struct Conversions : OneWarpgroup<1024> {
  static void run(const Arguments& args) {
    for (int i = thread_index(); i < args.words; i += 128) {
      const uint32_t* in = args.in + 2 * i;
      const float low = host::bits_float(in[0]), high = host::bits_float(in[1]);
      const uint32_t b = pack<true>(low, high), h = pack<false>(low, high);
      float back[4];
      unpack<true>(back[0], back[1], b);
      unpack<false>(back[2], back[3], h);
      args.out[6 * i] = b;
      args.out[6 * i + 1] = h;
      for (int j = 0; j < 4; ++j) args.out[6 * i + 2 + j] = host::float_bits(back[j]);
    }
  }
};

}  // namespace

HOST_ENTRY int mma(const Arguments* args, int bf16, const host::Run* run) {
  return bf16 ? host::run_kernel<Mma<true>>(*args, *run) : host::run_kernel<Mma<false>>(*args, *run);
}

HOST_ENTRY int matrices(const Arguments* args, const host::Run* run) { return host::run_kernel<Matrices>(*args, *run); }

HOST_ENTRY int wgmma_shared(const Arguments* args, int bf16, int n, const host::Run* run) {
  if (bf16 && n == 64) return host::run_kernel<Shared<true, 64>>(*args, *run);
  if (bf16 && n == 112) return host::run_kernel<Shared<true, 112>>(*args, *run);
  if (!bf16 && n == 112) return host::run_kernel<Shared<false, 112>>(*args, *run);
  if (bf16 && n == 176) return host::run_kernel<Shared<true, 176>>(*args, *run);
  return host::finish(*run, "no such shape");
}

HOST_ENTRY int wgmma_registers(const Arguments* args, int bf16, int n, const host::Run* run) {
  if (bf16 && n == 64) return host::run_kernel<FromRegisters<true, 64>>(*args, *run);
  if (bf16 && n == 80) return host::run_kernel<FromRegisters<true, 80>>(*args, *run);
  if (!bf16 && n == 80) return host::run_kernel<FromRegisters<false, 80>>(*args, *run);
  if (bf16 && n == 128) return host::run_kernel<FromRegisters<true, 128>>(*args, *run);
  return host::finish(*run, "no such shape");
}

HOST_ENTRY int tma(const Arguments* args, const host::Run* run) {
  const int* n = args->numbers;
  TmaImage::Args all = {*args, {}};
  const int64_t sizes[4] = {n[0], n[1], n[2], n[3]}, strides[3] = {n[4], n[5], n[6]};
  const int box[4] = {n[7], n[8], n[9], n[10]};
  if (const char* refused = host::encode_tensor_map(all.map, args->global, 4, sizes, strides, box, n[11])) return host::finish(*run, refused);
  return host::run_kernel<TmaImage>(all, *run);
}

HOST_ENTRY int conversions(const Arguments* args, const host::Run* run) { return host::run_kernel<Conversions>(*args, *run); }
