// What the binding files share: pointers from integers, CUDA errors as exceptions. Only
// bindings*.cpp see Python; nothing here or below sees torch.
#pragma once

#include <pybind11/pybind11.h>

#ifdef TWILIGHT_CUDA
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace twilight::bindings {

namespace py = pybind11;

#ifdef TWILIGHT_CUDA
template <typename T>
T* as(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

inline cudaStream_t as_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
  }
}

void bind_attend(py::module_& m);
void bind_hot_rows(py::module_& m);
void bind_index(py::module_& m);
void bind_pruning(py::module_& m);
#endif

void bind_engine(py::module_& m);

}  // namespace twilight::bindings
