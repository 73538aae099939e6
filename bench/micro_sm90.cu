// Design data for the Hopper attention kernel: rates of single instructions and of pairs that must overlap, on every
// multiprocessor at once. Every kernel's result is checked. Prints one JSON object a line; bench/micro.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "micro_sm90_loads.cuh"

#define CHECK(call)                                                                       \
  do {                                                                                    \
    cudaError_t error = call;                                                             \
    if (error != cudaSuccess) {                                                           \
      std::printf("{\"error\": \"%s, line %d\"}\n", cudaGetErrorString(error), __LINE__); \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (0)

struct Device {
  int multiprocessors;
  Clocks* clocks;
  float *d, *out;
  bf16 *a, *b, *qkv;
  int* wrong;
  std::vector<float> host_a, host_b;
};

struct Timing {
  double cycles, milliseconds;  // slowest warpgroup of the median multiprocessor; of the whole launch
  std::vector<Clocks> clocks;
};

template <class Launch>
Timing measure(Device& device, Launch launch) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times;
  Timing timing{};
  for (int i = 0; i < 4; i++) {
    CHECK(cudaMemset(device.clocks, 0, sizeof(Clocks) * MOST_WARPGROUPS * device.multiprocessors));
    CHECK(cudaMemset(device.wrong, 0, sizeof(int)));
    CHECK(cudaEventRecord(start));
    launch();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
    if (i) times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  timing.milliseconds = times[1];
  timing.clocks.resize(MOST_WARPGROUPS * device.multiprocessors);
  CHECK(cudaMemcpy(timing.clocks.data(), device.clocks, sizeof(Clocks) * timing.clocks.size(), cudaMemcpyDeviceToHost));
  std::vector<double> spans;
  for (int block = 0; block < device.multiprocessors; block++) {
    long long first = 0, last = 0;
    for (int group = 0; group < MOST_WARPGROUPS; group++) {
      const Clocks& c = timing.clocks[block * MOST_WARPGROUPS + group];
      if (!c.end) continue;
      first = first ? std::min(first, c.start) : c.start;
      last = std::max(last, c.end);
    }
    spans.push_back(double(last - first));
  }
  std::nth_element(spans.begin(), spans.begin() + spans.size() / 2, spans.end());
  timing.cycles = spans[spans.size() / 2];
  return timing;
}

// Units a clock of warpgroups [first, last) of the median multiprocessor.
double units_per_clock(const Timing& timing, int first, int last) {
  std::vector<double> rates;
  for (size_t block = 0; block < timing.clocks.size() / MOST_WARPGROUPS; block++) {
    double rate = 0;
    for (int group = first; group < last; group++) {
      const Clocks& c = timing.clocks[block * MOST_WARPGROUPS + group];
      rate += double(c.units) / (c.end - c.start);
    }
    rates.push_back(rate);
  }
  std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
  return rates[rates.size() / 2];
}

bool every_result_right = true;

void report(const char* item, const std::string& name, double value, const char* unit, double ideal, const Timing& timing,
            bool right, const std::string& more = "") {
  every_result_right &= right;
  std::printf(
      "{\"item\": \"%s\", \"name\": \"%s\", \"value\": %.4f, \"unit\": \"%s\", \"ideal\": %.4f, \"cycles\": %.0f, "
      "\"milliseconds\": %.4f, \"right\": %s%s}\n",
      item, name.c_str(), value, unit, ideal, timing.cycles, timing.milliseconds, right ? "true" : "false", more.c_str());
  std::fflush(stdout);
}

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

constexpr int MOST_SHARED = 227 * 1024;  // so that one block runs on a multiprocessor

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

bool small(Device& device, int count, double bound) {
  std::vector<float> out(count);
  CHECK(cudaMemcpy(out.data(), device.out, out.size() * 4, cudaMemcpyDeviceToHost));
  return std::all_of(out.begin(), out.end(), [&](float x) { return x <= bound; });
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
      report("beside", name, rate, "exponentials a clock", 16.0 * 16 / (16 - SIXTEENTHS), timing, right, more);
    }
}

template <int N, Order ORDER, int SIXTEENTHS, bool SKIP = false>
void skeleton_case(Device& device) {
  auto kernel = skeleton<N, ORDER, SIXTEENTHS, SKIP>;
  allow_shared(kernel, MOST_SHARED);
  constexpr int blocks = 400, most = N <= 112 ? 3 : 2;
  constexpr double clocks = 5 * N / 2 + N / 16 * 40;
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
    char name[128], more[96];
    std::snprintf(name, sizeof name, "%d rows, %s, polynomial %d/16, rescale %s, %d warpgroups", N, ORDER_NAMES[ORDER],
                  SIXTEENTHS, SKIP ? "when due" : "always", groups);
    std::snprintf(more, sizeof more, ", \"tensor_share\": %.4f, \"error\": %.5f", clocks * groups * blocks / timing.cycles,
                  worst);
    report("skeleton", name, timing.cycles / blocks, "clocks a block of all", clocks * groups, timing, worst < 0.02, more);
  }
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
  CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess) {
    std::printf("{\"error\": \"the driver has no cuTensorMapEncodeTiled\"}\n");
    std::exit(1);
  }
  return reinterpret_cast<Encode>(function);
}

CUtensorMap tensor_map(const bf16* qkv, std::vector<cuuint64_t> sizes, std::vector<cuuint64_t> strides,
                       std::vector<cuuint32_t> box, CUtensorMapSwizzle swizzle) {
  static Encode encode = find_encode();
  CUtensorMap map;
  std::vector<cuuint32_t> ones(box.size(), 1);
  CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(sizes.size()), const_cast<bf16*>(qkv),
                           sizes.data(), strides.data(), box.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::printf("{\"error\": \"cuTensorMapEncodeTiled returned %d\"}\n", int(result));
    std::exit(1);
  }
  return map;
}

constexpr cuuint64_t TOKEN_BYTES = 3 * HEADS * D * 2, HEAD_BYTES = D * 2;

CUtensorMap chunk_map(const bf16* qkv, cuuint32_t rows) {
  return tensor_map(qkv, {16, TOKENS, 5, 3 * HEADS}, {TOKEN_BYTES, 32, HEAD_BYTES}, {16, rows, 5, 1},
                    CU_TENSOR_MAP_SWIZZLE_32B);
}

CUtensorMap row_map(const bf16* qkv, cuuint32_t columns, CUtensorMapSwizzle swizzle) {
  return tensor_map(qkv, {D, TOKENS, 3 * HEADS}, {TOKEN_BYTES, HEAD_BYTES}, {columns, ROWS, 1}, swizzle);
}

template <Load LOAD>
void tma_case(Device& device) {
  auto kernel = tma_rate<LOAD>;
  allow_shared(kernel, MOST_SHARED);
  CUtensorMap map16 = row_map(device.qkv, 16, CU_TENSOR_MAP_SWIZZLE_32B);
  CUtensorMap map = LOAD == CHUNKS    ? chunk_map(device.qkv, ROWS)
                    : LOAD == ROW_160 ? row_map(device.qkv, D, CU_TENSOR_MAP_SWIZZLE_NONE)
                                      : row_map(device.qkv, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  for (int stages : {2, 4, 8})
    for (int apart : {0, 5}) {
      constexpr int tiles = 1024;
      Timing timing = measure(device, [&] {
        kernel<<<device.multiprocessors, 128, MOST_SHARED>>>(map, map16, device.qkv, tiles, stages, apart, device.wrong,
                                                             device.clocks);
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
    report("wait", "a warp " + std::to_string(late) + " clocks late", earliest, "clocks its start lies after warp 0's wait", 0,
           timing, true, more);
  }
}

void shared_load_case(Device& device) {
  allow_shared(tma_shared, MOST_SHARED);
  CUtensorMap map = chunk_map(device.qkv, ROWS);
  for (int stages : {2, 4, 8}) {
    constexpr int tiles = 1024;
    Timing timing = measure(device, [&] {
      tma_shared<<<device.multiprocessors / 2 * 2, 128, MOST_SHARED>>>(map, device.qkv, tiles, stages, device.wrong,
                                                                       device.clocks);
    });
    int wrong;
    CHECK(cudaMemcpy(&wrong, device.wrong, sizeof wrong, cudaMemcpyDeviceToHost));
    std::string name = "{16,112,5} shared by two blocks, " + std::to_string(stages) + " tiles under way";
    report("shared", name, double(tiles) * TILE / timing.cycles, "bytes a clock a multiprocessor", 21.0, timing, wrong == 0);
  }
}

void loads_beside_case(Device& device) {
  allow_shared(loads_beside, MOST_SHARED);
  CUtensorMap map = chunk_map(device.qkv, ROWS);
  for (int products : {0, 2})
    for (int stages : {0, 2, 4, 8}) {
      if (!products && !stages) continue;
      Timing timing = measure(device, [&] {
        loads_beside<<<device.multiprocessors, 128 * (products + 1), MOST_SHARED>>>(map, device.a, device.b, device.d, products,
                                                                                    stages, 300000, device.clocks);
      });
      bool right = !products || products_right(device, timing);
      char name[128], more[64];
      std::snprintf(name, sizeof name, "%d warpgroups of products, %d tiles under way", products, stages);
      std::snprintf(more, sizeof more, ", \"tensor_share\": %.4f", 560 * units_per_clock(timing, 0, products));
      double tiles = stages ? units_per_clock(timing, products, products + 1) : 0;
      report("loads", name, tiles * TILE, "bytes a clock a multiprocessor", 21.0, timing, right, more);
    }
}

Device prepare() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  if (properties.major != 9) {
    std::printf("{\"error\": \"needs compute capability 9.0, got %d.%d (%s)\"}\n", properties.major, properties.minor,
                properties.name);
    std::exit(1);
  }
  Device device{};
  device.multiprocessors = properties.multiProcessorCount;
  CHECK(cudaMalloc(&device.clocks, sizeof(Clocks) * MOST_WARPGROUPS * device.multiprocessors));
  CHECK(cudaMalloc(&device.d, 192 * 176 * 4));
  CHECK(cudaMalloc(&device.out, 4 * 512 * device.multiprocessors));
  CHECK(cudaMalloc(&device.wrong, sizeof(int)));
  uint32_t state = 1;
  auto random = [&] { return state = state * 1664525u + 1013904223u, state >> 16; };
  auto upload = [&](bf16*& to, size_t count, std::vector<float>* keep) {
    std::vector<bf16> values(count);
    for (auto& value : values) {
      float x = float(int(random() % 15)) - 7;  // sums of products stay exact in float32
      value = __float2bfloat16(keep ? x : x + (random() % 128) / 128.f);
      if (keep) keep->push_back(x);
    }
    CHECK(cudaMalloc(&to, count * 2));
    CHECK(cudaMemcpy(to, values.data(), count * 2, cudaMemcpyHostToDevice));
  };
  upload(device.a, 192 * 176, &device.host_a);
  upload(device.b, 176 * 176, &device.host_b);
  upload(device.qkv, size_t(TOKENS) * 3 * HEADS * D, nullptr);
  std::printf("{\"device\": \"%s\", \"multiprocessors\": %d, \"runtime\": %d}\n", properties.name, device.multiprocessors,
              CUDART_VERSION);
  return device;
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
    beside_case<SOFTMAX, 0>(device);
    beside_case<SOFTMAX, 2>(device);
  }
  if (wanted("skeleton")) {
    skeleton_case<112, SERIAL, 0>(device);
    skeleton_case<112, TOGETHER, 0>(device);
    skeleton_case<112, TOGETHER, 1>(device);
    skeleton_case<112, TOGETHER, 0, true>(device);
    skeleton_case<112, TOGETHER, 1, true>(device);
    skeleton_case<112, UNDER, 0>(device);
    skeleton_case<112, UNDER, 1>(device);
    skeleton_case<112, UNDER, 2>(device);
    skeleton_case<112, UNDER, 0, true>(device);
    skeleton_case<112, UNDER, 1, true>(device);
    skeleton_case<112, TURNS, 0>(device);
    skeleton_case<112, TURNS, 0, true>(device);
    skeleton_case<112, TURNS, 1, true>(device);
    skeleton_case<96, TOGETHER, 0, true>(device);
    skeleton_case<96, UNDER, 0, true>(device);
    skeleton_case<176, TOGETHER, 0, true>(device);
    skeleton_case<176, UNDER, 0, true>(device);
    skeleton_case<176, TURNS, 0, true>(device);
  }
  if (wanted("tma")) {
    tma_case<CHUNKS>(device);
    tma_case<SPLIT_64_16>(device);
    tma_case<ROW_160>(device);
    tma_case<FIVE_BOXES>(device);
    tma_case<COLUMNS_64>(device);
    tma_case<CONTIGUOUS>(device);
  }
  if (wanted("loads")) loads_beside_case(device);
  if (wanted("bytes")) bytes_case(device);
  if (wanted("wait")) wait_case(device);
  if (wanted("shared")) shared_load_case(device);
  return every_result_right ? 0 : 2;
}
