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

VarlenAttention problem(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, uintptr_t lse, uintptr_t tiles, int tile_count, int T,
                        int Tk, int H, int Hk, int D, const Pair& q_strides, const Pair& k_strides, const Pair& v_strides,
                        const Pair& o_strides, float scale, bool causal, bool bfloat16) {
  VarlenAttention p = {};
  p.q = pointer<const void*>(q);
  p.k = pointer<const void*>(k);
  p.v = pointer<const void*>(v);
  p.o = pointer<void*>(o);
  p.lse = pointer<float*>(lse);
  p.tiles = pointer<const Tile*>(tiles);
  p.tile_count = tile_count;
  p.T = T;
  p.Tk = Tk;
  p.H = H;
  p.Hk = Hk;
  p.D = D;
  std::tie(p.q_stride_t, p.q_stride_h) = q_strides;
  std::tie(p.k_stride_t, p.k_stride_h) = k_strides;
  std::tie(p.v_stride_t, p.v_stride_h) = v_strides;
  std::tie(p.o_stride_t, p.o_stride_h) = o_strides;
  p.scale = scale;
  p.causal = causal;
  p.bfloat16 = bfloat16;
  return p;
}

void varlen_attention_backward(const VarlenAttention& problem, uintptr_t key_tiles, int key_tile_count, uintptr_t grad,
                               uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t shift, uintptr_t delta, uintptr_t dq_sum, uintptr_t turns,
                               const Pair& grad_strides, const Pair& dq_strides, const Pair& dk_strides, const Pair& dv_strides,
                               int rows, int key_rows, int device, uintptr_t stream) {
  VarlenAttentionBackward args = {};
  args.problem = problem;
  args.key_tiles = pointer<const Tile*>(key_tiles);
  args.key_tile_count = key_tile_count;
  args.grad = pointer<const void*>(grad);
  args.dq = pointer<void*>(dq);
  args.dk = pointer<void*>(dk);
  args.dv = pointer<void*>(dv);
  args.shift = pointer<float*>(shift);
  args.delta = pointer<float*>(delta);
  args.dq_sum = pointer<float*>(dq_sum);
  args.turns = pointer<int*>(turns);
  std::tie(args.grad_stride_t, args.grad_stride_h) = grad_strides;
  std::tie(args.dq_stride_t, args.dq_stride_h) = dq_strides;
  std::tie(args.dk_stride_t, args.dk_stride_h) = dk_strides;
  std::tie(args.dv_stride_t, args.dv_stride_h) = dv_strides;
  backward(args, rows, key_rows, device, pointer<void*>(stream));
}

void varlen_attention_tiles(uintptr_t bounds, uintptr_t bounds_k, uintptr_t tiles, int N, int T, int Tk, int heads, int rows,
                            bool causal, bool by_keys, int device, uintptr_t stream) {
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
  list.by_keys = by_keys;
  build_tiles(list, device, pointer<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA extension of qwen2vl_fast. Loading it touches no device.";
  m.def("build_info", &build_info,
        "What was compiled: cuda_version (str), architectures with machine code (list of str), ptx (list of str).");
  m.def("device_count", &device_count,
        "Number of CUDA devices. Raises RuntimeError, naming the CUDA call, where there is no device or driver.");
  py::class_<VarlenAttention>(m, "VarlenAttention",
                              "The tensors of one attention: addresses of device memory, strides (token, head) in elements, tiles "
                              "int32 [tile_count, 8]. csrc/varlen_attention.h has the shapes.")
      .def(py::init(&problem), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("tiles"),
           py::arg("tile_count"), py::arg("T"), py::arg("Tk"), py::arg("H"), py::arg("Hk"), py::arg("D"), py::arg("q_strides"),
           py::arg("k_strides"), py::arg("v_strides"), py::arg("o_strides"), py::arg("scale"), py::arg("causal"),
           py::arg("bfloat16"));
  m.def(
      "varlen_attention_forward",
      [](const VarlenAttention& problem, const std::string& kernel, int rows, int device, uintptr_t stream) {
        forward(problem, kernel, rows, device, pointer<void*>(stream));
      },
      "Writes o and lse. rows: the block size that the tiles were made for. Raises ValueError before any CUDA call, RuntimeError "
      "with the kernel's name for a CUDA error.",
      py::arg("problem"), py::arg("kernel"), py::arg("rows"), py::arg("device"), py::arg("stream"));
  m.def("varlen_attention_backward", &varlen_attention_backward,
        "Writes dq, dk, dv; shift, delta float32 [H, T], dq_sum float32 [T, H, D] and turns int32 [H * T + 1] are workspace. dq_sum = 0 "
        "(dq by a second pass) or turns not 0 (added in turn; never causal): the same bits in every run. rows, key_rows: the block "
        "sizes of the two lists of tiles. Raises as varlen_attention_forward does.",
        py::arg("problem"), py::arg("key_tiles"), py::arg("key_tile_count"), py::arg("grad"), py::arg("dq"), py::arg("dk"),
        py::arg("dv"), py::arg("shift"), py::arg("delta"), py::arg("dq_sum"), py::arg("turns"), py::arg("grad_strides"), py::arg("dq_strides"),
        py::arg("dk_strides"), py::arg("dv_strides"), py::arg("rows"), py::arg("key_rows"), py::arg("device"), py::arg("stream"));
  m.def("varlen_attention_tiles", &varlen_attention_tiles,
        "Writes the (T / rows + N) * heads tiles of these boundaries, int32 [N + 1] on the device; by_keys: the backward's "
        "(Tk / rows + N) * heads.",
        py::arg("bounds"), py::arg("bounds_k"), py::arg("tiles"), py::arg("N"), py::arg("T"), py::arg("Tk"), py::arg("heads"),
        py::arg("rows"), py::arg("causal"), py::arg("by_keys"), py::arg("device"), py::arg("stream"));
}
