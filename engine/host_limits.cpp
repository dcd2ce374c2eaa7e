#include "engine/host_limits.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

namespace twilight {
namespace {

// Kept free for page tables, the driver and everybody else: 1/32 of what there is.
constexpr int64_t kReserveShare = 32;
// cgroup v1 writes "no limit" as the largest multiple of a page below 2^63.
constexpr int64_t kNoLimit = int64_t{1} << 60;

std::optional<int64_t> read_number(const std::string& path) {
  std::ifstream in(path);
  int64_t value = 0;
  if (in >> value) return value;
  return std::nullopt;  // missing, or the word "max"
}

// The number after `key` in a file of "key number" lines; `key` includes a colon where the file
// does.
std::optional<int64_t> read_field(const std::string& path, const std::string& key) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream words(line);
    std::string name;
    int64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

struct Hierarchy {
  std::string mount, limit_file, usage_file, inactive_key;
};

// Walks from the process's cgroup up to the mount point and keeps the limit with least room. Inside
// a container the path of /proc/self/cgroup may not exist below the mount; the mount itself, which
// is then the container's own cgroup, is always looked at.
void read_cgroup(const Hierarchy& h, std::string path, HostLimits& limits) {
  while (true) {
    const std::string dir = h.mount + path;
    const auto limit = read_number(dir + "/" + h.limit_file);
    const auto usage = read_number(dir + "/" + h.usage_file);
    if (limit && usage && *limit < kNoLimit) {
      const int64_t cache = read_field(dir + "/memory.stat", h.inactive_key).value_or(0);
      const int64_t used = std::max<int64_t>(0, *usage - cache);
      const bool tighter = limits.cgroup_limit_bytes < 0 ||
                           *limit - used < limits.cgroup_limit_bytes - limits.cgroup_used_bytes;
      if (tighter) {
        limits.cgroup_limit_bytes = *limit;
        limits.cgroup_used_bytes = used;
      }
    }
    if (path.empty()) return;
    path.erase(path.find_last_of('/'));
  }
}

}  // namespace

int64_t HostLimits::usable_bytes() const {
  int64_t room = mem_available_bytes;
  if (cgroup_limit_bytes >= 0) {
    const int64_t left = std::max<int64_t>(0, cgroup_limit_bytes - cgroup_used_bytes);
    room = room < 0 ? left : std::min(room, left);
  }
  return room < 0 ? -1 : room - room / kReserveShare;
}

std::string HostLimits::describe() const {
  std::string text = usable_bytes() < 0 ? "unknown room" : format_bytes(usable_bytes()) + " usable";
  text += " (MemAvailable " +
          (mem_available_bytes < 0 ? std::string("unknown") : format_bytes(mem_available_bytes));
  if (cgroup_limit_bytes >= 0) {
    text += ", cgroup limit " + format_bytes(cgroup_limit_bytes) + " with " +
            format_bytes(cgroup_used_bytes) + " used";
  }
  return text + ")";
}

HostLimits read_host_limits(const std::string& root) {
  HostLimits limits;
  if (const auto kb = read_field(root + "/proc/meminfo", "MemAvailable:")) {
    limits.mem_available_bytes = *kb * 1024;
  }
  std::ifstream in(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {  // "0::/path" (v2) or "4:memory:/path" (v1)
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::string path = line.substr(second + 1);
    if (path.empty() || path[0] != '/' || path == "/") path.clear();
    const std::string fs = root + "/sys/fs/cgroup";
    if (controllers == ",,") {
      read_cgroup({fs, "memory.max", "memory.current", "inactive_file"}, path, limits);
    } else if (controllers.find(",memory,") != std::string::npos) {
      read_cgroup(
          {fs + "/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"},
          path, limits);
    }
  }
  rlimit memlock{};
  if (getrlimit(RLIMIT_MEMLOCK, &memlock) == 0 && memlock.rlim_cur != RLIM_INFINITY) {
    limits.memlock_bytes = static_cast<int64_t>(memlock.rlim_cur);
  }
  return limits;
}

std::string format_bytes(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return text;
}

int pci_numa_node(const std::string& pci_bus_id, const std::string& root) {
  std::string id = pci_bus_id;  // CUDA writes hexadecimal digits in upper case, sysfs in lower
  std::transform(id.begin(), id.end(), id.begin(), [](unsigned char c) { return std::tolower(c); });
  const auto node = read_number(root + "/sys/bus/pci/devices/" + id + "/numa_node");
  return node ? static_cast<int>(*node) : -1;
}

bool prefer_numa_node(void* start, size_t bytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: another node when this one is full
  constexpr int kMaxNodes = 1024;
  constexpr int kBits = 8 * sizeof(unsigned long);
  if (node < 0 || node >= kMaxNodes) return false;
  std::vector<unsigned long> mask(kMaxNodes / kBits, 0);
  mask[node / kBits] |= 1UL << (node % kBits);
  return syscall(SYS_mbind, start, bytes, kPreferred, mask.data(), kMaxNodes + 1, 0) == 0;
}

}  // namespace twilight
