// The launches as a program, to be built with sanitizers: `program FOLDER DEVICE SEED` and `forward KERNEL ROWS`, `backward ROWS
// KEY_ROWS` or `build_tiles`. FOLDER/args is the struct that they are told, and each line of FOLDER/pointers (offset, name) a
// pointer in it: to the bytes of FOLDER/name, in a buffer exactly as long as the file. In the end the buffers are written back.
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

// launches.cpp
extern "C" int forward(const VarlenAttention* args, const char* kernel, int rows, int device, void* stream, const host::Run* run);
extern "C" int backward(const VarlenAttentionBackward* args, int rows, int key_rows, int device, void* stream, const host::Run* run);
extern "C" int build_tiles(const TileList* args, int device, void* stream, const host::Run* run);

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

int start(int count, char** words, const Buffer& args, int device, const host::Run& run) {
  const std::string function = words[0];
  void* stream = reinterpret_cast<void*>(static_cast<uintptr_t>(device) + 1);
  if (function == "forward" && count == 3) {
    return ::forward(as<VarlenAttention>(args), words[1], std::atoi(words[2]), device, stream, &run);
  }
  if (function == "backward" && count == 3) {
    return ::backward(as<VarlenAttentionBackward>(args), std::atoi(words[1]), std::atoi(words[2]), device, stream, &run);
  }
  if (function == "build_tiles" && count == 1) return ::build_tiles(as<TileList>(args), device, stream, &run);
  return host::finish(run, "this program has no " + function);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "usage: %s FOLDER DEVICE SEED FUNCTION ...\n", arguments[0]);
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
  const host::Run run{0, 1, std::strtoull(arguments[3], nullptr, 10), message, sizeof message};
  if (start(count - 4, arguments + 4, args, std::atoi(arguments[2]), run)) {
    std::fprintf(stderr, "%s: %s\n", arguments[4], message);
    return 1;
  }
  for (const auto& [name, buffer] : buffers) {
    std::ofstream(folder + name, std::ios::binary).write(buffer.bytes.get(), static_cast<std::streamsize>(buffer.size));
  }
  return 0;
}
