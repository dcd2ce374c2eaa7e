// gather_rows: rows[dst] = host_kv[head][src] for every entry of the fetch lists.
//
// Blocks read host memory themselves (zero-copy). Each finds the segments' offsets from the device
// counts and takes tiles of neighbouring rows of all lists laid end to end: warps take turns at
// runs of kInFlight * 32 vectors of 16 bytes, so that a warp has kInFlight loads a lane on the link
// at once and any row size that is a multiple of 16 bytes keeps all lanes busy. Each lane finds its
// vectors' rows by itself: warps never wait for each other, and the first request goes out after
// two loads, of the counts and of the list. The next run's list entries are read while the rows of
// this one are on the link. A short list is divided over all blocks, one tile each, so that all of
// its rows are on the link at once; rows of one granule of address translation (64 KB), being
// neighbours in the list, are asked for by one block. Bytes moved: row_bytes an entry over the link
// (PCIe 5 x16: 51 GB/s measured; 128 warps reach it). Scattered rows cost translations instead:
// 30-50 million new granules a second. Asking for all granules of a tile ahead of its rows was
// slower, 256-byte requests made no difference. With `times` the blocks also note when the first
// began and the last ended.
#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/gather_rows.h"
#include "csrc/link_times.cuh"

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

// The rows of all lists in tiles, which blocks take by turns.
struct Tiles {
  unsigned num_rows, tile_rows, row_vectors;

  __device__ unsigned rows(unsigned first) const { return min(tile_rows, num_rows - first); }
};

// Where a warp is: at vector `start` of the tile that begins with row `first` of all.
struct Cursor {
  unsigned first, start;

  // On to the block's next tile where this one has nothing left for the warp.
  __device__ void settle(const Tiles& tiles) {
    while (first < tiles.num_rows && start >= tiles.rows(first) * tiles.row_vectors) {
      first += gridDim.x * tiles.tile_rows;
      start = threadIdx.x / 32 * kRun;
    }
  }
};

// A lane's vectors of a run: list entries, -1 for none, heads, and vectors into the row.
struct Run {
  int src[kInFlight], dst[kInFlight], head[kInFlight];
  unsigned offset[kInFlight];

  __device__ static Run empty() {
    Run run{};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) run.src[i] = -1;
    return run;
  }
  __device__ bool has(int i) const { return src[i] >= 0 && dst[i] >= 0; }
};

// Starts to read the list entries of the run at the cursor.
__device__ __forceinline__ Run read_run(const GatherRowsParams& p, const unsigned* ends,
                                        const Tiles& tiles, Cursor at) {
  Run run = Run::empty();
  const unsigned rows = tiles.rows(at.first), row_vectors = tiles.row_vectors;
  const unsigned rows_on = 32 / row_vectors, vectors_on = 32 % row_vectors;  // 32 vectors further
  const unsigned vector = at.start + threadIdx.x % 32;
  unsigned row = vector / row_vectors, offset = vector - row * row_vectors;
  int segment = segment_of(ends, p.num_segments, at.first + min(row, rows - 1));
  int head = segment < p.num_kv_heads ? segment : segment % p.num_kv_heads;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    run.offset[i] = offset;
    if (row < rows) {
      for (; ends[segment] <= at.first + row; ++segment) {
        if (++head == p.num_kv_heads) head = 0;
      }
      const unsigned begin = segment == 0 ? 0 : ends[segment - 1];
      const int64_t entry = static_cast<int64_t>(segment) * p.capacity + (at.first + row - begin);
      run.src[i] = p.src[entry];
      run.dst[i] = p.dst[entry];
    }
    run.head[i] = head;
    offset += vectors_on;
    row += rows_on + (offset >= row_vectors);
    offset -= offset >= row_vectors ? row_vectors : 0;
  }
  return run;
}

// Moves the block's rows; returns how many of them begin in this lane.
__device__ unsigned copy_rows(const GatherRowsParams& p, const unsigned* ends, const Tiles& tiles) {
  unsigned moved = 0;
  Cursor at{blockIdx.x * tiles.tile_rows, threadIdx.x / 32 * kRun};
  at.settle(tiles);
  Run run = Run::empty();
  bool more;
  do {  // first only the list of the first run, last only the rows of the last
    uint4 data[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!run.has(i)) continue;
      const char* from = p.host_kv + run.head[i] * p.head_stride_bytes +
                         static_cast<int64_t>(run.src[i]) * p.row_bytes + run.offset[i] * 16;
      data[i] = __ldcs(reinterpret_cast<const uint4*>(from));
    }
    more = at.first < tiles.num_rows;
    Run next = Run::empty();
    if (more) {
      next = read_run(p, ends, tiles, at);
      at.start += kWarps * kRun;
      at.settle(tiles);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!run.has(i)) continue;
      char* to = p.rows + static_cast<int64_t>(run.dst[i]) * p.row_bytes + run.offset[i] * 16;
      *reinterpret_cast<uint4*>(to) = data[i];
      moved += run.offset[i] == 0;
    }
    run = next;
  } while (more);
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
  const Tiles tiles{num_rows, min(max(each, 1u), kMaxTileRows), p.row_bytes / 16u};
  const unsigned moved = copy_rows(p, ends, tiles);
  // No earlier: the blocks of the attention over the rows fill the multiprocessors' shared memory,
  // and would keep out those of the lower grades, which run while the rows are on the way.
  let_next_start();
  unsigned block_moved;
  block_exclusive_sum(moved, scan, &block_moved);  // every warp of the block is done
  if (timed && block_moved > 0) note_times(p.times, start_ns);
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
