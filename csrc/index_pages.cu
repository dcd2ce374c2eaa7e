// index_pages: quantise full pages of K and V; csrc/index_page.cuh has the formula.
//
// A block owns one (page, KV head). Bytes moved: K and V once from HBM, the index record once to
// it.
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/index_page.cuh"
#include "csrc/index_pages.h"

namespace twilight {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    index_pages_kernel(StagedPagesParams s, IndexPagesParams index) {
  __shared__ PageScratch<kThreads> scratch;
  wait_for_inputs();
  const int m = blockIdx.x, h = blockIdx.y;
  const int page = s.page_ids[m];
  if (page < 0) return;
  const Rows<T> k{static_cast<const T*>(s.k) + m * s.k_strides[0] + h * s.k_strides[2],
                  s.k_strides[1]};
  const Rows<T> v{static_cast<const T*>(s.v) + m * s.v_strides[0] + h * s.v_strides[2],
                  s.v_strides[1]};
  index_keys(k, page, h, index, scratch);
  index_values(v, page, h, index, scratch);
  __threadfence();
  let_next_start();  // not before: estimate_scores may read pages before it waits
}

}  // namespace

cudaError_t launch_index_pages(const StagedPagesParams& source, const IndexPagesParams& index,
                               cudaStream_t stream) {
  const dim3 grid(source.num_pages, index.num_kv_heads);
  return TWILIGHT_DISPATCH_ROW(index.dtype, T, {
    return launch_dependent(index_pages_kernel<T>, grid, dim3(kThreads), 0, stream, 1, source,
                            index);
  });
}

}  // namespace twilight
