#include "engine/device_probe.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "engine/cuda_device.h"
#include "engine/host_limits.h"

namespace twilight {

#ifdef TWILIGHT_CUDA
namespace {

// What a measurement holds, given back on every way out.
struct LinkBuffers {
  void* host = nullptr;
  void* device = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t start = nullptr;
  cudaEvent_t end = nullptr;

  explicit LinkBuffers(int64_t bytes) {
    try {
      check_cuda(cudaHostAlloc(&host, bytes, cudaHostAllocDefault), "measure_link");
      check_cuda(cudaMalloc(&device, bytes), "measure_link");
      check_cuda(cudaStreamCreate(&stream), "measure_link");
      check_cuda(cudaEventCreate(&start), "measure_link");
      check_cuda(cudaEventCreate(&end), "measure_link");
    } catch (...) {
      free();
      throw;
    }
  }
  ~LinkBuffers() { free(); }
  LinkBuffers(const LinkBuffers&) = delete;
  LinkBuffers& operator=(const LinkBuffers&) = delete;

  void free() {
    if (end) cudaEventDestroy(end);
    if (start) cudaEventDestroy(start);
    if (stream) cudaStreamDestroy(stream);
    if (device) cudaFree(device);
    if (host) cudaFreeHost(host);
  }
};

double best_gbps(LinkBuffers& b, void* to, const void* from, int64_t bytes, int repeats) {
  double best = 0;
  for (int i = 0; i <= repeats; ++i) {  // the first warms up
    check_cuda(cudaEventRecord(b.start, b.stream), "measure_link");
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, b.stream), "measure_link");
    check_cuda(cudaEventRecord(b.end, b.stream), "measure_link");
    check_cuda(cudaEventSynchronize(b.end), "measure_link");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, b.start, b.end), "measure_link");
    if (i > 0) best = std::max(best, static_cast<double>(bytes) / (milliseconds * 1e6));
  }
  return best;
}

}  // namespace

LinkSpeed measure_link(int device, int64_t bytes, int repeats) {
  if (bytes < 1) throw std::invalid_argument("bytes must be >= 1");
  if (repeats < 1) throw std::invalid_argument("repeats must be >= 1");
  const DeviceScope scope(device);
  LinkBuffers b(bytes);
  return {best_gbps(b, b.device, b.host, bytes, repeats),
          best_gbps(b, b.host, b.device, bytes, repeats)};
}

double time_host_alloc(int device, int64_t bytes) {
  const DeviceScope scope(device);
  check_cuda(cudaFree(nullptr), "time_host_alloc");  // creates the context outside the clock
  void* host = nullptr;
  const auto start = std::chrono::steady_clock::now();
  const cudaError_t status = cudaHostAlloc(&host, bytes, cudaHostAllocDefault);
  const auto stop = std::chrono::steady_clock::now();
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw HostMemoryError("host RAM: cudaHostAlloc could not pin " + format_bytes(bytes) + " (" +
                          cudaGetErrorString(status) + "); there is " +
                          read_host_limits().describe());
  }
  cudaFreeHost(host);
  return std::chrono::duration<double>(stop - start).count();
}

int device_numa_node(int device) {
  char bus_id[32] = {};
  check_cuda(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device), "device_numa_node");
  return pci_numa_node(bus_id);
}

#else

namespace {
[[noreturn]] void no_cuda(const char* name) {
  throw std::runtime_error(std::string(name) + ": twilight_engine._C was built without CUDA");
}
}  // namespace

LinkSpeed measure_link(int, int64_t, int) { no_cuda("measure_link"); }
double time_host_alloc(int, int64_t) { no_cuda("time_host_alloc"); }
int device_numa_node(int) { no_cuda("device_numa_node"); }

#endif

}  // namespace twilight
