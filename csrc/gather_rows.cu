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
// slower, 256-byte requests made no difference.
//
// Behind resolve_rows, a warp asks for the rows of its first run while that kernel still chooses
// their slots, by the misses that it announces. Once the lists are there, those that name the same
// rows are stored and others are read as ever.
//
// With `times` the blocks also note when the first began and the last ended, by the GPU's own
// clock: timing events inside a CUDA graph could be read only between two replays.
#include "csrc/announced_misses.cuh"
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
// count_of(s): rows of a segment.
template <typename CountOf>
__device__ unsigned sum_segments(const GatherRowsParams& p, unsigned* ends, BlockScan& scan,
                                 CountOf count_of) {
  unsigned sum = 0;
#pragma unroll 1
  for (int start = 0; start < p.num_segments; start += kThreads) {
    const int segment = start + threadIdx.x;
    const unsigned count = segment < p.num_segments ? count_of(segment) : 0;
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
  // Whether vector i is what another run has there.
  __device__ bool reads_as(const Run& other, int i) const {
    return src[i] == other.src[i] && head[i] == other.head[i] && offset[i] == other.offset[i];
  }
  __device__ const uint4* from(const GatherRowsParams& p, int i) const {
    return reinterpret_cast<const uint4*>(p.host_kv + head[i] * p.head_stride_bytes +
                                          static_cast<int64_t>(src[i]) * p.row_bytes +
                                          offset[i] * 16);
  }
  __device__ uint4* to(const GatherRowsParams& p, int i) const {
    return reinterpret_cast<uint4*>(p.rows + static_cast<int64_t>(dst[i]) * p.row_bytes +
                                    offset[i] * 16);
  }
};

// Finds the rows of the run at the cursor: read(segment, entry of its list, run, i) starts to read
// vector i's.
template <typename Read>
__device__ __forceinline__ Run find_run(const GatherRowsParams& p, const unsigned* ends,
                                        const Tiles& tiles, Cursor at, Read read) {
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
      read(segment, static_cast<int>(at.first + row - begin), run, i);
    }
    run.head[i] = head;
    offset += vectors_on;
    row += rows_on + (offset >= row_vectors);
    offset -= offset >= row_vectors ? row_vectors : 0;
  }
  return run;
}

// Starts to read the list entries of the run at the cursor.
__device__ __forceinline__ Run read_run(const GatherRowsParams& p, const unsigned* ends,
                                        const Tiles& tiles, Cursor at) {
  return find_run(p, ends, tiles, at, [&p](int segment, int in_list, Run& run, int i) {
    const int64_t entry = static_cast<int64_t>(segment) * p.capacity + in_list;
    run.src[i] = p.src[entry];
    run.dst[i] = p.dst[entry];
  });
}

// The rows in tiles, and the warp's first run.
struct Share {
  Tiles tiles;
  Cursor at;

  __device__ Share(const GatherRowsParams& p, unsigned num_rows) {
    const unsigned each = (num_rows + gridDim.x - 1) / gridDim.x;
    tiles = {num_rows, min(max(each, 1u), kMaxTileRows), p.row_bytes / 16u};
    at = {blockIdx.x * tiles.tile_rows, threadIdx.x / 32 * kRun};
    at.settle(tiles);
  }
  __device__ bool more() const { return at.first < tiles.num_rows; }
  __device__ void advance() {
    at.start += kWarps * kRun;
    at.settle(tiles);
  }
};

// A run that was asked for by announced misses; its vectors that nobody announced have no src.
struct EarlyRun {
  Run run = Run::empty();
  uint4 data[kInFlight];

  // Returns whether there are any such misses. All threads of the block must call it.
  __device__ bool ask(const GatherRowsParams& p, unsigned* ends, BlockScan& scan) {
    const unsigned tag = announcement_tag(*p.step, p.layer);
    bool complete = true;
    const unsigned num_rows = sum_segments(p, ends, scan, [&](int segment) {
      int count[] = {word_of(segment, 0)};
      await_words(p.announced, tag, count);
      complete &= 0 <= count[0] && count[0] <= kMostAnnounced;
      return complete ? count[0] : 0;
    });
    if (!__syncthreads_and(complete)) return false;  // the lists would be laid out otherwise
    const Share share(p, num_rows);
    if (!share.more()) return num_rows > 0;
    run = find_run(p, ends, share.tiles, share.at, [&](int segment, int in_list, Run& to, int i) {
      to.src[i] = word_of(segment, 1 + in_list);
    });
    await_words(p.announced, tag, run.src);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (run.src[i] >= 0) data[i] = __ldcs(run.from(p, i));
    }
    return true;
  }

  // Stores what the lists have of it, and reads and stores the rest of their first run; returns how
  // many rows begin in this lane.
  __device__ unsigned store(const GatherRowsParams& p, const Run& listed) {
    unsigned moved = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (listed.has(i) && !listed.reads_as(run, i)) data[i] = __ldcs(listed.from(p, i));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!listed.has(i)) continue;
      *listed.to(p, i) = data[i];
      moved += listed.offset[i] == 0;
    }
    return moved;
  }
};

// Moves the rows of the block's share; returns how many of them begin in this lane.
__device__ unsigned copy_rows(const GatherRowsParams& p, const unsigned* ends, Share share) {
  unsigned moved = 0;
  Run run = Run::empty();
  bool more;
  do {  // first only the list of the first run, last only the rows of the last
    uint4 data[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!run.has(i)) continue;
      data[i] = __ldcs(run.from(p, i));
    }
    more = share.more();
    Run next = Run::empty();
    if (more) {
      next = read_run(p, ends, share.tiles, share.at);
      share.advance();
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!run.has(i)) continue;
      *run.to(p, i) = data[i];
      moved += run.offset[i] == 0;
    }
    run = next;
  } while (more);
  return moved;
}

__global__ void __launch_bounds__(kThreads, 3) gather_rows_kernel(GatherRowsParams p) {
  extern __shared__ unsigned ends[];  // [num_segments]
  __shared__ BlockScan scan;
  const bool timed = p.times != nullptr && threadIdx.x == 0;
  EarlyRun early;
  const bool asked = p.announced != nullptr && early.ask(p, ends, scan);
  const unsigned long long asked_ns = timed ? now_ns() : 0;
  wait_for_inputs();
  const unsigned long long start_ns = !timed ? 0 : asked ? asked_ns : now_ns();
  const unsigned num_rows = sum_segments(
      p, ends, scan, [&p](int segment) { return min(max(p.counts[segment], 0), p.capacity); });
  Share share(p, num_rows);
  unsigned moved = 0;
  if (p.announced != nullptr && share.more()) {
    const Run first = read_run(p, ends, share.tiles, share.at);
    share.advance();
    moved = early.store(p, first);
  }
  moved += copy_rows(p, ends, share);
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

cudaError_t launch_gather_rows(GatherRowsParams p, cudaStream_t stream) {
  if (p.num_segments == 0 || p.capacity == 0) return cudaSuccess;
  if (!can_launch_dependent()) p.announced = nullptr;  // nobody announces while it is there
  const size_t shared_bytes = p.num_segments * sizeof(unsigned);
  return launch_dependent(gather_rows_kernel, dim3(p.num_blocks), dim3(kThreads), shared_bytes,
                          stream, 1, p);
}

}  // namespace twilight
