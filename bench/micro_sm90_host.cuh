// What the cases of micro_sm90.cu share on the host: memory, timing, tensor maps, one JSON object a line.
#pragma once

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

bool small(Device& device, int count, double bound) {
  std::vector<float> out(count);
  CHECK(cudaMemcpy(out.data(), device.out, out.size() * 4, cudaMemcpyDeviceToHost));
  return std::all_of(out.begin(), out.end(), [&](float x) { return x <= bound; });
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
