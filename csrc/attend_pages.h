// Dense attention over paged KV, on the device or in mapped host memory.
#pragma once

#include <cuda_runtime.h>

#include "csrc/split_attend.h"

namespace twilight {

struct AttendPagesParams {
  SplitWork work;
  StepView step;            // page_table: that of `pages`
  const void* q;            // [N, Hq, D] of the row dtype
  const void* pages;        // [Hkv, P, S, 2 * D] of the row dtype
  int64_t head_bytes;       // from one KV head's pages to the next's
  int64_t* streamed_bytes;  // grows by the bytes read, or null
  float softmax_scale;
  int head_dim;   // 64, 80, 96, 128 or 256
  int row_dtype;  // RowDtype
};

cudaError_t launch_attend_pages(const AttendPagesParams& params, cudaStream_t stream);

}  // namespace twilight
