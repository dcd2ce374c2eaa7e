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

template <typename T, int kD>
struct ListSource {
  const AttendRowsParams& params;
  const char* host = nullptr;   // the head's pages
  const int* pages = nullptr;   // the sequence's
  const int* tokens = nullptr;  // the segment's list
  const int* locations = nullptr;
  int first_row = 0;  // of the sequence slot and head's window rows
  int first_sink = 0, num_sinks = 0;
  int first_recent = 0, num_recent = 0;

  __device__ void resident(int n, int& sink, int& sinks, int& recent, int& recents) const {
    const StepView& step = params.step;
    const int end = step.positions[n] + 1, start = step.ctx_starts[n];
    sink = start;
    sinks = max(0, min(end, step.num_sink) - start);
    recent = max(max(step.window_starts[step.query_seq[n]], start), step.num_sink);
    recents = max(0, end - recent);
  }

  __device__ int num_items(int n, int h) const {
    int sink, sinks, recent, recents;
    resident(n, sink, sinks, recent, recents);
    return sinks + recents + params.counts[int64_t{n} * params.work.num_kv_heads + h];
  }

  __device__ void open(const Segment& segment) {
    const int hkv = params.work.num_kv_heads, b = params.step.query_seq[segment.n];
    const int64_t list = (int64_t{segment.n} * hkv + segment.h) * params.capacity;
    resident(segment.n, first_sink, num_sinks, first_recent, num_recent);
    host = static_cast<const char*>(params.host_kv) + segment.h * params.host_head_bytes;
    pages = params.step.page_table + int64_t{b} * params.step.page_table_stride;
    tokens = params.tokens + list;
    locations = params.locations + list;
    first_row =
        (params.step.seq_slots[b] * hkv + segment.h) * (params.step.num_sink + params.window_rows);
  }

  struct Peeked {
    int row = kNoRow;  // of the pool
    int token = -1;    // where row is NO_ROW; -1: no item
  };

  __device__ Peeked peek(int item) const {
    if (item < num_sinks) return {first_row + first_sink + item, 0};
    item -= num_sinks;
    if (item < num_recent) {
      return {first_row + params.step.num_sink + (first_recent + item) % params.window_rows, 0};
    }
    item -= num_recent;
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

template <typename T, int kD>
__global__ void __launch_bounds__(kSplitThreads) attend_rows_kernel(AttendRowsParams params) {
  extern __shared__ __align__(16) char shared[];
  let_next_start();
  ListSource<T, kD> source{params};
  RowStream<T, kD, ListSource<T, kD>> worker(source, params.work, params.q, params.softmax_scale,
                                             shared);
  wait_for_inputs();
  split_attend(worker, params.work);
  if (params.direct_bytes != nullptr && threadIdx.x % 32 == 0 && worker.direct_rows > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.direct_bytes),
              worker.direct_rows * RowBytes<T, kD>::kRow);
  }
}

}  // namespace

cudaError_t launch_attend_rows(const AttendRowsParams& params, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_ROW(params.row_dtype, T, {
    return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
      using Worker = RowStream<T, kD, ListSource<T, kD>>;
      return launch_split(attend_rows_kernel<T, kD>, params, params.work, Worker::kSharedBytes,
                          stream);
    });
  });
}

}  // namespace twilight
