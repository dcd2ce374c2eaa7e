// The Python module twilight_engine._C: pointers as integers in, CUDA errors out as exceptions.
// The only file that sees Python; nothing here or below sees torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef TWILIGHT_CUDA
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/arena.h"
#include "engine/page_pool.h"

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

// Raises one of the exceptions of twilight_engine/kv/errors.py, which is plain Python.
template <typename... Args>
void raise_kv_error(const char* name, Args... args) {
  const py::object type = py::module_::import("twilight_engine.kv.errors").attr(name);
  PyErr_SetObject(type.ptr(), type(args...).ptr());
}

void bind_engine(py::module_& m) {
  using twilight::HostArena;
  using twilight::PagePool;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const twilight::OutOfPages& e) {
      raise_kv_error("OutOfPages", e.what(), e.wanted, e.free);
    } catch (const twilight::HostMemoryError& e) {
      raise_kv_error("HostMemoryError", e.what());
    }
  });

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<HostArena>(m, "HostArena", py::buffer_protocol())
      .def(py::init(
               [](int64_t layers, int64_t heads, int64_t pages, int64_t page_bytes, int device) {
                 return std::make_unique<HostArena>(
                     twilight::ArenaShape{layers, heads, pages, page_bytes}, device);
               }),
           py::kw_only(), py::arg("num_layers"), py::arg("num_kv_heads"), py::arg("num_pages"),
           py::arg("page_bytes"), py::arg("device") = -1)
      .def_buffer([](HostArena& a) {  // the view holds the object, and so the address space
        if (a.closed()) throw std::runtime_error("HostArena is closed");
        return py::buffer_info(reinterpret_cast<uint8_t*>(a.data()), a.reserved_bytes());
      })
      .def("ensure_pages", &HostArena::ensure_pages, py::arg("num_pages"), nogil)
      .def("close", &HostArena::close, nogil)
      .def("offset", &HostArena::offset, py::arg("layer"), py::arg("kv_head"), py::arg("page"))
      .def_property_readonly("strip_pages", &HostArena::strip_pages)
      .def_property_readonly("extent_pages", &HostArena::extent_pages)
      .def_property_readonly("grown_pages", &HostArena::grown_pages)
      .def_property_readonly("reserved_bytes", &HostArena::reserved_bytes)
      .def_property_readonly("touched_bytes", &HostArena::touched_bytes)
      .def_property_readonly("registered_bytes", &HostArena::registered_bytes)
      .def_property_readonly("num_registrations", &HostArena::num_registrations)
      .def_property_readonly("touch_seconds", &HostArena::touch_seconds)
      .def_property_readonly("register_seconds", &HostArena::register_seconds)
      .def_property_readonly("numa_node", &HostArena::numa_node)
      .def_property_readonly("closed", &HostArena::closed);

  m.def(
      "host_limits",
      [](const std::string& root) {
        const twilight::HostLimits limits = twilight::read_host_limits(root);
        return std::map<std::string, int64_t>{{"mem_available_bytes", limits.mem_available_bytes},
                                              {"cgroup_limit_bytes", limits.cgroup_limit_bytes},
                                              {"cgroup_used_bytes", limits.cgroup_used_bytes},
                                              {"memlock_bytes", limits.memlock_bytes},
                                              {"usable_bytes", limits.usable_bytes()}};
      },
      py::arg("root") = "");

  using Pages = std::vector<int32_t>;
  py::class_<PagePool>(m, "PagePool")
      .def(py::init<int64_t>(), py::arg("num_pages"))
      .def("allocate", &PagePool::allocate, py::arg("n"), py::arg("exact") = true,
           py::arg("after") = -1)
      .def(
          "share", [](PagePool& p, const Pages& pages) { p.share(pages); }, py::arg("pages"))
      .def(
          "release",
          [](PagePool& p, const Pages& pages, int64_t epoch) { p.release(pages, epoch); },
          py::arg("pages"), py::arg("epoch") = -1)
      .def("complete", &PagePool::complete, py::arg("epoch"))
      .def(
          "mark_sparse", [](PagePool& p, const Pages& pages) { p.mark_sparse(pages); },
          py::arg("pages"))
      .def("references", &PagePool::references, py::arg("page"))
      .def("is_exact", &PagePool::is_exact, py::arg("page"))
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("num_pending", &PagePool::num_pending);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels and the offload engine; called by twilight_engine.ops and twilight_engine.kv.";
#ifdef TWILIGHT_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  bind_engine(m);
}
