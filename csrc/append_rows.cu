// append_rows: row (n, h) = K[n, h] | V[n, h] goes to its place in the host pages, in the windows
// (sink place, ring place) and in the device pages of a dense layer.
//
// A warp owns a row at a time and moves it in 16-byte vectors. Bytes moved: N * Hkv * 2 * D *
// itemsize read, the same over the link, and as much again for each tier on the device.
//
// Two kernels. Without an index, rows are dealt out head by head, so that neighbouring warps store
// neighbouring rows of the host arena and the stores of a warp are whole 128-byte lines on the
// link; nobody waits for a store, so a few blocks fill the link. With one (a decode step of few
// rows), a block owns a (sequence, KV head), or its K or V alone: after its rows it also indexes,
// from the ring, each page that they complete, which nobody else has a row of. Most steps complete
// none; but equal sequences complete theirs in one step, so few of them get many threads.
#include "csrc/append_rows.h"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/index_page.cuh"

namespace twilight {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// 32 blocks of 8 warps keep 256 rows in flight: 128 KiB of 512-byte rows over about 1 us of load
// and store latency, more than twice what the link takes (55 GB/s).
constexpr int kMaxBlocks = 32;
constexpr int kFewBlocks = 128;   // that index, with K and V in blocks of their own: an SM each
constexpr int kFewThreads = 512;  // of each of them

enum Part : int { kKeys = 1, kValues = 2 };  // bits

// A warp writes some parts of row (n, h) of sequence b to all tiers; returns whether it is none of
// padding.
__device__ bool append_row(const AppendRowsParams& p, int b, int n, int h,
                           int parts = kKeys | kValues) {
  const int t = p.positions[n];
  if (t < 0) return false;
  const int page = p.page_table[b * p.page_table_stride + t / p.page_size];
  if (page < 0) return false;
  const int vectors_per_head = p.head_bytes / 16;
  const int64_t row_bytes = 2 * static_cast<int64_t>(p.head_bytes);
  const int64_t place = (static_cast<int64_t>(page) * p.page_size + t % p.page_size) * row_bytes;
  char* host = p.host_kv + h * p.host_head_bytes + place;
  char* paged = p.pages == nullptr ? nullptr : p.pages + h * p.pages_head_bytes + place;
  char* sink = nullptr;
  char* ring = nullptr;
  if (p.windows != nullptr) {
    char* window = p.windows + (static_cast<int64_t>(p.seq_slots[b]) * p.num_kv_heads + h) *
                                   (p.num_sink + p.window_rows) * row_bytes;
    if (t < p.num_sink) sink = window + t * row_bytes;
    if (t >= p.seq_lens[b] - p.window_rows) {
      ring = window + (p.num_sink + t % p.window_rows) * row_bytes;
    }
  }
  const char* k = p.k + n * p.k_stride_bytes[0] + h * p.k_stride_bytes[1];
  const char* v = p.v + n * p.v_stride_bytes[0] + h * p.v_stride_bytes[1];
  const int begin = parts & kKeys ? 0 : vectors_per_head;
  const int end = parts & kValues ? 2 * vectors_per_head : vectors_per_head;
  for (int j = begin + threadIdx.x % 32; j < end; j += 32) {
    const char* source = j < vectors_per_head ? k + j * 16 : v + (j - vectors_per_head) * 16;
    const uint4 x = *reinterpret_cast<const uint4*>(source);
    *reinterpret_cast<uint4*>(host + j * 16) = x;
    if (paged != nullptr) *reinterpret_cast<uint4*>(paged + j * 16) = x;
    if (sink != nullptr) *reinterpret_cast<uint4*>(sink + j * 16) = x;
    if (ring != nullptr) *reinterpret_cast<uint4*>(ring + j * 16) = x;
  }
  return true;
}

// Adds the rows that the block's warps wrote to the counter; `rows` has been 0 since a barrier.
__device__ void count_written(const AppendRowsParams& p, unsigned written, unsigned& rows) {
  if (threadIdx.x % 32 == 0 && written > 0) atomicAdd(&rows, written);
  __syncthreads();
  if (p.counters != nullptr && threadIdx.x == 0 && rows > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.counters + kCounterWrittenBytes),
              static_cast<unsigned long long>(rows) * 2 * p.head_bytes);
  }
}

__global__ void __launch_bounds__(kThreads) append_rows_kernel(AppendRowsParams p) {
  __shared__ unsigned rows;
  let_next_start();
  if (threadIdx.x == 0) rows = 0;
  __syncthreads();
  wait_for_inputs();
  const int64_t num_rows = static_cast<int64_t>(p.num_queries) * p.num_kv_heads;
  unsigned written = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < num_rows;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int h = static_cast<int>(i / p.num_queries);
    const int n = static_cast<int>(i % p.num_queries);
    written += append_row(p, p.query_seq[n], n, h);
  }
  count_written(p, written, rows);
}

// The page that row n completes, or kNoRow.
__device__ int completed_page(const AppendRowsParams& p, int b, int n) {
  const int t = p.positions[n];
  if (t < 0 || (t + 1) % p.page_size != 0) return kNoRow;
  return p.page_table[b * p.page_table_stride + t / p.page_size];
}

template <typename T, int kBlock>
__global__ void __launch_bounds__(kBlock, 1024 / kBlock)
    append_and_index_kernel(AppendRowsParams p, IndexPagesParams index) {
  __shared__ unsigned rows;
  __shared__ PageScratch<kBlock> scratch;
  const int b = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  const int parts = gridDim.y == 1 ? kKeys | kValues : blockIdx.y == 0 ? kKeys : kValues;
  let_next_start();
  if (threadIdx.x == 0) rows = 0;
  __syncthreads();
  wait_for_inputs();
  const int begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
  unsigned written = 0;
  for (int n = begin + threadIdx.x / 32; n < end; n += kBlock / 32) {
    written += append_row(p, b, n, h, parts);
  }
  if (!(parts & kKeys)) written = 0;  // counted with the keys
  count_written(p, written, rows);    // with a barrier: the block's rows are in the ring
  for (int n = begin; n < end; ++n) {
    const int page = completed_page(p, b, n);
    if (page < 0) continue;
    const int64_t head = static_cast<int64_t>(p.seq_slots[b]) * p.num_kv_heads + h;
    const int place = (p.positions[n] + 1 - p.page_size) % p.window_rows;
    const int64_t row = head * (p.num_sink + p.window_rows) + p.num_sink + place;
    const int64_t stride = 2 * static_cast<int64_t>(index.head_dim);
    const T* first = reinterpret_cast<const T*>(p.windows) + row * stride;
    if (parts & kKeys) index_keys(Rows<T>{first, stride}, page, h, index, scratch);
    if (parts & kValues) {
      index_values(Rows<T>{first + index.head_dim, stride}, page, h, index, scratch);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_append_rows(const AppendRowsParams& p, const IndexPagesParams& index,
                               cudaStream_t stream) {
  if (index.k_codes != nullptr) {
    const int heads = p.num_seqs * p.num_kv_heads;
    const bool few = 2 * heads <= kFewBlocks;
    return TWILIGHT_DISPATCH_ROW(index.dtype, T, {
      const auto kernel =
          few ? append_and_index_kernel<T, kFewThreads> : append_and_index_kernel<T, kThreads>;
      return launch_dependent(kernel, dim3(heads, few ? 2 : 1), dim3(few ? kFewThreads : kThreads),
                              0, stream, 1, p, index);
    });
  }
  const int64_t num_rows = static_cast<int64_t>(p.num_queries) * p.num_kv_heads;
  const int64_t wanted = (num_rows + kWarps - 1) / kWarps;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return launch_dependent(append_rows_kernel, dim3(blocks), dim3(kThreads), 0, stream, 1, p);
}

}  // namespace twilight
