// Kernels as a program, to be built with sanitizers: `program FOLDER GRID SEED {KERNEL ROWS}...` starts one kernel after another.
// FOLDER/args is the struct that they are told, and each line of FOLDER/pointers (offset, name) a pointer in it: to the bytes of
// FOLDER/name, in a buffer exactly as long as the file. In the end the buffers are written back.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>

#include "../varlen_attention.h"
#include "entry.h"

using namespace qwen2vl_fast;

// A program holds some of them.
extern "C" __attribute__((weak)) int forward_sm80(const VarlenAttention* args, int rows, const host::Run* run);
extern "C" __attribute__((weak)) int forward_sm90(const VarlenAttention* args, int rows, const host::Run* run);
extern "C" __attribute__((weak)) int backward_sm80(const VarlenAttentionBackward* args, const char* kernel, int rows,
                                                   const host::Run* run);
extern "C" __attribute__((weak)) int build_tiles(const TileList* args, const host::Run* run);

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

template <class Args>
const Args* as(const Buffer& args) {
  if (args.size != sizeof(Args)) {
    std::fprintf(stderr, "args: expected %zu bytes, got %zu\n", sizeof(Args), args.size);
    std::exit(2);
  }
  return reinterpret_cast<const Args*>(args.bytes.get());
}

int start(const std::string& kernel, int rows, const Buffer& args, const host::Run& run) {
  if (kernel == "forward_sm80" && forward_sm80) return forward_sm80(as<VarlenAttention>(args), rows, &run);
  if (kernel == "forward_sm90" && forward_sm90) return forward_sm90(as<VarlenAttention>(args), rows, &run);
  if (kernel == "build_tiles" && build_tiles) return build_tiles(as<TileList>(args), &run);
  if (backward_sm80) return backward_sm80(as<VarlenAttentionBackward>(args), kernel.c_str(), rows, &run);
  return host::finish(run, "this program has no kernel " + kernel);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 6 || count % 2 != 0) {
    std::fprintf(stderr, "usage: %s FOLDER GRID SEED {KERNEL ROWS}...\n", arguments[0]);
    return 2;
  }
  const std::string folder = std::string(arguments[1]) + "/";
  const Buffer args = read(folder + "args");
  std::map<std::string, Buffer> buffers;
  std::ifstream pointers(folder + "pointers");
  size_t offset;
  for (std::string name; pointers >> offset >> name;) {
    const Buffer& buffer = buffers[name] = read(folder + name);
    const char* pointer = buffer.bytes.get();
    std::memcpy(args.bytes.get() + offset, &pointer, sizeof pointer);
  }
  char message[8192] = "";
  const host::Run run{std::atoi(arguments[2]), 1, std::strtoull(arguments[3], nullptr, 10), message, sizeof message};
  for (int i = 4; i < count; i += 2) {
    if (start(arguments[i], std::atoi(arguments[i + 1]), args, run)) {
      std::fprintf(stderr, "%s: %s\n", arguments[i], message);
      return 1;
    }
  }
  for (const auto& [name, buffer] : buffers) {
    std::ofstream(folder + name, std::ios::binary).write(buffer.bytes.get(), static_cast<std::streamsize>(buffer.size));
  }
  return 0;
}
