// The offload engine: arena, page pool, transfers, probes.
#include <pybind11/stl.h>

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "csrc/bindings.h"
#include "engine/arena.h"
#include "engine/device_probe.h"
#include "engine/host_limits.h"
#include "engine/page_pool.h"
#include "engine/transfers.h"

namespace twilight::bindings {
namespace {

// Raises one of the exceptions of twilight_engine/kv/errors.py, which is plain Python.
template <typename... Args>
void raise_kv_error(const char* name, Args... args) {
  const py::object type = py::module_::import("twilight_engine.kv.errors").attr(name);
  PyErr_SetObject(type.ptr(), type(args...).ptr());
}

void bind_probes(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
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
  m.def(
      "measure_link",
      [](int device, int64_t bytes, int repeats) {
        const twilight::LinkSpeed link = twilight::measure_link(device, bytes, repeats);
        return std::pair{link.to_device_gbps, link.to_host_gbps};
      },
      py::arg("device"), py::arg("bytes") = int64_t{64} << 20, py::arg("repeats") = 8, nogil);
  m.def("time_host_alloc", &twilight::time_host_alloc, py::arg("device"), py::arg("bytes"), nogil);
  m.def("device_numa_node", &twilight::device_numa_node, py::arg("device"), nogil);
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_probes(m);
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
      .def_buffer([](HostArena& a) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(a.data()), a.reserved_bytes());
      })
      .def("memory",
           [](const py::object& self) {  // a view holds the object, and so the address space
             if (self.cast<HostArena&>().closed()) throw std::runtime_error("HostArena is closed");
             return py::memoryview(self);
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

  using twilight::Direction;
  using twilight::Transfers;
  py::class_<Transfers>(m, "Transfers")
      .def(py::init<const HostArena&>(), py::arg("arena"), py::keep_alive<1, 2>())
      .def(
          "copy",
          [](Transfers& t, bool to_host, int64_t layer, int64_t head_begin, int64_t head_end,
             uint64_t pages, int64_t num_pages, uint64_t device, int64_t device_bytes,
             uint64_t stream) {
            t.copy(to_host ? Direction::kToHost : Direction::kToDevice,
                   {layer,
                    head_begin,
                    head_end,
                    {reinterpret_cast<const int32_t*>(pages), static_cast<size_t>(num_pages)}},
                   reinterpret_cast<std::byte*>(device), device_bytes,
                   reinterpret_cast<void*>(stream));
          },
          py::kw_only(), py::arg("to_host"), py::arg("layer"), py::arg("head_begin"),
          py::arg("head_end"), py::arg("pages"), py::arg("num_pages"), py::arg("device"),
          py::arg("device_bytes"), py::arg("stream"), nogil)
      .def(
          "totals",
          [](Transfers& t, bool to_host) {
            const auto sum = t.totals(to_host ? Direction::kToHost : Direction::kToDevice);
            return py::make_tuple(sum.copies, sum.bytes, sum.timed_bytes, sum.busy_seconds);
          },
          py::arg("to_host"));
}

}  // namespace twilight::bindings
