// What every launch shares: checked statuses, the current device, the number of resident blocks.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace qwen2vl_fast {

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps the error and would hand it to the next, unrelated check
  throw std::runtime_error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// Makes a device current while it lives. torch sets its own runtime's device, which this one, linked in here, need not share.
class CurrentDevice {
 public:
  CurrentDevice(int device, const std::string& kernel) {
    check(cudaGetDevice(&before_), kernel + ": cudaGetDevice");
    check(cudaSetDevice(device), kernel + ": cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace qwen2vl_fast
