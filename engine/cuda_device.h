// Small things around CUDA runtime calls. Empty without TWILIGHT_CUDA.
#pragma once

#ifdef TWILIGHT_CUDA
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace twilight {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here; the next launch must not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current for a scope. Errors are left to the calls inside.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    if (cudaGetDevice(&previous_) != cudaSuccess) previous_ = device;
    cudaSetDevice(device);
  }
  ~DeviceScope() { cudaSetDevice(previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace twilight
#endif
