// A forward kernel as a program, to be built with sanitizers: `program FOLDER` reads FOLDER/call (int64 numbers in the order
// below), q, k, v, o, lse and tiles as raw files, and writes o and lse back. Every buffer is exactly as long as its file.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "../varlen_attention.h"
#include "entry.h"

using namespace qwen2vl_fast;

// A program holds one of them.
extern "C" __attribute__((weak)) int forward_sm80(const VarlenAttention* problem, int rows, const host::Run* run);
extern "C" __attribute__((weak)) int forward_sm90(const VarlenAttention* problem, int rows, const host::Run* run);

namespace {

struct Buffer {
  std::unique_ptr<char[]> bytes;
  size_t size;
};

Buffer read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(2);
  }
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  Buffer buffer{std::unique_ptr<char[]>(new char[text.size()]), text.size()};
  std::memcpy(buffer.bytes.get(), text.data(), text.size());
  return buffer;
}

void write(const std::string& path, const Buffer& buffer) {
  std::ofstream file(path, std::ios::binary);
  file.write(buffer.bytes.get(), static_cast<std::streamsize>(buffer.size));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", arguments[0]);
    return 2;
  }
  const std::string folder = std::string(arguments[1]) + "/";
  const Buffer call = read(folder + "call"), q = read(folder + "q"), k = read(folder + "k"), v = read(folder + "v");
  const Buffer o = read(folder + "o"), lse = read(folder + "lse"), tiles = read(folder + "tiles");
  int64_t n[24];
  if (call.size != sizeof n) {
    std::fprintf(stderr, "call: expected %zu bytes, got %zu\n", sizeof n, call.size);
    return 2;
  }
  std::memcpy(n, call.bytes.get(), sizeof n);
  VarlenAttention p = {};
  p.q = q.bytes.get();
  p.k = k.bytes.get();
  p.v = v.bytes.get();
  p.o = o.bytes.get();
  p.lse = reinterpret_cast<float*>(lse.bytes.get());
  p.tiles = reinterpret_cast<const Tile*>(tiles.bytes.get());
  p.tile_count = static_cast<int>(tiles.size / sizeof(Tile));
  const int kernel = static_cast<int>(n[0]), rows = static_cast<int>(n[1]);
  char message[8192] = "";
  const host::Run run{static_cast<int>(n[2]), 1, static_cast<uint64_t>(n[3]), message, sizeof message};
  p.T = static_cast<int>(n[4]);
  p.Tk = static_cast<int>(n[5]);
  p.H = static_cast<int>(n[6]);
  p.Hk = static_cast<int>(n[7]);
  p.D = static_cast<int>(n[8]);
  p.causal = n[9] != 0;
  p.bfloat16 = n[10] != 0;
  const int32_t scale = static_cast<int32_t>(n[11]);
  std::memcpy(&p.scale, &scale, 4);
  int64_t* strides[8] = {&p.q_stride_t, &p.q_stride_h, &p.k_stride_t, &p.k_stride_h,
                         &p.v_stride_t, &p.v_stride_h, &p.o_stride_t, &p.o_stride_h};
  for (int i = 0; i < 8; ++i) *strides[i] = n[12 + i];
  const auto forward = kernel == 80 ? forward_sm80 : kernel == 90 ? forward_sm90 : nullptr;
  if (forward == nullptr) {
    std::fprintf(stderr, "this program has no kernel %d\n", kernel);
    return 2;
  }
  if (forward(&p, rows, &run)) {
    std::fprintf(stderr, "%s\n", message);
    return 1;
  }
  write(folder + "o", o);
  write(folder + "lse", lse);
  return 0;
}
