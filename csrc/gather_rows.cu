// gather_rows: rows[dst] = host_kv[head][src] for every entry of the fetch lists.
//
// A few blocks stay for the whole copy and read host memory themselves (zero-copy). Each finds the
// segments' offsets from the device counts, in shared memory; then warps take turns at runs of
// kInFlight * 32 vectors of 16 bytes of all rows laid end to end, so that neighbouring loads go to
// neighbouring rows of the list, a warp has kInFlight loads a lane on the link at once, and any row
// size that is a multiple of 16 bytes keeps all lanes busy.
// Bytes moved: row_bytes an entry over the link (PCIe 5 x16: 51 GB/s measured; 8 blocks reach it).
// With `times` the blocks also note when the first began and the last ended, by the GPU's own
// clock: timing events inside a CUDA graph could be read only between two replays.
#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/gather_rows.h"

namespace twilight {
namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;
constexpr int kRun = 32 * kInFlight;  // vectors a warp moves at a time

// ends[s] becomes the number of rows in segments 0 .. s; returns the number of all rows.
__device__ unsigned sum_segments(const GatherRowsParams& p, unsigned* ends, BlockScan& scan) {
  unsigned sum = 0;
  for (int start = 0; start < p.num_segments; start += kThreads) {
    const int segment = start + threadIdx.x;
    const unsigned count =
        segment < p.num_segments ? min(max(p.counts[segment], 0), p.capacity) : 0;
    unsigned total;
    const unsigned before = block_exclusive_sum(count, scan, &total);
    if (segment < p.num_segments) ends[segment] = sum + before + count;
    sum += total;
  }
  __syncthreads();
  return sum;
}

// The segment that row `row` of all belongs to: the first whose end lies beyond it.
__device__ __forceinline__ int segment_of(const unsigned* ends, int num_segments, unsigned row) {
  int low = 0, high = num_segments - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ __forceinline__ unsigned long long now_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRowsParams p) {
  extern __shared__ unsigned ends[];  // [num_segments]
  __shared__ BlockScan scan;
  const bool timed = p.times != nullptr && threadIdx.x == 0;
  const unsigned long long start_ns = timed ? now_ns() : 0;
  const unsigned num_rows = sum_segments(p, ends, scan);
  const unsigned row_vectors = p.row_bytes / 16;
  const uint64_t num_vectors = static_cast<uint64_t>(num_rows) * row_vectors;
  const unsigned lane = threadIdx.x % 32;
  const uint64_t warp = (threadIdx.x / 32) * gridDim.x + blockIdx.x;  // short lists: all blocks
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * (kThreads / 32) * kRun;
  unsigned moved = 0;

  for (uint64_t start = warp * kRun; start < num_vectors; start += stride) {
    const unsigned first_row = static_cast<unsigned>(start / row_vectors);
    const unsigned first_vector = static_cast<unsigned>(start % row_vectors);
    const char* from[kInFlight];
    char* to[kInFlight];
    uint4 data[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned vector = first_vector + i * 32 + lane;
      const unsigned row = first_row + vector / row_vectors, part = vector % row_vectors;
      to[i] = nullptr;
      if (row >= num_rows) continue;
      const int segment = segment_of(ends, p.num_segments, row);
      const unsigned begin = segment == 0 ? 0 : ends[segment - 1];
      const int64_t entry = static_cast<int64_t>(segment) * p.capacity + (row - begin);
      const int src = p.src[entry], dst = p.dst[entry];
      if (src < 0 || dst < 0) continue;
      from[i] = p.host_kv + (segment % p.num_kv_heads) * p.head_stride_bytes +
                static_cast<int64_t>(src) * p.row_bytes + part * 16;
      to[i] = p.rows + static_cast<int64_t>(dst) * p.row_bytes + part * 16;
      moved += part == 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (to[i] != nullptr) data[i] = __ldcs(reinterpret_cast<const uint4*>(from[i]));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (to[i] != nullptr) *reinterpret_cast<uint4*>(to[i]) = data[i];
    }
  }
  unsigned block_moved;
  block_exclusive_sum(moved, scan, &block_moved);  // every warp of the block is done
  if (timed && block_moved > 0) {
    auto* times = reinterpret_cast<unsigned long long*>(p.times);
    atomicMin(&times[0], start_ns);
    atomicMax(&times[1], now_ns());
  }
  if (p.counters == nullptr) return;
  if (threadIdx.x == 0 && block_moved > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.counters + kCounterFetchedBytes),
              static_cast<unsigned long long>(block_moved) * p.row_bytes);
  }
}

}  // namespace

cudaError_t launch_gather_rows(const GatherRowsParams& p, cudaStream_t stream) {
  if (p.num_segments == 0 || p.capacity == 0) return cudaSuccess;
  const size_t shared_bytes = p.num_segments * sizeof(unsigned);
  gather_rows_kernel<<<p.num_blocks, kThreads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace twilight
