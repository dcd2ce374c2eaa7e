// What this host can give: memory (cgroup v1 and v2, MemAvailable), lockable memory, NUMA nodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace twilight {

// Host RAM cannot be had or pinned. The message says what was asked, what there is, what to do.
class HostMemoryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// -1 stands for "no limit" or "unknown" in every field.
struct HostLimits {
  int64_t mem_available_bytes = -1;  // MemAvailable of /proc/meminfo
  int64_t cgroup_limit_bytes = -1;   // the tightest limit on the way up from this process's cgroup
  int64_t cgroup_used_bytes = -1;    // charged to that cgroup, page cache that can go left out
  int64_t memlock_bytes = -1;        // RLIMIT_MEMLOCK

  // What an arena may still take: the smaller of both, less a share kept for everybody else.
  int64_t usable_bytes() const;
  // "40.0 GiB usable (MemAvailable 41.0 GiB, cgroup limit 64.0 GiB with 12.0 GiB used)"
  std::string describe() const;
};

// Reads the limits of this process; `root` goes before /proc and /sys, for tests.
HostLimits read_host_limits(const std::string& root = "");

// "12.0 GiB"
std::string format_bytes(int64_t bytes);

// NUMA node of a PCI device such as "0000:1b:00.0", or -1 where the system does not say.
int pci_numa_node(const std::string& pci_bus_id, const std::string& root = "");

// Prefers a NUMA node for pages of [start, start + bytes) that are not touched yet. Returns false
// where the system refuses; memory then comes from any node.
bool prefer_numa_node(void* start, size_t bytes, int node);

}  // namespace twilight
