// gather_rows: rows[dst] = host_kv[head][src] for every entry of the fetch lists.
//
// Blocks read host memory themselves (zero-copy). Each finds the segments' offsets from the device
// counts and takes tiles of neighbouring rows of all lists laid end to end: warps take turns at
// runs of kInFlight * 32 vectors of 16 bytes, so that a warp has kInFlight loads a lane on the link
// at once and any row size that is a multiple of 16 bytes keeps all lanes busy. Each lane finds its
// vectors' rows by itself: warps never wait for each other, and the first request goes out after
// two loads, of the counts and of the list. A short list is divided over all blocks, one tile each,
// so that all of its rows are on the link at once; rows of one granule of address translation (64
// KB), being neighbours in the list, are asked for by one block. Bytes moved: row_bytes an entry
// over the link (PCIe 5 x16: 51 GB/s measured; 128 warps reach it). Scattered rows cost
// translations instead: 30-50 million new granules a second. Asking for all granules of a tile
// ahead of its rows was slower, 256-byte requests made no difference. With `times` the blocks also
// note when the first began and the last ended, by the GPU's own clock: timing events inside a CUDA
// graph could be read only between two replays.
#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/gather_rows.h"

namespace twilight {
namespace {

constexpr int kThreads = 256;  // small blocks on many SMs leave room for the kernels beside them
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;
constexpr int kRun = 32 * kInFlight;  // vectors a warp moves at a time
constexpr unsigned kMaxTileRows = 256;

// ends[s] becomes the number of rows in segments 0 .. s; returns the number of all rows.
__device__ unsigned sum_segments(const GatherRowsParams& p, unsigned* ends, BlockScan& scan) {
  unsigned sum = 0;
#pragma unroll 1
  for (int start = 0; start < p.num_segments; start += kThreads) {
    const int segment = start + threadIdx.x;
    const unsigned count =
        segment < p.num_segments ? min(max(p.counts[segment], 0), p.capacity) : 0;
    unsigned total;
    const unsigned before = block_exclusive_sum(count, scan, &total);
    if (segment < p.num_segments) ends[segment] = sum + before + count;
    sum += total;
    __syncthreads();
  }
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

// Moves rows first .. first + rows of all; returns how many of them begin in this lane.
__device__ unsigned copy_tile(const GatherRowsParams& p, const unsigned* ends, unsigned first,
                              unsigned rows) {
  const unsigned row_vectors = p.row_bytes / 16, num_vectors = rows * row_vectors;
  const unsigned rows_on = 32 / row_vectors, vectors_on = 32 % row_vectors;  // 32 vectors further
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned moved = 0;
  for (unsigned start = warp * kRun; start < num_vectors; start += kWarps * kRun) {
    int src[kInFlight], dst[kInFlight], head[kInFlight];
    unsigned offset[kInFlight];  // vectors into the row
    unsigned row = (start + lane) / row_vectors, at = start + lane - row * row_vectors;
    int segment = segment_of(ends, p.num_segments, first + min(row, rows - 1));
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      src[i] = dst[i] = -1;
      offset[i] = at;
      if (row < rows) {
        while (ends[segment] <= first + row) ++segment;
        const unsigned begin = segment == 0 ? 0 : ends[segment - 1];
        const int64_t entry = static_cast<int64_t>(segment) * p.capacity + (first + row - begin);
        src[i] = p.src[entry];
        dst[i] = p.dst[entry];
      }
      head[i] = segment;
      at += vectors_on;
      row += rows_on + (at >= row_vectors);
      at -= at >= row_vectors ? row_vectors : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {  // of several sequences; while the list is on its way
      if (head[i] >= p.num_kv_heads) head[i] %= p.num_kv_heads;
    }
    uint4 data[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (src[i] < 0 || dst[i] < 0) continue;
      const char* from = p.host_kv + head[i] * p.head_stride_bytes +
                         static_cast<int64_t>(src[i]) * p.row_bytes + offset[i] * 16;
      data[i] = __ldcs(reinterpret_cast<const uint4*>(from));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (src[i] < 0 || dst[i] < 0) continue;
      char* to = p.rows + static_cast<int64_t>(dst[i]) * p.row_bytes + offset[i] * 16;
      *reinterpret_cast<uint4*>(to) = data[i];
      moved += offset[i] == 0;
    }
  }
  return moved;
}

__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRowsParams p) {
  extern __shared__ unsigned ends[];  // [num_segments]
  __shared__ BlockScan scan;
  wait_for_inputs();
  const bool timed = p.times != nullptr && threadIdx.x == 0;
  const unsigned long long start_ns = timed ? now_ns() : 0;
  const unsigned num_rows = sum_segments(p, ends, scan);
  const unsigned each = (num_rows + gridDim.x - 1) / gridDim.x;
  const unsigned tile_rows = min(max(each, 1u), kMaxTileRows);
  unsigned moved = 0;
  for (unsigned first = blockIdx.x * tile_rows; first < num_rows; first += gridDim.x * tile_rows) {
    moved += copy_tile(p, ends, first, min(tile_rows, num_rows - first));
  }
  // No earlier: the blocks of the attention over the rows fill the multiprocessors' shared memory,
  // and would keep out those of the lower grades, which run while the rows are on the way.
  let_next_start();
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
  return launch_dependent(gather_rows_kernel, dim3(p.num_blocks), dim3(kThreads), shared_bytes,
                          stream, 1, p);
}

}  // namespace twilight
