// The Python module twilight_engine._C: pointers as integers in, CUDA errors out as exceptions.
// The only file that sees Python; nothing here or below sees torch.
#include <pybind11/pybind11.h>

#ifdef TWILIGHT_CUDA
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

#ifdef TWILIGHT_CUDA
template <typename T>
T* as(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t as_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
  }
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels and the offload engine; called by twilight_engine.ops and twilight_engine.kv.";
#ifdef TWILIGHT_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
