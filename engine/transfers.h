// Copies of arena pages between host and device by the copy engines, counted and timed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "engine/arena.h"

#ifdef TWILIGHT_CUDA
#include <cuda_runtime.h>
#endif

namespace twilight {

enum class Direction : int { kToDevice = 0, kToHost = 1 };

// Totals of one direction. timed_bytes are those that busy_seconds speaks of: the rate is
// timed_bytes / busy_seconds. A copy goes untimed while all events of the pool are in use.
struct TransferTotals {
  int64_t copies = 0;  // contiguous pieces handed to the copy engine
  int64_t bytes = 0;
  int64_t timed_bytes = 0;
  double busy_seconds = 0;
};

// Which pages of the arena, of one layer and some of its heads.
struct PageSelection {
  int64_t layer;
  int64_t head_begin;
  int64_t head_end;
  std::span<const int32_t> pages;  // contiguous ascending runs become one copy each
};

// Thread safe; copies never allocate memory. The arena must outlive it, and copies under way must
// end before the arena closes. Without CUDA, or for an arena of plain memory, a copy is a memcpy
// that is done on return.
class Transfers {
 public:
  explicit Transfers(const HostArena& arena);
  ~Transfers();
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;

  // Copies between the selected pages and a packed array [heads][pages][page_bytes] at `device`,
  // asynchronously on `stream` (a cudaStream_t). Throws std::invalid_argument, with nothing
  // copied, for pages, heads or a size that do not fit.
  void copy(Direction direction, const PageSelection& selection, std::byte* device,
            int64_t device_bytes, void* stream);

  // Counters so far; busy time of the copies that have ended.
  TransferTotals totals(Direction direction);

 private:
  void check(const PageSelection& selection, int64_t device_bytes) const;
  // Issues the copies and returns how many there were.
  int64_t issue(Direction direction, const PageSelection& selection, std::byte* device,
                void* stream) const;
  void copy_piece(Direction direction, int64_t host_offset, std::byte* device, int64_t bytes,
                  void* stream) const;
  void harvest();

  const HostArena& arena_;
  std::mutex mutex_;
  std::array<TransferTotals, 2> totals_{};
#ifdef TWILIGHT_CUDA
  struct Timing {
    cudaEvent_t start = nullptr;
    cudaEvent_t end = nullptr;
    Direction direction = Direction::kToDevice;
    int64_t bytes = 0;  // 0: free
  };
  std::vector<Timing> timings_;
#endif
};

}  // namespace twilight
