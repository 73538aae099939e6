// Questions to the CUDA runtime that need no kernel. Every status is checked: a call that fails throws
// std::runtime_error with the call's name, which pybind11 turns into Python's RuntimeError.
#pragma once

#include <string>

namespace qwen2vl_fast {

// Version of the CUDA runtime that is linked in, such as "13.0".
std::string cuda_version();

// Number of CUDA devices. A machine without a device or a driver is an error, as it is for the runtime.
int device_count();

}  // namespace qwen2vl_fast
