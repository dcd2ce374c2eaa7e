// The Python module twilight_engine._C: pointers as integers in, CUDA errors out as exceptions.
#include "csrc/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels and the offload engine; called by twilight_engine.ops and twilight_engine.kv.";
#ifdef TWILIGHT_CUDA
  m.attr("has_cuda") = true;
  twilight::bindings::bind_attend(m);
  twilight::bindings::bind_hot_rows(m);
  twilight::bindings::bind_index(m);
  twilight::bindings::bind_pruning(m);
#else
  m.attr("has_cuda") = false;
#endif
  twilight::bindings::bind_engine(m);
}
