// Measurements that `doctor` and the benches show: the link, pinned allocation, the GPU's NUMA
// node.
#pragma once

#include <cstdint>

namespace twilight {

struct LinkSpeed {
  double to_device_gbps;  // 1e9 bytes a second
  double to_host_gbps;
};

// Each function throws std::runtime_error in a build without CUDA and when a CUDA call fails.

// Best of `repeats` copies of a pinned buffer, each way.
LinkSpeed measure_link(int device, int64_t bytes, int repeats);

// Seconds that cudaHostAlloc takes for this many bytes; they are freed again. Throws
// HostMemoryError where they cannot be had.
double time_host_alloc(int device, int64_t bytes);

// NUMA node of a GPU, or -1 where the system does not say.
int device_numa_node(int device);

}  // namespace twilight
