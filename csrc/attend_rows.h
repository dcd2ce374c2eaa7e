// Attention over exact rows: windows, hot rows, and rows read in place from mapped host memory.
#pragma once

#include <cuda_runtime.h>

#include "csrc/split_attend.h"

namespace twilight {

struct AttendRowsParams {
  SplitWork work;
  StepView step;
  const void* q;            // [N, Hq, D] of the row dtype
  const void* pool;         // [R, 2 * D] of the row dtype: windows first, then hot rows
  const void* host_kv;      // [Hkv, P, S, 2 * D] of the row dtype
  int64_t host_head_bytes;  // from one KV head's pages to the next's
  const int* tokens;        // [N, Hkv, C] positions of the listed tokens
  const int* counts;        // [N, Hkv]
  const int* locations;     // [N, Hkv, C] rows of the pool, or NO_ROW: in host_kv
  int64_t* direct_bytes;    // grows by the bytes read from host_kv, or null
  int64_t capacity;         // C
  int window_rows;
  float softmax_scale;
  int head_dim;   // 64, 80, 96, 128 or 256
  int row_dtype;  // RowDtype
};

cudaError_t launch_attend_rows(const AttendRowsParams& params, cudaStream_t stream);

}  // namespace twilight
