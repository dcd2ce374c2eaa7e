// out[n, hq] = softmax(softmax_scale * q[n, hq] . K[resident and listed tokens]) V[the same]
//
// A segment's items are its visible sinks, its visible window tokens, then its list. Persistent
// blocks share all segments' items evenly (split_attend.cuh), whatever the lists' lengths; a warp
// owns 16 of every 64 items of its block's stretch and streams their rows through its ring
// (attend_stream.cuh), rows without a location straight from host memory. All query heads of a
// group, up to 8, share one load. Bytes: 2 * D * itemsize an item and ceil(G / 8) heads' tiles, and
// min(G, 8) * (D + 2) * 4 a partial state written.
//
// Source: Flash-Decoding; stream-K.
#include "csrc/attend_rows.h"
#include "csrc/attend_stream.cuh"

namespace twilight {
namespace {

// What the step's metadata says of a query row. It is read before wait_for_inputs: plain kernels
// and copies alone write it, and whatever may still run was launched after their end.
struct Resident {
  int seq, first_row;  // of the sequence's first head in the pool
  int first_sink, num_sinks;
  int first_recent, num_recent;  // place in the ring of window rows
};

__device__ Resident read_resident(const AttendRowsParams& params, int n) {
  const StepView& step = params.step;
  const int seq = step.query_seq[n], end = step.positions[n] + 1, start = step.ctx_starts[n];
  const int recent = max(max(step.window_starts[seq], start), step.num_sink);
  const int head_rows = step.num_sink + params.window_rows;
  return {seq,
          step.seq_slots[seq] * params.work.num_kv_heads * head_rows,
          start,
          max(0, min(end, step.num_sink) - start),
          recent % params.window_rows,
          max(0, end - recent)};
}

constexpr int kKnown = 32;  // query rows whose Resident is in shared memory
// With this many blocks a segment a warp has one or two tiles of lists up to 4,000 rows, for which
// two stages do; a block of head_dim 128 then takes 68 KB of shared memory for 101.
constexpr int kFewTilesBlocks = 32;

template <typename T, int kD>
struct ListSource {
  const AttendRowsParams& params;
  const Resident* known;        // of the first kKnown query rows
  const char* host = nullptr;   // the head's pages
  const int* pages = nullptr;   // the sequence's
  const int* tokens = nullptr;  // the segment's list
  const int* locations = nullptr;
  Resident rows{};  // first_row: the head's

  __device__ Resident resident(int n) const {
    return n < kKnown ? known[n] : read_resident(params, n);
  }

  __device__ int num_items(int n, int h) const {
    const int listed = params.counts[int64_t{n} * params.work.num_kv_heads + h];
    const Resident rows = resident(n);
    return rows.num_sinks + rows.num_recent + listed;
  }

  __device__ void open(const Segment& segment) {
    const int64_t list =
        (int64_t{segment.n} * params.work.num_kv_heads + segment.h) * params.capacity;
    rows = resident(segment.n);
    rows.first_row += segment.h * (params.step.num_sink + params.window_rows);
    host = static_cast<const char*>(params.host_kv) + segment.h * params.host_head_bytes;
    pages = params.step.page_table + int64_t{rows.seq} * params.step.page_table_stride;
    tokens = params.tokens + list;
    locations = params.locations + list;
  }

  struct Peeked {
    int row = kNoRow;  // of the pool
    int token = -1;    // where row is NO_ROW; -1: no item
  };

  __device__ Peeked peek(int item) const {
    if (item < rows.num_sinks) return {rows.first_row + rows.first_sink + item, 0};
    item -= rows.num_sinks;
    if (item < rows.num_recent) {
      const int at = rows.first_recent + item;  // a window has no more rows than the ring
      const int place = at < params.window_rows ? at : at - params.window_rows;
      return {rows.first_row + params.step.num_sink + place, 0};
    }
    item -= rows.num_recent;
    return {locations[item], tokens[item]};
  }

  __device__ const char* row(const Peeked& peeked, bool& direct) const {
    if (peeked.row >= 0) {
      return static_cast<const char*>(params.pool) + int64_t{peeked.row} * RowBytes<T, kD>::kRow;
    }
    if (peeked.token < 0) return nullptr;
    const int page = pages[peeked.token / params.step.page_size];
    if (page < 0) return nullptr;
    direct = true;
    const int64_t row =
        int64_t{page} * params.step.page_size + peeked.token % params.step.page_size;
    return host + row * RowBytes<T, kD>::kRow;
  }
};

template <typename T, int kD, int kMostStages>
using RowsWorker = RowStream<T, kD, ListSource<T, kD>, kMostStages>;

template <typename T, int kD, int kMostStages>
__global__ void __launch_bounds__(kSplitThreads) attend_rows_kernel(AttendRowsParams params) {
  extern __shared__ __align__(16) char shared[];
  __shared__ Resident known[kKnown];
  let_next_start();
  for (int n = threadIdx.x; n < min(params.work.num_queries, kKnown); n += kSplitThreads) {
    known[n] = read_resident(params, n);
  }
  __syncthreads();
  ListSource<T, kD> source{params, known};
  RowsWorker<T, kD, kMostStages> worker(source, params.work, params.q, params.softmax_scale,
                                        shared);
  wait_for_inputs();
  split_attend(worker, params.work);
  if (params.direct_bytes != nullptr && threadIdx.x % 32 == 0 && worker.direct_rows > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.direct_bytes),
              worker.direct_rows * RowBytes<T, kD>::kRow);
  }
}

template <typename T, int kD, int kMostStages>
cudaError_t launch(const AttendRowsParams& params, cudaStream_t stream) {
  return launch_split(attend_rows_kernel<T, kD, kMostStages>, params, params.work,
                      RowsWorker<T, kD, kMostStages>::kSharedBytes, stream);
}

}  // namespace

cudaError_t launch_attend_rows(const AttendRowsParams& params, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_ROW(params.row_dtype, T, {
    return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
      const bool few_tiles = num_segments(params.work) * kFewTilesBlocks <= params.work.num_blocks;
      return few_tiles ? launch<T, kD, 2>(params, stream) : launch<T, kD, 3>(params, stream);
    });
  });
}

}  // namespace twilight
