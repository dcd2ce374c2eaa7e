#include "engine/transfers.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "engine/cuda_device.h"

namespace twilight {
namespace {

// Event pairs of the pool: copies in flight that can be timed at once, two a layer of a large
// model.
[[maybe_unused]] constexpr int kNumTimings = 256;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Transfers::Transfers(const HostArena& arena) : arena_(arena) {
#ifdef TWILIGHT_CUDA
  if (arena.device() < 0) return;
  const DeviceScope scope(arena.device());
  timings_.resize(kNumTimings);
  for (Timing& t : timings_) {
    check_cuda(cudaEventCreate(&t.start), "Transfers");
    check_cuda(cudaEventCreate(&t.end), "Transfers");
  }
#endif
}

Transfers::~Transfers() {
#ifdef TWILIGHT_CUDA
  for (Timing& t : timings_) {
    cudaEventDestroy(t.start);
    cudaEventDestroy(t.end);
  }
#endif
}

void Transfers::check(const PageSelection& s, int64_t device_bytes) const {
  const ArenaShape& shape = arena_.shape();
  if (s.layer < 0 || s.layer >= shape.num_layers) {
    refuse("layer is " + std::to_string(s.layer) + "; it must lie in [0, " +
           std::to_string(shape.num_layers) + ")");
  }
  if (s.head_begin < 0 || s.head_end < s.head_begin || s.head_end > shape.num_kv_heads) {
    refuse("heads are [" + std::to_string(s.head_begin) + ", " + std::to_string(s.head_end) +
           "); they must lie in [0, " + std::to_string(shape.num_kv_heads) + ")");
  }
  const int64_t grown = arena_.grown_pages();
  for (const int32_t page : s.pages) {
    if (page < 0 || page >= grown) {
      refuse("page " + std::to_string(page) + " is not one of the arena's " +
             std::to_string(grown) + " usable pages");
    }
  }
  const int64_t bytes =
      (s.head_end - s.head_begin) * static_cast<int64_t>(s.pages.size()) * shape.page_bytes;
  if (device_bytes != bytes) {
    refuse("device buffer has " + std::to_string(device_bytes) + " bytes; the pages have " +
           std::to_string(bytes));
  }
}

void Transfers::copy(Direction direction, const PageSelection& selection, std::byte* device,
                     int64_t device_bytes, void* stream) {
  check(selection, device_bytes);
  if (device_bytes == 0) return;
  const std::lock_guard lock(mutex_);
  TransferTotals& totals = totals_[static_cast<int>(direction)];
#ifdef TWILIGHT_CUDA
  if (arena_.device() >= 0) {
    const DeviceScope scope(arena_.device());
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    auto is_free = [](const Timing& t) { return t.bytes == 0; };
    auto timing = std::find_if(timings_.begin(), timings_.end(), is_free);
    if (timing == timings_.end()) {
      harvest();
      timing = std::find_if(timings_.begin(), timings_.end(), is_free);
    }
    const bool timed = timing != timings_.end();
    if (timed) check_cuda(cudaEventRecord(timing->start, cuda_stream), "Transfers.copy");
    totals.copies += issue(direction, selection, device, stream);
    totals.bytes += device_bytes;
    if (timed) {
      check_cuda(cudaEventRecord(timing->end, cuda_stream), "Transfers.copy");
      timing->direction = direction;
      timing->bytes = device_bytes;
    }
    return;
  }
#endif
  const auto start = std::chrono::steady_clock::now();
  totals.copies += issue(direction, selection, device, stream);
  totals.bytes += device_bytes;
  totals.timed_bytes += device_bytes;
  totals.busy_seconds +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int64_t Transfers::issue(Direction direction, const PageSelection& s, std::byte* device,
                         void* stream) const {
  const int64_t page_bytes = arena_.shape().page_bytes;
  int64_t copies = 0;
  for (int64_t head = s.head_begin; head < s.head_end; ++head) {
    for (size_t first = 0, last = 0; first < s.pages.size(); first = last) {
      for (last = first + 1; last < s.pages.size() && s.pages[last] == s.pages[last - 1] + 1;) {
        ++last;
      }
      int64_t at = arena_.offset(s.layer, head, s.pages[first]);
      const int64_t end = at + static_cast<int64_t>(last - first) * page_bytes;
      while (at < end) {
        const int64_t stop = arena_.registration_end(at, end);
        copy_piece(direction, at, device, stop - at, stream);
        device += stop - at;
        at = stop;
        ++copies;
      }
    }
  }
  return copies;
}

void Transfers::copy_piece(Direction direction, int64_t host_offset, std::byte* device,
                           int64_t bytes, [[maybe_unused]] void* stream) const {
  std::byte* const host = arena_.data() + host_offset;
  const bool to_device = direction == Direction::kToDevice;
#ifdef TWILIGHT_CUDA
  if (arena_.device() >= 0) {
    check_cuda(cudaMemcpyAsync(to_device ? device : host, to_device ? host : device, bytes,
                               to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost,
                               static_cast<cudaStream_t>(stream)),
               "Transfers.copy");
    return;
  }
#endif
  std::memcpy(to_device ? device : host, to_device ? host : device, bytes);
}

// Adds the times of copies that have ended and frees their events.
void Transfers::harvest() {
#ifdef TWILIGHT_CUDA
  for (Timing& t : timings_) {
    if (t.bytes == 0) continue;
    const cudaError_t status = cudaEventQuery(t.end);
    if (status == cudaErrorNotReady) continue;
    check_cuda(status, "Transfers");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, t.start, t.end), "Transfers");
    TransferTotals& totals = totals_[static_cast<int>(t.direction)];
    totals.timed_bytes += t.bytes;
    totals.busy_seconds += milliseconds * 1e-3;
    t.bytes = 0;
  }
#endif
}

TransferTotals Transfers::totals(Direction direction) {
  const std::lock_guard lock(mutex_);
  harvest();
  return totals_[static_cast<int>(direction)];
}

}  // namespace twilight
