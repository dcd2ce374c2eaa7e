#include "engine/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "engine/cuda_device.h"
#include "engine/device_probe.h"
#include "engine/parallel.h"

#ifndef MADV_POPULATE_WRITE  // Linux 5.14; older C libraries lack the name
#define MADV_POPULATE_WRITE 23
#endif

namespace twilight {
namespace {

constexpr int64_t kOsPage = 4096;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kGranule = 64 << 10;        // of the GPU's translation of host addresses
constexpr int64_t kStripExtent = 4 << 20;     // of one strip; 8B shape: 256 strips, 1 GiB an extent
constexpr int64_t kMaxExtentShare = 8;        // an extent is at most this fraction of the arena
constexpr int64_t kMaxPadShare = 16;          // padding of a strip to huge pages, likewise
constexpr int64_t kTouchItem = 64 << 20;      // work of a thread between two looks at the queue
constexpr int64_t kRegisterItem = 1LL << 30;  // largest single registration
constexpr int kTouchThreads = 16;
constexpr int kRegisterThreads = 4;
constexpr int64_t kMaxReserve = int64_t{1} << 46;  // half of a 47-bit user address space

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Fewest pages whose bytes are a multiple of `alignment`.
int64_t pages_per(int64_t alignment, int64_t page_bytes) {
  return alignment / std::gcd(alignment, page_bytes);
}

std::vector<ByteRange> split(const std::vector<ByteRange>& ranges, int64_t max_bytes) {
  std::vector<ByteRange> pieces;
  for (const ByteRange& r : ranges) {
    for (int64_t at = r.begin; at < r.end; at += max_bytes) {
      pieces.push_back({at, std::min(at + max_bytes, r.end)});
    }
  }
  return pieces;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

const char* kAdvice =
    "; lower KVConfig.host_bytes, max_model_len or max_num_seqs, free host memory, or raise the "
    "container's memory limit";

}  // namespace

HostArena::HostArena(const ArenaShape& shape, int device)
    : shape_(shape), device_(device), owner_pid_(getpid()) {
  for (const auto& [name, value] : {std::pair{"num_layers", shape.num_layers},
                                    {"num_kv_heads", shape.num_kv_heads},
                                    {"num_pages", shape.num_pages},
                                    {"page_bytes", shape.page_bytes}}) {
    if (value < 1) {
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                  "; it must be >= 1");
    }
  }
  const int64_t strips = shape.num_layers * shape.num_kv_heads;
  // Two registrations may not share an OS page, so strips and extents hold whole ones; a long
  // strip holds whole huge pages.
  const int64_t os_unit = pages_per(kOsPage, shape.page_bytes);
  const int64_t huge_unit = pages_per(kHugePage, shape.page_bytes);
  const bool huge = huge_unit <= shape.num_pages / kMaxPadShare;
  const double wanted = 1.0 * shape.num_pages * shape.page_bytes * strips;
  if (wanted > kMaxReserve) {
    throw HostMemoryError("host RAM: an arena of " + std::to_string(shape.num_pages) +
                          " pages asks for " + format_bytes(static_cast<int64_t>(wanted)) +
                          " of address space; at most " + format_bytes(kMaxReserve) +
                          " can be had" + kAdvice);
  }
  strip_pages_ = round_up(shape.num_pages, huge ? huge_unit : os_unit);
  reserved_bytes_ = strips * strip_pages_ * shape.page_bytes;

  const int64_t max_extent = strip_pages_ * shape.page_bytes / kMaxExtentShare;
  int64_t extent_bytes = kStripExtent;
  while (extent_bytes > kGranule && extent_bytes > max_extent) extent_bytes /= 2;
  const int64_t granule_unit = pages_per(kGranule, shape.page_bytes);
  const bool granular = granule_unit * shape.page_bytes <= extent_bytes;
  int64_t unit = granular ? granule_unit : os_unit;
  if (huge && huge_unit * shape.page_bytes <= extent_bytes) unit = huge_unit;
  extent_pages_ = round_up((extent_bytes + shape.page_bytes - 1) / shape.page_bytes, unit);

#ifdef TWILIGHT_CUDA
  if (device_ >= 0) {
    int same_pointer = 0;
    check_cuda(
        cudaDeviceGetAttribute(&same_pointer, cudaDevAttrCanUseHostPointerForRegisteredMem, device),
        "HostArena");
    if (same_pointer == 0) {
      throw std::runtime_error("HostArena: device " + std::to_string(device) +
                               " cannot use host pointers for registered memory; the engine "
                               "needs it (any GPU with unified addressing on Linux has it)");
    }
    numa_node_ = device_numa_node(device);
  }
#else
  if (device_ >= 0) {
    throw std::invalid_argument("device is " + std::to_string(device) +
                                "; this build has no CUDA, so it must be -1");
  }
#endif

  mapping_bytes_ = static_cast<size_t>(reserved_bytes_ + kHugePage);
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    throw HostMemoryError("host RAM: cannot reserve " + format_bytes(reserved_bytes_) +
                          " of address space for the KV arena: " + std::strerror(errno) + kAdvice);
  }
  mapping_ = static_cast<std::byte*>(mapping);
  const auto address = reinterpret_cast<uintptr_t>(mapping);
  base_ = mapping_ +
          (round_up(static_cast<int64_t>(address), kHugePage) - static_cast<int64_t>(address));
  // Advice, so failures do not matter. Without whole huge pages an extent would take its
  // neighbours' memory along; a forked child would copy what is pinned.
  if (unit == huge_unit) madvise(base_, reserved_bytes_, MADV_HUGEPAGE);
  if (device_ >= 0) madvise(mapping_, mapping_bytes_, MADV_DONTFORK);
  if (numa_node_ >= 0) prefer_numa_node(base_, reserved_bytes_, numa_node_);
}

HostArena::~HostArena() {
  close();
  if (getpid() == owner_pid_) munmap(mapping_, mapping_bytes_);
}

std::vector<ByteRange> HostArena::new_ranges(int64_t begin_page, int64_t end_page) const {
  // A whole arena at once is one range: strips leave no gaps.
  if (begin_page == 0 && end_page == strip_pages_) return {{0, reserved_bytes_}};
  std::vector<ByteRange> ranges;
  for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      ranges.push_back({offset(layer, head, begin_page), offset(layer, head, end_page)});
    }
  }
  return ranges;
}

void HostArena::check_room(int64_t end_page) const {
  const int64_t bytes = (end_page - grown_pages_) * (reserved_bytes_ / strip_pages_);
  const HostLimits limits = read_host_limits();
  const int64_t usable = limits.usable_bytes();
  if (usable < 0 || bytes <= usable) return;
  throw HostMemoryError("host RAM: the KV arena needs " + format_bytes(bytes) +
                        " more to grow from " + std::to_string(grown_pages_) + " to " +
                        std::to_string(end_page) + " pages; there is " + limits.describe() +
                        kAdvice);
}

void HostArena::ensure_pages(int64_t num_pages) {
  const std::lock_guard growth(growth_mutex_);
  if (closed_) throw std::runtime_error("HostArena is closed");
  if (num_pages > shape_.num_pages) {
    throw std::invalid_argument("num_pages is " + std::to_string(num_pages) +
                                "; the arena has room for " + std::to_string(shape_.num_pages));
  }
  if (num_pages <= grown_pages_) return;
  const int64_t end_page = std::min(round_up(num_pages, extent_pages_), strip_pages_);
  check_room(end_page);
  const std::vector<ByteRange> ranges = new_ranges(grown_pages_, end_page);
  try {
    touch(ranges);
    register_ranges(ranges);
  } catch (...) {
    discard(ranges);
    throw;
  }
  const std::lock_guard lock(mutex_);
  for (const ByteRange& r : ranges) touched_bytes_ += r.end - r.begin;
  grown_pages_ = end_page;
}

void HostArena::touch(const std::vector<ByteRange>& ranges) {
  const auto start = std::chrono::steady_clock::now();
  parallel_for(split(ranges, kTouchItem), kTouchThreads, [this](const ByteRange& r) {
    if (madvise(base_ + r.begin, r.end - r.begin, MADV_POPULATE_WRITE) == 0) return;
    if (errno == ENOMEM || errno == EFAULT) {
      throw HostMemoryError(
          "host RAM: the system ran out while the KV arena was touched; there is " +
          read_host_limits().describe() + kAdvice);
    }
    for (int64_t at = r.begin; at < r.end; at += kOsPage) {  // a kernel without that advice
      *reinterpret_cast<volatile std::byte*>(base_ + at) = std::byte{0};
    }
  });
  const std::lock_guard lock(mutex_);
  touch_seconds_ += seconds_since(start);
}

void HostArena::register_ranges([[maybe_unused]] const std::vector<ByteRange>& ranges) {
#ifdef TWILIGHT_CUDA
  if (device_ < 0) return;
  const auto start = std::chrono::steady_clock::now();
  std::vector<ByteRange> done;
  std::mutex done_mutex;
  try {
    parallel_for(split(ranges, kRegisterItem), kRegisterThreads, [&](const ByteRange& r) {
      const DeviceScope scope(device_);
      const cudaError_t status = cudaHostRegister(
          base_ + r.begin, r.end - r.begin, cudaHostRegisterMapped | cudaHostRegisterPortable);
      if (status != cudaSuccess) {
        cudaGetLastError();  // not sticky; the next launch must not report it
        throw HostMemoryError("host RAM: cudaHostRegister could not pin " +
                              format_bytes(r.end - r.begin) + " of the KV arena (" +
                              cudaGetErrorString(status) + "); there is " +
                              read_host_limits().describe() + kAdvice);
      }
      const std::lock_guard lock(done_mutex);
      done.push_back(r);
    });
  } catch (...) {
    unregister(done);
    throw;
  }
  const std::lock_guard lock(mutex_);
  registrations_.insert(registrations_.end(), done.begin(), done.end());
  std::sort(registrations_.begin(), registrations_.end(),
            [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
  register_seconds_ += seconds_since(start);
#endif
}

void HostArena::unregister([[maybe_unused]] const std::vector<ByteRange>& ranges) {
#ifdef TWILIGHT_CUDA
  parallel_for(ranges, kRegisterThreads, [this](const ByteRange& r) {
    const DeviceScope scope(device_);
    cudaHostUnregister(base_ + r.begin);
    cudaGetLastError();  // at interpreter exit the driver may be gone already, and its pins too
  });
#endif
}

void HostArena::discard(const std::vector<ByteRange>& ranges) {
  for (const ByteRange& r : ranges) madvise(base_ + r.begin, r.end - r.begin, MADV_DONTNEED);
}

void HostArena::close() {
  const std::lock_guard growth(growth_mutex_);
  std::vector<ByteRange> registered;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    registered.swap(registrations_);
    grown_pages_ = touched_bytes_ = 0;
  }
  if (getpid() != owner_pid_) return;  // a forked child owns neither the pins nor the memory
#ifdef TWILIGHT_CUDA
  if (!registered.empty()) {
    const DeviceScope scope(device_);
    cudaDeviceSynchronize();  // a kernel or copy may still read what is about to go
  }
#endif
  unregister(registered);
  discard({{0, reserved_bytes_}});
}

int64_t HostArena::registration_end(int64_t offset, int64_t end) const {
  const std::lock_guard lock(mutex_);
  const auto after =
      std::upper_bound(registrations_.begin(), registrations_.end(), offset,
                       [](int64_t value, const ByteRange& r) { return value < r.begin; });
  if (after == registrations_.begin()) return end;
  return std::min(std::prev(after)->end, end);
}

int64_t HostArena::grown_pages() const {
  const std::lock_guard lock(mutex_);
  return grown_pages_;
}

int64_t HostArena::touched_bytes() const {
  const std::lock_guard lock(mutex_);
  return touched_bytes_;
}

int64_t HostArena::registered_bytes() const {
  const std::lock_guard lock(mutex_);
  int64_t bytes = 0;
  for (const ByteRange& r : registrations_) bytes += r.end - r.begin;
  return bytes;
}

int64_t HostArena::num_registrations() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(registrations_.size());
}

double HostArena::touch_seconds() const {
  const std::lock_guard lock(mutex_);
  return touch_seconds_;
}

double HostArena::register_seconds() const {
  const std::lock_guard lock(mutex_);
  return register_seconds_;
}

bool HostArena::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace twilight
