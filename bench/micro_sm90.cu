// Design data for the Hopper attention kernel: rates of single instructions and of pairs that must overlap, on every
// multiprocessor at once. Every kernel's result is checked. Prints one JSON object a line; bench/micro.py builds and runs it.
#include "micro_sm90_host.cuh"

template <int N, bool REGISTERS, bool MN, int WIDTH, int STEPS, bool SPLIT = false>
void wgmma_case(Device& device) {
  constexpr int K = 16 * STEPS, passes = 4000 / STEPS;
  auto kernel = wgmma_rate<N, REGISTERS, MN, WIDTH, STEPS, SPLIT>;
  allow_shared(kernel, MOST_SHARED);
  for (int groups = 1; groups <= 3; groups++) {
    Timing timing = measure(device, [&] {
      kernel<<<device.multiprocessors, 128 * groups, MOST_SHARED>>>(device.a, device.b, device.d, passes, device.clocks);
    });
    std::vector<float> d(groups * 64 * N);
    CHECK(cudaMemcpy(d.data(), device.d, d.size() * 4, cudaMemcpyDeviceToHost));
    bool right = true;
    for (int m = 0; m < groups * 64; m++)
      for (int n = 0; n < N; n++) {
        double sum = 0;
        for (int k = 0; k < K; k++) sum += device.host_a[m * K + k] * device.host_b[MN ? k * N + n : n * K + k];
        right &= d[m * N + n] == sum * passes;
      }
    char name[128];
    std::snprintf(name, sizeof name, "n%s A in %s, B %s, %s swizzle, %d warpgroups",
                  SPLIT ? "64 + n16" : std::to_string(N).c_str(), REGISTERS ? "registers" : "shared memory",
                  MN ? "MN-major" : "K-major",
                  SPLIT          ? "128 + 32-byte"
                  : WIDTH == 128 ? "128-byte"
                                 : "32-byte",
                  groups);
    report("wgmma", name, timing.cycles / (double(passes) * STEPS * groups), "clocks a k16 step", N / 2.0, timing, right);
  }
}

template <int SIXTEENTHS>
void exp2_case(Device& device) {
  for (int warps : {4, 8, 12, 16}) {
    constexpr int rounds = 2000;
    Timing timing = measure(device, [&] {
      exp2_rate<SIXTEENTHS><<<device.multiprocessors, 32 * warps>>>(-1.f, 0.f, device.out, rounds, device.clocks);
    });
    std::string name = "polynomial " + std::to_string(SIXTEENTHS) + "/16, " + std::to_string(warps) + " warps";
    report("exp2", name, rounds * 16.0 * 32 * warps / timing.cycles, "exponentials a clock",
           16.0 * 16 / std::max(1, 16 - SIXTEENTHS), timing,
           small(device, device.multiprocessors * 32 * warps, SIXTEENTHS ? 1e-4 : 1e-6));
  }
}

bool products_right(Device& device, const Timing& timing) {
  std::vector<float> d(64 * ROWS + 64 * D);
  CHECK(cudaMemcpy(d.data(), device.d, d.size() * 4, cudaMemcpyDeviceToHost));
  const double passes = double(timing.clocks[(device.multiprocessors - 1) * MOST_WARPGROUPS].units);
  for (int m = 0; m < 64; m++) {
    for (int n = 0; n < ROWS; n++) {
      double sum = 0;
      for (int k = 0; k < D; k++) sum += device.host_a[m * ROWS + k] * device.host_b[n * D + k];
      if (d[m * ROWS + n] != sum) return false;
    }
    for (int n = 0; n < D; n++) {
      double sum = 0;
      for (int k = 0; k < ROWS; k++) sum += device.host_a[m * ROWS + k] * device.host_b[k * D + n];
      if (d[64 * ROWS + m * D + n] != sum * passes) return false;
    }
  }
  return true;
}

// Rates of both roles, alone and together. A block of products has 560 tensor clocks; a round has 2048 exponentials.
template <Work WORK, int SIXTEENTHS>
void beside_case(Device& device) {
  auto kernel = beside<WORK, SIXTEENTHS>;
  allow_shared(kernel, MOST_SHARED);
  const double exponentials = WORK == EXP2 ? 16 * 128 : 56 * 128;
  for (int products = 0; products <= 2; products++)
    for (int others = 0; others <= 2; others++) {
      const int groups = products + others;
      if (!groups || groups > 3 || (!others && SIXTEENTHS)) continue;
      Timing timing = measure(device, [&] {
        kernel<<<device.multiprocessors, 128 * groups, MOST_SHARED>>>(device.a, device.b, device.d, device.out, products,
                                                                      300000, -1.f, 0.f, device.clocks);
      });
      bool right = !products || products_right(device, timing);
      if (others) {
        std::vector<float> out(device.multiprocessors * 128 * groups);
        CHECK(cudaMemcpy(out.data(), device.out, out.size() * 4, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < out.size(); i++)
          right &= int(i / 128 % groups) < products || out[i] <= (WORK == EXP2 ? SIXTEENTHS ? 1e-4 : 1e-6 : 5e-3);
      }
      double rate = units_per_clock(timing, products, groups) * exponentials,
             tensor = units_per_clock(timing, 0, products) * 560;
      char name[128], more[64];
      std::snprintf(name, sizeof name, "%d warpgroups of products, %d of %s, polynomial %d/16", products, others,
                    WORK == EXP2 ? "exp2" : "softmax", SIXTEENTHS);
      std::snprintf(more, sizeof more, ", \"tensor_share\": %.4f", tensor);
      report("beside", name, rate, "exponentials a clock", 16.0 * 16 / std::max(1, 16 - SIXTEENTHS), timing, right,
             more);
    }
}

// Rate of an operation by two warpgroups: alone, and beside a warpgroup of products with A in shared memory or in registers.
template <Operation OPERATION>
void operation_case(Device& device) {
  auto scores = operation_beside<OPERATION, true>, output = operation_beside<OPERATION, false>;
  allow_shared(scores, MOST_SHARED);
  allow_shared(output, MOST_SHARED);
  for (int which = 0; which < 3; which++) {
    const int products = which > 0, groups = products + 2;
    Timing timing = measure(device, [&] {
      (which == 1 ? scores : output)<<<device.multiprocessors, 128 * groups, MOST_SHARED>>>(
          device.a, device.b, device.out, products, 300000, -1.f, device.clocks);
    });
    const char* beside[] = {"alone", "beside n112, A in shared memory", "beside n80, A in registers"};
    char more[64];
    std::snprintf(more, sizeof more, ", \"tensor_share\": %.4f", units_per_clock(timing, 0, products) * 280);
    report("operation", std::string(OPERATION_NAMES[OPERATION]) + " " + beside[which],
           units_per_clock(timing, products, groups) * 16 * 128, "threads a clock", OPERATION == UNIT ? 16 : 128, timing,
           small(device, device.multiprocessors * 128 * groups, 1e-6), more);
  }
}

constexpr const char* RESCALE_NAMES[] = {"always", "when due", "never"};

template <int N, Order ORDER, int SIXTEENTHS, Rescale RESCALE = ALWAYS, bool ONES = false>
void skeleton_case(Device& device) {
  auto kernel = skeleton<N, ORDER, SIXTEENTHS, RESCALE, ONES>;
  allow_shared(kernel, MOST_SHARED);
  constexpr int blocks = 400, most = N <= 112 ? 3 : 2;
  constexpr double clocks = 5 * N / 2 + N / 16 * 40;  // the useful ones
  constexpr float scale = 0.01f;
  for (int groups = ORDER == TURNS ? 2 : 1; groups <= most; groups++) {
    Timing timing = measure(device, [&] {
      kernel<<<device.multiprocessors, 128 * groups, MOST_SHARED>>>(device.a, device.b, device.d, blocks, scale, 0,
                                                                    device.clocks);
    });
    std::vector<float> d(64 * D);
    CHECK(cudaMemcpy(d.data(), device.d, d.size() * 4, cudaMemcpyDeviceToHost));
    double worst = 0;
    for (int m = 0; m < 64; m++) {
      double score[N], highest = -1e30, total = 0;
      for (int n = 0; n < N; n++) {
        score[n] = 0;
        for (int k = 0; k < D; k++) score[n] += device.host_a[m * N + k] * device.host_b[n * D + k];
        highest = std::max(highest, score[n]);
      }
      for (double& s : score) total += s = std::exp2((s - highest) * scale);
      for (int n = 0; n < D; n++) {
        double sum = 0;
        for (int k = 0; k < N; k++) sum += score[k] / total * device.host_b[k * D + n];
        worst = std::max(worst, std::fabs(sum - d[m * D + n]));
      }
    }
    char name[160], more[96];
    std::snprintf(name, sizeof name, "%d rows, %s, polynomial %d/16, rescale %s%s, %d warpgroups", N, ORDER_NAMES[ORDER],
                  SIXTEENTHS, RESCALE_NAMES[RESCALE], ONES ? ", sums by wgmma" : "", groups);
    std::snprintf(more, sizeof more, ", \"tensor_share\": %.4f, \"largest_error\": %.5f",
                  clocks * groups * blocks / timing.cycles, worst);
    report("skeleton", name, timing.cycles / blocks, "clocks a block of all", clocks * groups, timing, worst < 0.02, more);
  }
}

struct Maps {
  CUtensorMap wide, narrow;
};

template <Load LOAD>
Maps maps_of(const bf16* qkv) {
  CUtensorMap wide = LOAD == CHUNKS    ? chunk_map(qkv, ROWS)
                     : LOAD == ROW_160 ? row_map(qkv, D, CU_TENSOR_MAP_SWIZZLE_NONE)
                                       : row_map(qkv, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  return {wide, row_map(qkv, 16, CU_TENSOR_MAP_SWIZZLE_32B)};
}

template <Load LOAD>
void tma_case(Device& device) {
  auto kernel = tma_rate<LOAD>;
  allow_shared(kernel, MOST_SHARED);
  const Maps maps = maps_of<LOAD>(device.qkv);
  for (int stages : {2, 4, 8})
    for (int apart : {0, 5}) {
      constexpr int tiles = 1024;
      Timing timing = measure(device, [&] {
        kernel<<<device.multiprocessors, 128, MOST_SHARED>>>(maps.wide, maps.narrow, device.qkv, tiles, stages, apart,
                                                             device.wrong, device.clocks);
      });
      int wrong;
      CHECK(cudaMemcpy(&wrong, device.wrong, sizeof wrong, cudaMemcpyDeviceToHost));
      double bytes = double(tiles) * (LOAD == COLUMNS_64 ? ROWS * 128 : TILE);
      char name[128];
      std::snprintf(name, sizeof name, "%s, %d tiles under way, blocks %s", LOAD_NAMES[LOAD], stages,
                    apart ? "at different rows" : "in step");
      report("tma", name, bytes / timing.cycles, "bytes a clock a multiprocessor", 21.0, timing, wrong == 0);
    }
}

void bytes_case(Device& device) {
  allow_shared(bytes_counted, MOST_SHARED);
  CUtensorMap map = chunk_map(device.qkv, ROWS);
  int* facts;
  CHECK(cudaMalloc(&facts, 2 * sizeof(int)));
  for (int row : {0, TOKENS - 50, TOKENS, -30})
    for (int more : {0, 16}) {
      CHECK(cudaMemset(facts, 0, 2 * sizeof(int)));
      bytes_counted<<<1, 128, MOST_SHARED>>>(map, device.qkv, row, TILE + more, facts);
      CHECK(cudaGetLastError());
      int found[2];
      CHECK(cudaMemcpy(found, facts, sizeof found, cudaMemcpyDeviceToHost));
      int inside = std::max(0, std::min(row + ROWS, TOKENS) - std::max(row, 0));
      std::string name = std::to_string(inside) + " of " + std::to_string(ROWS) + " rows in bounds, " +
                         (row < 0 ? "negative start, " : "") + (more ? "16 bytes more than" : "exactly") +
                         " the full box expected";
      report("bytes", name, found[0], "barrier flipped", !more, Timing{}, found[0] == !more && !found[1]);
    }
  CHECK(cudaFree(facts));
}

void wait_case(Device& device) {
  allow_shared(wait_coverage, MOST_SHARED);
  for (int late : {0, 100, 1000, 10000}) {
    Timing timing = measure(
        device, [&] { wait_coverage<<<device.multiprocessors, 128, MOST_SHARED>>>(device.a, device.b, late, device.clocks); });
    double earliest = 0, spread = 0;
    long long wrong = 0;
    for (int block = 0; block < device.multiprocessors; block++) {
      const Clocks* c = &timing.clocks[block * MOST_WARPGROUPS];
      double before = double(c[3].start - c[0].end), apart = double(c[3].end - c[0].end);
      earliest = block ? std::max(earliest, before) : before;
      spread = std::max(spread, std::fabs(apart));
      for (int warp = 0; warp < 4; warp++) wrong += c[warp].units;
    }
    char more[128];
    std::snprintf(more, sizeof more, ", \"wait_spread\": %.0f, \"values_destroyed\": %lld", spread, wrong);
    // Warp 0 overwrites the operands after its wait: where that was later than the late warp's start, its values must be whole.
    report("wait", "a warp " + std::to_string(late) + " clocks late", earliest, "clocks its start lies after warp 0's wait", 0,
           timing, wrong == 0 || earliest > 0, more);
  }
}

template <Load LOAD>
void shared_load_case(Device& device) {
  auto kernel = tma_shared<LOAD>;
  allow_shared(kernel, MOST_SHARED);
  const Maps maps = maps_of<LOAD>(device.qkv);
  for (int stages : {2, 4, 8}) {
    constexpr int tiles = 1024;
    Timing timing = measure(device, [&] {
      kernel<<<device.multiprocessors / 2 * 2, 128, MOST_SHARED>>>(maps.wide, maps.narrow, device.qkv, tiles, stages,
                                                                   device.wrong, device.clocks);
    });
    int wrong;
    CHECK(cudaMemcpy(&wrong, device.wrong, sizeof wrong, cudaMemcpyDeviceToHost));
    std::string name = std::string(LOAD_NAMES[LOAD]) + ", shared by two blocks, " + std::to_string(stages) + " tiles under way";
    report("shared", name, double(tiles) * TILE / timing.cycles, "bytes a clock a multiprocessor", 21.0, timing, wrong == 0);
  }
}

template <Load LOAD>
void loads_beside_case(Device& device) {
  auto kernel = loads_beside<LOAD>;
  allow_shared(kernel, MOST_SHARED);
  const Maps maps = maps_of<LOAD>(device.qkv);
  for (int products : {0, 2})
    for (int stages : {0, 2, 4, LOAD == PADDED ? 5 : 8}) {
      if (!products && !stages) continue;
      Timing timing = measure(device, [&] {
        kernel<<<device.multiprocessors, 128 * (products + 1), MOST_SHARED>>>(
            maps.wide, maps.narrow, device.a, device.b, device.d, products, stages, 300000, device.clocks);
      });
      bool right = !products || products_right(device, timing);
      char name[128], more[64];
      std::snprintf(name, sizeof name, "%s, %d warpgroups of products, %d tiles under way", LOAD_NAMES[LOAD], products, stages);
      std::snprintf(more, sizeof more, ", \"tensor_share\": %.4f", 560 * units_per_clock(timing, 0, products));
      double tiles = stages ? units_per_clock(timing, products, products + 1) : 0;
      report("loads", name, tiles * TILE, "bytes a clock a multiprocessor", 21.0, timing, right, more);
    }
}

int main(int count, char** names) {
  auto wanted = [&](const char* item) {
    return count == 1 || std::any_of(names + 1, names + count, [&](const char* name) { return !std::strcmp(name, item); });
  };
  Device device = prepare();
  if (wanted("wgmma")) {
    wgmma_case<80, true, true, 32, 7>(device);   // P V
    wgmma_case<80, false, true, 32, 7>(device);  // P V with P in shared memory
    wgmma_case<80, true, true, 32, 7, true>(device);
    wgmma_case<64, true, true, 128, 7>(device);
    wgmma_case<112, false, false, 32, 5>(device);  // Q K^T
    wgmma_case<112, false, false, 128, 4>(device);
    wgmma_case<112, true, false, 32, 5>(device);
    wgmma_case<128, false, false, 32, 5>(device);
    wgmma_case<128, true, false, 32, 5>(device);
    wgmma_case<176, false, false, 32, 5>(device);
    wgmma_case<80, true, false, 32, 5>(device);
    wgmma_case<96, true, true, 32, 7>(device);
  }
  if (wanted("exp2")) {
    exp2_case<0>(device);
    exp2_case<1>(device);
    exp2_case<2>(device);
    exp2_case<4>(device);
    exp2_case<16>(device);
  }
  if (wanted("beside")) {
    beside_case<EXP2, 0>(device);
    beside_case<EXP2, 1>(device);
    beside_case<EXP2, 2>(device);
    beside_case<EXP2, 4>(device);
    beside_case<EXP2, 16>(device);
    beside_case<SOFTMAX, 0>(device);
    beside_case<SOFTMAX, 2>(device);
  }
  if (wanted("operation")) {
    operation_case<UNIT>(device);
    operation_case<MULTIPLY>(device);
    operation_case<ADD>(device);
    operation_case<FUSED>(device);
    operation_case<MAXIMUM>(device);
    operation_case<PACK>(device);
  }
  if (wanted("skeleton")) {
    skeleton_case<112, SERIAL, 0>(device);
    skeleton_case<112, TOGETHER, 0>(device);
    skeleton_case<112, TOGETHER, 1>(device);
    skeleton_case<112, TOGETHER, 0, WHEN_DUE>(device);
    skeleton_case<112, TOGETHER, 1, WHEN_DUE>(device);
    skeleton_case<112, UNDER, 0>(device);
    skeleton_case<112, UNDER, 1>(device);
    skeleton_case<112, UNDER, 2>(device);
    skeleton_case<112, UNDER, 0, WHEN_DUE>(device);
    skeleton_case<112, UNDER, 1, WHEN_DUE>(device);
    skeleton_case<112, UNDER, 0, NEVER>(device);
    skeleton_case<112, UNDER, 0, WHEN_DUE, true>(device);
    skeleton_case<112, UNDER, 0, NEVER, true>(device);
    skeleton_case<112, TOGETHER, 0, NEVER>(device);
    skeleton_case<112, TOGETHER, 0, NEVER, true>(device);
    skeleton_case<112, TURNS, 0>(device);
    skeleton_case<112, TURNS, 0, WHEN_DUE>(device);
    skeleton_case<112, TURNS, 1, WHEN_DUE>(device);
    skeleton_case<96, TOGETHER, 0, WHEN_DUE>(device);
    skeleton_case<96, UNDER, 0, WHEN_DUE>(device);
    skeleton_case<176, TOGETHER, 0, WHEN_DUE>(device);
    skeleton_case<176, UNDER, 0, WHEN_DUE>(device);
    skeleton_case<176, TURNS, 0, WHEN_DUE>(device);
  }
  if (wanted("tma")) {
    tma_case<CHUNKS>(device);
    tma_case<SPLIT_64_16>(device);
    tma_case<ROW_160>(device);
    tma_case<FIVE_BOXES>(device);
    tma_case<COLUMNS_64>(device);
    tma_case<CONTIGUOUS>(device);
    tma_case<PADDED>(device);
  }
  if (wanted("loads")) {
    loads_beside_case<CHUNKS>(device);
    loads_beside_case<SPLIT_64_16>(device);
    loads_beside_case<PADDED>(device);
  }
  if (wanted("bytes")) bytes_case(device);
  if (wanted("wait")) wait_case(device);
  if (wanted("shared")) {
    shared_load_case<CHUNKS>(device);
    shared_load_case<SPLIT_64_16>(device);
  }
  return every_result_right ? 0 : 2;
}
