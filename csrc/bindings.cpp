// What Python sees of the extension. Tensors come as addresses and strides and the stream as a number: no torch header takes part.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <utility>

#include "device.h"
#include "launch.h"

namespace py = pybind11;
using namespace qwen2vl_fast;

namespace {

// QWEN2VL_FAST_MACHINE_CODE and QWEN2VL_FAST_PTX are the lists that CMakeLists.txt gave to nvcc, split by spaces.
py::dict build_info() {
  py::dict info;
  info["cuda_version"] = cuda_version();
  info["architectures"] = py::str(QWEN2VL_FAST_MACHINE_CODE).attr("split")();
  info["ptx"] = py::str(QWEN2VL_FAST_PTX).attr("split")();
  return info;
}

template <class Pointer>
Pointer pointer(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

using Pair = std::pair<int64_t, int64_t>;

void varlen_attention_forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, uintptr_t lse, uintptr_t tiles, int tile_count,
                              int T, int Tk, int H, int Hk, int D, const Pair& q_strides, const Pair& k_strides,
                              const Pair& v_strides, const Pair& o_strides, float scale, bool causal, bool bfloat16,
                              const std::string& kernel, int rows, int device, uintptr_t stream) {
  VarlenAttention problem = {};
  problem.q = pointer<const void*>(q);
  problem.k = pointer<const void*>(k);
  problem.v = pointer<const void*>(v);
  problem.o = pointer<void*>(o);
  problem.lse = pointer<float*>(lse);
  problem.tiles = pointer<const Tile*>(tiles);
  problem.tile_count = tile_count;
  problem.T = T;
  problem.Tk = Tk;
  problem.H = H;
  problem.Hk = Hk;
  problem.D = D;
  std::tie(problem.q_stride_t, problem.q_stride_h) = q_strides;
  std::tie(problem.k_stride_t, problem.k_stride_h) = k_strides;
  std::tie(problem.v_stride_t, problem.v_stride_h) = v_strides;
  std::tie(problem.o_stride_t, problem.o_stride_h) = o_strides;
  problem.scale = scale;
  problem.causal = causal;
  problem.bfloat16 = bfloat16;
  forward(problem, kernel, rows, device, pointer<void*>(stream));
}

void varlen_attention_tiles(uintptr_t bounds, uintptr_t bounds_k, uintptr_t tiles, int N, int T, int Tk, int heads, int rows,
                            bool causal, int device, uintptr_t stream) {
  TileList list = {};
  list.bounds = pointer<const int*>(bounds);
  list.bounds_k = pointer<const int*>(bounds_k);
  list.tiles = pointer<Tile*>(tiles);
  list.N = N;
  list.T = T;
  list.Tk = Tk;
  list.heads = heads;
  list.rows = rows;
  list.causal = causal;
  build_tiles(list, device, pointer<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA extension of qwen2vl_fast. Loading it touches no device.";
  m.def("build_info", &build_info,
        "What was compiled: cuda_version (str), architectures with machine code (list of str), ptx (list of str).");
  m.def("device_count", &device_count,
        "Number of CUDA devices. Raises RuntimeError, naming the CUDA call, where there is no device or driver.");
  m.def("varlen_attention_forward", &varlen_attention_forward,
        "o and lse of the tiles. Addresses are of device memory, strides (token, head) in elements, tiles int32 [tile_count, 8] "
        "made for blocks of `rows`. Raises ValueError before any CUDA call, RuntimeError with the kernel's name for a CUDA error.",
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("tiles"), py::arg("tile_count"),
        py::arg("T"), py::arg("Tk"), py::arg("H"), py::arg("Hk"), py::arg("D"), py::arg("q_strides"), py::arg("k_strides"),
        py::arg("v_strides"), py::arg("o_strides"), py::arg("scale"), py::arg("causal"), py::arg("bfloat16"), py::arg("kernel"),
        py::arg("rows"), py::arg("device"), py::arg("stream"));
  m.def("varlen_attention_tiles", &varlen_attention_tiles,
        "Writes the (T / rows + N) * heads tiles of these boundaries, int32 [N + 1] on the device.", py::arg("bounds"),
        py::arg("bounds_k"), py::arg("tiles"), py::arg("N"), py::arg("T"), py::arg("Tk"), py::arg("heads"), py::arg("rows"),
        py::arg("causal"), py::arg("device"), py::arg("stream"));
}
