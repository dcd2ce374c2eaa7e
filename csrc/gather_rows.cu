// gather_rows: rows[dst] = host_kv[head][src] for every entry of the fetch lists.
//
// Blocks read host memory themselves (zero-copy). Each finds the segments' offsets from the device
// counts and takes tiles of neighbouring rows of all lists laid end to end: a thread resolves one
// row of the tile to its two addresses, in shared memory; then warps take turns at runs of
// kInFlight * 32 vectors of 16 bytes, so that a warp has kInFlight loads a lane on the link at once
// and any row size that is a multiple of 16 bytes keeps all lanes busy. A short list is divided
// over all blocks, one tile each, so that all of its rows are on the link at once; rows of one
// granule of address translation (64 KB), being neighbours in the list, are asked for by one block.
// Bytes moved: row_bytes an entry over the link (PCIe 5 x16: 51 GB/s measured; 128 warps reach it).
// Scattered rows cost translations instead: 30-50 million new granules a second. Asking for all
// granules of a tile ahead of its rows was slower, 256-byte requests made no difference.
// With `times` the blocks also note when the first began and the last ended, by the GPU's own
// clock: timing events inside a CUDA graph could be read only between two replays.
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

// Where the rows of a tile come from (null: skip) and go to.
struct Tile {
  const char* from[kThreads];
  char* to[kThreads];
};

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

// Finds the addresses of row `first + threadIdx.x` of all; returns whether it is to be moved.
__device__ bool find_row(const GatherRowsParams& p, const unsigned* ends, unsigned first,
                         unsigned rows, Tile& tile) {
  const char* from = nullptr;
  if (threadIdx.x < rows) {
    const unsigned row = first + threadIdx.x;
    const int segment = segment_of(ends, p.num_segments, row);
    const unsigned begin = segment == 0 ? 0 : ends[segment - 1];
    const int64_t entry = static_cast<int64_t>(segment) * p.capacity + (row - begin);
    const int src = p.src[entry], dst = p.dst[entry];
    if (src >= 0 && dst >= 0) {
      from = p.host_kv + (segment % p.num_kv_heads) * p.head_stride_bytes +
             static_cast<int64_t>(src) * p.row_bytes;
      tile.to[threadIdx.x] = p.rows + static_cast<int64_t>(dst) * p.row_bytes;
    }
    tile.from[threadIdx.x] = from;
  }
  return from != nullptr;
}

__device__ void copy_tile(const Tile& tile, unsigned rows, unsigned row_vectors) {
  const unsigned num_vectors = rows * row_vectors;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (unsigned start = warp * kRun; start < num_vectors; start += kWarps * kRun) {
    char* to[kInFlight];
    uint4 data[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned vector = start + i * 32 + lane;
      const unsigned row = vector / row_vectors, offset = (vector - row * row_vectors) * 16;
      const char* from = vector < num_vectors ? tile.from[row] : nullptr;
      to[i] = nullptr;
      if (from == nullptr) continue;
      to[i] = tile.to[row] + offset;
      data[i] = __ldcs(reinterpret_cast<const uint4*>(from + offset));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (to[i] != nullptr) *reinterpret_cast<uint4*>(to[i]) = data[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRowsParams p) {
  extern __shared__ unsigned ends[];  // [num_segments]
  __shared__ BlockScan scan;
  __shared__ Tile tile;
  let_next_start();
  wait_for_inputs();
  const bool timed = p.times != nullptr && threadIdx.x == 0;
  const unsigned long long start_ns = timed ? now_ns() : 0;
  const unsigned num_rows = sum_segments(p, ends, scan);
  const unsigned each = (num_rows + gridDim.x - 1) / gridDim.x;
  const unsigned tile_rows = min(max(each, 1u), static_cast<unsigned>(kThreads));
  unsigned moved = 0;

  for (unsigned first = blockIdx.x * tile_rows; first < num_rows; first += gridDim.x * tile_rows) {
    const unsigned rows = min(tile_rows, num_rows - first);
    moved += find_row(p, ends, first, rows, tile);
    __syncthreads();
    copy_tile(tile, rows, p.row_bytes / 16);
    __syncthreads();
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
  return launch_dependent(gather_rows_kernel, dim3(p.num_blocks), dim3(kThreads), shared_bytes,
                          stream, 1, p);
}

}  // namespace twilight
