// out[n, hq] = softmax(softmax_scale * q[n, hq] . K[ctx_starts[n] .. positions[n]]) V
//
// Persistent blocks share all segments' tokens evenly (split_attend.cuh); a warp owns 16 tokens of
// every 64 of its block's stretch and streams their rows through its ring (attend_stream.cuh). All
// query heads of a group, up to 8, share one load of K and V. Bytes: tokens * Hkv * 2 * D *
// itemsize, times ceil(G / 8), and min(G, 8) * (D + 2) * 4 written for each partial state.
//
// Source: Flash-Decoding.
#include "csrc/attend_pages.h"
#include "csrc/attend_stream.cuh"

namespace twilight {
namespace {

template <typename T, int kD>
struct PageSource {
  const AttendPagesParams& params;
  const char* head_pages = nullptr;
  const int* pages = nullptr;
  int first_token = 0;

  __device__ int num_items(int n, int) const {
    return max(0, params.step.positions[n] + 1 - params.step.ctx_starts[n]);
  }

  __device__ void open(const Segment& segment) {
    const int b = params.step.query_seq[segment.n];
    head_pages = static_cast<const char*>(params.pages) + segment.h * params.head_bytes;
    pages = params.step.page_table + int64_t{b} * params.step.page_table_stride;
    first_token = params.step.ctx_starts[segment.n];
  }

  struct Peeked {
    int page = kNoRow, offset = 0;
  };

  __device__ Peeked peek(int item) const {
    const int token = first_token + item, page_size = params.step.page_size;
    return {pages[token / page_size], token % page_size};
  }

  __device__ const char* row(const Peeked& peeked, bool&) const {
    if (peeked.page < 0) return nullptr;
    const int64_t row = int64_t{peeked.page} * params.step.page_size + peeked.offset;
    return head_pages + row * RowBytes<T, kD>::kRow;
  }
};

template <typename T, int kD>
struct PageWorker : RowStream<T, kD, PageSource<T, kD>> {
  using Base = RowStream<T, kD, PageSource<T, kD>>;
  using Base::Base;
  unsigned long long rows = 0;

  __device__ void attend(const Segment& segment, int first, int last) {
    rows += last - first;
    Base::attend(segment, first, last);
  }
};

template <typename T, int kD>
__global__ void __launch_bounds__(kSplitThreads) attend_pages_kernel(AttendPagesParams params) {
  extern __shared__ __align__(16) char shared[];
  let_next_start();
  PageSource<T, kD> source{params};
  PageWorker<T, kD> worker(source, params.work, params.q, params.softmax_scale, shared);
  wait_for_inputs();
  split_attend(worker, params.work);
  if (params.streamed_bytes != nullptr && threadIdx.x == 0 && worker.rows > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.streamed_bytes),
              worker.rows * RowBytes<T, kD>::kRow);
  }
}

}  // namespace

cudaError_t launch_attend_pages(const AttendPagesParams& params, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_ROW(params.row_dtype, T, {
    return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
      using Worker = PageWorker<T, kD>;
      return launch_split(attend_pages_kernel<T, kD>, params, params.work, Worker::kSharedBytes,
                          stream);
    });
  });
}

}  // namespace twilight
