// append_rows: row (n, h) = K[n, h] | V[n, h] goes to its place in the host pages, in the windows
// (sink place, ring place) and in the device pages of a dense layer.
//
// A warp owns a row at a time and moves it in 16-byte vectors; rows are dealt out head by head, so
// that neighbouring warps store neighbouring rows of the host arena and the stores of a warp are
// whole 128-byte lines on the link. Nobody waits for a store, so a few blocks fill the link.
// Bytes moved: N * Hkv * 2 * D * itemsize read, the same over the link, and as much again for
// each tier on the device.
#include "csrc/append_rows.h"
#include "csrc/common.cuh"

namespace twilight {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// 32 blocks of 8 warps keep 256 rows in flight: 128 KiB of 512-byte rows over about 1 us of load
// and store latency, more than twice what the link takes (55 GB/s).
constexpr int kMaxBlocks = 32;

__global__ void __launch_bounds__(kThreads) append_rows_kernel(AppendRowsParams p) {
  __shared__ unsigned rows_written;
  if (threadIdx.x == 0) rows_written = 0;
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int vectors_per_head = p.head_bytes / 16;
  const int64_t row_bytes = 2 * static_cast<int64_t>(p.head_bytes);
  const int64_t num_rows = static_cast<int64_t>(p.num_queries) * p.num_kv_heads;
  const int64_t window_rows_per_head = p.num_sink + p.window_rows;
  unsigned written = 0;

  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < num_rows;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int h = static_cast<int>(i / p.num_queries);
    const int n = static_cast<int>(i % p.num_queries);
    const int t = p.positions[n];
    if (t < 0) continue;
    const int b = p.query_seq[n];
    const int page = p.page_table[b * p.page_table_stride + t / p.page_size];
    if (page < 0) continue;
    const int64_t place = (static_cast<int64_t>(page) * p.page_size + t % p.page_size) * row_bytes;
    char* host = p.host_kv + h * p.host_head_bytes + place;
    char* paged = p.pages == nullptr ? nullptr : p.pages + h * p.pages_head_bytes + place;
    char* sink = nullptr;
    char* ring = nullptr;
    if (p.windows != nullptr) {
      char* window = p.windows + (static_cast<int64_t>(p.seq_slots[b]) * p.num_kv_heads + h) *
                                     window_rows_per_head * row_bytes;
      if (t < p.num_sink) sink = window + t * row_bytes;
      if (t >= p.seq_lens[b] - p.window_rows) {
        ring = window + (p.num_sink + t % p.window_rows) * row_bytes;
      }
    }
    const char* k = p.k + n * p.k_stride_bytes[0] + h * p.k_stride_bytes[1];
    const char* v = p.v + n * p.v_stride_bytes[0] + h * p.v_stride_bytes[1];
    for (int j = lane; j < 2 * vectors_per_head; j += 32) {
      const char* source = j < vectors_per_head ? k + j * 16 : v + (j - vectors_per_head) * 16;
      const uint4 x = *reinterpret_cast<const uint4*>(source);
      *reinterpret_cast<uint4*>(host + j * 16) = x;
      if (paged != nullptr) *reinterpret_cast<uint4*>(paged + j * 16) = x;
      if (sink != nullptr) *reinterpret_cast<uint4*>(sink + j * 16) = x;
      if (ring != nullptr) *reinterpret_cast<uint4*>(ring + j * 16) = x;
    }
    ++written;
  }

  if (p.counters == nullptr) return;
  if (lane == 0) atomicAdd(&rows_written, written);
  __syncthreads();
  if (threadIdx.x == 0 && rows_written > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.counters + kCounterWrittenBytes),
              static_cast<unsigned long long>(rows_written) * row_bytes);
  }
}

}  // namespace

cudaError_t launch_append_rows(const AppendRowsParams& p, cudaStream_t stream) {
  const int64_t num_rows = static_cast<int64_t>(p.num_queries) * p.num_kv_heads;
  const int64_t wanted = (num_rows + kWarps - 1) / kWarps;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  append_rows_kernel<<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace twilight
