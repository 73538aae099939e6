#include <pybind11/pybind11.h>

#include "device.h"

namespace py = pybind11;

namespace {

// QWEN2VL_FAST_MACHINE_CODE and QWEN2VL_FAST_PTX are the lists that CMakeLists.txt gave to nvcc, split by spaces.
py::dict build_info() {
  py::dict info;
  info["cuda_version"] = qwen2vl_fast::cuda_version();
  info["architectures"] = py::str(QWEN2VL_FAST_MACHINE_CODE).attr("split")();
  info["ptx"] = py::str(QWEN2VL_FAST_PTX).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA extension of qwen2vl_fast. Loading it touches no device.";
  m.def("build_info", &build_info,
        "What was compiled: cuda_version (str), architectures with machine code (list of str), ptx (list of str).");
  m.def("device_count", &qwen2vl_fast::device_count,
        "Number of CUDA devices. Raises RuntimeError, naming the CUDA call, where there is no device or driver.");
}
