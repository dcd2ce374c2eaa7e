// The host arena: every K,V row of the engine at full precision, in one mapping of host memory.
//
// Layout [layer][kv_head][page][token][K|V]. The pages of one (layer, KV head) are a *strip*; a
// layer's strips follow each other without gaps, so a layer is a contiguous [Hkv, P, S, 2D] array
// (P = strip_pages). All address space is reserved at once and memory is added in extents: the
// same run of pages in every strip, touched in parallel and then registered with CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "engine/host_limits.h"

namespace twilight {

struct ArenaShape {
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t num_pages;   // capacity asked for
  int64_t page_bytes;  // page_size * 2 * head_dim * itemsize
};

struct ByteRange {
  int64_t begin;  // offsets from the start of the arena
  int64_t end;
};

// Thread safe. Growing and closing block for the time that the memory takes (seconds for tens of
// GiB); neither belongs on the decode path.
class HostArena {
 public:
  // Reserves address space, no memory. device: CUDA device that gets the memory registered and
  // mapped; -1 for plain host memory. Throws std::invalid_argument for sizes below 1,
  // HostMemoryError where the address space cannot be had.
  HostArena(const ArenaShape& shape, int device);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  // Makes pages [0, num_pages) of every strip usable, rounded up to a whole extent. Throws
  // HostMemoryError, with the arena as it was, when host RAM does not suffice.
  void ensure_pages(int64_t num_pages);

  // Unregisters and gives all memory back. Idempotent. The address space stays reserved until the
  // destructor, so that a view somebody kept reads zeros instead of another owner's memory.
  void close();

  // Where page `page` of a strip starts, as an offset and as an address. Not checked.
  int64_t offset(int64_t layer, int64_t kv_head, int64_t page) const {
    return ((layer * shape_.num_kv_heads + kv_head) * strip_pages_ + page) * shape_.page_bytes;
  }
  std::byte* data() const { return base_; }

  // First offset after `offset` at which another registration begins, at most `end`. A copy engine
  // refuses a copy that crosses one.
  int64_t registration_end(int64_t offset, int64_t end) const;

  const ArenaShape& shape() const { return shape_; }
  int device() const { return device_; }
  int numa_node() const { return numa_node_; }
  int64_t strip_pages() const { return strip_pages_; }
  int64_t extent_pages() const { return extent_pages_; }
  int64_t reserved_bytes() const { return reserved_bytes_; }
  int64_t grown_pages() const;
  int64_t touched_bytes() const;
  int64_t registered_bytes() const;
  int64_t num_registrations() const;
  double touch_seconds() const;
  double register_seconds() const;
  bool closed() const;

 private:
  std::vector<ByteRange> new_ranges(int64_t begin_page, int64_t end_page) const;
  void check_room(int64_t end_page) const;
  void touch(const std::vector<ByteRange>& ranges);
  void register_ranges(const std::vector<ByteRange>& ranges);
  void unregister(const std::vector<ByteRange>& ranges);
  void discard(const std::vector<ByteRange>& ranges);

  const ArenaShape shape_;
  const int device_;
  const int owner_pid_;
  int numa_node_ = -1;
  int64_t strip_pages_ = 0;
  int64_t extent_pages_ = 0;
  int64_t reserved_bytes_ = 0;
  std::byte* base_ = nullptr;
  std::byte* mapping_ = nullptr;  // base_ is this, moved up to a huge page's start
  size_t mapping_bytes_ = 0;

  std::mutex growth_mutex_;               // held while memory is touched, registered or given back
  mutable std::mutex mutex_;              // guards what follows; never held for long
  std::vector<ByteRange> registrations_;  // ascending
  int64_t grown_pages_ = 0;
  int64_t touched_bytes_ = 0;
  double touch_seconds_ = 0;
  double register_seconds_ = 0;
  bool closed_ = false;
};

}  // namespace twilight
